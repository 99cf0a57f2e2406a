// The whole life of the driver between real servers, under write load, judged by pg_dump and by the clients' history.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <mutex>
#include <set>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/life.h"
#include "stores/postgres/testing/load.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

class PostgresLife : public ::testing::TestWithParam<std::pair<int, int>> {};

TEST_P(PostgresLife, SwitchAndReverseUnderLoad) {
  auto [from, to] = GetParam();
  PgServer source(from), target(to);
  source.session("postgres")->exec("CREATE DATABASE shop; ");
  source.session("postgres")->exec("ALTER DATABASE shop SET statement_timeout = '1h'; ALTER DATABASE shop SET search_path = public, stock");
  source.session("shop")->exec("SET search_path = public; " + Load::schema(20));
  source.session("shop")->exec("SET search_path = public; " + variety("storeman"));
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  for (const auto& f : store.preflight(w.context())) EXPECT_NE(f.level, Finding::Level::error) << f.id << " " << f.object << ": " << f.message << " / " << f.mend;
  Load load({&source, &target}, "shop", 4);
  begin(w, store);
  // Views of a session's own are no change of the schema.
  auto reports = source.session("shop");
  reports->exec("CREATE TEMP TABLE chosen(id int PRIMARY KEY); CREATE TEMP VIEW report AS SELECT * FROM chosen; COMMENT ON VIEW report IS 'mine';");
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  EXPECT_THROW(target.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)"), PgError);
  EXPECT_THROW(target.session("shop")->exec("TRUNCATE public.log"), PgError);
  source.session("shop")->exec("INSERT INTO stock.cache VALUES ('late', '2'); SELECT lo_put(424242, 0, 'FIRST'); INSERT INTO stock.event VALUES ('2026-02-10', 9999, 'late'); "
                               "TRUNCATE stock.base CASCADE; INSERT INTO stock.tenant VALUES (2, 'late'); UPDATE stock.part SET f = f + 1 WHERE id < 10; DELETE FROM stock.part WHERE id = 50");
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  EXPECT_GT(verdict.compared, 500);
  auto old_reader = source.session("shop");
  old_reader->exec("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM public.account");
  auto old_superuser = source.session("shop");
  switch_over(w, store, {Side::source}, [&] { load.route(1); }, [&] {
    // Begun before the fence, and refused after it.
    EXPECT_THROW(old_reader->exec("UPDATE public.account SET balance = 0"), PgError);
    EXPECT_THROW(old_superuser->exec("DELETE FROM public.account"), PgError);
    EXPECT_THROW(old_superuser->exec("COPY public.account FROM '/dev/null'"), PgError);
    EXPECT_THROW(old_superuser->exec("CREATE TABLE public.x()"), PgError);
  });
  std::int64_t at_switch = load.acknowledged();
  EXPECT_THROW(source.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)"), PgError);
  EXPECT_THROW(source.session("shop")->exec("SET session_replication_role = replica; INSERT INTO public.account VALUES (-1, 0)"), PgError);
  wait_until_following(w, store);
  while (load.acknowledged() < at_switch + 200) system_clock().sleep(Millis(10));
  switch_over(w, store, {Side::target}, [&] { load.route(0); });
  at_switch = load.acknowledged();
  while (load.acknowledged() < at_switch + 200) system_clock().sleep(Millis(10));
  wait_until_following(w, store);
  switch_over(w, store, {Side::source}, [&] { load.route(1); });
  at_switch = load.acknowledged();
  while (load.acknowledged() < at_switch + 200) system_clock().sleep(Millis(10));
  load.stop();
  std::printf("  acknowledged %lld, refused %lld, broken %lld, longest gap %.0f ms\n", static_cast<long long>(load.acknowledged()),
              static_cast<long long>(load.refused()), static_cast<long long>(load.broken()), load.longest_gap());
  quiesced_equal(source, target);
  sequences_cover(source, target);
  EXPECT_EQ(large_objects(source), large_objects(target));
  EXPECT_EQ(target.session("shop")->value("SHOW statement_timeout"), "0");   // our own session's
  EXPECT_EQ(target.session("postgres")->value("SELECT count(*) FROM pg_db_role_setting WHERE setdatabase <> 0"), "1");
  EXPECT_EQ(load.judge(target), std::vector<std::string>{});
  EXPECT_EQ(load.judge(source), std::vector<std::string>{});
  store.finish(w.context(), Side::target);
  target.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)");
  EXPECT_THROW(source.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)"), PgError);
  auto left = store.leftovers(w.context());
  ASSERT_EQ(left.size(), 1u) << join(left, "\n");
  EXPECT_NE(left[0].find("the fence"), std::string::npos);
  store.unfence_source(w.context());
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
  source.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)");
}

