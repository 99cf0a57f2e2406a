// The judge is judged: every kind of fault, made by hand, must be found, and nothing else.
#include "support/history.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace rehome::testing {
namespace {

OrderSeen seen(const std::string& key, Outcome outcome = Outcome::ok, std::int64_t start = 0, std::int64_t end = 5000) {
  return {key, start, end, outcome, false};
}

ProbeSeen probe(const char* side, std::int64_t start, std::int64_t end, ProbeOutcome outcome = ProbeOutcome::accepted) {
  return {side, start, end, outcome};
}

// Holds a and b whole.
Stored whole() {
  Stored s;
  s.orders["a"] = {.id = 1, .total = 300, .lines = 2, .lines_amount = 300};
  s.orders["b"] = {.id = 2, .total = 100, .lines = 1, .lines_amount = 100};
  s.receipts = {{"a", 1}, {"b", 2}};
  s.sold = s.booked = 3;
  return s;
}

const std::vector<OrderSeen> kBoth = {seen("a"), seen("b")};

struct Counts {
  std::int64_t lost, doubled, failed, both;
  bool operator==(const Counts&) const = default;
};
Counts counts(const Verdict& v) { return {v.lost, v.doubled, v.failed, v.both_accepting}; }
Verdict judge(const std::vector<OrderSeen>& orders, const Stored& serving) { return judge(Told{.orders = orders}, serving); }
std::ostream& operator<<(std::ostream& o, const Counts& c) {
  return o << "lost " << c.lost << " doubled " << c.doubled << " failed " << c.failed << " both " << c.both;
}

TEST(History, CleanIsClean) {
  Stored s = whole();
  s.probes = {{{"source", 0}, 1}, {{"target", 5}, 1}};
  Verdict v = judge({.orders = kBoth, .probes = {probe("source", 0, 1), probe("target", 5, 6)}, .sides = {"source", "target"},
                     .at_least = 2, .none_failed = true}, s);
  EXPECT_EQ(counts(v), (Counts{0, 0, 0, 0}));
  EXPECT_EQ(v.acknowledged, 2);
  EXPECT_DOUBLE_EQ(v.longest_wait_ms, 5);
  EXPECT_TRUE(v.clean());
  EXPECT_TRUE(v.findings.empty());
}

TEST(History, EachMissingPartOfAnAcknowledgedOrderIsLost) {
  auto lost_after = [](auto break_it) {
    Stored s = whole();
    break_it(s);
    Verdict v = judge(kBoth, s);
    EXPECT_FALSE(v.clean());
    EXPECT_EQ(v.findings.size(), 1u);
    return counts(v);
  };
  const Counts one{1, 0, 0, 0};
  EXPECT_EQ(lost_after([](Stored& s) { s.orders.erase("a"); }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.receipts.erase("a"); }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.receipts["a"] = 2; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.receipts["a"] = -1; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.orders["a"].lines_amount = 200; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.orders["a"].lines = 0, s.orders["a"].lines_amount = 0; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.orders["a"].outbox = 0; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.orders["a"].audit = 0; }), one);
  EXPECT_EQ(lost_after([](Stored& s) { s.booked = 2; }), one);
}

TEST(History, ALostOrderIsCountedOnceThoughItsStockIsStillBooked) {
  Stored s = whole();
  s.orders.erase("a");
  s.sold = 1;
  EXPECT_EQ(counts(judge(kBoth, s)), (Counts{1, 0, 0, 0}));
}

TEST(History, EachSecondCopyIsDoubled) {
  auto doubled_after = [](auto break_it) {
    Stored s = whole();
    break_it(s);
    return counts(judge(kBoth, s));
  };
  const Counts one{0, 1, 0, 0};
  EXPECT_EQ(doubled_after([](Stored& s) { s.orders["b"].rows = 2; }), one);
  EXPECT_EQ(doubled_after([](Stored& s) { s.orders["b"].lines_amount = 200; }), one);
  EXPECT_EQ(doubled_after([](Stored& s) { s.orders["b"].outbox = 2; }), one);
  EXPECT_EQ(doubled_after([](Stored& s) { s.orders["b"].audit = 2; }), one);
  EXPECT_EQ(doubled_after([](Stored& s) { s.booked = 4; }), one);
}

TEST(History, AnUnknownOrderMayBeThereOnceOrNot) {
  Stored s = whole();
  EXPECT_EQ(counts(judge({seen("a"), seen("x", Outcome::unknown)}, s)), (Counts{0, 0, 1, 0}));
  s.receipts.erase("b");
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, s)), (Counts{0, 0, 1, 0}));
  s.orders["b"].rows = 2;
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, s)), (Counts{0, 1, 1, 0}));
}

TEST(History, AnUnknownOrderIsNeverThereInPart) {
  Stored s = whole();
  s.orders["b"].lines_amount = 0;
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, s)), (Counts{1, 0, 1, 0}));
}

