#include <gtest/gtest.h>

#include <set>

#include "engine/step.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// Dies before or after its k-th append, as a killed process would: nothing of the controller survives.
struct Killed {};
class DyingJournal : public JournalBackend {
 public:
  DyingJournal(std::vector<std::string>& lines, int& appends_left, bool after) : lines_(lines), left_(appends_left), after_(after) {}
  std::vector<std::string> read_all() override { return lines_; }
  void append(std::size_t from, const std::vector<std::string>& lines) override {
    REHOME_CHECK(from == lines_.size());
    bool dies = left_-- == 0;
    if (dies && !after_) throw Killed{};
    lines_.insert(lines_.end(), lines.begin(), lines.end());
    if (dies) throw Killed{};
  }

 private:
  std::vector<std::string>& lines_;
  int& left_;
  bool after_;
};

// A world that steps change: each may run many times, but its effect is there once.
struct World {
  std::set<std::string> made;
  std::vector<std::string> order;
  std::vector<Step> steps() {
    std::vector<Step> s;
    for (std::string id : {"prepare", "copy", "follow", "verify"})
      s.push_back({.id = id, .title = "do " + id,
                   .run = [this, id] { made.insert(id); order.push_back(id); },
                   .undo = [this, id] { made.erase(id); }});
    return s;
  }
};

TEST(Engine, KilledBeforeAndAfterEveryJournalWriteAndResumed) {
  std::atomic<bool> never{false};
  for (bool after : {false, true}) {
    for (int at = 0; at < 8; at++) {
      World world;
      std::vector<std::string> lines;
      int left = at;
      try {
        Journal j(std::make_unique<DyingJournal>(lines, left, after), system_clock());
        run_steps(world.steps(), j, never);
        FAIL() << "write " << at << " must have killed it";
      } catch (const Killed&) {
      }
      left = 1000;
      Journal j(std::make_unique<DyingJournal>(lines, left, after), system_clock());
      run_steps(world.steps(), j, never);
      EXPECT_EQ(world.made.size(), 4u) << "killed " << (after ? "after" : "before") << " write " << at;
      for (const auto& s : world.steps()) EXPECT_EQ(j.step(s.id), StepState::done);
      // At most the one step that was in flight ran twice.
      EXPECT_LE(world.order.size(), 5u);
    }
  }
}

TEST(Engine, KilledDuringUndoAndUndoneAgain) {
  std::atomic<bool> never{false};
  for (int at = 8; at < 12; at++) {
    for (bool after : {false, true}) {
      World world;
      std::vector<std::string> lines;
      int left = at;
      try {
        Journal j(std::make_unique<DyingJournal>(lines, left, after), system_clock());
        run_steps(world.steps(), j, never);
        undo_steps(world.steps(), j);
        FAIL();
      } catch (const Killed&) {
      }
      left = 1000;
      Journal j(std::make_unique<DyingJournal>(lines, left, after), system_clock());
      undo_steps(world.steps(), j);
      EXPECT_TRUE(world.made.empty());
    }
  }
}

TEST(Engine, AFailingStepSaysWhichAndRunsAgain) {
  TempDir dir;
  std::atomic<bool> never{false};
  int tries = 0;
  std::vector<Step> steps{{.id = "a", .title = "make a", .run = [&] {
                             if (tries++ == 0) throw Error(Code::store, "slot exists", "drop it");
                           }}};
  {
    Journal j(std::make_unique<FileJournal>(dir.path() + "/j"), system_clock());
    try {
      run_steps(steps, j, never);
      FAIL();
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "make a: slot exists");
    }
    EXPECT_EQ(j.step("a"), StepState::failed);
  }
  Journal j(std::make_unique<FileJournal>(dir.path() + "/j"), system_clock());
  run_steps(steps, j, never);
  EXPECT_EQ(j.step("a"), StepState::done);
  EXPECT_EQ(j.of_kind("step").size(), 4u);
}

TEST(Engine, GroupsRunTogetherAndAllEnd) {
  std::atomic<bool> never{false};
  TempDir dir;
  Journal j(std::make_unique<FileJournal>(dir.path() + "/j"), system_clock());
  std::atomic<int> ended{0};
  std::vector<Step> steps{{.id = "x", .title = "x", .group = "g", .run = [&] { throw Error(Code::io, "no"); }},
                          {.id = "y", .title = "y", .group = "g", .run = [&] {
                             system_clock().sleep(Millis(30));
                             ended++;
                           }}};
  EXPECT_THROW(run_steps(steps, j, never), Error);
  EXPECT_EQ(ended, 1);
  EXPECT_EQ(j.step("y"), StepState::done);
}

TEST(Journal, ATornLastLineIsCutOff) {
  TempDir dir;
  std::string path = dir.path() + "/j";
  {
    Journal j(std::make_unique<FileJournal>(path), system_clock());
    j.set_fact("k", 1);
  }
  write_durably(path, read_file(path) + "{\"n\":1,\"kind\":\"fa");
  Journal j(std::make_unique<FileJournal>(path), system_clock());
  EXPECT_EQ(j.entries().size(), 1u);
  j.set_fact("k", 2);
  Journal again(std::make_unique<FileJournal>(path), system_clock());
  EXPECT_EQ(again.fact("k"), 2);
}

TEST(Journal, TwoWritersConflict) {
  TempDir dir;
  std::string path = dir.path() + "/j";
  FileJournal a(path), b(path);
  a.append(0, {"{}"});
  EXPECT_NO_THROW(a.append(1, {"{}"}));
  EXPECT_THROW(a.append(1, {"{}"}), Error);
}

TEST(Journal, HeldBackLinesBecomeDurableAtTheFlush) {
  TempDir dir;
  std::string path = dir.path() + "/j";
  Journal j(std::make_unique<FileJournal>(path), system_clock());
  j.hold_back();
  j.append("phase", {{"name", "hold"}});
  EXPECT_EQ(read_file(path), "");
  j.append_intent("phase", {{"name", "seal"}});
  EXPECT_EQ(Journal(std::make_unique<FileJournal>(path), system_clock()).entries().size(), 2u);
  j.append("phase", {{"name", "open"}});
  j.flush();
  EXPECT_EQ(Journal(std::make_unique<FileJournal>(path), system_clock()).entries().size(), 3u);
}

}  // namespace
}  // namespace rehome