// A table that comes between prepare and the slot is in the slot's snapshot: it must be followed and fenced like the others.
TEST(PostgresCopyTest, TableMadeBeforeTheSlotIsFollowed) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop"), open = source.session("shop");
  s->exec("CREATE TABLE public.item(id int PRIMARY KEY)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  s->exec("CREATE TABLE public.late(id int PRIMARY KEY); INSERT INTO public.late VALUES (1)");
  // And one that commits while the slot's making waits for it.
  open->exec("BEGIN; CREATE TABLE public.later(id int PRIMARY KEY); INSERT INTO public.later VALUES (1)");
  {
    std::jthread committer([&] {
      Deadline deadline = Deadline::in(Millis(20000));
      while (s->number("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rehome snapshot' AND wait_event_type = 'Lock'") == 0 && !deadline.passed()) system_clock().sleep(Millis(20));
      EXPECT_FALSE(deadline.passed());
      open->exec("COMMIT");
    });
    store.copy(w.context());
  }
  EXPECT_NE(join(w.lines, "\n").find("its slot is made anew, for these tables were made meanwhile: \"public\".\"later\""), std::string::npos) << join(w.lines, "\n");
  store.follow(w.context());
  wait_until_following(w, store);
  s->exec("INSERT INTO public.late VALUES (2); INSERT INTO public.later VALUES (2)");
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  // The net below it: a cut refuses where a table is not followed.
  std::string publication = pg_identifier(store.flow("shop", Side::source).publication);
  store.prepare_reverse(w.context(), {Side::source});
  for (const char* lacks : {"ALTER PUBLICATION % DROP TABLE public.late", "DROP TRIGGER rehome_fence ON public.late"}) {
    std::string sql = lacks;
    if (auto at = sql.find('%'); at != std::string::npos) sql.replace(at, 1, publication);
    auto hand = source.session("shop", "rehome by hand");
    hand->exec(sql);
    try {
      store.open_cut(w.context(), {Side::source});
      ADD_FAILURE() << sql;
    } catch (const Error& e) {
      EXPECT_NE(e.message.find("\"public\".\"late\""), std::string::npos) << e.message;
    }
    hand->exec(sql.starts_with("ALTER") ? "ALTER PUBLICATION " + publication + " ADD TABLE public.late" : "CREATE TRIGGER rehome_fence BEFORE INSERT OR UPDATE OR DELETE ON public.late FOR EACH STATEMENT EXECUTE FUNCTION rehome.fence(); ALTER TABLE public.late ENABLE ALWAYS TRIGGER rehome_fence");
  }
  switch_over(w, store, {Side::source});
  for (const char* table : {"public.late", "public.later"}) {
    EXPECT_EQ(target.session("shop")->value(std::string("SELECT count(*) FROM ") + table), "2") << table;
    EXPECT_THROW(source.session("shop")->exec(std::string("INSERT INTO ") + table + " VALUES (3)"), PgError) << table;
  }
  quiesced_equal(source, target);
}

