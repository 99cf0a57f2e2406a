// What the phase prepare makes of the source's roles, databases and tables, judged by the target's catalogues and its log.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/life.h"
#include "sys/fs.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

std::string settings_of(const PgServer& server, const std::string& role) {
  return server.session("postgres")->value("SELECT coalesce(string_agg(x, '; ' ORDER BY x), '') FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) x WHERE r.rolname = " + pg_literal(role));
}

TEST(PostgresRoles, SettingsListsAndPasswordsWithoutAWordInTheLog) {
  PgServer source(15), target(17, {"log_statement = all", "log_min_duration_statement = 0", "log_duration = on", "log_transaction_sample_rate = 1", "log_min_error_statement = debug5"});
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("postgres");
  s->exec("CREATE ROLE shopkeeper LOGIN PASSWORD 'geheim' VALID UNTIL '2030-01-01'; CREATE ROLE half LOGIN PASSWORD 'geheim' CREATEDB; CREATE ROLE before LOGIN PASSWORD 'geheim'; CREATE ROLE staff; "
          "ALTER ROLE shopkeeper SET search_path TO app, \"$user\", \"od,d \"\"one\", public; ALTER ROLE half SET search_path TO ''; ALTER ROLE half SET work_mem TO '8MB'; "
          "ALTER ROLE before SET work_mem TO '8MB'; ALTER ROLE shopkeeper IN DATABASE shop SET search_path TO ''; ALTER DATABASE shop SET search_path TO app, public; GRANT staff TO half WITH ADMIN OPTION");
  // An interrupted try has made the one; the other was there before.
  target.session("postgres")->exec("CREATE ROLE half; CREATE ROLE before LOGIN");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  w.facts["postgres.db.roles"] = Json::array({"half"});
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  for (const char* role : {"shopkeeper", "half"}) {
    EXPECT_EQ(settings_of(source, role), settings_of(target, role));
    std::string question = "SELECT (rolcanlogin, rolcreatedb, rolvaliduntil, rolpassword)::text FROM pg_authid WHERE rolname = " + pg_literal(role);
    EXPECT_EQ(s->value(question), target.session("postgres")->value(question));
  }
  EXPECT_EQ(settings_of(target, "before"), "");
  EXPECT_EQ(target.session("postgres")->value("SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'before'"), "t");
  const char* of_database = "SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = 0 AND setdatabase <> 0";
  EXPECT_EQ(s->value(of_database), target.session("postgres")->value(of_database));
  EXPECT_EQ(target.session("postgres")->value("SELECT admin_option FROM pg_auth_members WHERE member = 'half'::regrole"), "t");
  EXPECT_NE(target.log().find("CREATE DATABASE"), std::string::npos);
  EXPECT_EQ(target.log().find("SCRAM-SHA-256"), std::string::npos);
}

TEST(PostgresRoles, AnErrorSaysNothingOfAPassword) {
  PgServer server(15);
  try {
    server.session("postgres")->exec("ALTER ROLE nobody PASSWORD 'md50123456789abcdef0123456789abcdef'");
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("ALTER ROLE nobody PASSWORD"), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find("md5"), std::string::npos) << e.what();
  }
}

TEST(PostgresRoles, MembershipsKeepTheirOptions) {
  PgServer source(17), target(17);
  source.session("postgres")->exec("CREATE DATABASE shop; ");
  source.session("postgres")->exec("CREATE ROLE staff; CREATE ROLE one; CREATE ROLE two; GRANT staff TO one WITH INHERIT FALSE, SET TRUE; GRANT staff TO two WITH ADMIN TRUE, INHERIT TRUE, SET FALSE; CREATE ROLE before; GRANT staff TO before");
  // What was there before the run stays as it is.
  target.session("postgres")->exec("CREATE ROLE staff; CREATE ROLE before; GRANT staff TO before WITH ADMIN TRUE");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  const char* question = "SELECT string_agg(concat_ws(' ', roleid::regrole, member::regrole, admin_option, inherit_option, set_option), ', ' ORDER BY member::regrole::text) FROM pg_auth_members WHERE roleid = 'staff'::regrole";
  EXPECT_EQ(source.session("postgres")->value(question), "staff before f t t, staff one f f t, staff two t t f");
  EXPECT_EQ(target.session("postgres")->value(question), "staff before t t t, staff one f f t, staff two t t f");
}

