// Large objects between real servers: exact, whatever was done to them, and never whole in this process.
#include "stores/postgres/large_objects.h"

#include <gtest/gtest.h>

#include <cstdio>

#include "base/text.h"
#include "stores/postgres/testing/life.h"
#include "sys/fs.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kMemoryTells = false;   // what was freed is kept for a while
#else
constexpr bool kMemoryTells = true;
#endif

// Of this process, in kilobytes: "VmRSS", "VmHWM".
std::int64_t memory(const std::string& what) {
  for (const auto& line : split(read_file("/proc/self/status"), '\n'))
    if (line.starts_with(what + ":")) return std::atoll(line.c_str() + what.size() + 1);
  return 0;
}

void forget_peak() {
  FILE* f = std::fopen("/proc/self/clear_refs", "w");
  ASSERT_NE(f, nullptr);
  std::fputs("5", f);
  std::fclose(f);
}

// Every page of every object, its owner and rights; a hole is a page that is not there.
std::string state(PgSession& s) {
  return s.value("SELECT coalesce(string_agg(m.oid || ' ' || pg_get_userbyid(m.lomowner) || ' ' || " + large_object_rights() + " || ' ' || coalesce(l.x, 'empty'), '; ' ORDER BY m.oid), '') "
                 "FROM pg_largeobject_metadata m LEFT JOIN (SELECT loid, count(*) || ' pages, last ' || max(pageno) || ', ' || sum(hashtextextended(pageno || md5(data), 0)) AS x FROM pg_largeobject GROUP BY loid) l ON l.loid = m.oid");
}

// `megabytes` of them, different ones, at `from` megabytes.
std::string fill(int object, int from, int megabytes) {
  return "SELECT count(lo_put(" + std::to_string(object) + ", i::bigint * 1048576, decode(repeat(md5(i::text), 65536 / 2), 'hex') || decode(repeat(md5((-i)::text), 65536 / 2), 'hex'))) FROM generate_series(" + std::to_string(from) + ", " +
         std::to_string(from + megabytes - 1) + ") i";
}

class PostgresLargeObjects : public ::testing::TestWithParam<std::pair<int, int>> {};

TEST_P(PostgresLargeObjects, OnlyChangedPagesTravel) {
  auto [from, to] = GetParam();
  PgServer source(from), target(to);
  for (const auto* server : {&source, &target}) {
    server->session("postgres")->exec("CREATE DATABASE shop");
    server->session("shop")->exec("CREATE ROLE keeper; CREATE ROLE reader");
  }
  auto s = source.session("shop"), t = target.session("shop");
  auto carry = [&] {
    auto carried = carry_large_objects(*s, *t, Deadline::in(Millis(120000)));
    EXPECT_EQ(state(*s), state(*t));
    return carried;
  };
  EXPECT_EQ(carry().objects, 0);
  s->exec("SELECT lo_create(o) FROM unnest('{500, 501, 502, 503, 504}'::oid[]) o; " + fill(500, 0, 70) + "; " + fill(500, 75, 10) + "; " + fill(501, 0, 2) +
          "; SELECT lo_put(502, 0, 'small'); GRANT SELECT ON LARGE OBJECT 502 TO reader; ALTER LARGE OBJECT 503 OWNER TO keeper; SELECT lo_from_bytea(10000 + i, i::text::bytea) FROM generate_series(1, 1200) i");
  auto carried = carry();
  EXPECT_EQ(carried.objects, 1205);
  EXPECT_EQ(carried.pages, 82 * 512 + 1 + 1200);
  EXPECT_EQ(t->value("SELECT md5(lo_get(500))"), s->value("SELECT md5(lo_get(500))"));
  EXPECT_EQ(carry().objects, 0);

  s->exec("SELECT lo_put(500, 40000000, 'x')");
  carried = carry();
  EXPECT_EQ(carried.objects, 1);
  EXPECT_EQ(carried.pages, 1);
  // Shorter to a page, which leaves an empty one behind, and to a byte within one; longer again, which leaves a hole where pages were.
  s->exec("SELECT lo_truncate64(lo_open(500, 131072), 71000001); SELECT lo_truncate(lo_open(501, 131072), 2048 * 10); SELECT lo_put(501, 2048 * 600, 'behind a hole')");
  carried = carry();
  EXPECT_EQ(carried.objects, 2);
  EXPECT_EQ(carried.pages, 3);
  EXPECT_EQ(t->value("SELECT length(lo_get(500)) || ' ' || length(lo_get(501))"), "71000001 " + std::to_string(2048 * 600 + 13));
  s->exec("SELECT lo_truncate(lo_open(501, 131072), 0)");
  EXPECT_EQ(carry().pages, 1);
  // Rights alone bring no page.
  s->exec("GRANT UPDATE ON LARGE OBJECT 500 TO public; GRANT SELECT ON LARGE OBJECT 500 TO reader WITH GRANT OPTION; REVOKE ALL ON LARGE OBJECT 502 FROM reader; REVOKE ALL ON LARGE OBJECT 504 FROM CURRENT_USER; ALTER LARGE OBJECT 500 OWNER TO keeper");
  carried = carry();
  EXPECT_EQ(carried.objects, 3);
  EXPECT_EQ(carried.pages, 0);
  EXPECT_EQ(carry().objects, 0);
  s->exec("SELECT lo_unlink(500), lo_unlink(503); SELECT lo_unlink(oid) FROM pg_largeobject_metadata WHERE oid > 10000; SELECT lo_from_bytea(503, 'made anew')");
  EXPECT_EQ(carry().objects, 1202);
  EXPECT_EQ(t->value("SELECT count(*) FROM pg_largeobject WHERE loid = 500 OR loid > 10000"), "0");
  // The other way.
  t->exec("SELECT lo_put(503, 5, 'w'), lo_unlink(504), lo_from_bytea(900, 'there')");
  EXPECT_EQ(carry_large_objects(*t, *s, Deadline::in(Millis(120000))).objects, 3);
  EXPECT_EQ(state(*s), state(*t));
  EXPECT_EQ(s->value("SELECT encode(lo_get(503), 'escape')"), "made wnew");
}