// A schema change while following: the switch is refused until the tables are copied again, and nothing is lost by that.
TEST(PostgresChange, SchemaChangeMustBeCopiedAgain) {
  Shop shop("SET search_path = public; " + Load::schema(2));
  auto& [source, target, s, w, store] = shop;
  Load load({&source, &target}, "shop", 2);
  begin(w, store);
  source.session("shop")->exec("SET search_path = public; CREATE TABLE added(id int PRIMARY KEY); INSERT INTO added VALUES (1); ALTER TABLE churn ADD COLUMN extra int DEFAULT 7; "
                               "CREATE TEMP TABLE t(id int); DROP TABLE t");
  auto again = store.needs_recopy(w.context());
  ASSERT_GE(again.size(), 2u) << join(again, "\n");
  EXPECT_NE(join(again, "\n").find("public.added"), std::string::npos);
  EXPECT_NE(join(again, "\n").find("public.churn"), std::string::npos);
  store.recopy(w.context());
  wait_until_following(w, store);
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  source.session("shop")->exec("INSERT INTO public.added VALUES (2)");
  switch_over(w, store, {Side::source}, [&] { load.route(1); });
  system_clock().sleep(Millis(300));
  load.stop();
  quiesced_equal(source, target);
  EXPECT_EQ(target.session("shop")->value("SELECT count(*) FROM public.added"), "2");
  const char* fenced = "SELECT string_agg(tgrelid::regclass::text || ' ' || tgname || ' ' || tgenabled::text, ', ' ORDER BY tgrelid::regclass::text, tgname) FROM (SELECT * FROM pg_trigger WHERE NOT tgisinternal ORDER BY tgrelid::regclass::text, tgname) t";
  EXPECT_EQ(source.session("shop")->value(fenced), target.session("shop")->value(fenced));
  EXPECT_EQ(load.judge(target), std::vector<std::string>{});
}

// Whatever phase the controller dies in, before the commit: its sessions are cut, the agent's undo runs, the source serves,
// and the follower still follows.
TEST(PostgresCutTest, ControllerLostAtEachPhase) {
  Shop shop("SET search_path = public; " + Load::schema(5));
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  Direction d{Side::source};
  store.prepare_reverse(w.context(), d);
  Load load({&source, &target}, "shop", 2);
  using Phase = void (Cut::*)(Deadline);
  const Phase phases[] = {&Cut::soft_fence, &Cut::marker, &Cut::catch_up, &Cut::compare, &Cut::arm_reverse, &Cut::hard_fence};
  for (std::size_t last = 0; last < std::size(phases); last++) {
    {
      // A second controller's view of the same sites, so that only its sessions are cut.
      testing::World other(w.deployment);
      other.facts = w.facts;
      std::erase_if(other.facts, [](const auto& f) { return f.first.find(".socket_directory.") != std::string::npos; });
      auto cut = store.open_cut(other.context(), d);
      for (std::size_t i = 0; i <= last; i++) ((*cut).*phases[i])(Deadline::in(Millis(10000)));
      other.source.cut();
      other.target.cut();
      Ticks from = system_clock().now();
      w.source.run_actions(store.actions(w.context(), d).undo);
      std::int64_t before = load.acknowledged();
      Deadline deadline = Deadline::in(Millis(5000));
      while (load.acknowledged() < before + 20 && !deadline.passed()) system_clock().sleep(Millis(2));
      EXPECT_GE(load.acknowledged(), before + 20) << "phase " << last;
      std::printf("  lost after phase %zu: writers go on after %.0f ms\n", last, ms_between(from, system_clock().now()));
    }
    EXPECT_THROW(target.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)"), PgError);
  }
  switch_over(w, store, d, [&] { load.route(1); });
  system_clock().sleep(Millis(200));
  load.stop();
  quiesced_equal(source, target);
  EXPECT_EQ(load.judge(target), std::vector<std::string>{});
  store.finish(w.context(), Side::target);
}

// What the cut costs as the number of tables grows; REHOME_TEST_TABLES=2000 asks for more than the 200 of every run.
TEST(PostgresCutTest, TimingsGrowWithTables) {
  const char* more = std::getenv("REHOME_TEST_TABLES");
  for (int tables : {200, more ? std::atoi(more) : 0}) {
    if (tables == 0) continue;
    PgServer source(15, {"max_locks_per_transaction = 256"}), target(15, {"max_locks_per_transaction = 256"});
    source.session("postgres")->exec("CREATE DATABASE shop");
    source.session("shop")->exec("SET search_path = public; " + Load::schema(0));
    for (int i = 0; i < tables; i++) {
      static const std::string body = "(id bigserial PRIMARY KEY, a int, b text)";
      source.session("shop")->exec("CREATE TABLE public.filler_" + std::to_string(i) + body);
    }
    World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
    PostgresStore store(w.deployment.stores[0], w.deployment);
    Ticks from = system_clock().now();
    store.prepare(w.context());
    double prepared = ms_between(from, system_clock().now()) / 1000;
    store.copy(w.context());
    store.follow(w.context());
    wait_until_following(w, store);
    std::printf("%d tables: prepared in %.1f s, begun in %.1f s\n", tables, prepared, ms_between(from, system_clock().now()) / 1000);
    Load load({&source, &target}, "shop", 2);
    system_clock().sleep(Millis(200));
    for (int i = 0; i < 2; i++) {
      store.prepare_reverse(w.context(), {Side::source});
      std::printf("  micro-fence %lld ms\n", static_cast<long long>(store.micro_fence(w.context(), {Side::source}, Deadline::in(Millis(20000))).count()));
    }
    switch_over(w, store, {Side::source}, [&] { load.route(1); });
    load.stop();
    EXPECT_EQ(load.judge(target), std::vector<std::string>{});
  }
}