// A published table whose rows nothing identifies refuses UPDATE and DELETE: that must not meet the application.
TEST(PostgresPublish, EveryTableCanBeChangedAndIsPutBackAsItWas) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  const char* names[] = {"keyed", "bare", "nothing", "postponed", "by_index", "index_gone", "whole"};
  s->exec("SET search_path = public; CREATE TABLE keyed(id int PRIMARY KEY, a int); CREATE TABLE bare(id int, a int); CREATE TABLE nothing(id int PRIMARY KEY, a int); ALTER TABLE nothing REPLICA IDENTITY NOTHING; "
          "CREATE TABLE postponed(id int PRIMARY KEY DEFERRABLE, a int); CREATE TABLE by_index(id int NOT NULL, a int); CREATE UNIQUE INDEX i ON by_index(id); ALTER TABLE by_index REPLICA IDENTITY USING INDEX i; "
          "CREATE TABLE index_gone(id int NOT NULL, a int); CREATE UNIQUE INDEX g ON index_gone(id); ALTER TABLE index_gone REPLICA IDENTITY USING INDEX g; DROP INDEX g; "
          "CREATE TABLE whole(id int, a int); ALTER TABLE whole REPLICA IDENTITY FULL");
  for (const char* t : names) s->exec("INSERT INTO public." + std::string(t) + " VALUES (1, 1), (2, 2)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  std::string keyless;
  for (const auto& f : store.preflight(w.context()))
    if (f.id == "postgres.keyless") keyless = f.message;
  EXPECT_EQ(keyless.substr(0, 8), "4 tables") << keyless;
  begin(w, store);
  for (const char* t : names) s->exec("UPDATE public." + std::string(t) + " SET a = 7 WHERE id = 1; DELETE FROM public." + t + " WHERE id = 2");
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  switch_over(w, store, {Side::source});
  auto t = target.session("shop");
  for (const char* name : names) t->exec("UPDATE public." + std::string(name) + " SET a = 8 WHERE id = 1");
  store.finish(w.context(), Side::target);
  // An identity whose index is gone comes to nothing, and cannot be said otherwise.
  for (const PgServer* server : {&source, &target})
    EXPECT_EQ(server->session("shop")->value("SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"),
              "bare d, by_index i, index_gone n, keyed d, nothing n, postponed d, whole f");
}

// ddl: block refuses changes of the schema, and nothing that an application does without changing it.
TEST(PostgresDdl, BlockLetsThroughWhatChangesNoSchema) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  s->exec("SET search_path = public; CREATE TABLE item(id int PRIMARY KEY, a int); CREATE MATERIALIZED VIEW seen AS SELECT count(*) FROM item");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  w.deployment.stores[0].postgres.ddl = PostgresConfig::Ddl::block;
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  for (const char* harmless : {"CREATE TEMP TABLE t(id serial PRIMARY KEY); CREATE INDEX ON t(id); ALTER TABLE t ADD COLUMN b int; DROP TABLE t", "CREATE TEMP TABLE t AS SELECT 1; DROP TABLE t",
                               "REFRESH MATERIALIZED VIEW seen", "REINDEX TABLE item", "REINDEX TABLE CONCURRENTLY item", "CREATE TABLE IF NOT EXISTS item(id int)", "DROP TABLE IF EXISTS nothing"})
    EXPECT_NO_THROW(s->exec(harmless)) << harmless;
  for (const char* change : {"CREATE TABLE more()", "CREATE TABLE more AS SELECT 1", "ALTER TABLE item ADD COLUMN b int", "DROP TABLE item CASCADE", "CREATE INDEX ON item(a)", "GRANT SELECT ON item TO public", "COMMENT ON TABLE item IS 'x'"})
    EXPECT_THROW(s->exec(change), PgError) << change;
  EXPECT_EQ(s->value("SELECT count(*) FROM rehome.ddl_log"), "0");
}

