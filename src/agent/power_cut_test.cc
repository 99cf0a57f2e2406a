// The record and the journal, with the power failing in every call: what was answered is there afterwards.
#include <fcntl.h>
#include <gtest/gtest.h>

#include "agent/journal_file.h"
#include "agent/record.h"
#include "base/json.h"
#include "sys/fs.h"
#include "sys/testing/power_cut.h"

namespace rehome {
namespace {

using testing::PowerCut;

constexpr unsigned seeds = 5;  // and 0: nothing survives that was not synced

Record with(Decision d, std::int64_t attempt) {
  Record r;
  r.decision = d;
  r.attempt = attempt;
  r.settled = false;
  return r;
}

// Decisions as an attempt makes them; the record is opened anew after each crash. Counts the runs in which an answered one is gone.
int lost_decisions(bool lose) {
  const std::vector<Decision> decisions{Decision::attempt, Decision::commit, Decision::serving, Decision::attempt, Decision::abort};
  int lost = 0;
  std::uint64_t calls = 1;
  for (std::uint64_t k = 0; k <= calls; k++)
    for (unsigned seed = 0; seed <= seeds; seed++) {
      TempDir dir;
      const std::string path = dir.path() + "/record";
      PowerCut cut({dir.path()});
      create_record_file(path, with(Decision::serving, 0));
      const std::uint64_t before = cut.calls();
      cut.lose_syncs(lose);
      cut.fail_at(before + k);
      std::int64_t answered = 0;
      {
        auto file = open_record_file(path);
        RecordStore store(*file);
        store.load();
        for (std::size_t i = 0; i < decisions.size(); i++) {
          store.write(with(decisions[i], static_cast<std::int64_t>(i) + 1));
          if (cut.calls() <= before + k) answered = static_cast<std::int64_t>(i) + 1;
          if (i == 2) store.settle();
        }
        calls = cut.calls() - before;
      }
      cut.crash(seed);
      auto file = open_record_file(path);
      RecordStore store(*file);
      try {
        std::int64_t found = store.load().attempt;
        // The one in which the power failed may be there.
        if (found != answered && found != answered + 1) lost++;
        // Acting on it needs it to be there after the next cut too.
        cut.crash(seed + 1);
        auto again_file = open_record_file(path);
        RecordStore again(*again_file);
        if (again.load().attempt != found) lost++;
      } catch (const Error&) {
        lost++;
      }
    }
  EXPECT_GT(calls, 6u);
  return lost;
}

TEST(PowerCutRecord, AnAnsweredDecisionIsThereAfterwards) {
  EXPECT_EQ(lost_decisions(false), 0);
  EXPECT_GT(lost_decisions(true), 0);
}

TEST(PowerCutRecord, IsMadeWholeOrNotAtAll) {
  std::uint64_t calls = 1;
  for (std::uint64_t k = 0; k <= calls; k++)
    for (unsigned seed = 0; seed <= seeds; seed++) {
      TempDir dir;
      const std::string path = dir.path() + "/record";
      PowerCut cut({dir.path()});
      cut.fail_at(k);
      create_record_file(path, with(Decision::serving, 0));
      calls = cut.calls();
      cut.crash(seed);
      if (!exists(path)) {
        EXPECT_LT(k, calls);
        continue;
      }
      auto file = open_record_file(path);
      RecordStore store(*file);
      EXPECT_NO_THROW(store.load()) << k << " " << seed;
    }
}

std::string line(int n) { return dump_line({{"n", n}, {"kind", "step"}, {"text", std::string(static_cast<std::size_t>(n) * 397 % 3000, 'x')}}); }

// Appends of one and of several lines, the journal opened anew in between. Counts runs in which an answered line is gone, or one is
// there that was never written, or the next append does not continue.
int lost_lines(bool lose) {
  int lost = 0;
  std::uint64_t calls = 1;
  for (std::uint64_t k = 0; k <= calls; k++)
    for (unsigned seed = 0; seed <= seeds; seed++) {
      TempDir dir;
      const std::string path = dir.path() + "/journal.jsonl";
      PowerCut cut({dir.path()});
      cut.lose_syncs(lose);
      cut.fail_at(k);
      std::int64_t answered = 0, next = 0;
      for (int run = 0; run < 2; run++) {
        JournalFile journal(path);
        for (int count : {1, 3, 1}) {
          std::vector<std::string> lines;
          for (int i = 0; i < count; i++) lines.push_back(line(static_cast<int>(next) + i));
          next = journal.append(next, lines);
          if (cut.calls() <= k) answered = next;
        }
      }
      calls = cut.calls();
      cut.crash(seed);
      JournalFile journal(path);
      std::int64_t there = 0;
      std::vector<std::string> lines = journal.read(0, &there);
      bool right = there >= answered && there <= next && static_cast<std::int64_t>(lines.size()) == there;
      for (std::size_t i = 0; i < lines.size(); i++) right = right && lines[i] == line(static_cast<int>(i));
      try {
        right = right && journal.append(there, {line(static_cast<int>(there))}) == there + 1;
      } catch (const Error&) {
        right = false;
      }
      cut.crash(seed + 1);
      std::int64_t after = 0;
      JournalFile(path).read(0, &after);
      right = right && after == there + 1;
      lost += !right;
    }
  EXPECT_GT(calls, 10u);
  return lost;
}

TEST(PowerCutJournal, AnAnsweredLineIsThereAfterwards) {
  EXPECT_EQ(lost_lines(false), 0);
  EXPECT_GT(lost_lines(true), 0);
}

// A process that was killed between making the file and syncing its directory left the second half to its successor.
TEST(PowerCutJournal, AFileMadeByAKilledAgentGetsItsName) {
  TempDir dir;
  const std::string path = dir.path() + "/journal.jsonl";
  PowerCut cut({dir.path()});
  Fd(::open(path.c_str(), O_WRONLY | O_CREAT, 0600));
  JournalFile(path).append(0, {line(0)});
  cut.crash();
  std::int64_t next = 0;
  JournalFile(path).read(0, &next);
  EXPECT_EQ(next, 1);
}

}  // namespace
}  // namespace rehome
