// What the copy takes of the source while others work there, and what it leaves to whoever resumes it: locks, killed and stopped
// index builds, tables that change under it.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/life.h"
#include "sys/process.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

// False after a minute.
bool until(const std::function<bool()>& is) {
  for (Deadline deadline = Deadline::in(Millis(60000)); !is();) {
    if (deadline.passed()) return false;
    system_clock().sleep(Millis(5));
  }
  return true;
}

std::string sum(PgSession& s, const std::string& table) { return s.value("SELECT count(*) || ' ' || coalesce(sum(hashtextextended(x::text, 0)), 0) FROM public." + table + " x"); }

void expect_interrupted(World& w, PostgresStore& store) {
  try {
    store.copy(w.context());
    ADD_FAILURE() << "was to be stopped";
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::interrupted) << e.what();
  }
}

// A table that is copied is let go at once; one that changes before or between its pieces is found, left out, and brought by recopy.
TEST(PostgresCopyLocks, TablesThatChangeMeanwhile) {
  const std::string rows = "SELECT i, repeat(md5(i::text), 5) FROM generate_series(1, ";
  Shop shop("SET search_path = public; CREATE UNLOGGED TABLE early(id int PRIMARY KEY, t text); INSERT INTO early " + rows + "4000) i; "   // never split: it comes first
            "CREATE TABLE turned(id int PRIMARY KEY, t text); INSERT INTO turned " + rows + "16000) i; DELETE FROM turned WHERE id % 3 = 0; "
            "CREATE TABLE renewed(id int PRIMARY KEY, t text); INSERT INTO renewed " + rows + "4000) i; "
            "CREATE TABLE gone(id int PRIMARY KEY); INSERT INTO gone VALUES (1); CREATE TABLE slim(id int PRIMARY KEY, t text); INSERT INTO slim VALUES (1, 'a'); "
            "CREATE TABLE parent(id int PRIMARY KEY, t text); INSERT INTO parent VALUES (1, 'a'); CREATE TABLE child(id int PRIMARY KEY, of int REFERENCES parent); INSERT INTO child VALUES (1, 1)");
  auto& [source, target, s, w, store] = shop;
  store.split_bytes = 400 << 10;
  store.split_share = 0;
  w.deployment.limits.bandwidth = 600 << 10;
  store.prepare(w.context());
  auto copied = [&](const char* table) {
    auto t = target.session("shop");
    return until([&] { return t->value("SELECT to_regclass('public." + std::string(table) + "') IS NOT NULL") == "t" && t->number("SELECT count(*) FROM public." + std::string(table)) > 0; });
  };
  {
    std::jthread stopper([&] {
      EXPECT_TRUE(copied("early"));
      w.cancelled = true;
    });
    expect_interrupted(w, store);
  }
  w.cancelled = false;
  // The snapshot is held: what was finished stays as it is.
  const std::string file = "SELECT pg_relation_filenode('public.early')", before = target.session("shop")->value(file);
  ASSERT_NE(w.facts["postgres.db.shop.done"].dump().find("early"), std::string::npos);
  {
    w.progress.clear();
    std::jthread changes([&] {
      EXPECT_TRUE(until([&] {
        std::lock_guard lock(w.mutex);
        return std::any_of(w.progress.begin(), w.progress.end(), [](const Progress& p) { return p.phase == "copy"; });
      }));
      try {
        s->exec("SET lock_timeout = '2500ms'; SET search_path = public; DROP TABLE gone; ALTER TABLE slim DROP COLUMN t; ALTER TABLE parent ALTER t TYPE text USING upper(t)");
        s->exec("ALTER TABLE early ADD COLUMN more int");
        EXPECT_TRUE(copied("turned"));
        s->exec("VACUUM FULL turned");
        s->exec("ALTER TABLE renewed ALTER t TYPE text USING upper(t)");
        EXPECT_EQ(w.context().recall("postgres.db.shop.sections").dump().find("post-data"), std::string::npos) << "the copy was too quick for this test";
      } catch (const PgError& e) {
        ADD_FAILURE() << "a change waited for the copy: " << e.what();
      }
    });
    store.copy(w.context());
  }
  EXPECT_EQ(target.session("shop")->value(file), before);
  for (const char* table : {"turned", "renewed", "gone", "slim", "parent"}) EXPECT_TRUE(w.said("\"" + std::string(table) + "\" has changed since the copy began")) << table << "\n" << join(w.lines, "\n");
  store.follow(w.context());
  wait_until_following(w, store);
  EXPECT_NE(join(store.needs_recopy(w.context()), "\n").find("changed while it was copied: \"public\".\"turned\""), std::string::npos);
  store.recopy(w.context());
  EXPECT_FALSE(w.said("as a whole")) << join(w.lines, "\n");
  for (const char* table : {"turned", "renewed", "slim", "parent", "child"}) EXPECT_EQ(sum(*s, table), sum(*target.session("shop"), table)) << table;
  EXPECT_TRUE(store.verify(w.context()).equal);
  switch_over(w, store, {Side::source});
  quiesced_equal(source, target);
}