// It is the source's until the switch: where the way back is undone, the side that serves goes on to take changes.
TEST(PostgresDdl, BlockIsOfTheSourceUntilTheSwitch) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("shop")->exec("CREATE TABLE public.item(id int PRIMARY KEY, a int)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  w.deployment.stores[0].postgres.ddl = PostgresConfig::Ddl::block;
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  store.prepare_reverse(w.context(), {Side::source});
  w.source.run_actions(store.actions(w.context(), {Side::source}).undo);
  EXPECT_THROW(source.session("shop")->exec("CREATE INDEX ON public.item(a)"), PgError);
  switch_over(w, store, {Side::source});
  target.session("shop")->exec("CREATE INDEX a1 ON public.item(a)");
  store.prepare_reverse(w.context(), {Side::target});
  w.target.run_actions(store.actions(w.context(), {Side::target}).undo);
  target.session("shop")->exec("CREATE INDEX a2 ON public.item(a); INSERT INTO public.item VALUES (1, 1)");
}

// COPY writes in the client's encoding. A role's own one, on one side, must turn no byte into another.
TEST(PostgresSettings, BytesStayWhatTheyAreWhateverEncodingARoleAsksFor) {
  for (Side odd : {Side::source, Side::target}) {
    PgServer source(15), target(15);
    (odd == Side::source ? source : target).session("postgres")->exec("ALTER ROLE postgres SET client_encoding = 'LATIN1'");
    source.session("postgres")->exec("CREATE DATABASE shop");
    source.session("postgres")->exec("CREATE DATABASE bytes TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'");
    // The array is why one of them is copied as text.
    const std::string tables = "CREATE TABLE public.item(id int PRIMARY KEY, t text, k name[]); CREATE UNLOGGED TABLE public.fleeting(t text); ";
    source.session("shop")->exec(tables + "INSERT INTO public.item SELECT i, chr(i), ARRAY[chr(i)::name] FROM generate_series(192, 255) i; INSERT INTO public.fleeting SELECT string_agg(t, '') FROM public.item");
    source.session("bytes")->exec(tables + "INSERT INTO public.item SELECT i, convert_from(decode(to_hex(i), 'hex'), 'SQL_ASCII'), NULL FROM generate_series(160, 255) i; INSERT INTO public.fleeting SELECT string_agg(t, '') FROM public.item");
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop", "bytes"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    begin(w, store);
    EXPECT_TRUE(store.verify(w.context()).equal);
    switch_over(w, store, {Side::source});
    for (const char* database : {"shop", "bytes"})
      for (const char* question : {"SELECT md5(string_agg(t::bytea::text || coalesce(k::text, ''), ' ' ORDER BY id)) FROM public.item", "SELECT md5(string_agg(t::bytea::text, ' ')) FROM public.fleeting"})
        EXPECT_EQ(source.session(database)->value(question), target.session(database)->value(question)) << database << " " << side_name(odd) << " " << question;
  }
}

// Two servers are compared by their rows' text: what each writes by itself must not tell.
TEST(PostgresSettings, RowsLookTheSameWhateverTheServersSay) {
  PgServer source(15, {"timezone = 'Europe/Berlin'", "datestyle = 'German'"}), target(17, {"timezone = 'UTC'", "bytea_output = escape", "extra_float_digits = -3"});
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("postgres")->exec("ALTER DATABASE shop SET default_transaction_read_only = on; ALTER DATABASE shop SET lock_timeout = '1ms'; ALTER DATABASE shop SET idle_session_timeout = '100ms'; "
                                   "ALTER DATABASE shop SET idle_in_transaction_session_timeout = '100ms'; ALTER DATABASE shop SET search_path = app, public; ALTER DATABASE shop SET TimeZone = 'Asia/Tokyo'");
  auto s = source.session("shop");
  s->exec("CREATE SCHEMA app; CREATE TABLE app.item(id int PRIMARY KEY, at timestamptz, b bytea, f float8, r tstzrange, d date); "
          "INSERT INTO app.item SELECT i, '2026-03-29 00:59:00+00'::timestamptz + i * interval '1 hour', decode(md5(i::text), 'hex'), 1.0 / i, tstzrange(now(), now() + interval '1 day'), '2026-02-01' FROM generate_series(1, 50) i");
  // A check's query meets what the application's do.
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  EXPECT_EQ(store.ask(w.context(), Side::source, "shop", "SELECT count(*) || ' ' || current_setting('TimeZone') FROM item", Millis(30000), false), "50 Asia/Tokyo");
  EXPECT_THROW(store.ask(w.context(), Side::source, "shop", "DELETE FROM item RETURNING 1", Millis(30000), false), PgError);
  begin(w, store);
  s->exec("UPDATE app.item SET at = at + interval '1 minute'");
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  EXPECT_EQ(verdict.compared, 50);
  // The snapshot's connection stands idle, in a transaction, for as long as a copy takes.
  PgSession walsender(store.address(w.context(), Side::source, "shop"), "test", true);
  walsender.query("CREATE_REPLICATION_SLOT test TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT");
  system_clock().sleep(Millis(300));
  EXPECT_EQ(walsender.value("SELECT 1"), "1");
  switch_over(w, store, {Side::source});
  target.session("shop")->exec("UPDATE app.item SET at = at + interval '1 minute'");
  quiesced_equal(source, target);
}

