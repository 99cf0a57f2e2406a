// Extensions: which rows of their tables are moved and compared, and what happens when one is updated or added while we follow. Judged by
// the tables of both servers, where the same extension is there in different versions.
#include <gtest/gtest.h>

#include <algorithm>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/extension.h"
#include "stores/postgres/testing/life.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

std::string rows(const PgServer& server, const std::string& table) { return server.session("shop")->value("SELECT coalesce(string_agg(id || ' ' || name, ', ' ORDER BY id), '') FROM public." + table); }

// What people wrote into an extension's tables moves, with and without rows that CREATE EXTENSION makes itself.
TEST(PostgresExtension, ConfigurationIsCopiedFollowedAndFenced) {
  PgServer source(13), target(13);
  TestExtension config("config"), more("more");
  config.put(source, "1", {{"1",
                "CREATE TABLE kinds(id int PRIMARY KEY, name text); INSERT INTO kinds VALUES (1, 'built in'); CREATE TABLE jobs(id serial PRIMARY KEY, kind int REFERENCES kinds, what text); "
                "CREATE TABLE inside(id int PRIMARY KEY); SELECT pg_extension_config_dump('kinds', 'WHERE id > 1'); SELECT pg_extension_config_dump('jobs', ''); SELECT pg_extension_config_dump('jobs_id_seq', '')"}});
  more.put(source, "1", {{"1", "CREATE TABLE words(w text PRIMARY KEY); INSERT INTO words VALUES ('a'); SELECT pg_extension_config_dump('words', 'WHERE w > ''a''')"}});
  auto s = shop_with(source, "SET search_path = public; CREATE EXTENSION " + config.name() + "; INSERT INTO kinds VALUES (2, 'ours'); INSERT INTO jobs(kind, what) VALUES (2, 'sweep'), (1, 'mop'); CREATE TABLE plain(id int PRIMARY KEY)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  s->exec("SET search_path = public; INSERT INTO jobs(kind, what) VALUES (2, 'dust'); DELETE FROM jobs WHERE what = 'mop'; CREATE EXTENSION " + more.name() + "; INSERT INTO words VALUES ('b')");
  store.recopy(w.context());
  wait_until_following(w, store);
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  s->exec("INSERT INTO public.words VALUES ('c')");
  EXPECT_THROW(target.session("shop")->exec("INSERT INTO public.kinds VALUES (9, 'no')"), PgError);
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  switch_over(w, store, {Side::source});
  quiesced_equal(source, target);
  auto t = target.session("shop");
  EXPECT_EQ(t->value("SELECT string_agg(kind || what, ' ' ORDER BY id) FROM public.jobs"), "2sweep 2dust");
  EXPECT_EQ(t->value("SELECT string_agg(name, ' ' ORDER BY id) FROM public.kinds"), "built in ours");
  EXPECT_EQ(t->value("SELECT string_agg(w, ' ' ORDER BY w) FROM public.words"), "a b c");
  t->exec("INSERT INTO public.jobs(kind, what) VALUES (2, 'next')");
  EXPECT_THROW(source.session("shop")->exec("INSERT INTO public.kinds VALUES (9, 'no')"), PgError);
  store.finish(w.context(), Side::target);
}

// The rows that meet the condition are people's; the others belong to the version that a server has.
class PostgresExtensionRows : public ::testing::TestWithParam<std::pair<int, int>> {};

TEST_P(PostgresExtensionRows, OfTheConditionOnly) {
  auto [from, to] = GetParam();
  PgServer source(from), target(to);
  TestExtension kinds("kinds");
  const std::string made = "CREATE TABLE kinds(id int PRIMARY KEY, name text); SELECT pg_extension_config_dump('kinds', 'WHERE id > 10 -- people''s'); CREATE UNLOGGED TABLE seen(id int PRIMARY KEY, name text); "
                           "SELECT pg_extension_config_dump('seen', 'where id > 10'); INSERT INTO seen VALUES (1, 'own');";
  kinds.put(source, "1", {{"1", made + "INSERT INTO kinds VALUES (1, 'one'), (2, 'old two')"}});
  kinds.put(target, "2", {{"2", made + "INSERT INTO kinds VALUES (1, 'one'), (2, 'new two'), (3, 'new three'); UPDATE seen SET name = 'newer'"}});
  auto s = shop_with(source, "SET search_path = public; CREATE EXTENSION " + kinds.name() + "; INSERT INTO kinds VALUES (11, 'ours'), (12, 'ours too'); INSERT INTO seen VALUES (11, 'ours')");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  std::string note;
  for (const auto& f : store.preflight(w.context())) {
    EXPECT_NE(f.level, Finding::Level::error) << f.id << " " << f.message;
    if (f.id == "postgres.extension_rows") note = f.message;
  }
  EXPECT_EQ(note.empty(), std::min(from, to) >= 15) << note;
  begin(w, store);
  EXPECT_EQ(rows(target, "kinds"), "1 one, 2 new two, 3 new three, 11 ours, 12 ours too");
  // A row may come under the condition and leave it.
  s->exec("SET search_path = public; INSERT INTO kinds VALUES (13, 'later'); UPDATE kinds SET name = 'changed' WHERE id = 11; DELETE FROM kinds WHERE id = 12");
  if (from >= 15) s->exec("SET search_path = public; INSERT INTO kinds VALUES (9, 'hers'); UPDATE kinds SET name = 'older two' WHERE id = 2; UPDATE kinds SET id = 14 WHERE id = 1");
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  std::string moved = std::string("1 one, 2 new two, 3 new three, 11 changed, 13 later") + (from >= 15 ? ", 14 one" : "");
  EXPECT_EQ(rows(target, "kinds"), moved);
  // Copied again by the server's own synchronisation.
  s->exec("SET search_path = public; DROP EXTENSION " + kinds.name() + " CASCADE; CREATE EXTENSION " + kinds.name() + "; INSERT INTO kinds VALUES (11, 'again'), (15, 'more')");
  store.recopy(w.context());
  EXPECT_FALSE(w.said("as a whole")) << join(w.lines, "\n");
  wait_until_following(w, store);
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  EXPECT_EQ(rows(target, "kinds"), std::min(from, to) >= 15 ? "1 one, 2 new two, 3 new three, 11 again, 15 more" : "1 one, 2 old two, 11 again, 15 more");
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::source});
  EXPECT_EQ(rows(target, "seen"), "1 newer");
  auto t = target.session("shop");
  t->exec("SET search_path = public; UPDATE kinds SET name = 'there' WHERE id = 15; INSERT INTO kinds VALUES (16, 'sixteen')");
  wait_until_following(w, store);
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::target});
  EXPECT_EQ(rows(source, "kinds"), "1 one, 2 old two, 11 again, 15 there, 16 sixteen");
  store.finish(w.context(), Side::source);
  store.unfence_source(w.context());
  for (const PgServer* server : {&source, &target}) EXPECT_EQ(server->session("shop")->value("SELECT relreplident FROM pg_class WHERE relname = 'kinds'"), "d");
}