// Where commits do not wait for the disk, ours do: a fence that a crash takes away would leave two sides that serve.
TEST(PostgresCutTest, WhatACutHasDoneIsStillThereAfterACrash) {
  const std::vector<std::string> lazy{"synchronous_commit = off", "wal_writer_delay = 10s", "autovacuum = off"};
  PgServer source(15, lazy), target(15, lazy);
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("shop")->exec("CREATE TABLE public.item(id serial PRIMARY KEY, a int); INSERT INTO public.item(a) SELECT generate_series(1, 100)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  auto crash = [](PgServer& server) {
    server.stop("immediate");
    server.start();
  };
  const std::string write = "INSERT INTO public.item(a) VALUES (0)";
  // A cut, and the last that it does.
  store.prepare_reverse(w.context(), {Side::source});
  {
    auto cut = store.open_cut(w.context(), {Side::source});
    source.session("shop")->exec("SELECT setval('public.item_id_seq', 1000)");
    Deadline deadline = Deadline::in(Millis(10000));
    cut->soft_fence(deadline);
    cut->marker(deadline);
    cut->catch_up(deadline);
    crash(target);
    EXPECT_EQ(target.session("shop")->value("SELECT last_value FROM public.item_id_seq"), "1032");
    cut->hard_fence(deadline);
    crash(source);
  }
  EXPECT_THROW(source.session("shop")->exec(write), PgError);
  // What the agents do without us.
  ActionSets sets = store.actions(w.context(), {Side::source});
  w.target.run_actions(sets.open);
  crash(target);
  target.session("shop")->exec(write);
  w.target.run_actions(sets.close.target);
  crash(target);
  EXPECT_THROW(target.session("shop")->exec(write), PgError);
  // Who asks for more gets it.
  source.session("postgres")->exec("ALTER DATABASE shop SET synchronous_commit = remote_apply");
  EXPECT_EQ(source.session("postgres")->value("SHOW synchronous_commit"), "on");
  EXPECT_EQ(source.session("shop")->value("SHOW synchronous_commit"), "remote_apply");
}

// The way back begins where the cut was, also when the server that has just been opened crashes before its next checkpoint: what came
// from the other side is not sent back to it, where a table without a key would take it twice.
TEST(PostgresCutTest, TheWayBackBeginsAtTheCutAfterACrash) {
  Shop shop("SET search_path = public; CREATE TABLE line(at int); CREATE TABLE item(id int PRIMARY KEY); INSERT INTO line VALUES (0)");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  // Followed again after somebody has disabled the follower: from where it was, not from what the slot has heard of.
  s->exec("INSERT INTO public.line SELECT generate_series(1, 1000)");
  auto t = target.session("shop");
  for (Deadline deadline = Deadline::in(Millis(20000)); t->number("SELECT count(*) FROM public.line") < 1001; system_clock().sleep(Millis(1))) ASSERT_FALSE(deadline.passed());
  t->exec("ALTER SUBSCRIPTION " + store.flow("shop", Side::source).subscription + " DISABLE");
  store.follow(w.context());
  wait_until_following(w, store);
  s->exec("INSERT INTO public.line VALUES (0)");
  quiesced_equal(source, target);
  for (Direction d : {Direction{Side::source}, Direction{Side::target}}) {
    PgServer &yields = d.yields == Side::source ? source : target, &takes = d.yields == Side::source ? target : source;
    store.prepare_reverse(w.context(), d);
    takes.session("postgres")->exec("CHECKPOINT");
    yields.session("shop")->exec("INSERT INTO public.line SELECT generate_series(1, 100); INSERT INTO public.item SELECT count(*) FROM public.line");
    wait_until_following(w, store);
    switch_over(w, store, d, [&] {
      takes.stop("immediate");
      takes.start();
    });
    takes.session("shop")->exec("INSERT INTO public.line VALUES (-1)");
    quiesced_equal(source, target);
  }
}

