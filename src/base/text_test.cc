#include "base/text.h"

#include <gtest/gtest.h>

#include "base/json.h"

namespace rehome {

TEST(Text, DurationsNeedAUnit) {
  EXPECT_EQ(parse_duration("300ms"), Millis(300));
  EXPECT_EQ(parse_duration("1.5 s"), Millis(1500));
  EXPECT_EQ(parse_duration("5 min"), Millis(300000));
  EXPECT_FALSE(parse_duration("300"));
  EXPECT_FALSE(parse_duration("-1s"));
  EXPECT_FALSE(parse_duration("fast"));
}

TEST(Text, Sizes) {
  EXPECT_EQ(parse_bytes("10GB"), 10'000'000'000);
  EXPECT_EQ(parse_bytes("1 MiB"), 1048576);
  EXPECT_FALSE(parse_bytes("10 GBs"));
  EXPECT_EQ(human_bytes(999), "999 B");
  EXPECT_EQ(human_bytes(1'440'000'000), "1.4 GB");
}

TEST(Text, NearestNamesWhatWasMeant) {
  EXPECT_EQ(nearest("max_puase", {"max_pause", "drain_deadline"}), "max_pause");
  EXPECT_FALSE(nearest("zzzz", {"max_pause", "drain_deadline"}));
}

TEST(Text, ErrorsCrossTheWireWhole) {
  Error e = Error(Code::store, "slot is gone", "begin again", true).in("shop");
  Error back = error_from_json(parse_json(dump_line(error_to_json(e)), "an error"));
  EXPECT_EQ(back.code, Code::store);
  EXPECT_STREQ(back.what(), "shop: slot is gone");
  EXPECT_EQ(back.hint, "begin again");
  EXPECT_TRUE(back.retryable);
}

}  // namespace rehome
