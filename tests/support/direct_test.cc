#include "support/direct.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace rehome::testing {
namespace {

struct Case {
  std::vector<DirectSeen> seen = {{"a", "superuser", "w1", Outcome::ok},
                                  {"b", "superuser", "w1", Outcome::ok},
                                  {"c", "large-objects", "w2", Outcome::ok},
                                  {"d", "superuser", "w1", Outcome::failed}};
  DirectStored stored = {{{"a", true}, {"b", true}, {"c", true}}, {{"w1", 2}, {"w2", 1}}};
  DirectVerdict judge() const { return judge_direct(seen, stored); }
};

TEST(Direct, CleanIsClean) {
  const DirectVerdict v = Case().judge();
  EXPECT_TRUE(v.clean());
  EXPECT_EQ(v.acknowledged.at("superuser"), 2);
  EXPECT_EQ(v.acknowledged.at("large-objects"), 1);
  EXPECT_EQ(v.failed, 1);
  EXPECT_TRUE(v.findings.empty());
}

TEST(Direct, AMissingRowIsLostOnceThoughItsCounterLacksItToo) {
  Case c;
  c.stored.written.erase("b");
  c.stored.counted["w1"] = 1;
  const DirectVerdict v = c.judge();
  EXPECT_FALSE(v.clean());
  EXPECT_EQ(v.lost.at("superuser"), 1);
  EXPECT_EQ(v.findings.size(), 1u);
}

TEST(Direct, AnObjectWithoutItsBytesIsLost) {
  Case c;
  c.stored.written["c"] = false;
  EXPECT_EQ(c.judge().lost.at("large-objects"), 1);
}

TEST(Direct, ALostUpdateOfASharedRowIsFound) {
  Case c;
  c.stored.counted["w1"] = 1;
  EXPECT_EQ(c.judge().lost.at("superuser"), 1);
  c.stored.counted.erase("w1");
  EXPECT_EQ(c.judge().lost.at("superuser"), 1);
}

TEST(Direct, AnUpdateAppliedTwiceIsDoubled) {
  Case c;
  c.stored.counted["w1"] = 3;
  const DirectVerdict v = c.judge();
  EXPECT_FALSE(v.clean());
  EXPECT_EQ(v.doubled, 1);
}

TEST(Direct, ARefusedWriteMustNotBeThere) {
  Case c;
  c.stored.written["d"] = true;
  c.stored.counted["w1"] = 3;
  EXPECT_EQ(c.judge().doubled, 1);
}

TEST(Direct, AnUnknownWriteMayBeThereWholeOrNotAtAll) {
  Case c;
  c.seen.push_back({"e", "superuser", "w1", Outcome::unknown});
  EXPECT_TRUE(c.judge().clean());
  c.stored.written["e"] = true;
  c.stored.counted["w1"] = 3;
  EXPECT_TRUE(c.judge().clean());
  c.stored.counted["w1"] = 4;
  EXPECT_EQ(c.judge().doubled, 1);
  c.stored.written["e"] = false;
  EXPECT_EQ(c.judge().lost.at("superuser"), 1);
}

TEST(Direct, LinesAreParsedStrictly) {
  const DirectSeen s = parse_direct(R"({"key":"k","kind":"ddl","writer":"w","outcome":"unknown"})");
  EXPECT_EQ(s.key, "k");
  EXPECT_EQ(s.outcome, Outcome::unknown);
  EXPECT_THROW(parse_direct(R"({"key":"k","kind":"dll","writer":"w","outcome":"ok"})"), Error);
  EXPECT_THROW(parse_direct(R"({"key":"k","kind":"ddl","writer":"w","outcome":"fine"})"), Error);
  EXPECT_THROW(parse_direct(R"({"key":"k","kind":"ddl","outcome":"ok"})"), Error);
  EXPECT_THROW(parse_direct("{"), Error);
}

}  // namespace
}  // namespace rehome::testing
