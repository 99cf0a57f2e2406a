// The judge is judged: every kind of fault, made by hand, must be found, and nothing else.
#include "support/history.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace rehome::testing {
namespace {

OrderSeen seen(const std::string& key, Outcome outcome = Outcome::ok, std::int64_t start = 0, std::int64_t end = 5000) {
  return {key, start, end, outcome, 1, outcome == Outcome::ok ? 201 : 503, false};
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
std::ostream& operator<<(std::ostream& o, const Counts& c) {
  return o << "lost " << c.lost << " doubled " << c.doubled << " failed " << c.failed << " both " << c.both;
}

TEST(History, CleanIsClean) {
  Verdict v = judge(kBoth, {probe("source", 0, 1), probe("target", 5, 6)}, whole(), "source");
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
    Verdict v = judge(kBoth, {}, s, "");
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
  EXPECT_EQ(counts(judge(kBoth, {}, s, "")), (Counts{1, 0, 0, 0}));
}

TEST(History, EachSecondCopyIsDoubled) {
  auto doubled_after = [](auto break_it) {
    Stored s = whole();
    break_it(s);
    return counts(judge(kBoth, {}, s, ""));
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
  EXPECT_EQ(counts(judge({seen("a"), seen("x", Outcome::unknown)}, {}, s, "")), (Counts{0, 0, 1, 0}));
  s.receipts.erase("b");
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, {}, s, "")), (Counts{0, 0, 1, 0}));
  s.orders["b"].rows = 2;
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, {}, s, "")), (Counts{0, 1, 1, 0}));
}

TEST(History, AnUnknownOrderIsNeverThereInPart) {
  Stored s = whole();
  s.orders["b"].lines_amount = 0;
  EXPECT_EQ(counts(judge({seen("a"), seen("b", Outcome::unknown)}, {}, s, "")), (Counts{1, 0, 1, 0}));
}

TEST(History, FailedAndResetsAndTheLongestWaitAreCounted) {
  OrderSeen reset = seen("b", Outcome::ok, 1000, 91'000);
  reset.reset = true;
  Verdict v = judge({seen("a"), reset, seen("f", Outcome::failed)}, {}, whole(), "");
  EXPECT_EQ(counts(v), (Counts{0, 0, 1, 0}));
  EXPECT_EQ(v.resets, 1);
  EXPECT_DOUBLE_EQ(v.longest_wait_ms, 90);
  EXPECT_EQ(v.longest_wait_at_us, 1000);
  EXPECT_TRUE(v.clean());
}

TEST(History, AKeyAcknowledgedInOneOfTwoHistoriesIsAcknowledged) {
  Stored s = whole();
  s.orders.erase("a");
  Verdict v = judge({seen("a", Outcome::unknown), seen("a"), seen("b")}, {}, s, "");
  EXPECT_EQ(counts(v), (Counts{1, 0, 0, 0}));
  EXPECT_EQ(v.acknowledged, 2);
}

TEST(History, AWriteAfterTheHandoverIsFound) {
  const ProbeSeen first = probe("target", 100, 110), later = probe("target", 200, 210);
  auto both = [&](std::vector<ProbeSeen> more, const char* yielding = "source") {
    more.push_back(later);
    more.push_back(first);
    return judge({}, more, Stored(), yielding).both_accepting;
  };
  EXPECT_EQ(both({probe("source", 111, 120)}), 1);
  EXPECT_EQ(both({probe("source", 111, 120), probe("source", 150, 160)}), 2);
  // Overlapping the first one, either may have come first.
  EXPECT_EQ(both({probe("source", 110, 120)}), 0);
  EXPECT_EQ(both({probe("source", 90, 150)}), 0);
  EXPECT_EQ(both({probe("source", 111, 120, ProbeOutcome::refused)}), 0);
  EXPECT_EQ(both({probe("source", 111, 120, ProbeOutcome::unknown)}), 0);
  EXPECT_EQ(both({probe("source", 111, 120)}, ""), 0);
  // The other way round: the target yields, the source took over before.
  EXPECT_EQ(both({probe("source", 50, 60)}, "target"), 2);
}

TEST(History, NoHandoverNoFault) {
  EXPECT_EQ(judge({}, {probe("source", 1, 2), probe("target", 0, 1, ProbeOutcome::refused)}, Stored(), "source").both_accepting, 0);
}

TEST(History, ALostOrderSaysWhereItIs) {
  Stored s = whole();
  s.orders.erase("a");
  Verdict v = judge(kBoth, {}, s, "", whole());
  ASSERT_EQ(v.findings.size(), 1u);
  EXPECT_EQ(v.findings[0], "lost: a is on the other side only");
}

TEST(History, LinesAreParsedStrictly) {
  OrderSeen o = parse_order(R"({"key":"k","start_us":1,"end_us":2,"outcome":"unknown","tries":2,"status":0,"reset":true})");
  EXPECT_EQ(o.outcome, Outcome::unknown);
  EXPECT_TRUE(o.reset);
  EXPECT_EQ(parse_probe(R"({"side":"target","start_us":1,"end_us":2,"outcome":"refused"})").outcome, ProbeOutcome::refused);
  EXPECT_THROW(parse_order("{\"key\":\"k\""), Error);
  EXPECT_THROW(parse_order(R"({"key":"k","start_us":1,"end_us":2,"outcome":"fine","tries":2,"status":0,"reset":true})"), Error);
  EXPECT_THROW(parse_probe(R"({"side":"left","start_us":1,"end_us":2,"outcome":"refused"})"), Error);
}

}  // namespace
}  // namespace rehome::testing