// What the journal says of a copy is true of a target that crashes the moment it is written down.
TEST(PostgresCopy, ATargetThatCrashesLosesNothingThatIsWrittenDownAsDone) {
  Shop shop("SET search_path = public; " + Load::schema(3) + "; " + variety("storeman") + "; SELECT lo_from_bytea(0, 'one'); CREATE TABLE public.large(id int PRIMARY KEY, t text); "
            "INSERT INTO public.large SELECT i, repeat(md5(i::text), 12) FROM generate_series(1, 30000) i");
  auto& [source, target, s, w, store] = shop;
  // Commits that nobody asks to be durable are on the disk at the next checkpoint.
  for (const char* lazy : {"synchronous_commit = off", "wal_writer_delay = '10s'", "autovacuum = off"}) target.session("postgres")->exec(std::string("ALTER SYSTEM SET ") + lazy);
  target.stop("immediate");
  target.start();
  store.prepare(w.context());
  std::set<std::string> crashed_at;
  std::mutex mutex;
  w.remembered = [&](const std::string& key) {
    std::lock_guard lock(mutex);
    // `done` grows; the others are said once.
    const std::string what = key.ends_with(".done") || key.ends_with(".sections") ? w.context().recall(key).dump() : key;
    if (!crashed_at.insert(what).second) return;
    target.stop("immediate");
    target.start();
  };
  int crashes = 0;
  for (; !store.copied(w.context()); crashes++) {
    ASSERT_LT(crashes, 60);
    try {
      store.copy(w.context());
    } catch (const Error& e) {
      EXPECT_TRUE(e.code == Code::unreachable || e.code == Code::store) << e.what();
    }
  }
  w.remembered = {};
  EXPECT_GE(crashed_at.size(), 8u);
  EXPECT_TRUE(crashed_at.contains("postgres.db.shop.copied"));
  store.follow(w.context());
  wait_until_following(w, store);
  switch_over(w, store, {Side::source});
  quiesced_equal(source, target);
  EXPECT_EQ(large_objects(source), large_objects(target));
}

// TRUNCATE minds foreign keys even where nothing fires them.
TEST(PostgresCutTest, UnloggedTablesWithForeignKeysBetweenThem) {
  Shop shop("SET search_path = public; CREATE TABLE customer(id int PRIMARY KEY); INSERT INTO customer VALUES (1); CREATE UNLOGGED TABLE basket(id int PRIMARY KEY, of int REFERENCES customer); "
                               "CREATE UNLOGGED TABLE a_line(basket int REFERENCES basket, n int PRIMARY KEY, before int REFERENCES a_line); INSERT INTO basket VALUES (1, 1), (2, 1); INSERT INTO a_line VALUES (1, 1, NULL), (2, 2, 1); CREATE TABLE staging(id serial PRIMARY KEY)", 15, 17);
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  // A sequence that the follower sets back after the cut has looked.
  auto staged = [&] { s->exec("TRUNCATE public.staging RESTART IDENTITY; INSERT INTO public.staging SELECT FROM generate_series(1, 1000)"); };
  staged();
  wait_until_following(w, store);
  store.prepare_reverse(w.context(), {Side::source});
  {
    auto cut = store.open_cut(w.context(), {Side::source});
    staged();
    Deadline deadline = Deadline::in(Millis(20000));
    cut->soft_fence(deadline);
    cut->marker(deadline);
    cut->catch_up(deadline);
    EXPECT_GT(target.session("shop")->number("SELECT coalesce(last_value, 0) FROM pg_sequences WHERE sequencename = 'staging_id_seq'"), 1000);
    cut->release();
  }
  switch_over(w, store, {Side::source});
  quiesced_equal(source, target);
  auto t = target.session("shop");
  t->exec("DELETE FROM public.a_line WHERE n = 2; DELETE FROM public.basket WHERE id = 2; INSERT INTO public.basket VALUES (3, 1); INSERT INTO public.a_line VALUES (3, 3, 1)");
  switch_over(w, store, {Side::target});
  EXPECT_EQ(source.session("shop")->value("SELECT string_agg(a_line::text, ' ' ORDER BY n) FROM public.a_line"), "(1,1,) (3,3,1)");
  EXPECT_THROW(target.session("shop")->exec("DELETE FROM public.a_line"), PgError);
}