INSTANTIATE_TEST_SUITE_P(Majors, PostgresExtensionRows, ::testing::Values(std::pair{15, 17}, std::pair{13, 17}),
                         [](const auto& p) { return std::to_string(p.param.first) + "to" + std::to_string(p.param.second); });

// ALTER EXTENSION ... UPDATE and CREATE EXTENSION on the source: brought where the target has that version, else said, with nothing done.
TEST(PostgresExtension, UpdatedWhileFollowing) {
  PgServer source(15), target(17);
  TestExtension ours("ours"), other("other");
  const std::string first = "CREATE TABLE kinds(id int PRIMARY KEY, name text); SELECT pg_extension_config_dump('kinds', 'WHERE id > 10'); INSERT INTO kinds VALUES (1, 'one'); CREATE FUNCTION answer() RETURNS int LANGUAGE sql AS 'SELECT 1'",
                    second = "ALTER TABLE kinds ADD COLUMN more int DEFAULT 7; INSERT INTO kinds VALUES (2, 'two'); CREATE OR REPLACE FUNCTION answer() RETURNS int LANGUAGE sql AS 'SELECT 2'";
  ours.put(source, "1", {{"1", first}, {"1--2", second}});
  ours.put(target, "1", {{"1", first}});
  other.put(source, "2", {{"1", "CREATE FUNCTION number() RETURNS int LANGUAGE sql AS 'SELECT 1'"}, {"2", "CREATE FUNCTION number() RETURNS int LANGUAGE sql AS 'SELECT 2'"}});
  auto s = shop_with(source, "SET search_path = public; CREATE EXTENSION " + ours.name() + "; INSERT INTO kinds VALUES (11, 'ours'); CREATE TABLE plain(id int PRIMARY KEY); INSERT INTO plain VALUES (1)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  auto t = target.session("shop");
  std::string plain = t->value("SELECT oid FROM pg_class WHERE relname = 'plain'"), kinds = t->value("SELECT oid FROM pg_class WHERE relname = 'kinds'");
  auto refused = [&](const std::string& message, const std::string& hint) {
    try {
      store.recopy(w.context());
      ADD_FAILURE() << "done";
    } catch (const Error& e) {
      EXPECT_NE(e.message.find(message), std::string::npos) << e.message;
      EXPECT_NE(e.hint.find(hint), std::string::npos) << e.hint;
    }
    EXPECT_EQ(t->value("SELECT oid FROM pg_class WHERE relname = 'plain'"), plain);
  };
  s->exec("SET search_path = public; ALTER EXTENSION " + ours.name() + " UPDATE TO '2'; INSERT INTO kinds VALUES (12, 'later', 8)");
  EXPECT_FALSE(store.needs_recopy(w.context()).empty());
  refused("is of version 2 on the source now, and the target has 1 and no way from there to it", "install the package that brings version 2 on the target");
  ours.put(target, "1", {{"1", first}, {"1--2", second}});
  s->exec("SET search_path = public; CREATE EXTENSION " + other.name() + " VERSION '1'");
  refused("is not installed on the target", "install its package");
  other.put(target, "2", {{"1", "CREATE FUNCTION number() RETURNS int LANGUAGE sql AS 'SELECT 1'"}, {"2", "CREATE FUNCTION number() RETURNS int LANGUAGE sql AS 'SELECT 2'"}, {"2--1", "CREATE OR REPLACE FUNCTION number() RETURNS int LANGUAGE sql AS 'SELECT 1'"}});
  store.recopy(w.context());
  EXPECT_FALSE(w.said("as a whole")) << join(w.lines, "\n");
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  wait_until_following(w, store);
  EXPECT_EQ(t->value("SELECT oid FROM pg_class WHERE relname = 'plain'"), plain);
  EXPECT_EQ(t->value("SELECT oid FROM pg_class WHERE relname = 'kinds'"), kinds);
  s->exec("INSERT INTO public.kinds VALUES (13, 'last', 9)");
  EXPECT_TRUE(store.verify(w.context()).equal);
  EXPECT_THROW(t->exec("INSERT INTO public.kinds VALUES (99, 'no')"), PgError);
  switch_over(w, store, {Side::source});
  t = target.session("shop");
  EXPECT_EQ(t->value("SELECT string_agg(id || ' ' || name || ' ' || more, ', ' ORDER BY id) FROM public.kinds"), "1 one 7, 2 two 7, 11 ours 7, 12 later 8, 13 last 9");
  EXPECT_EQ(t->value("SELECT public.answer() || ' ' || public.number()"), "2 1");
  const char* versions = "SELECT string_agg(extname || ' ' || extversion, ', ' ORDER BY extname) FROM pg_extension WHERE extname <> 'plpgsql'";
  EXPECT_EQ(t->value(versions), source.session("shop")->value(versions));
}

// Its tables go with it, here and there, and nothing of the rest is copied again.
TEST(PostgresExtension, MovedToAnotherSchemaWhileFollowing) {
  PgServer source(15), target(17);
  TestExtension places("places", true);
  for (PgServer* server : {&source, &target})
    places.put(*server, "1", {{"1", "CREATE TABLE places(id int PRIMARY KEY, name text); SELECT pg_extension_config_dump('places', '')"}});
  auto s = shop_with(source, "SET search_path = public; CREATE EXTENSION " + places.name() + "; INSERT INTO places VALUES (1, 'here'); CREATE TABLE plain(id int PRIMARY KEY); INSERT INTO plain VALUES (1)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  auto t = target.session("shop");
  const char* plain_oid = "SELECT oid FROM pg_class WHERE relname = 'plain'";
  const std::string plain = t->value(plain_oid);
  s->exec("CREATE SCHEMA other; ALTER EXTENSION " + places.name() + " SET SCHEMA other; INSERT INTO other.places VALUES (2, 'there')");
  EXPECT_FALSE(store.needs_recopy(w.context()).empty());
  store.recopy(w.context());
  EXPECT_FALSE(w.said("as a whole")) << join(w.lines, "\n");
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  wait_until_following(w, store);
  s->exec("INSERT INTO other.places VALUES (3, 'later'); INSERT INTO plain VALUES (2)");
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::source});
  quiesced_equal(source, target);
  t = target.session("shop");
  EXPECT_EQ(t->value("SELECT string_agg(id || ' ' || name, ', ' ORDER BY id) FROM other.places"), "1 here, 2 there, 3 later");
  EXPECT_EQ(t->value(plain_oid), plain);
  store.finish(w.context(), Side::target);
}

}  // namespace
}  // namespace rehome
