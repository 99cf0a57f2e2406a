#include "agent/record.h"

#include <gtest/gtest.h>

#include <fcntl.h>
#include <unistd.h>

#include "agent/attempt_fakes.h"
#include "sys/fs.h"

namespace rehome {
namespace {

using testing::FakeBlocks;

FakeBlocks fresh() {
  FakeBlocks b;
  Record first;
  b.block[0] = b.block[1] = encode_record(first);
  return b;
}

Record with(Decision d, std::int64_t attempt) {
  Record r;
  r.decision = d;
  r.attempt = attempt;
  return r;
}

TEST(Record, SurvivesEncoding) {
  Record r{7, (std::int64_t(3) << 32) + 1, 9, Decision::stored, AgentSide::target, true, false, 1234567};
  auto back = decode_record(encode_record(r));
  ASSERT_TRUE(back);
  EXPECT_EQ(encode_record(*back), encode_record(r));
  EXPECT_EQ(back->epoch, r.epoch);
  EXPECT_TRUE(back->forced);
  EXPECT_FALSE(back->settled);
}

TEST(Record, EveryFlippedByteIsSeen) {
  std::string good = encode_record(with(Decision::commit, 3));
  for (std::size_t i = 0; i < 80; i++) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x10);
    EXPECT_FALSE(decode_record(bad)) << i;
  }
}

TEST(Record, TheLastGoodBlockIsNeverWrittenTo) {
  FakeBlocks b = fresh();
  RecordStore store(b);
  store.load();
  store.write(with(Decision::attempt, 1));
  std::string good = encode_record(store.current());
  for (int i = 0; i < 5; i++) {
    b.fails = FakeBlocks::Fails::torn;
    EXPECT_THROW(store.write(with(Decision::commit, 1)), Error);
    EXPECT_FALSE(store.known());
    EXPECT_TRUE(b.block[0] == good || b.block[1] == good);
  }
  store.write(with(Decision::abort, 1));
  EXPECT_TRUE(store.known());
  RecordStore again(b);
  EXPECT_EQ(again.load().decision, Decision::abort);
}

TEST(Record, ATornNewerBlockLeavesTheOlderOne) {
  FakeBlocks b = fresh();
  RecordStore store(b);
  store.load();
  store.write(with(Decision::attempt, 1));
  b.fails = FakeBlocks::Fails::torn;
  EXPECT_THROW(store.write(with(Decision::commit, 1)), Error);
  RecordStore again(b);
  EXPECT_EQ(again.load().decision, Decision::attempt);
}

TEST(Record, ASettledRecordSurvivesTheLossOfEitherBlock) {
  for (int lost : {0, 1}) {
    FakeBlocks b = fresh();
    RecordStore store(b);
    store.load();
    store.write(with(Decision::commit, 1));
    store.settle();
    b.block[lost] = std::string(kBlockSize, 'x');
    RecordStore again(b);
    EXPECT_EQ(again.load().decision, Decision::commit);
  }
}

TEST(Record, NoValidBlockIsAnError) {
  FakeBlocks b;
  b.block[0] = b.block[1] = std::string(kBlockSize, '\0');
  RecordStore store(b);
  EXPECT_THROW(store.load(), Error);
  EXPECT_FALSE(store.loaded());
}

TEST(Record, IsWrittenAgainBeforeItIsActedOn) {
  FakeBlocks b = fresh();
  b.fails = FakeBlocks::Fails::before;
  RecordStore store(b);
  EXPECT_THROW(store.load(), Error);
  EXPECT_FALSE(store.loaded());
}

TEST(Record, OnADisk) {
  TempDir dir;
  std::string path = dir.path() + "/record";
  EXPECT_THROW(open_record_file(path), Error);
  create_record_file(path, {});
  {
    auto file = open_record_file(path);
    RecordStore store(*file);
    store.load();
    store.write(with(Decision::commit, 4));
  }
  auto file = open_record_file(path);
  RecordStore store(*file);
  EXPECT_EQ(store.load().attempt, 4);
  ASSERT_EQ(::truncate(path.c_str(), 5000), 0);
  EXPECT_THROW(open_record_file(path), Error);
}

}  // namespace
}  // namespace rehome