// A comparison and a micro-fence hold writers for what a marker takes, never for a follower that is behind.
TEST(PostgresVerify, WritersDoNotWaitForAFollowerThatIsBehind) {
  Shop shop("SET search_path = public; " + Load::schema(2));
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  store.prepare_reverse(w.context(), {Side::source});
  Load load({&source, &target}, "shop", 2);
  auto obstacle = target.session("shop");
  obstacle->exec("BEGIN; LOCK TABLE public.account IN SHARE MODE");
  system_clock().sleep(Millis(1000));
  load.longest_gap();
  try {
    store.micro_fence(w.context(), {Side::source}, Deadline::in(Millis(1500)));
    ADD_FAILURE() << "measured";
  } catch (const Error& e) {
    EXPECT_TRUE(e.retryable);
    EXPECT_EQ(e.code, Code::state);
    EXPECT_NE(e.message.find("its follower is "), std::string::npos) << e.message;
    EXPECT_NE(e.message.find("B behind"), std::string::npos) << e.message;
  }
  EXPECT_LT(load.longest_gap(), 500);
  auto verdict = std::async(std::launch::async, [&] { return store.verify(w.context()); });
  system_clock().sleep(Millis(4000));
  EXPECT_LT(load.longest_gap(), 500);
  EXPECT_NE(verdict.wait_for(Millis(0)), std::future_status::ready);
  {
    std::lock_guard lock(w.mutex);
    ASSERT_FALSE(w.progress.empty());
    EXPECT_NE(w.progress.back().detail.find("waiting for the follower"), std::string::npos) << w.progress.back().detail;
  }
  obstacle->exec("ROLLBACK");
  EXPECT_TRUE(verdict.get().equal);
  EXPECT_LT(load.longest_gap(), 500);
  load.stop();
}

// What a new version changes after the switch: the way back is refused until the old side has a place for every row.
TEST(PostgresWindow, SchemaChangesAfterTheSwitch) {
  Shop shop("SET search_path = public; " + Load::schema(2) + "; CREATE TABLE owned(id int PRIMARY KEY, account int REFERENCES account); INSERT INTO owned VALUES (1, 1)");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  switch_over(w, store, {Side::source});
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  // Of one the rows are not the same when a person does it again.
  const std::string column = "ALTER TABLE public.account ADD COLUMN note text DEFAULT 'none'; ALTER TABLE public.account ADD COLUMN token uuid DEFAULT gen_random_uuid()",
                    table = "CREATE TABLE public.made(id bigint PRIMARY KEY, t text)", change = column + "; " + table;
  auto t = target.session("shop");
  t->exec(column);
  EXPECT_FALSE(store.needs_recopy(w.context()).empty());
  // Nobody who goes past `reverse` gets through either.
  store.prepare_reverse(w.context(), {Side::target});
  {
    auto cut = store.open_cut(w.context(), {Side::target});
    Deadline deadline = Deadline::in(Millis(10000));
    cut->soft_fence(deadline);
    EXPECT_THROW(cut->compare(deadline), Error);
  }
  t->exec(table);
  EXPECT_THROW(store.open_cut(w.context(), {Side::target}), Error);
  t->exec("INSERT INTO public.made SELECT i, 'before' FROM generate_series(1, 1000) i; UPDATE public.account SET note = 'kept' WHERE id = 1");
  try {
    store.recopy(w.context());
    ADD_FAILURE() << "the source has no table made";
  } catch (const Error& e) {
    EXPECT_NE(e.message.find("\"made\""), std::string::npos) << e.message;
    EXPECT_NE(e.message.find("note text"), std::string::npos) << e.message;
  }
  s = source.session("shop");
  EXPECT_THROW(s->exec(change), PgError);
  s->exec(std::string("SET application_name = 'rehome by hand'; ") + change + "; RESET application_name");
  store.recopy(w.context());
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  EXPECT_THROW(s->exec("INSERT INTO public.made VALUES (-1, 'x')"), PgError) << "the old side takes writes";
  EXPECT_THROW(s->exec("CREATE TABLE public.other()"), PgError);
  EXPECT_TRUE(w.said("rewritten on the target, and copied back: \"public\".\"account\";")) << join(w.lines, "\n");
  EXPECT_EQ(s->value("SELECT count(*) FROM public.owned JOIN public.account ON account.id = account"), "1");
  t->exec("INSERT INTO public.made VALUES (2000, 'after')");
  wait_until_following(w, store);
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::target});
  quiesced_equal(source, target);
  auto serving = source.session("shop");
  EXPECT_EQ(serving->value("SELECT count(*) FROM public.made"), "1001");
  EXPECT_EQ(serving->value("SELECT note FROM public.account WHERE id = 1"), "kept");
  serving->exec("INSERT INTO public.made VALUES (3000, 'at home')");
  EXPECT_THROW(target.session("shop")->exec("INSERT INTO public.made VALUES (-1, 'x')"), PgError) << "the table that was made in the window is not fenced";
}