// A whole life under names that a connection string, SQL and a shell each read in their own way.
TEST(PostgresNames, DatabaseAndUserOfAnyName) {
  PgServer source(15), target(15);
  const std::string name = "my \"sh'op = \\", user = "our \"us'er\\";
  for (const auto* server : {&source, &target}) server->session("postgres")->exec("CREATE ROLE " + pg_identifier(user) + " SUPERUSER LOGIN");
  source.session("postgres")->exec("CREATE DATABASE " + pg_identifier(name));
  source.session(name)->exec("CREATE TABLE public.item(id serial PRIMARY KEY, a int); INSERT INTO public.item(a) SELECT generate_series(1, 100); CREATE INDEX ON public.item(a); CREATE UNLOGGED TABLE public.fleeting(a int)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {name}));
  for (Side side : {Side::source, Side::target}) w.deployment.stores[0].postgres.server[side].user = user;
  PostgresStore store(w.deployment.stores[0], w.deployment);
  for (const auto& f : store.preflight(w.context())) EXPECT_NE(f.level, Finding::Level::error) << f.id << " " << f.object << ": " << f.message;
  store.estimate(w.context());
  begin(w, store);
  source.session(name)->exec("ALTER TABLE public.item ADD COLUMN b int DEFAULT 3");
  EXPECT_EQ(store.needs_recopy(w.context()).size(), 1u);
  store.recopy(w.context());
  wait_until_following(w, store);
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::source});
  target.session(name)->exec("INSERT INTO public.item(a) VALUES (7)");
  switch_over(w, store, {Side::target});
  source.session(name)->exec("INSERT INTO public.item(a) VALUES (8)");
  wait_until_following(w, store);
  quiesced_equal(source, target, name);
  w.source.run_actions(store.actions(w.context(), {Side::source}).undo);
  store.finish(w.context(), Side::source);
  store.unfence_source(w.context());
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
}

// What a plan holds changes when the schema does, not when a table has grown past another one.
TEST(PostgresEstimate, SchemaFactIsOfNamesAndLargeObjectsAreOfBytes) {
  Shop shop("SET search_path = public; CREATE TABLE a(id int); CREATE TABLE b(id int); INSERT INTO a SELECT generate_series(1, 5000)");
  auto& [source, target, s, w, store] = shop;
  Estimate before = store.estimate(w.context());
  s->exec("INSERT INTO public.b SELECT generate_series(1, 50000)");
  EXPECT_EQ(store.estimate(w.context()).facts, before.facts);
  s->exec("SELECT lo_from_bytea(0, decode((SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300000) i), 'hex'))");
  Estimate large = store.estimate(w.context());
  EXPECT_EQ(large.facts, before.facts);
  EXPECT_GE(large.pause - before.pause, Millis(5 + 19)) << join(large.reasons, "\n");   // 4.8 MB at 250 MB a second
  EXPECT_LE(large.pause - before.pause, Millis(5 + 40)) << join(large.reasons, "\n");
  EXPECT_GE(large.bytes - before.bytes, 4'800'000);
  s->exec("ALTER TABLE public.b ADD COLUMN more int");
  EXPECT_NE(store.estimate(w.context()).facts, before.facts);
}