INSTANTIATE_TEST_SUITE_P(Majors, PostgresLargeObjects, ::testing::Values(std::pair{15, 15}, std::pair{13, 18}, std::pair{17, 13}),
                         [](const auto& p) { return std::to_string(p.param.first) + "to" + std::to_string(p.param.second); });

// A whole life with an object that is larger than what this process may need: copied at the beginning, changed under the fence, and
// on the way back; nothing is left but the objects.
TEST(PostgresLargeObject, OfAnySizeInConstantMemory) {
  constexpr int kMegabytes = 300;
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  s->exec("CREATE TABLE public.item(id int PRIMARY KEY, file oid)");
  s->exec("SELECT lo_create(77); " + fill(77, 0, 120) + "; " + fill(77, 140, kMegabytes - 140) + "; INSERT INTO public.item VALUES (1, 77); SELECT lo_from_bytea(78, 'goes')");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  Estimate estimate = store.estimate(w.context());
  std::printf("  estimated: %s\n", join(estimate.reasons, "; ").c_str());
  forget_peak();
  std::int64_t before = memory("VmRSS");
  Ticks from = system_clock().now();
  begin(w, store);
  std::printf("  begun with %d MB in one object in %.1f s\n", kMegabytes, ms_between(from, system_clock().now()) / 1000);
  auto t = target.session("shop");
  EXPECT_EQ(state(*s), state(*t));
  EXPECT_NE(store.verify(w.context()).detail.dump().find("\"copied\":\"in the pause\",\"equal\":true"), std::string::npos);

  Direction there{Side::source};
  store.prepare_reverse(w.context(), there);
  from = system_clock().now();
  auto cut = store.open_cut(w.context(), there);
  std::printf("  the pass before the pause: %.0f ms\n", ms_between(from, system_clock().now()));
  s->exec("SELECT lo_put(77, 200000000, 'x'), lo_unlink(78), lo_from_bytea(79, 'new'); SELECT lo_truncate64(lo_open(77, 131072), 290000000)");
  Deadline deadline = Deadline::in(Millis(60000));
  cut->soft_fence(deadline);
  cut->marker(deadline);
  from = system_clock().now();
  cut->catch_up(deadline);
  double compared = ms_between(from, system_clock().now());
  std::printf("  compared and carried inside the pause: %.0f ms\n", compared);
  EXPECT_EQ(state(*s), state(*t));
  EXPECT_EQ(t->value("SELECT length(lo_get(77, 289999990, 100)) || ' ' || encode(lo_get(77, 200000000, 1), 'escape')"), "10 x");
  cut->compare(deadline);
  cut->release();
  cut.reset();

  switch_over(w, store, there);
  t = target.session("shop");
  t->exec("SELECT lo_put(77, 5, 'y'), lo_unlink(79)");
  wait_until_following(w, store);
  switch_over(w, store, {Side::target});
  s = source.session("shop");
  t = target.session("shop");
  EXPECT_EQ(state(*s), state(*t));
  EXPECT_EQ(s->value("SELECT count(*) || encode(lo_get(77, 5, 1), 'escape') FROM pg_largeobject_metadata"), "1y");
  std::int64_t grown = memory("VmHWM") - before;
  std::printf("  this process grew by %lld kB at most\n", static_cast<long long>(grown));
  if (kMemoryTells) {
    EXPECT_LT(grown, 64 << 10);
  }
  w.source.run_actions(store.actions(w.context(), there).undo);
  store.finish(w.context(), Side::source);
  store.unfence_source(w.context());
  EXPECT_EQ(store.leftovers(w.context()), std::vector<std::string>{});
}

}  // namespace
}  // namespace rehome