// Stopped or killed while an index is built, and resumed at once; and no password of a user mapping gets into the target's log.
TEST(PostgresCopyLocks, StoppedAndKilledWhileAnIndexIsBuilt) {
  Shop shop("SET search_path = public; CREATE FUNCTION slow(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS 'BEGIN IF current_setting(''application_name'') = ''rehome copy'' THEN PERFORM pg_catalog.pg_sleep(0.1); END IF; RETURN $1; END'; "
            "CREATE TABLE item(id int PRIMARY KEY, t text); INSERT INTO item SELECT i, 'x' FROM generate_series(1, 40) i; CREATE INDEX item_slow ON item (slow(id)); "
            "CREATE FOREIGN DATA WRAPPER dummy; CREATE SERVER far FOREIGN DATA WRAPPER dummy; CREATE USER MAPPING FOR postgres SERVER far OPTIONS (password 'geheim')", 15, 17);
  auto& [source, target, s, w, store] = shop;
  auto t = target.session("postgres");
  for (const char* loud : {"log_statement = 'all'", "log_min_duration_statement = 0", "log_duration = on", "log_transaction_sample_rate = 1", "log_min_error_statement = 'debug5'"}) t->exec(std::string("ALTER SYSTEM SET ") + loud);
  t->exec("SELECT pg_reload_conf()");
  store.prepare(w.context());
  const std::string building = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'rehome copy' AND state = 'active' AND query LIKE '%CREATE INDEX \"item_slow\"%'";
  Ticks stopped = 0;
  {
    std::jthread stopper([&] {
      EXPECT_TRUE(until([&] { return t->number(building) > 0; }));
      stopped = system_clock().now();
      w.cancelled = true;
    });
    expect_interrupted(w, store);
    EXPECT_LT(ms_between(stopped, system_clock().now()), 2500);
  }
  EXPECT_EQ(t->value(building), "0") << "the server goes on with what was stopped";
  w.cancelled = false;
  {
    std::jthread killer([&] {
      EXPECT_TRUE(until([&] { return t->number(building) > 0; }));
      for (const auto& pid : split(run({.argv = {"pgrep", "-P", std::to_string(::getpid()), "-x", "pg_restore"}}).out, '\n'))
        if (!pid.empty()) ::kill(-std::atoi(pid.c_str()), SIGKILL);
    });
    EXPECT_THROW(store.copy(w.context()), Error);
  }
  EXPECT_EQ(t->value(building), "1") << "this test needs a server that does not notice";
  store.copy(w.context());
  store.follow(w.context());
  wait_until_following(w, store);
  s->exec("CREATE SERVER farther FOREIGN DATA WRAPPER dummy; CREATE USER MAPPING FOR postgres SERVER farther OPTIONS (password 'geheimer')");
  store.recopy(w.context());
  EXPECT_FALSE(w.said("as a whole")) << join(w.lines, "\n");
  const char* mappings = "SELECT string_agg(srvname || umoptions::text, ' ' ORDER BY srvname) FROM pg_user_mappings";
  EXPECT_EQ(target.session("shop")->value(mappings), s->value(mappings));
  EXPECT_NE(target.log().find("CREATE DATABASE"), std::string::npos);
  EXPECT_EQ(target.log().find("geheim"), std::string::npos);
  quiesced_equal(source, target);
}

TEST(PostgresCopyLocks, AStatementIsStopped) {
  PgServer server(15);
  auto s = server.session("postgres");
  std::atomic<bool> stop{false};
  s->stop_on(stop);
  std::jthread stopper([&] {
    system_clock().sleep(Millis(300));
    stop = true;
  });
  Ticks from = system_clock().now();
  try {
    s->exec("SELECT pg_sleep(20)");
    ADD_FAILURE() << "was to be stopped";
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::interrupted) << e.what();
  }
  EXPECT_LT(ms_between(from, system_clock().now()), 2000);
}

