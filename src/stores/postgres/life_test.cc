// The whole life of the driver between real servers, under write load, judged by pg_dump and by the clients' history.
#include <gtest/gtest.h>

#include <cstdio>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/load.h"
#include "stores/postgres/testing/local_site.h"

namespace rehome {
namespace {

using testing::deployment_between;
using testing::Load;
using testing::LocalSite;
using testing::PgServer;
using testing::World;

std::string dump(const PgServer& server, const std::string& database, bool with_sequences = false) {
  Outcome o = run_ok({.argv = {"pg_dump", "-N", "rehome", "--no-publications", "--no-subscriptions", "-d", server.conninfo(database)}}, Deadline::in(Millis(60000)), "pg_dump");
  std::vector<std::string> lines;
  for (auto& line : split(o.out, '\n')) {
    if (line.starts_with("--") || line.starts_with("\\restrict") || line.starts_with("\\unrestrict") || line.find("rehome") != std::string::npos) continue;
    if (!with_sequences && line.find("setval") != std::string::npos) continue;
    if (line.find("SET transaction_timeout") != std::string::npos) continue;
    lines.push_back(line);
  }
  // Rows come in heap order, which is not the same on both sides: compared as a set of lines.
  std::sort(lines.begin(), lines.end());
  return join(lines, "\n");
}

std::string diff(const std::string& a, const std::string& b) {
  auto x = split(a, '\n'), y = split(b, '\n');
  std::vector<std::string> only_a, only_b;
  std::set_difference(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(only_a));
  std::set_difference(y.begin(), y.end(), x.begin(), x.end(), std::back_inserter(only_b));
  if (only_a.size() > 8) only_a.resize(8);
  if (only_b.size() > 8) only_b.resize(8);
  if (only_a.empty() && only_b.empty() && x.size() == y.size()) return {};
  return "only source:\n" + join(only_a, "\n") + "\nonly target:\n" + join(only_b, "\n");
}

LocalSite& at(World& w, Side side) { return side == Side::source ? w.source : w.target; }

void wait_until_following(World& w, PostgresStore& store) {
  Deadline deadline = Deadline::in(Millis(60000));
  while (true) {
    FollowStatus s = store.follow_status(w.context());
    if (s.following && s.trouble.empty() && s.lag_bytes < 1'000'000) return;
    if (deadline.passed()) FAIL() << s.trouble << " " << s.lag_bytes;
    system_clock().sleep(Millis(20));
  }
}

// One switch, as ops does it. Returns the milliseconds between the soft fence's request and the opening.
double switch_over(World& w, PostgresStore& store, Direction d, const std::function<void()>& opened = {}) {
  store.prepare_reverse(w.context(), d);
  ActionSets sets = store.actions(w.context(), d);
  auto cut = store.open_cut(w.context(), d);
  Deadline deadline = Deadline::in(Millis(20000));
  Ticks from = system_clock().now();
  cut->soft_fence(deadline);
  cut->marker(deadline);
  cut->catch_up(deadline);
  cut->compare(deadline);
  cut->arm_reverse(deadline);
  cut->hard_fence(deadline);
  double ms = ms_between(from, system_clock().now());
  Json timings = cut->timings();
  at(w, d.takes()).run_actions(sets.open);
  if (opened) opened();
  cut.reset();
  at(w, d.takes()).run_actions(sets.tail_takes);
  at(w, d.yields).run_actions(sets.tail_yields);
  std::printf("  cut %s: %.1f ms %s\n", d.yields == Side::source ? "forward" : "back", ms, timings.dump().c_str());
  return ms;
}

void quiesced_equal(World& w, PostgresStore& store, const PgServer& a, const PgServer& b) {
  Deadline deadline = Deadline::in(Millis(20000));
  std::string d;
  while (!(d = diff(dump(a, "shop"), dump(b, "shop"))).empty() && !deadline.passed()) system_clock().sleep(Millis(100));
  EXPECT_EQ(d, "");
  (void)w;
  (void)store;
}

TEST(PostgresLife, SwitchAndReverseUnderLoad15to15) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  source.session("shop")->exec("SET search_path = public; " + Load::schema(50));
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  Load load({&source, &target}, "shop", 4);
  store.prepare(w.context());
  store.copy(w.context());
  store.follow(w.context());
  wait_until_following(w, store);
  EXPECT_TRUE(store.needs_recopy(w.context()).empty());
  EXPECT_THROW(target.session("shop")->exec("INSERT INTO public.account VALUES (-1, 0)"), PgError);
  switch_over(w, store, {Side::source}, [&] { load.route(1); });
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
  quiesced_equal(w, store, source, target);
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

}  // namespace
}  // namespace rehome
