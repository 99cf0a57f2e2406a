// What the phase prepare makes of the source's roles, databases and tables, judged by the target's catalogues and its log.
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <thread>
#include <tuple>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/life.h"
#include "sys/fd.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

using namespace std::string_literals;

using namespace testing;   // NOLINT: the whole of it is this test's

std::string settings_of(const PgServer& server, const std::string& role) {
  return server.session("postgres")->value("SELECT coalesce(string_agg(x, '; ' ORDER BY x), '') FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) x WHERE r.rolname = " + pg_literal(role));
}

std::vector<std::string> errors_of(World& w, PostgresStore& store) {
  std::vector<std::string> all;
  for (const auto& f : store.preflight(w.context()))
    if (f.level == Finding::Level::error) all.push_back(f.id + ": " + f.message + " / " + f.mend);
  return all;
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

// A connection pooler answers with a process number of its own.
TEST(PostgresSession, APoolerIsNotTheServer) {
  PgServer server(15);
  TempDir dir("rehome-pooler");
  Fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un here{.sun_family = AF_UNIX, .sun_path = {}}, there = here;
  std::snprintf(here.sun_path, sizeof here.sun_path, "%s/.s.PGSQL.5432", dir.path().c_str());
  std::snprintf(there.sun_path, sizeof there.sun_path, "%s/.s.PGSQL.5432", server.socket_directory().c_str());
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<sockaddr*>(&here), sizeof here), 0);
  ASSERT_EQ(::listen(listener.get(), 1), 0);
  std::jthread pooler([&] {
    Fd client(::accept(listener.get(), nullptr, nullptr)), to(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(to.get(), reinterpret_cast<sockaddr*>(&there), sizeof there) != 0) return;
    std::string piece(65536, 0);
    for (bool key = true;;) {
      pollfd both[] = {{client.get(), POLLIN, 0}, {to.get(), POLLIN, 0}};
      if (::poll(both, 2, 10000) <= 0) return;
      for (int i : {0, 1}) {
        if (!both[i].revents) continue;
        ssize_t n = ::read(both[i].fd, piece.data(), piece.size());
        if (n <= 0) return;
        // BackendKeyData: its length, the process, the secret.
        if (auto at = std::string_view(piece.data(), static_cast<std::size_t>(n)).find("K\0\0\0\f"s); i == 1 && key && at != std::string::npos) piece[at + 8] = static_cast<char>(piece[at + 8] ^ 1), key = false;
        if (::write(both[1 - i].fd, piece.data(), static_cast<std::size_t>(n)) != n) return;
      }
    }
  });
  try {
    PgSession session({.label = "source: postgres", .host = dir.path(), .port = 5432, .user = "postgres", .password = {}, .database = "postgres"}, "rehome");
    ADD_FAILURE() << "taken for the server";
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::config);
    EXPECT_NE(e.message.find("a connection pooler answers there"), std::string::npos) << e.message;
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
  auto s = source.session("shop");
  s->exec("CREATE FUNCTION public.heard() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; CREATE EVENT TRIGGER greet ON login EXECUTE FUNCTION public.heard()");
  const std::string greets = ": greet / ALTER EVENT TRIGGER greet DISABLE";
  EXPECT_NE(join(errors_of(w, store), "\n").find(greets), std::string::npos);
  s->exec("ALTER EVENT TRIGGER greet DISABLE");
  EXPECT_EQ(join(errors_of(w, store), "\n").find(greets), std::string::npos);
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
  const std::string slot = "pg_1_sync_1_" + t->value("SELECT system_identifier FROM pg_control_system()");
  s = source.session("shop");   // the old one ended with the switch
  s->exec("SELECT pg_create_logical_replication_slot('" + slot + "', 'pgoutput')");
  const std::string there = join(store.leftovers(w.context()), "\n");
  for (const std::string& what : {"source: wal_retrieve_retry_interval = 100ms"s, "target: wal_retrieve_retry_interval = 100ms"s, ": the agent's wal-limit-db"s, "target: shop: replica identity full of "s, "source: slot " + slot})
    EXPECT_NE(there.find(what), std::string::npos) << what << " is not in\n" << there;
  s->exec("SELECT pg_drop_replication_slot('" + slot + "')");
  store.finish(w.context(), Side::target);
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{"source: shop: refusing trigger on 7 tables (the fence)"});
  // An identity whose index is gone comes to nothing, and cannot be said otherwise.
  for (const PgServer* server : {&source, &target})
    EXPECT_EQ(server->session("shop")->value("SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"),
              "bare d, by_index i, index_gone n, keyed d, nothing n, postponed d, whole f");
}