// A side that is opened without a cut must not give numbers again, whatever its sequences belong to.
TEST(PostgresSequences, AdvancedWithoutACut) {
  Shop shop("SET search_path = public; CREATE TABLE plain(id serial PRIMARY KEY); INSERT INTO plain SELECT generate_series(1, 100); "
                               "CREATE TABLE worded(id text PRIMARY KEY); CREATE SEQUENCE worded_seq OWNED BY worded.id; INSERT INTO worded VALUES ('A-7'), ('B'); SELECT setval('worded_seq', 7); "
                               "CREATE DOMAIN number AS bigint; CREATE TABLE domained(id number PRIMARY KEY); CREATE SEQUENCE domained_seq OWNED BY domained.id; INSERT INTO domained VALUES (500); "
                               "CREATE TABLE huge(id numeric PRIMARY KEY); CREATE SEQUENCE huge_seq OWNED BY huge.id; INSERT INTO huge VALUES (1e30), ('NaN'); "
                               "CREATE TABLE downwards(id int PRIMARY KEY); CREATE SEQUENCE down_seq INCREMENT -1 OWNED BY downwards.id; INSERT INTO downwards VALUES (-50); CREATE SEQUENCE alone");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  store.make_up_for_cut(w.context(), {Side::source});
  auto t = target.session("shop");
  auto at = [&](const std::string& sequence) { return t->number("SELECT last_value FROM public." + sequence); };
  EXPECT_EQ(at("plain_id_seq"), 132);
  EXPECT_GE(at("worded_seq"), 1001);
  EXPECT_EQ(at("domained_seq"), 532);
  EXPECT_GE(at("huge_seq"), 1001);
  EXPECT_EQ(at("down_seq"), -82);
  EXPECT_GE(at("alone"), 1001);
}

// What a position says is not only its number: a sequence that was positioned and not called since gives that very number next.
TEST(PostgresSequences, PositionedButNotCalled) {
  for (auto [from, to] : {std::pair{13, 15}, std::pair{15, 18}}) {
    PgServer source(from), target(to);
    source.session("postgres")->exec("CREATE DATABASE shop");
    auto s = source.session("shop");
    s->exec("SET search_path = public; CREATE SEQUENCE never START 7; CREATE SEQUENCE placed; SELECT setval('placed', 5000, false); CREATE SEQUENCE restarted; SELECT nextval('restarted'); ALTER SEQUENCE restarted RESTART WITH 6000; "
            "CREATE TABLE item(id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, a int); INSERT INTO item(id) SELECT generate_series(1, 100); ALTER TABLE item ALTER id RESTART WITH 101; "
            "CREATE SEQUENCE called; SELECT setval('called', 70); CREATE SEQUENCE \"Odd \"\"one'\"; SELECT setval('\"Odd \"\"one''\"', 42, false); CREATE SEQUENCE down INCREMENT -1; SELECT setval('down', -9, false); "
            "CREATE TABLE emptied(id serial PRIMARY KEY); INSERT INTO emptied SELECT FROM generate_series(1, 500)");
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    begin(w, store);
    store.prepare_reverse(w.context(), {Side::source});
    {
      // While a cut is open: what moved before its pause is carried in it.
      auto cut = store.open_cut(w.context(), {Side::source});
      EXPECT_EQ(sequences(target), (std::vector<std::string>{"public.\"Odd \"\"one'\" 42", "public.called 102 called", "public.down -9", "public.emptied_id_seq 532 called", "public.item_id_seq 101", "public.never 7", "public.placed 5000",
                                                             "public.restarted 6000"}));
      s->exec("TRUNCATE public.emptied RESTART IDENTITY; SELECT setval('public.placed', 5001, false); SELECT setval('public.called', 3, false); SELECT nextval('public.never')");
      Deadline deadline = Deadline::in(Millis(10000));
      cut->soft_fence(deadline);
      cut->marker(deadline);
      cut->catch_up(deadline);
    }
    std::vector<std::string> there{"public.\"Odd \"\"one'\" 42", "public.called 3", "public.down -9", "public.emptied_id_seq 1", "public.item_id_seq 101", "public.never 39 called", "public.placed 5001", "public.restarted 6000"};
    EXPECT_EQ(sequences(target), there);
    switch_over(w, store, {Side::source});
    EXPECT_EQ(sequences(target), there);
    sequences_cover(source, target);
    auto t = target.session("shop");
    t->exec("INSERT INTO public.item(a) VALUES (1); SELECT setval('public.placed', 20, false); SELECT setval('public.down', -10)");
    EXPECT_EQ(t->value("SELECT max(id) FROM public.item"), "101");
    switch_over(w, store, {Side::target});
    // The way back, too: 71 is what `never` gives after 39 and a margin, which the source's own 7 does not cover.
    EXPECT_EQ(sequences(source), (std::vector<std::string>{"public.\"Odd \"\"one'\" 42", "public.called 3", "public.down -42 called", "public.emptied_id_seq 1", "public.item_id_seq 133 called", "public.never 71 called", "public.placed 20",
                                                           "public.restarted 6000"}));
    source.session("shop")->exec("INSERT INTO public.item(a) VALUES (2)");
  }
}

