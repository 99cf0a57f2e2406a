#include "ops/serves.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace rehome::ops {
namespace {

Json record(std::int64_t epoch, const char* decision, const char* serves) {
  return {{"epoch", epoch}, {"attempt", 3}, {"decision", decision}, {"serves", serves}};
}

TEST(Serves, WhoseRecordIsNewerAndOpen) {
  const Json away;
  EXPECT_EQ(who_serves({record(0, "SERVING", "source"), record(0, "SERVING", "source")}), Side::source);
  EXPECT_EQ(who_serves({record(0, "ATTEMPT", "source"), record(0, "PREPARED", "source")}), Side::source);
  EXPECT_EQ(who_serves({record(0, "SERVING", "source"), away}), Side::source);
  EXPECT_EQ(who_serves({away, record(0, "SERVING", "source")}), Side::source);
  EXPECT_EQ(who_serves({record(1, "COMMIT", "target"), record(1, "OPENED", "target")}), Side::target);
  EXPECT_EQ(who_serves({record(1, "SERVING", "target"), away}), Side::target);
  EXPECT_EQ(who_serves({away, record(1, "OPENED", "target")}), Side::target);
  EXPECT_EQ(who_serves({record(2, "SERVING", "source"), record(0, "REFUSED", "source")}), Side::source);
  EXPECT_EQ(who_serves({record(1, "SERVING", "target"), record(std::int64_t{1} << 32, "SERVING", "target")}), Side::target);
}

TEST(Serves, NobodyDoesBetweenADecisionAndItsOpening) {
  struct Case {
    BySide<Json> records;
    bool by_themselves;
    const char *says, *way_out;
  };
  const Json away;
  const Case cases[] = {
      {{record(1, "COMMIT", "target"), record(0, "SERVING", "source")}, true, "the target has not heard of it", "link"},
      {{record(1, "COMMIT", "target"), record(0, "PREPARED", "source")}, true, "neither side serves", "link"},
      {{record(1, "COMMIT", "target"), record(1, "STORED", "target")}, true, "the target has not opened", "agent"},
      {{away, record(1, "STORED", "target")}, true, "the target has not opened", "agent"},
      {{record(1, "COMMIT", "target"), away}, false, "the target is not reached", "reverse --target-is-gone"},
      {{away, record(0, "PREPARED", "source")}, false, "the source is not reached", "resume --source-is-gone"},
      {{record(1, "PREPARED", "target"), away}, false, "the target is not reached", "reverse --target-is-gone"},
      {{record(1, "PREPARED", "target"), record(2, "COMMIT", "source")}, true, "decided at the target", "link"},
      {{away, record(2, "COMMIT", "source")}, false, "the source is not reached", "bring the source's host back"},
  };
  for (const auto& c : cases) {
    try {
      who_serves(c.records);
      ADD_FAILURE() << c.says;
    } catch (const Error& e) {
      EXPECT_EQ(e.code, Code::unknown);
      EXPECT_EQ(e.retryable, c.by_themselves) << e.message;
      EXPECT_NE(e.message.find(c.says), std::string::npos) << e.message;
      EXPECT_NE(e.hint.find(c.way_out), std::string::npos) << e.hint;
    }
  }
}

}  // namespace
}  // namespace rehome::ops