// Whatever a phase locks, it waits 100 ms for all of it together: locks that others let go one after the other must not add up, nor
// does one that is held for long keep us in its queue. The size of a table is asked without a lock that anybody could wait for.
TEST(PostgresCopyLocks, EveryWaitForLocksIsBounded) {
  constexpr int kTables = 9;
  std::string sql = "SET search_path = public";
  for (int i = 0; i < kTables; i++) sql += "; CREATE TABLE t" + std::to_string(i) + "(id bigserial PRIMARY KEY, t text); INSERT INTO t" + std::to_string(i) + "(t) SELECT 'x' FROM generate_series(1, 100)";
  Shop shop(sql);
  auto& [source, target, s, w, store] = shop;
  std::atomic<double> longest{0}, writer_waited{0};
  std::string waited_most;
  // Of a session between two statements, what is shown is the last one and its begin, while pg_locks may know the next one's wait already.
  std::jthread sampler([&](std::stop_token stop) {
    auto look = source.session("shop");
    while (!stop.stop_requested()) {
      for (auto& r : look->query("SELECT extract(epoch FROM clock_timestamp() - query_start) * 1000, application_name || ': ' || left(query, 200) FROM pg_stat_activity a WHERE state = 'active' AND application_name LIKE 'rehome%' AND query NOT LIKE '%pg_table_size%' AND EXISTS "
                                 "(SELECT 1 FROM pg_locks l WHERE l.pid = a.pid AND NOT l.granted AND l.locktype = 'relation')"))
        if (std::stod(*r[0]) > longest) longest = std::stod(*r[0]), waited_most = *r[1];
      system_clock().sleep(Millis(3));
    }
  });
  std::jthread writer([&](std::stop_token stop) {
    auto own = source.session("shop");
    while (!stop.stop_requested()) {
      Ticks from = system_clock().now();
      try {
        own->exec("INSERT INTO public.t0(t) VALUES ('w')");
      } catch (const PgError&) {
        return;   // after the switch
      }
      writer_waited = std::max(writer_waited.load(), ms_between(from, system_clock().now()));
      system_clock().sleep(Millis(3));
    }
  });
  // Each of the other tables is let go 60 ms after somebody asks for it, the last one after half a second.
  auto while_held = [&](const char* mode, const char* what, const std::function<void()>& work) {
    longest = writer_waited = 0;
    {
      std::vector<std::jthread> holders;
      std::atomic<int> held{0}, asked{0};
      for (int i = 1; i < kTables; i++)
        holders.emplace_back([&, i](std::stop_token stop) {
          const std::string name = "public.t" + std::to_string(i);
          auto holder = source.session("shop"), look = source.session("shop");
          holder->exec("BEGIN; LOCK TABLE " + name + " IN " + mode + " MODE");
          held++;
          while (!stop.stop_requested() && look->number("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = '" + name + "'::regclass") == 0) system_clock().sleep(Millis(3));
          if (!stop.stop_requested()) asked++;
          system_clock().sleep(Millis(i == kTables - 1 ? 500 : 60));
          holder->exec("ROLLBACK");
        });
      while (held < kTables - 1) system_clock().sleep(Millis(5));
      work();
      EXPECT_GT(asked, 3) << what;
    }
    std::printf("  %s: waited %.0f ms at most, a writer %.0f ms\n", what, longest.load(), writer_waited.load());
    EXPECT_LT(longest, 180) << what << ": " << waited_most;
    EXPECT_LT(writer_waited, 260) << what;
  };
  while_held("SHARE ROW EXCLUSIVE", "fence", [&] { store.prepare(w.context()); });
  source.session("shop", "rehome by hand")->exec("DROP PUBLICATION " + pg_identifier(store.flow("shop", Side::source).publication));
  while_held("SHARE ROW EXCLUSIVE", "publication", [&] { store.prepare(w.context()); });
  {
    longest = writer_waited = 0;
    std::jthread holder([&](std::stop_token stop) {
      auto own = source.session("shop");
      while (!stop.stop_requested()) {
        own->exec("BEGIN; LOCK TABLE public.t8 IN ACCESS EXCLUSIVE MODE");
        system_clock().sleep(Millis(400));
        own->exec("ROLLBACK");
        system_clock().sleep(Millis(250));
      }
    });
    store.copy(w.context());
    std::printf("  copy: waited %.0f ms at most, a writer %.0f ms\n", longest.load(), writer_waited.load());
    EXPECT_GT(longest, 20) << "the copy met no lock";
    EXPECT_LT(longest, 180) << waited_most;
    EXPECT_LT(writer_waited, 260);
  }
  store.follow(w.context());
  wait_until_following(w, store);
  store.prepare_reverse(w.context(), {Side::source});
  while_held("SHARE ROW EXCLUSIVE", "micro-fence", [&] { store.micro_fence(w.context(), {Side::source}, Deadline::in(Millis(30000))); });
  while_held("SHARE ROW EXCLUSIVE", "comparison", [&] { EXPECT_TRUE(store.verify(w.context()).equal); });
}

}  // namespace
}  // namespace rehome