// Thousands that were never called cost some statements in the pause, not one each.
TEST(PostgresSequences, ManyNeverCalled) {
  PgServer source(13), target(18);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  s->exec("SET search_path = public; CREATE TABLE item(id int PRIMARY KEY)");
  for (int i = 0; i < 2500; i += 100) s->exec("DO $$ BEGIN FOR i IN " + std::to_string(i) + ".." + std::to_string(i + 99) + " LOOP EXECUTE format('CREATE SEQUENCE public.s%s', i); PERFORM setval('public.s' || i, i + 5, false); END LOOP; END $$");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  switch_over(w, store, {Side::source});
  EXPECT_EQ(sequences(source), sequences(target));
}

// A database that was there before keeps the number of connections that its owner allowed.
TEST(PostgresConnections, OfADatabaseThatWasThereBefore) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE ROLE away");
  source.session("postgres")->exec("CREATE DATABASE shop CONNECTION LIMIT 3");
  source.session("shop")->exec("CREATE TABLE public.item(id int PRIMARY KEY); ALTER TABLE public.item OWNER TO away");
  target.session("postgres")->exec("CREATE DATABASE shop TEMPLATE template0 CONNECTION LIMIT 7");
  auto limit = [&] { return target.session("postgres")->number("SELECT datconnlimit FROM pg_database WHERE datname = 'shop'"); };
  Deployment d = deployment_between(source.socket_directory(), target.socket_directory(), {"shop"});
  {
    Deployment without = d;
    without.stores[0].postgres.roles = false;
    World w(without);
    PostgresStore store(w.deployment.stores[0], w.deployment);
    store.prepare(w.context());
    EXPECT_THROW(store.copy(w.context()), Error);   // the owner is not there
    EXPECT_EQ(limit(), 0);
    store.prepare(w.context());
    EXPECT_THROW(store.copy(w.context()), Error);
    store.abandon(w.context());
    EXPECT_EQ(limit(), 7);
  }
  World w(d);
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  store.copy(w.context());
  EXPECT_EQ(limit(), 7);
  store.abandon(w.context());
  target.session("postgres")->exec("DROP DATABASE shop");
  World again(d);
  PostgresStore made(again.deployment.stores[0], again.deployment);
  made.prepare(again.context());
  made.copy(again.context());
  EXPECT_EQ(limit(), 3);
}

// What only the end of a copy would find: a server that cannot reach the agent's socket.
TEST(PostgresPath, ServerThatCannotSeeTheSocketIsFoundFirst) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  // The server's account may not enter it.
  TempDir closed("rehome-closed");
  w.facts["postgres.db.socket_directory.target"] = closed.path() + "/pg";
  ASSERT_EQ(::chmod(closed.path().c_str(), 0700), 0);
  try {
    store.prepare(w.context());
    ADD_FAILURE() << "prepared";
  } catch (const Error& e) {
    EXPECT_NE(e.message.find("does not see the agent's directory " + closed.path()), std::string::npos) << e.message;
    EXPECT_NE(e.hint.find("mount it into a container"), std::string::npos);
  }
  ASSERT_EQ(::chmod(closed.path().c_str(), 0755), 0);
  store.prepare(w.context());
}

std::vector<std::string> errors_of(World& w, PostgresStore& store) {
  std::vector<std::string> all;
  for (const auto& f : store.preflight(w.context()))
    if (f.level == Finding::Level::error) all.push_back(f.id + ": " + f.message + " / " + f.mend);
  return all;
}

