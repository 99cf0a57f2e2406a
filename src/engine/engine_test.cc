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

// Loses what is asked of it, or its answer, as a connection that breaks would, `times` times.
struct BrokenLine : JournalBackend {
  BrokenLine(std::vector<std::string>& lines, bool done, int& times, Code code) : lines_(lines), done_(done), times_(times), code_(code) {}
  std::vector<std::string> read_all() override { return lines_; }
  void append(std::size_t from, const std::vector<std::string>& lines) override {
    if (from != lines_.size()) throw Error(Code::conflict, "the next line is another one");
    const bool broken = times_ > 0 && times_-- > 0;
    if (!broken || done_) lines_.insert(lines_.end(), lines.begin(), lines.end());
    if (broken) throw Error(code_, "the connection broke");
  }
  std::vector<std::string>& lines_;
  bool done_;
  int& times_;
  Code code_;
};

TEST(Journal, ALostAnswerIsNoOtherWriter) {
  for (bool done : {false, true}) {
    for (Code code : {Code::unreachable, Code::timeout, Code::io}) {
      for (int broken : {1, 2}) {
        std::vector<std::string> lines;
        int times = 0, failed = 0;
        Journal j(std::make_unique<BrokenLine>(lines, done, times, code), system_clock());
        j.append("message", {{"text", "a"}});
        times = broken;
        for (const char* text : {"b", "c"}) {
          try {
            j.append("message", {{"text", text}});
          } catch (const Error& e) {
            EXPECT_EQ(e.code, code);
            failed++;
          }
        }
        // The same value again is no reason to leave the line unwritten.
        times = 2;
        try {
          j.set_fact("k", 1);
        } catch (const Error&) {
        }
        times = 0;
        j.set_fact("k", 1);
        EXPECT_LE(failed, code == Code::unreachable ? broken - 1 : broken);
        Journal again(std::make_unique<BrokenLine>(lines, done, times, code), system_clock());
        ASSERT_EQ(again.entries().size(), 4u) << done << " " << broken;
        EXPECT_EQ(again.entries()[1]["text"], "b");
        EXPECT_EQ(again.fact("k"), 1);
        // Another writer's line still is one.
        lines.push_back("{}");
        EXPECT_THROW(j.append("message", {{"text", "d"}}), Error);
      }
    }
  }
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