TEST(History, FailedAndResetsAndTheLongestWaitAreCounted) {
  OrderSeen reset = seen("b", Outcome::ok, 1000, 91'000);
  reset.reset = true;
  Verdict v = judge({seen("a"), reset, seen("f", Outcome::failed)}, whole());
  EXPECT_EQ(counts(v), (Counts{0, 0, 1, 0}));
  EXPECT_EQ(v.resets, 1);
  EXPECT_DOUBLE_EQ(v.longest_wait_ms, 90);
  EXPECT_EQ(v.longest_wait_at_us, 1000);
  EXPECT_TRUE(v.clean());
}

TEST(History, AKeyAcknowledgedInOneOfTwoHistoriesIsAcknowledged) {
  Stored s = whole();
  s.orders.erase("a");
  Verdict v = judge({seen("a", Outcome::unknown), seen("a"), seen("b")}, s);
  EXPECT_EQ(counts(v), (Counts{1, 0, 0, 0}));
  EXPECT_EQ(v.acknowledged, 2);
}

// A side that holds every row of these probes.
Stored holding(const std::vector<ProbeSeen>& probes) {
  Stored s;
  for (auto& p : probes) ++s.probes[{p.side, p.start_us}];
  return s;
}

TEST(History, AWriteAfterTheHandoverIsFound) {
  const ProbeSeen first = probe("target", 100, 110), later = probe("target", 200, 210), before = probe("source", 10, 20);
  auto both = [&](std::vector<ProbeSeen> more) {
    for (auto& p : {before, later, first}) more.push_back(p);
    Verdict v = judge({.probes = more, .sides = {"source", "target"}}, holding(more));
    EXPECT_EQ(v.unmet, 0);
    return v.both_accepting;
  };
  EXPECT_EQ(both({probe("source", 111, 120)}), 1);
  EXPECT_EQ(both({probe("source", 111, 120), probe("source", 150, 160)}), 2);
  EXPECT_EQ(both({probe("source", 111, 120, ProbeOutcome::found)}), 1);
  // Overlapping the first one, either may have come first.
  EXPECT_EQ(both({probe("source", 110, 120)}), 0);
  EXPECT_EQ(both({probe("source", 90, 150)}), 0);
  EXPECT_EQ(both({probe("source", 111, 120, ProbeOutcome::refused)}), 0);
  EXPECT_EQ(both({probe("source", 111, 120, ProbeOutcome::unknown)}), 0);
  // The other way round: the target yields, the source took over before.
  EXPECT_EQ(judge({.probes = {first, later, probe("source", 50, 60)}, .sides = {"target", "source"}}, Stored()).both_accepting, 2);
}

// Each kind of store has its own first write, and its own rows or lines.
TEST(History, FilesAreJudgedBesideTheDatabases) {
  const std::vector<ProbeSeen> rows = {probe("source", 10, 20), probe("target", 100, 110)};
  auto with = [&](std::vector<ProbeSeen> lines) {
    Stored held = holding(rows);
    held.file_probes = holding(lines).probes;
    return judge({.probes = rows, .file_probes = lines, .sides = {"source", "target"}}, held);
  };
  EXPECT_TRUE(with({probe("source", 120, 125), probe("target", 130, 140)}).clean());
  EXPECT_EQ(with({probe("source", 50, 60), probe("target", 100, 110), probe("source", 120, 125)}).both_accepting, 1);
  EXPECT_EQ(with({probe("source", 50, 60), probe("target", 0, 1, ProbeOutcome::refused)}).unmet, 1);
  Stored held = holding(rows);
  const std::vector<ProbeSeen> lines = {probe("source", 50, 60), probe("target", 100, 110)};
  held.file_probes = {{{"source", 50}, 2}};
  const Verdict v = judge({.probes = rows, .file_probes = lines, .sides = {"source", "target"}}, held);
  EXPECT_EQ(v.doubled, 1);
  EXPECT_EQ(v.lost, 1);
}

TEST(History, ASideThatNeverServedTakesNothing) {
  const ProbeSeen ours = probe("source", 100, 110);
  auto with = [&](ProbeSeen other) { return judge({.probes = {ours, other}, .sides = {"source"}}, holding({ours})); };
  EXPECT_TRUE(with(probe("target", 0, 1, ProbeOutcome::refused)).clean());
  EXPECT_TRUE(with(probe("target", 0, 1, ProbeOutcome::unknown)).clean());
  EXPECT_EQ(counts(with(probe("target", 0, 1))), (Counts{0, 0, 0, 1}));
}

TEST(History, AWriteThatTheDatabaseTookItselfIsThereOnce) {
  const std::vector<ProbeSeen> probes = {probe("source", 10, 20), probe("source", 30, 40), probe("target", 100, 110),
                                         probe("source", 50, 60, ProbeOutcome::unknown),
                                         probe("source", 70, 80, ProbeOutcome::found),
                                         probe("source", 90, 95, ProbeOutcome::refused)};
  const std::vector<ProbeSeen> taken(probes.begin(), probes.begin() + 3);
  auto after = [&](auto break_it) {
    Stored s = holding(taken);
    break_it(s);
    Verdict v = judge({.probes = probes, .sides = {"source", "target"}}, s);
    EXPECT_EQ(v.clean(), v.findings.empty());
    return counts(v);
  };
  EXPECT_EQ(after([](Stored&) {}), (Counts{0, 0, 0, 0}));
  EXPECT_EQ(after([](Stored& s) { s.probes.erase({"source", 30}); }), (Counts{1, 0, 0, 0}));
  EXPECT_EQ(after([](Stored& s) { s.probes.erase({"target", 100}); }), (Counts{1, 0, 0, 0}));
  EXPECT_EQ(after([](Stored& s) { s.probes.clear(); }), (Counts{3, 0, 0, 0}));
  EXPECT_EQ(after([](Stored& s) { s.probes[{"source", 10}] = 2; }), (Counts{0, 1, 0, 0}));
  // Whoever was told nothing may find it there or not, but once.
  EXPECT_EQ(after([](Stored& s) { s.probes[{"source", 50}] = s.probes[{"source", 70}] = 1; }), (Counts{0, 0, 0, 0}));
  EXPECT_EQ(after([](Stored& s) { s.probes[{"source", 50}] = 2; }), (Counts{0, 1, 0, 0}));
  // Refused, it is done again elsewhere.
  EXPECT_EQ(after([](Stored& s) { s.probes[{"source", 90}] = 1; }), (Counts{0, 1, 0, 0}));
}

TEST(History, TwoWritesOfOneMomentAreTwoRows) {
  const std::vector<ProbeSeen> two = {probe("source", 10, 20), probe("source", 10, 21)};
  EXPECT_TRUE(judge({.probes = two, .sides = {"source"}}, holding(two)).clean());
  EXPECT_EQ(counts(judge({.probes = two, .sides = {"source"}}, holding({two[0]}))), (Counts{1, 0, 0, 0}));
}

TEST(History, AWriteAfterTheHandoverIsNotAlsoLost) {
  const std::vector<ProbeSeen> probes = {probe("source", 10, 20), probe("target", 100, 110), probe("source", 120, 130)};
  EXPECT_EQ(counts(judge({.probes = probes, .sides = {"source", "target"}}, holding({probes[0], probes[1]}))), (Counts{0, 0, 0, 1}));
}

TEST(History, AVerdictOnNothingIsNotClean) {
  EXPECT_EQ(judge({.orders = kBoth, .at_least = 3}, whole()).unmet, 1);
  EXPECT_EQ(judge({.orders = {seen("a")}, .earlier = kBoth, .at_least = 2}, whole()).unmet, 1);
  EXPECT_EQ(judge({.orders = {seen("a"), seen("b"), seen("x", Outcome::failed)}, .none_failed = true}, whole()).unmet, 1);
  EXPECT_TRUE(judge({.orders = kBoth, .earlier = {seen("x", Outcome::failed)}, .none_failed = true}, whole()).clean());
  const std::vector<ProbeSeen> one = {probe("source", 10, 20), probe("target", 1, 2, ProbeOutcome::refused)};
  EXPECT_EQ(judge({.probes = one, .sides = {"source"}}, holding({one[0]})).unmet, 0);
  EXPECT_EQ(judge({.probes = one, .sides = {"source", "target"}}, holding({one[0]})).unmet, 1);
  EXPECT_EQ(judge({.probes = one, .sides = {"target"}}, holding({})).unmet, 1);
  EXPECT_EQ(judge({.sides = {"source", "target"}}, Stored()).unmet, 2);
  EXPECT_FALSE(judge({.orders = kBoth, .at_least = 3}, whole()).clean());
}

TEST(History, ALostOrderSaysWhereItIs) {
  Stored s = whole();
  s.orders.erase("a");
  Verdict v = judge(Told{.orders = kBoth}, s, whole());
  ASSERT_EQ(v.findings.size(), 1u);
  EXPECT_EQ(v.findings[0], "lost: a is on the other side only");
}

TEST(History, LinesAreParsedStrictly) {
  OrderSeen o = parse_order(R"({"key":"k","start_us":1,"end_us":2,"outcome":"unknown","reset":true})");
  EXPECT_EQ(o.outcome, Outcome::unknown);
  EXPECT_TRUE(o.reset);
  EXPECT_EQ(parse_probe(R"({"side":"target","start_us":1,"end_us":2,"outcome":"refused"})").outcome, ProbeOutcome::refused);
  EXPECT_THROW(parse_order("{\"key\":\"k\""), Error);
  EXPECT_THROW(parse_order(R"({"key":"k","start_us":1,"end_us":2,"outcome":"fine","reset":true})"), Error);
  EXPECT_THROW(parse_probe(R"({"side":"left","start_us":1,"end_us":2,"outcome":"refused"})"), Error);
}

}  // namespace
}  // namespace rehome::testing