// They would fire for what is replicated: an audit row that the trigger writes, and the one that comes from the other side.
TEST(PostgresPreflight, TriggersThatFireForReplicatedRows) {
  Shop shop("SET search_path = public; CREATE TABLE item(id int PRIMARY KEY, a int); CREATE TABLE audit(id int); CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.audit VALUES (NEW.id); RETURN NEW; END'; "
          "CREATE TRIGGER \"Watch\" AFTER INSERT ON item FOR EACH ROW EXECUTE FUNCTION note(); CREATE TRIGGER quiet BEFORE INSERT ON item FOR EACH ROW EXECUTE FUNCTION note(); ALTER TABLE item DISABLE TRIGGER quiet; "
          "CREATE TRIGGER copy BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION note(); ALTER TABLE item ENABLE ALWAYS TRIGGER \"Watch\"; ALTER TABLE audit ENABLE REPLICA TRIGGER copy");
  auto& [source, target, s, w, store] = shop;
  auto found = errors_of(w, store);
  ASSERT_EQ(found.size(), 2u) << join(found, "\n");
  EXPECT_NE(found[0].find("public.item: \"Watch\" / ALTER TABLE public.item ENABLE TRIGGER \"Watch\": "), std::string::npos) << found[0];
  EXPECT_NE(found[1].find("public.audit: copy / ALTER TABLE public.audit DISABLE TRIGGER copy: "), std::string::npos) << found[1];
  // What the mends say is enough.
  s->exec("ALTER TABLE public.item ENABLE TRIGGER \"Watch\"; ALTER TABLE public.audit DISABLE TRIGGER copy");
  EXPECT_EQ(errors_of(w, store), std::vector<std::string>{});
  begin(w, store);
  s->exec("INSERT INTO public.item SELECT generate_series(1, 10)");
  EXPECT_EQ(s->value("SELECT count(*) FROM public.audit"), "10");
  quiesced_equal(source, target);
  // Our own are ENABLE ALWAYS.
  EXPECT_EQ(errors_of(w, store), std::vector<std::string>{});
  // One that comes later is not brought either.
  s->exec("ALTER TABLE public.item ENABLE ALWAYS TRIGGER \"Watch\"");
  EXPECT_FALSE(store.needs_recopy(w.context()).empty());
  EXPECT_THROW(store.recopy(w.context()), Error);
  s->exec("ALTER TABLE public.item ENABLE TRIGGER \"Watch\"");
  store.recopy(w.context());
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
}

// A subscriber of somebody else's, which has none of our tables, goes on while we move its publisher.
TEST(PostgresPreflight, PublicationOfAllTablesThatSomebodyFollows) {
  PgServer source(15), target(15), reader(15);
  for (const PgServer* server : {&source, &reader}) {
    server->session("postgres")->exec("CREATE DATABASE shop");
    server->session("shop")->exec("CREATE TABLE public.item(id int PRIMARY KEY)");
  }
  auto s = source.session("shop"), r = reader.session("shop");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  s->exec("CREATE PUBLICATION everything FOR ALL TABLES");
  EXPECT_EQ(errors_of(w, store), std::vector<std::string>{});   // nobody follows it
  r->exec("CREATE SUBSCRIPTION reader CONNECTION " + pg_literal(source.conninfo("shop")) + " PUBLICATION everything");
  auto found = errors_of(w, store);
  ASSERT_EQ(found.size(), 1u) << join(found, "\n");
  EXPECT_NE(found[0].find("publication everything, slot reader / give that publication its tables by name"), std::string::npos) << found[0];
  s->exec("DROP PUBLICATION everything; CREATE PUBLICATION everything FOR TABLE public.item");
  r->exec("ALTER SUBSCRIPTION reader REFRESH PUBLICATION");
  EXPECT_EQ(errors_of(w, store), std::vector<std::string>{});
  begin(w, store);
  EXPECT_TRUE(store.verify(w.context()).equal);
  s->exec("INSERT INTO public.item VALUES (1)");
  Deadline deadline = Deadline::in(Millis(20000));
  while (r->value("SELECT count(*) FROM public.item") != "1" && !deadline.passed()) system_clock().sleep(Millis(50));
  EXPECT_EQ(r->value("SELECT count(*) FROM public.item"), "1") << reader.log();
}