// What tells a row apart must be sent, and generated columns are not: 18 refuses the UPDATE, other followers stop at it.
TEST(PostgresPublish, RowsAreNotToldApartByGeneratedColumns) {
  for (auto [from, to, told] : {std::tuple{13, 15, "public.doc (id), public.of_full (b)"}, std::tuple{15, 18, "public.bare (b), public.doc (id), public.of_full (b)"}, std::tuple{18, 13, "public.bare (b), public.doc (id), public.of_full (b)"}}) {
    PgServer source(from), target(to);
    auto s = shop_with(source, "SET search_path = public; CREATE TABLE doc(doc jsonb, id text GENERATED ALWAYS AS (doc->>'id') STORED PRIMARY KEY); CREATE TABLE bare(a int, b int GENERATED ALWAYS AS (a * 2) STORED); "
                               "CREATE TABLE of_full(a int, b int GENERATED ALWAYS AS (a * 2) STORED PRIMARY KEY); ALTER TABLE of_full REPLICA IDENTITY FULL; "
                               "CREATE TABLE keyed(id int PRIMARY KEY, b int GENERATED ALWAYS AS (id * 2) STORED); CREATE TABLE beside(id int, b int GENERATED ALWAYS AS (id * 2) STORED, PRIMARY KEY (id) INCLUDE (b)); "
                               "CREATE UNLOGGED TABLE fleeting(a int, b int GENERATED ALWAYS AS (a * 2) STORED)");
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    std::string said;
    for (const auto& f : store.preflight(w.context()))
      if (f.id == "postgres.generated_identity") said = f.message.substr(f.message.rfind(": ") + 2);
    EXPECT_EQ(said, told) << from << " to " << to;
    if (from == 18) continue;   // no pg_dump here reads it
    s->exec("SET search_path = public; DROP TABLE doc, of_full; " + std::string(to == 18 ? "DROP TABLE bare; " : "INSERT INTO bare VALUES (1), (2); ") + "INSERT INTO keyed VALUES (1), (2); INSERT INTO beside VALUES (1), (2)");
    begin(w, store);
    s->exec("SET search_path = public; UPDATE keyed SET id = 3 WHERE id = 1; UPDATE beside SET id = 3 WHERE id = 1" + std::string(to == 18 ? "" : "; UPDATE bare SET a = 3 WHERE a = 1"));
    // One that comes later is not published either.
    s->exec("CREATE TABLE public.doc(doc jsonb, id text GENERATED ALWAYS AS (doc->>'id') STORED PRIMARY KEY)");
    try {
      store.recopy(w.context());
      ADD_FAILURE() << "was published";
    } catch (const Error& e) {
      EXPECT_NE(e.message.find("public.doc (id)"), std::string::npos) << e.message;
    }
    s->exec("CREATE UNIQUE INDEX plain ON public.doc(doc); ALTER TABLE public.doc ALTER doc SET NOT NULL; ALTER TABLE public.doc REPLICA IDENTITY USING INDEX plain");
    store.recopy(w.context());
    s->exec("INSERT INTO public.doc VALUES ('{\"id\": \"x\"}'); UPDATE public.doc SET doc = doc || '{\"v\": 1}'");
    wait_until_following(w, store);
    switch_over(w, store, {Side::source});
    target.session("shop")->exec("UPDATE public.doc SET doc = doc || '{\"v\": 2}'; UPDATE public.keyed SET id = 4 WHERE id = 2");
    quiesced_equal(source, target);
  }
}

TEST(PostgresPreflight, AServerThatTakesNoWritesOrNoSettings) {
  PgServer source(15), target(17, {"allow_alter_system = off", "synchronous_standby_names = 'ANY 1 (\"a*b\", *)'"});
  source.session("postgres")->exec("CREATE DATABASE shop");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  EXPECT_EQ(join(errors_of(w, store), "\n").substr(0, 28), "postgres.allow_alter_system:");
  EXPECT_NE(join(errors_of(w, store), "\n").find("postgres.synchronous_standby_names: synchronous_standby_names is ANY 1"), std::string::npos);
  source.stop();
  write_durably(source.data() + "/standby.signal", "", 0644);
  source.start();
  EXPECT_NE(join(errors_of(w, store), "\n").find("postgres.standby: that server is a standby"), std::string::npos) << join(errors_of(w, store), "\n");
}

// An autovacuum that works for hours on a large table yields to who waits for its lock, if he waits long enough.
TEST(PostgresFinish, AnAutovacuumYields) {
  PgServer source(15, {"autovacuum_naptime = 1", "autovacuum_vacuum_cost_delay = 100", "autovacuum_vacuum_cost_limit = 1"}), target(15);
  auto s = shop_with(source, "CREATE TABLE public.large(id int PRIMARY KEY, t text) WITH (autovacuum_vacuum_threshold = 100, autovacuum_vacuum_scale_factor = 0); INSERT INTO public.large SELECT i, repeat('x', 500) FROM generate_series(1, 50000) i");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  s->exec("DELETE FROM public.large WHERE id % 2 = 0");
  Deadline deadline = Deadline::in(Millis(60000));
  while (s->number("SELECT count(*) FROM pg_stat_progress_vacuum") == 0 && !deadline.passed()) system_clock().sleep(Millis(50));
  ASSERT_FALSE(deadline.passed());
  const Ticks from = system_clock().now();
  store.abandon(w.context());
  EXPECT_LT(ms_between(from, system_clock().now()), 30000);
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
}