// Databases that nobody named: what is made and dropped while the run follows.
TEST(PostgresAll, DatabasesThatComeAndGo) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("postgres")->exec("CREATE DATABASE gone");
  const std::string table = "CREATE TABLE public.item(id int PRIMARY KEY); INSERT INTO public.item SELECT generate_series(1, 100)";
  source.session("shop")->exec(table);
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  begin(w, store);
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  source.session("postgres")->exec("CREATE DATABASE late");
  source.session("late")->exec(table);
  auto again = store.needs_recopy(w.context());
  ASSERT_EQ(again.size(), 1u) << join(again, "\n");
  EXPECT_NE(again[0].find("database late was made on the source"), std::string::npos) << again[0];
  store.recopy(w.context());
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  source.session("late")->exec("INSERT INTO public.item VALUES (0)");
  wait_until_following(w, store);
  quiesced_equal(source, target, "late");
  // One that comes when everybody has looked.
  refused_under_the_fence(w, store, [&] { source.session("postgres")->exec("CREATE DATABASE last"); }, "database last was made on the source");
  source.session("postgres")->exec("DROP DATABASE last");
  switch_over(w, store, {Side::source});
  // In the window the target's other databases are nobody's business, but those that come then have no way back.
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  target.session("postgres")->exec("CREATE DATABASE made");
  EXPECT_EQ(store.needs_recopy(w.context()).size(), 1u);
  EXPECT_THROW(store.recopy(w.context()), Error);
  target.session("postgres")->exec("DROP DATABASE made");
  switch_over(w, store, {Side::target});
  EXPECT_EQ(store.needs_recopy(w.context()), std::vector<std::string>{});
  // A follower that is off lets its database go.
  w.source.run_actions(store.actions(w.context(), {Side::source}).undo);
  target.session("gone")->exec("ALTER SUBSCRIPTION " + store.flow("gone", Side::source).subscription + " DISABLE");
  Deadline deadline = Deadline::in(Millis(10000));
  while (true) {
    try {
      source.session("postgres")->exec("DROP DATABASE gone WITH (FORCE)");
      break;
    } catch (const PgError&) {
      if (deadline.passed()) throw;
    }
    system_clock().sleep(Millis(50));
  }
  again = store.needs_recopy(w.context());
  ASSERT_FALSE(again.empty());
  EXPECT_NE(again[0].find("database gone is gone from the source"), std::string::npos) << again[0];
  EXPECT_THROW(store.recopy(w.context()), Error);
  store.abandon(w.context());
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
}