TEST(PostgresPreflight, TablespacesThatTheTargetLacks) {
  PgServer source(15), target(15);
  for (const PgServer* server : {&source, &target}) {
    std::string place = server->data() + "/../fast";
    server->session("postgres")->exec("COPY (SELECT 1) TO PROGRAM 'mkdir " + place + " " + place + "er'");
    server->session("postgres")->exec("CREATE TABLESPACE fast LOCATION " + pg_literal(server->socket_directory() + "/fast"));
  }
  source.session("postgres")->exec("CREATE TABLESPACE faster LOCATION " + pg_literal(source.socket_directory() + "/faster"));
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("shop")->exec("CREATE TABLE public.item(id int PRIMARY KEY USING INDEX TABLESPACE faster) TABLESPACE fast");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  auto errors = [&] {
    std::vector<std::string> all;
    for (const auto& f : store.preflight(w.context()))
      if (f.level == Finding::Level::error) all.push_back(f.id + ": " + f.message);
    return all;
  };
  EXPECT_EQ(errors(), std::vector<std::string>{"postgres.tablespace: tablespace faster is not there, and in database shop these lie in it: public.item_pkey"});
  store.prepare(w.context());
  EXPECT_THROW(store.copy(w.context()), Error);
  target.session("postgres")->exec("CREATE TABLESPACE faster LOCATION " + pg_literal(target.socket_directory() + "/faster"));
  EXPECT_EQ(errors(), std::vector<std::string>{});
  store.copy(w.context());
}

// A schema of the name of ours is neither copied nor kept: nobody's may be there but the run's own.
TEST(PostgresPreflight, SchemaOfOurNameThatIsNotThisRuns) {
  PgServer source(15), target(15);
  for (const PgServer* server : {&source, &target}) server->session("postgres")->exec("CREATE DATABASE shop");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  auto found = [](World& world, PostgresStore& of) {
    std::string all;
    for (const auto& f : of.preflight(world.context()))
      if (f.level == Finding::Level::error) all += f.id + " " + f.object + "; ";
    return all;
  };
  EXPECT_EQ(found(w, store), "");
  for (const PgServer* server : {&source, &target}) server->session("shop")->exec("CREATE SCHEMA rehome");
  EXPECT_EQ(found(w, store), "postgres.schema db: source: database shop; postgres.schema db: target: database shop; ");
  for (const PgServer* server : {&source, &target}) server->session("shop")->exec("DROP SCHEMA rehome");
  store.prepare(w.context());
  store.copy(w.context());
  EXPECT_EQ(found(w, store), "");
  // The same database under another name.
  Deployment second = w.deployment;
  second.name = "second";
  World other(second);
  PostgresStore again(other.deployment.stores[0], other.deployment);
  EXPECT_NE(found(other, again).find("postgres.schema db: source: database shop; "), std::string::npos);
  store.abandon(w.context());
}

// "postgres" of `databases: all` has none as a rule. What a killed controller's dump left goes too.
TEST(PostgresCleanup, ADatabaseWithoutTablesKeepsNothing) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("shop")->exec("CREATE TABLE public.t(id int PRIMARY KEY)");
  source.session("postgres")->exec("CREATE DATABASE bare");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop", "bare"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  switch_over(w, store, {Side::source});
  make_directories(store.dump_place() + ".killed");
  EXPECT_NE(join(store.leftovers(w.context()), "; ").find(store.dump_place() + ".killed"), std::string::npos);
  store.finish(w.context(), Side::target);
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{"source: shop: refusing trigger on 1 tables (the fence)"});
  EXPECT_FALSE(exists(store.dump_place() + ".killed"));
}

TEST(PostgresReverse, AWaitingSwitchHoldsNoOldWal) {
  Shop shop("CREATE TABLE public.t(id int PRIMARY KEY, filler text)");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  store.prepare_reverse(w.context(), {Side::source});
  auto held = [&] {
    return target.session("shop")->number("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), confirmed_flush_lsn)::bigint FROM pg_replication_slots WHERE slot_name = " + pg_literal(store.flow("shop", Side::target).slot));
  };
  s->exec("INSERT INTO public.t SELECT i, repeat('x', 1000) FROM generate_series(1, 2000) i");
  wait_until_following(w, store);
  EXPECT_GT(held(), 2'000'000);
  store.renew_reverse(w.context(), {Side::source});
  EXPECT_LT(held(), 100'000);
  switch_over(w, store, {Side::source});
  store.finish(w.context(), Side::target);
}

}  // namespace
}  // namespace rehome