// A change that locks no relation waits in the pause for the log alone, and the other side would lack it.
TEST(PostgresDdl, WhatWaitsForTheLogIsRefused) {
  for (int from : {13, 15}) {
    Shop shop("CREATE SCHEMA app; CREATE TABLE app.item(id int PRIMARY KEY)", from, 15);
    auto& [source, target, s, w, store] = shop;
    begin(w, store);
    for (bool through : {false, true}) {
      store.prepare_reverse(w.context(), {Side::source});
      auto cut = store.open_cut(w.context(), {Side::source});
      Deadline deadline = Deadline::in(Millis(20000));
      cut->soft_fence(deadline);
      std::string refused;
      std::jthread client([&, waits = source.session("shop")] {
        try {
          waits->exec("COMMENT ON SCHEMA app IS 'late'");
        } catch (const PgError& e) {
          refused = e.message;
        }
      });
      while (source.session("postgres")->number("SELECT count(*) FROM pg_locks WHERE NOT granted") == 0 && !deadline.passed()) system_clock().sleep(Millis(10));
      if (through) {
        cut->marker(deadline);
        cut->catch_up(deadline);
        cut->compare(deadline);
        cut->arm_reverse(deadline);
        cut->hard_fence(deadline);
      } else {
        cut->release();
      }
      cut.reset();
      client.join();
      EXPECT_EQ(refused.find("no change of its schema") != std::string::npos, through) << refused;
      EXPECT_EQ(s->value("SELECT coalesce(obj_description('app'::regnamespace), '')"), through ? "" : "late");
      if (!through) {
        store.recopy(w.context());
        s->exec("COMMENT ON SCHEMA app IS NULL");
        store.recopy(w.context());
        wait_until_following(w, store);
      }
    }
  }
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
  // Before 15 a subscriber leaves it to the publisher how it writes.
  for (auto [from, to] : {std::pair{15, 17}, std::pair{15, 13}, std::pair{13, 15}}) {
    PgServer source(from, {"timezone = 'Europe/Berlin'", "datestyle = 'SQL, DMY'", "intervalstyle = sql_standard"}), target(to, {"timezone = 'UTC'", "bytea_output = escape", "extra_float_digits = -3"});
    source.session("postgres")->exec("CREATE DATABASE shop");
    source.session("postgres")->exec("ALTER DATABASE shop SET default_transaction_read_only = on; ALTER DATABASE shop SET lock_timeout = '1ms'; " + std::string(std::min(from, to) >= 14 ? "ALTER DATABASE shop SET idle_session_timeout = '100ms'; " : "") +
                                     "ALTER DATABASE shop SET idle_in_transaction_session_timeout = '100ms'; ALTER DATABASE shop SET search_path = app, public; ALTER DATABASE shop SET TimeZone = 'Asia/Tokyo'");
    auto s = source.session("shop");
    s->exec("CREATE SCHEMA app; CREATE TABLE app.item(id int PRIMARY KEY, at timestamptz, b bytea, f float8, r tstzrange, d date, i interval); "
            "INSERT INTO app.item SELECT i, '2026-03-29 00:59:00+00'::timestamptz + i * interval '1 hour', decode(md5(i::text), 'hex'), 1.0 / i, tstzrange(now(), now() + interval '1 day'), '2026-02-01', '-1 day +2 hours' FROM generate_series(1, 50) i");
    // A check's query meets what the application's do.
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    EXPECT_EQ(store.ask(w.context(), Side::source, "shop", "SELECT count(*) || ' ' || current_setting('TimeZone') FROM item", Millis(30000), false), "50 Asia/Tokyo");
    EXPECT_THROW(store.ask(w.context(), Side::source, "shop", "DELETE FROM item RETURNING 1", Millis(30000), false), PgError);
    begin(w, store);
    s->exec("UPDATE app.item SET at = at + interval '1 minute', d = d + 1, f = f / 3, i = i - interval '1 day'");
    Verdict verdict = store.verify(w.context());
    EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
    EXPECT_EQ(verdict.compared, 50);
    // The snapshot's connection stands idle, in a transaction, for as long as a copy takes.
    PgSession walsender(store.address(w.context(), Side::source, "shop"), "test", true);
    walsender.query("CREATE_REPLICATION_SLOT test TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT");
    system_clock().sleep(Millis(300));
    EXPECT_EQ(walsender.value("SELECT 1"), "1");
    switch_over(w, store, {Side::source});
    target.session("shop")->exec("UPDATE app.item SET at = at + interval '1 minute', d = d + 1, f = f / 3, i = i - interval '1 day'");
    const char* rows = "SELECT md5(string_agg(t::text, ' ' ORDER BY id)) FROM app.item t";
    const std::string wanted = target.session("shop")->value(rows);
    for (Deadline deadline = Deadline::in(Millis(20000)); source.session("shop")->value(rows) != wanted && !deadline.passed();) system_clock().sleep(Millis(50));
    EXPECT_EQ(source.session("shop")->value(rows), wanted) << from << " to " << to;
  }
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
  EXPECT_GE(large.pause - before.pause, Millis(15 + 19)) << join(large.reasons, "\n");   // 4.8 MB at 250 MB a second
  EXPECT_LE(large.pause - before.pause, Millis(15 + 40)) << join(large.reasons, "\n");
  EXPECT_GE(large.bytes - before.bytes, 4'800'000);
  // The limit is the run's: two stores copy at once.
  w.deployment.limits.bandwidth = 1'000'000;
  w.deployment.stores.push_back(w.deployment.stores[0]);
  EXPECT_EQ(store.estimate(w.context()).copy, Millis(large.bytes * 1000 / 500'000));
  w.deployment.limits.bandwidth = 0;
  s->exec("ALTER TABLE public.b ADD COLUMN more int");
  EXPECT_NE(store.estimate(w.context()).facts, before.facts);
}

// A side that is opened without a cut must not give numbers again, whatever its sequences belong to.
TEST(PostgresSequences, AdvancedWithoutACut) {
  Shop shop("SET search_path = public; CREATE TABLE plain(id serial PRIMARY KEY); INSERT INTO plain SELECT generate_series(1, 100); "
                               "CREATE TABLE worded(id text PRIMARY KEY); CREATE SEQUENCE worded_seq OWNED BY worded.id; INSERT INTO worded VALUES ('A-7'), ('B'); SELECT setval('worded_seq', 7); "
                               "CREATE DOMAIN number AS bigint; CREATE TABLE domained(id number PRIMARY KEY); CREATE SEQUENCE domained_seq OWNED BY domained.id; INSERT INTO domained VALUES (500); "
                               "CREATE TABLE huge(id numeric PRIMARY KEY); CREATE SEQUENCE huge_seq OWNED BY huge.id; INSERT INTO huge VALUES (1e30), ('NaN'); "
                               "CREATE TABLE downwards(id int PRIMARY KEY); CREATE SEQUENCE down_seq INCREMENT -1 OWNED BY downwards.id; INSERT INTO downwards VALUES (-50); CREATE SEQUENCE alone; CREATE MATERIALIZED VIEW late AS SELECT 1 WITH NO DATA; "
                               "CREATE TABLE heap(id serial, a int); CREATE TABLE parted(id serial, a int) PARTITION BY RANGE (a); CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10)");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  s->exec("INSERT INTO public.heap(a) SELECT 1 FROM generate_series(1, 5000); INSERT INTO public.parted(a) SELECT 1 FROM generate_series(1, 5000)");
  for (Deadline deadline = Deadline::in(Millis(20000)); target.session("shop")->number("SELECT min(pg_stat_get_tuples_inserted(oid)) FROM pg_class WHERE relname IN ('heap', 'part')") < 5000 && !deadline.passed();) system_clock().sleep(Millis(50));
  // A table without an index on the column may take any time to look at: not asked, so that its lock holds nobody up.
  auto locks = target.session("shop");
  locks->exec("SET idle_in_transaction_session_timeout = '8s'; BEGIN; LOCK TABLE public.heap");
  const Ticks from = system_clock().now();
  store.make_up_for_cut(w.context(), {Side::source});
  EXPECT_LT(ms_between(from, system_clock().now()), 6000);
  EXPECT_TRUE(w.said("materialized views that are not filled here, and may have been on the other side: public.late (REFRESH")) << join(w.lines, "\n");
  auto t = target.session("shop");
  auto at = [&](const std::string& sequence) { return t->number("SELECT last_value FROM public." + sequence); };
  EXPECT_EQ(at("plain_id_seq"), 132);
  EXPECT_GE(at("worded_seq"), 1001);
  EXPECT_EQ(at("domained_seq"), 532);
  EXPECT_GE(at("huge_seq"), 1001);
  EXPECT_EQ(at("down_seq"), -82);
  EXPECT_GE(at("alone"), 1001);
  EXPECT_GE(at("heap_id_seq"), 5000);
  EXPECT_GE(at("parted_id_seq"), 5000);
}

// A side that a person opens follows the other no more, should it come back; in a cut the tails see to that.
TEST(PostgresOpen, ByAPersonsWordFollowsNoMore) {
  Shop shop("CREATE TABLE public.item(id int PRIMARY KEY)", 15, 17);
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  target.session("postgres")->exec("ALTER ROLE postgres SET transaction_timeout = '200ms'; ALTER ROLE postgres SET idle_in_transaction_session_timeout = '200ms'");
  ActionSets sets = store.actions(w.context(), {Side::source});
  for (auto& a : sets.open) a.input += "BEGIN; \n\\! sleep 0.5\nSELECT pg_sleep(0.1); COMMIT;\n";   // takes as long as it takes
  auto on = [&] { return target.session("shop")->value("SELECT subenabled FROM pg_subscription"); };
  for (auto [epoch, is] : {std::pair{std::int64_t{7}, "t"}, std::pair{std::int64_t{1} << 32, "f"}, std::pair{std::int64_t{1} << 32, "f"}}) {
    w.target.run_actions(sets.open, epoch);
    EXPECT_EQ(on(), is) << epoch;
  }
  target.session("shop")->exec("INSERT INTO public.item VALUES (1)");
}

// What a position says is not only its number: a sequence that was positioned and not called since gives that very number next.
TEST(PostgresSequences, PositionedButNotCalled) {
  for (auto [from, to] : {std::pair{13, 15}, std::pair{15, 18}}) {
    PgServer source(from), target(to);
    source.session("postgres")->exec("CREATE DATABASE shop");
    auto s = source.session("shop");
    s->exec("SET search_path = public; CREATE SEQUENCE never START 7; CREATE SEQUENCE placed; SELECT setval('placed', 5000, false); CREATE SEQUENCE restarted; SELECT nextval('restarted'); ALTER SEQUENCE restarted RESTART WITH 6000; "
            "CREATE TABLE item(id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, a int); INSERT INTO item(id) SELECT generate_series(1, 100); ALTER TABLE item ALTER id RESTART WITH 101; "
            "CREATE SEQUENCE called; SELECT setval('called', 70); CREATE SEQUENCE moved; SELECT setval('moved', 100); CREATE SEQUENCE stirred INCREMENT -2 MINVALUE -1000 MAXVALUE 1000; SELECT setval('stirred', 100); CREATE SEQUENCE \"Odd \"\"one'\"; SELECT setval('\"Odd \"\"one''\"', 42, false); CREATE SEQUENCE down INCREMENT -1; SELECT setval('down', -9, false); "
            "CREATE TABLE emptied(id serial PRIMARY KEY); INSERT INTO emptied SELECT FROM generate_series(1, 500)");
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    begin(w, store);
    store.prepare_reverse(w.context(), {Side::source});
    {
      // While a cut is open: what moved before its pause is carried in it.
      auto cut = store.open_cut(w.context(), {Side::source});
      EXPECT_EQ(sequences(target), (std::vector<std::string>{"public.\"Odd \"\"one'\" 42", "public.called 102 called", "public.down -9", "public.emptied_id_seq 532 called", "public.item_id_seq 101", "public.moved 132 called", "public.never 7", "public.placed 5000",
                                                             "public.restarted 6000", "public.stirred 36 called"}));
      s->exec("TRUNCATE public.emptied RESTART IDENTITY; SELECT setval('public.placed', 5001, false); SELECT setval('public.called', 3, false); SELECT nextval('public.never'); SELECT setval('public.moved', 117); SELECT setval('public.stirred', 98)");
      Deadline deadline = Deadline::in(Millis(10000));
      cut->soft_fence(deadline);
      cut->marker(deadline);
      cut->catch_up(deadline);
    }
    std::vector<std::string> there{"public.\"Odd \"\"one'\" 42", "public.called 3", "public.down -9", "public.emptied_id_seq 1", "public.item_id_seq 101", "public.moved 149 called", "public.never 39 called", "public.placed 5001", "public.restarted 6000", "public.stirred 36 called"};
    EXPECT_EQ(sequences(target), there);
    switch_over(w, store, {Side::source});
    EXPECT_EQ(sequences(target), there);
    sequences_cover(source, target);
    auto t = target.session("shop");
    t->exec("INSERT INTO public.item(a) VALUES (1); SELECT setval('public.placed', 20, false); SELECT setval('public.down', -10)");
    EXPECT_EQ(t->value("SELECT max(id) FROM public.item"), "101");
    switch_over(w, store, {Side::target});
    // The way back, too: 71 is what `never` gives after 39 and a margin, which the source's own 7 does not cover.
    EXPECT_EQ(sequences(source), (std::vector<std::string>{"public.\"Odd \"\"one'\" 42", "public.called 3", "public.down -42 called", "public.emptied_id_seq 1", "public.item_id_seq 133 called", "public.moved 181 called", "public.never 71 called", "public.placed 20",
                                                           "public.restarted 6000", "public.stirred -28 called"}));
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
  s->exec("CREATE FUNCTION public.heard() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END'; CREATE EVENT TRIGGER always ON ddl_command_end EXECUTE FUNCTION public.heard(); CREATE EVENT TRIGGER origin ON sql_drop EXECUTE FUNCTION public.heard(); "
          "ALTER EVENT TRIGGER always ENABLE ALWAYS");
  found = errors_of(w, store);
  ASSERT_EQ(found.size(), 1u) << join(found, "\n");
  EXPECT_NE(found[0].find("does not serve: always / ALTER EVENT TRIGGER always ENABLE: "), std::string::npos) << found[0];
  s->exec("ALTER EVENT TRIGGER always ENABLE");
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

// What an application records of changes of its schema is of its own: none of ours is among it, and none is refused by the fence for it.
TEST(PostgresDdl, AnEventTriggerThatWritesHearsNothingOfOurs) {
  Shop shop("SET search_path = public; CREATE TABLE ddl_history(n int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tag text, who text); CREATE TABLE item(id int PRIMARY KEY); CREATE TABLE of(id int PRIMARY KEY, item int REFERENCES item); "
            "CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.ddl_history(tag, who) VALUES (tg_tag, current_setting(''application_name'')); END'; "
            "CREATE MATERIALIZED VIEW many AS SELECT count(*) FROM item; CREATE EVENT TRIGGER note_end ON ddl_command_end EXECUTE FUNCTION note(); CREATE EVENT TRIGGER note_drop ON sql_drop EXECUTE FUNCTION note()");
  auto& [source, target, s, w, store] = shop;
  EXPECT_EQ(errors_of(w, store), std::vector<std::string>{});
  begin(w, store);
  s->exec("CREATE INDEX after ON public.item(id); INSERT INTO public.item VALUES (1); INSERT INTO public.of VALUES (1, 1)");
  store.recopy(w.context());
  wait_until_following(w, store);
  switch_over(w, store, {Side::source});
  target.session("shop")->exec("INSERT INTO public.item VALUES (2)");
  switch_over(w, store, {Side::target});
  source.session("shop")->exec("INSERT INTO public.item VALUES (3)");
  wait_until_following(w, store);
  quiesced_equal(source, target);
  w.target.run_actions(store.actions(w.context(), {Side::source}).close.target);
  store.finish(w.context(), Side::source);
  store.unfence_source(w.context());
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
  for (const PgServer* server : {&source, &target})
    EXPECT_EQ(server->session("shop")->value("SELECT string_agg(tag || ' ' || who, ', ') FROM public.ddl_history"), "CREATE INDEX test");
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

// Each is found before the run, where an apply worker or a restore would meet it in the middle.
TEST(PostgresPreflight, WhatTypesAndLimitsWouldStopIt) {
  const std::vector<std::string> few{"max_locks_per_transaction = 10", "max_connections = 30"};
  PgServer source(15), target(18, few);
  target.session("postgres")->exec("ALTER SYSTEM SET max_active_replication_origins = 1");
  target.stop();
  // A locale of our own: the machine may have none but C.
  TempDir locales("rehome-locales");
  ::chmod(locales.path().c_str(), 0755);
  write_durably(locales.path() + "/text", "LC_MONETARY\nint_curr_symbol \"EUR \"\ncurrency_symbol \"E\"\nmon_decimal_point \",\"\nmon_thousands_sep \".\"\nmon_grouping 3;3\npositive_sign \"\"\nnegative_sign \"-\"\nint_frac_digits 2\n"
                "frac_digits 2\np_cs_precedes 1\np_sep_by_space 0\nn_cs_precedes 1\nn_sep_by_space 0\np_sign_posn 1\nn_sign_posn 1\nEND LC_MONETARY\n");
  run({.argv = {"localedef", "-c", "-i", locales.path() + "/text", locales.path() + "/xx_XX"}}, Deadline::in(Millis(30000)));   // warns of what it lacks, and says 1
  ::setenv("LOCPATH", locales.path().c_str(), 1);
  target.start();
  ::unsetenv("LOCPATH");
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  s->exec("SET search_path = public; CREATE DOMAIN words AS json; CREATE TYPE pair AS (n int, at point); CREATE DOMAIN money2 AS numeric; CREATE TYPE color AS ENUM ('red'); CREATE TYPE fine AS (a int[], t varchar); "
          "CREATE TABLE good(a int[], b money2, c color[], d fine, e inet, f cidr, g varchar(3), h int4range, i jsonb[], j name, k text[]); "
          "CREATE TABLE bad(a json[], b xml[], c words, d pair, e pair[], f xml); CREATE UNLOGGED TABLE cache(t text); INSERT INTO cache SELECT repeat('x', 1000) FROM generate_series(1, 10000)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  auto found = errors_of(w, store);
  ASSERT_EQ(found.size(), 2u) << join(found, "\n");
  auto has = [&](const std::string& what) { return std::any_of(found.begin(), found.end(), [&](const std::string& f) { return f.find(what) != std::string::npos; }); };
  EXPECT_TRUE(has("postgres.max_active_replication_origins: max_active_replication_origins is 1, 0 in use, and the run needs 2")) << found[0];
  for (const char* column : {"a (json[])", "b (xml[])", "c (public.words)", "d (public.pair)", "e (public.pair[])", "f (xml)"}) EXPECT_TRUE(has(std::string("public.bad.") + column)) << column << " " << join(found, "\n");
  EXPECT_FALSE(has("public.good")) << join(found, "\n");
  // What nobody sees before a server's own processes meet it.
  s->exec("ALTER DATABASE shop SET force_parallel_mode = off; ALTER DATABASE shop SET my.own = 1; CREATE ROLE teller; ALTER ROLE teller SET force_parallel_mode = off; ALTER ROLE postgres SET force_parallel_mode = off; ALTER ROLE postgres IN DATABASE shop SET statement_timeout = '1min'; "
          "GRANT SET ON PARAMETER work_mem TO teller; COMMENT ON ROLE teller IS 'x'; CREATE PUBLICATION own; CREATE TABLE logged(id int PRIMARY KEY); ALTER TABLE cache ADD of int REFERENCES logged; CREATE DOMAIN price AS money; ALTER TABLE good ADD m money, ADD n price[]");
  target.session("postgres")->exec("ALTER SYSTEM SET lc_monetary = 'xx_XX'");
  target.session("postgres")->exec("ALTER SYSTEM SET idle_replication_slot_timeout = '1h'");
  target.session("postgres")->exec("SELECT pg_reload_conf(), pg_sleep(0.1)");
  found = errors_of(w, store);
  ASSERT_EQ(found.size(), 4u) << join(found, "\n");
  EXPECT_TRUE(has("and these differ (-$1,234,567.89 here, -E1.234.567,89 there): public.good.m, public.good.n / give both")) << join(found, "\n");
  EXPECT_TRUE(has("postgres.settings: settings that PostgreSQL 18 does not know, and with which nothing can be made there: force_parallel_mode, force_parallel_mode / ALTER DATABASE shop RESET force_parallel_mode; ALTER ROLE teller RESET force_parallel_mode"))
      << join(found, "\n");
  std::string others;
  for (const auto& f : store.preflight(w.context()))
    if (f.level != Finding::Level::error) others += f.id + ": " + f.object + ": " + f.message + " / " + f.mend + "\n";
  for (const char* what : {"postgres.timeouts: db: source: database shop: set for postgres, who follows: statement_timeout = 60000 ms; ", "/ ALTER ROLE \"postgres\" IN DATABASE \"shop\" SET statement_timeout = 0\n",
                           "postgres.idle_replication_slot_timeout: db: target: idle_replication_slot_timeout is 1h: ", "postgres.unlogged_children: db: source: database shop: unlogged tables with a foreign key to a logged one: public.cache (to public.logged); ",
                           "source: database shop: make again on the target what is not carried: publication own", "what is not carried (pg_dumpall --globals-only has it): comment on role teller, rights on parameter work_mem"})
    EXPECT_NE(others.find(what), std::string::npos) << what << " is not in\n" << others;
  // What the database has set comes with it.
  s->exec("ALTER DATABASE shop RESET force_parallel_mode; ALTER ROLE teller RESET force_parallel_mode; ALTER DATABASE shop SET lc_monetary = 'C'");
  EXPECT_EQ(errors_of(w, store).size(), 2u);
  // 10 MB at 50 MB a second.
  Estimate e = store.estimate(w.context());
  EXPECT_TRUE(std::any_of(e.reasons.begin(), e.reasons.end(), [](const std::string& r) { return r.find("in unlogged tables: copied inside the pause, about 2") != std::string::npos; })) << join(e.reasons, "\n");
  EXPECT_GE(e.pause, Millis(200));
  // A table here is four relations there, in one transaction.
  s->exec("DROP TABLE public.bad; DO $$ BEGIN FOR i IN 1..130 LOOP EXECUTE format('CREATE TABLE public.t%s(id serial PRIMARY KEY, t text)', i); END LOOP; END $$");
  found = errors_of(w, store);
  EXPECT_TRUE(has("postgres.max_locks_per_transaction: the tables of all databases, or the relations of one")) << join(found, "\n");
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
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{"source: shop: refusing trigger on 1 table (the fence)"});
  EXPECT_FALSE(exists(store.dump_place() + ".killed"));
}

TEST(PostgresReverse, AWaitingSwitchHoldsNoOldWal) {
  // In the order of their names each view would come before what it reads.
  Shop shop("SET search_path = public; CREATE TABLE t(id int PRIMARY KEY, filler text); CREATE MATERIALIZED VIEW z AS SELECT count(*) AS n FROM t; CREATE VIEW y AS SELECT n FROM z; "
            "CREATE MATERIALIZED VIEW a AS SELECT n FROM y; CREATE MATERIALIZED VIEW late AS SELECT n FROM a WITH NO DATA; CREATE MATERIALIZED VIEW never AS SELECT n FROM a WITH NO DATA");
  auto& [source, target, s, w, store] = shop;
  target.session("postgres")->exec("ALTER SYSTEM SET autovacuum = off; ");
  target.session("postgres")->exec("SELECT pg_reload_conf()");
  s->exec("INSERT INTO public.t SELECT -i, 'x' FROM generate_series(1, 500) i");
  begin(w, store);
  // The planner knows the tables before anybody asks it.
  EXPECT_EQ(target.session("shop")->value("SELECT reltuples FROM pg_class WHERE oid = 'public.t'::regclass"), "500");
  EXPECT_EQ(target.session("shop")->value("SELECT count(*) FROM pg_stats WHERE schemaname = 'public' AND tablename = 't'"), "2");
  auto views = [&] { return target.session("shop")->value("SELECT (SELECT n FROM public.z) || ' ' || (SELECT n FROM public.a) || ' ' || (SELECT n FROM public.late)"); };
  s->exec("REFRESH MATERIALIZED VIEW public.late");
  s->exec("INSERT INTO public.t SELECT -i, 'x' FROM generate_series(501, 510) i");
  wait_until_following(w, store);
  ASSERT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  Deadline arrived = Deadline::in(Millis(20000));
  while (target.session("shop")->value("SELECT count(*) FROM public.t") != "510" && !arrived.passed()) system_clock().sleep(Millis(20));
  store.prepare_reverse(w.context(), {Side::source});
  EXPECT_EQ(views(), "510 510 510");
  EXPECT_EQ(target.session("shop")->value("SELECT relispopulated FROM pg_class WHERE oid = 'public.never'::regclass"), "f");
  auto held = [&] {
    return target.session("shop")->number("SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), confirmed_flush_lsn)::bigint FROM pg_replication_slots WHERE slot_name = " + pg_literal(store.flow("shop", Side::target).slot));
  };
  s->exec("INSERT INTO public.t SELECT i, repeat('x', 1000) FROM generate_series(1, 2000) i");
  arrived = Deadline::in(Millis(20000));
  while (target.session("shop")->value("SELECT count(*) FROM public.t") != "2510" && !arrived.passed()) system_clock().sleep(Millis(20));
  EXPECT_GT(held(), 2'000'000);
  store.renew_reverse(w.context(), {Side::source});
  EXPECT_LT(held(), 100'000);
  // Refreshing takes the target's time: not every minute.
  EXPECT_EQ(views(), "510 510 510");
  store.views_again_ = Deadline::in(Millis(0));
  store.renew_reverse(w.context(), {Side::source});
  EXPECT_EQ(views(), "2510 2510 2510");
  // What the server gave up has its name still.
  auto lost = [&] { return target.session("shop")->value("SELECT wal_status = 'lost' FROM pg_replication_slots WHERE slot_name = " + pg_literal(store.flow("shop", Side::target).slot)); };
  auto give_up = [&](const std::string& limit) {
    auto t = target.session("postgres");
    t->exec("ALTER SYSTEM SET max_slot_wal_keep_size = " + limit);
    t->exec("SELECT pg_reload_conf(), pg_sleep(0.1)");
    if (limit == "-1") return;
    for (int i = 0; i < 3; i++) t->exec("SELECT txid_current(), pg_switch_wal()");
    t->exec("CHECKPOINT");
  };
  give_up("'1MB'");
  auto found = store.preflight(w.context());
  EXPECT_EQ(std::count_if(found.begin(), found.end(), [](const Finding& f) { return f.id == "postgres.max_slot_wal_keep_size" && f.level == Finding::Level::warning && f.message.find("is 1MB") != std::string::npos; }), 1);
  EXPECT_EQ(lost(), "t");
  store.renew_reverse(w.context(), {Side::source});
  EXPECT_EQ(lost(), "f");
  give_up("'1MB'");
  EXPECT_EQ(lost(), "t");
  give_up("-1");
  switch_over(w, store, {Side::source});
  store.finish(w.context(), Side::target);
}

}  // namespace
}  // namespace rehome