// A plain role that does nothing but write large objects: what it was told is acknowledged is on the other side.
TEST(PostgresCutTest, LargeObjectsAreWrittenByNobodyBehindTheFence) {
  Shop shop("CREATE TABLE public.item(id int PRIMARY KEY); CREATE ROLE clerk LOGIN; SELECT lo_create(i) FROM generate_series(1001, 1005) i; "
            "DO $$ BEGIN FOR i IN 1001..1005 LOOP EXECUTE format('ALTER LARGE OBJECT %s OWNER TO clerk', i); END LOOP; END $$; GRANT EXECUTE ON FUNCTION lo_import(text) TO clerk");
  auto& [source, target, s, w, store] = shop;
  begin(w, store);
  const std::string rights = "SELECT string_agg(oid::regprocedure || ' ' || coalesce(proacl::text, 'NULL'), ', ' ORDER BY oid) FROM pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname ~ '^lo(_|w?r)' AND proname <> 'lower'";
  const std::string before = s->value(rights);
  const std::string write = "SELECT lo_put($1::oid, 0, convert_to(lpad($2, 8), 'UTF8'))";
  auto clerk = [](const PgServer& server) {
    auto own = server.session("shop");
    own->exec("SET SESSION AUTHORIZATION clerk");
    return own;
  };
  EXPECT_THROW(clerk(target)->query(write, {"1005", "0"}), PgError) << "it does not serve yet";
  std::atomic<bool> stop{false};
  std::int64_t acknowledged[5] = {};
  std::vector<std::jthread> writers;
  for (int i = 1; i <= 4; i++)
    writers.emplace_back([&, i] {
      auto own = clerk(source);
      for (std::int64_t n = 1; !stop; n++) {
        try {
          own->query(write, {std::to_string(1000 + i), std::to_string(n)});
          acknowledged[i] = n;
        } catch (const Error&) {
          if (own->broken()) own = clerk(source);
          system_clock().sleep(Millis(1));
        }
      }
    });
  // Its session has called the function, and its transaction is older than the fence.
  auto old = clerk(source);
  old->query(write, {"1005", "1"});
  old->exec("BEGIN; SELECT 1");
  switch_over(w, store, {Side::source}, [&] { system_clock().sleep(Millis(100)); }, [&] {
    EXPECT_THROW(old->query(write, {"1005", "2"}), Error);
    EXPECT_THROW(clerk(source)->query(write, {"1005", "2"}), PgError);
  });
  stop = true;
  writers.clear();
  for (int i = 1; i <= 4; i++) {
    EXPECT_GT(acknowledged[i], 10);
    EXPECT_GE(target.session("shop")->number("SELECT convert_from(lo_get(" + std::to_string(1000 + i) + "), 'UTF8')"), acknowledged[i]);
  }
  EXPECT_EQ(target.session("shop")->value(rights), before);
  source.stop("immediate");
  source.start();
  for (const char* sql : {"SELECT lo_create(0)", "SELECT lo_from_bytea(0, 'x')", "SELECT lo_unlink(1005)", "SELECT lowrite(lo_open(1005, 131072), 'x')"}) EXPECT_THROW(clerk(source)->exec(sql), PgError) << sql;
  EXPECT_NE(source.session("shop")->value(rights), before);
  wait_until_following(w, store);
  switch_over(w, store, {Side::target});
  EXPECT_EQ(source.session("shop")->value(rights), before);
  clerk(source)->query(write, {"1005", "3"});
  EXPECT_THROW(clerk(target)->query(write, {"1005", "4"}), PgError);
  // Backed out: as if nothing had been.
  store.prepare_reverse(w.context(), {Side::source});
  {
    auto cut = store.open_cut(w.context(), {Side::source});
    Deadline deadline = Deadline::in(Millis(10000));
    for (auto phase : {&Cut::soft_fence, &Cut::marker, &Cut::catch_up, &Cut::compare, &Cut::arm_reverse, &Cut::hard_fence}) ((*cut).*phase)(deadline);
  }
  EXPECT_THROW(clerk(source)->query(write, {"1005", "5"}), PgError);
  w.source.run_actions(store.actions(w.context(), {Side::source}).undo);
  clerk(source)->query(write, {"1005", "6"});
  EXPECT_EQ(source.session("shop")->value(rights), before);
  store.finish(w.context(), Side::source);
  EXPECT_THROW(clerk(target)->query(write, {"1005", "7"}), PgError);
  store.unfence_source(w.context());
  EXPECT_EQ(target.session("shop")->value(rights), before);
  clerk(target)->query(write, {"1005", "8"});
}

INSTANTIATE_TEST_SUITE_P(Majors, PostgresLife, ::testing::Values(std::pair{15, 15}, std::pair{13, 15}, std::pair{15, 17}, std::pair{15, 18}),
                         [](const auto& p) { return std::to_string(p.param.first) + "to" + std::to_string(p.param.second); });

}  // namespace
}  // namespace rehome
