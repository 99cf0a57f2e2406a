#include "agent/attempt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "agent/attempt_fakes.h"

namespace rehome {
namespace {

using testing::FakeBlocks;
using testing::FakeSite;
using testing::World;

// One site serves, released; the other is closed and sends its clients there.
void expect_served(World& w, AgentSide serves, const std::string& when) {
  FakeSite& a = w.at(serves);
  FakeSite& b = w.at(other(serves));
  EXPECT_TRUE(a.open) << when;
  EXPECT_FALSE(b.open) << when;
  EXPECT_EQ(a.gate, GateWish::local) << when;
  EXPECT_EQ(b.gate, GateWish::peer) << when;
  EXPECT_EQ(a.record().serves, serves) << when;
  EXPECT_EQ(b.record().serves, serves) << when;
  EXPECT_TRUE(a.record().settled && b.record().settled) << when;
  EXPECT_FALSE(a.forbidden) << when;
}

AgentSide served_by(World& w) { return w.source.open ? AgentSide::source : AgentSide::target; }

Deadline soon(World& w) { return Deadline(w.clock, Millis(0)); }

std::int64_t begun(World& w) {
  auto n = w.source.agent().open(Millis(3000), soon(w));
  w.source.gate_held = true;
  w.source.relays = true;
  return n;
}

TEST(Attempt, SwitchAndReverse) {
  World w;
  EXPECT_TRUE(w.try_switch(AgentSide::source));
  EXPECT_EQ(w.source.gate, GateWish::peer);  // before any background work
  w.settle();
  expect_served(w, AgentSide::target, "after the switch");
  EXPECT_TRUE(w.source.forbidden);
  EXPECT_EQ(w.source.record().epoch, 1);
  EXPECT_TRUE(w.try_switch(AgentSide::target));
  w.settle();
  expect_served(w, AgentSide::source, "after the reverse");
  EXPECT_EQ(w.source.record().attempt, 2);
}

TEST(Attempt, TailsRunInOrderAndTheOthersFirst) {
  World w;
  ASSERT_TRUE(w.try_switch(AgentSide::source));
  w.target.failing = {ActionSet::tail_takes};
  w.settle(Millis(5000));
  EXPECT_EQ(std::count(w.source.done.begin(), w.source.done.end(), "tail_yields"), 0);
  EXPECT_FALSE(w.source.agent().status()["waiting_for"].get<std::string>().empty());
  EXPECT_THROW(w.target.agent().open(Millis(3000), soon(w)), Error);  // not steady
  w.target.failing.clear();
  w.settle();
  EXPECT_EQ(w.source.done, (std::vector<std::string>{"kill", "tail_yields"}));
}

// A disk that failed in an undo, or an agent that died behind its end, may have left the start condition.
TEST(Attempt, AStartConditionThatWasLeftIsLiftedWhereItServesWhenTheAgentStarts) {
  World w;
  ASSERT_TRUE(w.try_switch(AgentSide::source));
  w.settle();
  for (FakeSite* site : {&w.source, &w.target}) {
    site->forbidden = true;
    site->start(false);
    w.settle();
    EXPECT_EQ(site->forbidden, site == &w.source);
  }
}

// What nobody else starts at a boot is started again where it serves, and there alone.
TEST(Attempt, TailsRunAgainAfterAReboot) {
  World w;
  ASSERT_TRUE(w.try_switch(AgentSide::source));
  w.settle();
  for (FakeSite* site : {&w.source, &w.target}) {
    site->done.clear();
    site->start(false);
    w.settle();
    EXPECT_EQ(site->done, std::vector<std::string>{});
    site->start(true);
    w.settle();
    EXPECT_EQ(site->done, site == &w.target ? std::vector<std::string>{"tail_takes"} : std::vector<std::string>{});
  }
  expect_served(w, AgentSide::target, "after the reboots");
}

TEST(Attempt, LeaseEndUndoes) {
  World w;
  auto n = begun(w);
  w.clock.pass(Millis(2900));
  EXPECT_EQ(w.source.agent().renew(n), Millis(3000));
  w.clock.pass(Millis(3000));
  EXPECT_THROW(w.source.agent().renew(n), Error);
  w.settle(Millis(200));
  EXPECT_EQ(w.source.done, (std::vector<std::string>{"cut", "undo", "thaw"}));
  expect_served(w, AgentSide::source, "after the lease");
  EXPECT_TRUE(w.source.agent().status()["undone"].get<bool>());
}

TEST(Attempt, ASleepingHostLosesItsLease) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.clock.pass(Millis(60'000));  // nobody looked meanwhile
  try {
    w.source.agent().commit(n, soon(w));
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::backed_out);
  }
  EXPECT_EQ(w.source.record().decision, Decision::abort);
  w.settle();
  expect_served(w, AgentSide::source, "after a late commit");
}

TEST(Attempt, CommitNeedsTheSeal) {
  World w;
  auto n = begun(w);
  EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
  EXPECT_EQ(w.source.record().decision, Decision::attempt);
}

TEST(Attempt, FirstOfCommitAndAbortWins) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.source.agent().abort(n, "asked");
  EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
  w.settle();
  expect_served(w, AgentSide::source, "aborted");
  EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
  EXPECT_NO_THROW(w.source.agent().abort(n, "again"));

  ASSERT_TRUE(w.try_switch(AgentSide::source));
  auto m = w.source.record().attempt;
  EXPECT_THROW(w.source.agent().abort(m, "late"), Error);
  EXPECT_EQ(w.source.agent().commit(m, soon(w)).what, PeerAnswer::What::opened);  // asked twice
}

TEST(Attempt, ASecondControllerEndsTheFirstOnesAttempt) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.source.agent().controller_changed();
  EXPECT_THROW(w.source.agent().renew(n), Error);
  EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
  EXPECT_THROW(w.source.agent().open(Millis(3000), soon(w)), Error);  // until it is undone
  w.settle();
  EXPECT_NO_THROW(w.source.agent().open(Millis(3000), soon(w)));
}

TEST(Attempt, UndoIsTriedUntilItSucceedsAndTheGateStaysHeld) {
  World w;
  auto n = begun(w);
  w.source.gate = GateWish::hold;
  w.source.open = false;  // some hard fence was up
  w.source.failing = {ActionSet::undo};
  w.source.agent().abort(n, "asked");
  w.settle(Millis(5000));
  EXPECT_EQ(w.source.gate, GateWish::hold);
  EXPECT_NE(w.source.agent().status()["waiting_for"].get<std::string>().find("undo fails"), std::string::npos);
  w.source.failing.clear();
  w.settle(Millis(3000));
  expect_served(w, AgentSide::source, "undone at last");
}

TEST(Attempt, RefusedGoesBack) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.target.failing = {ActionSet::open};
  w.source.open = false;
  EXPECT_EQ(w.source.agent().commit(n, soon(w)).what, PeerAnswer::What::refused);
  EXPECT_EQ(w.source.record().decision, Decision::refused);
  EXPECT_EQ(w.source.record().epoch, 2);
  EXPECT_EQ(w.target.agent().peer_commit(n, 1, soon(w)).what, PeerAnswer::What::refused);  // a late copy
  w.target.failing.clear();
  EXPECT_EQ(w.target.agent().peer_commit(n, 1, soon(w)).what, PeerAnswer::What::refused);
  w.settle();
  expect_served(w, AgentSide::source, "refused");
  EXPECT_TRUE(w.try_switch(AgentSide::source));
  w.settle();
  expect_served(w, AgentSide::target, "after a refusal");
  EXPECT_EQ(w.target.record().epoch, 3);
}

TEST(Attempt, StoredIsOpenedWhateverItTakes) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.source.open = false;
  Record stored = w.target.record();
  // The set fails only once STORED is durable.
  w.lose_answer = true;
  w.target.failing.clear();
  w.source.agent().commit(n, soon(w));
  (void)stored;
  w.settle();
  expect_served(w, AgentSide::target, "answer lost");
}

TEST(Attempt, LateAndDuplicateMessagesChangeNothing) {
  World w;
  ASSERT_TRUE(w.try_switch(AgentSide::source));
  w.settle();
  EXPECT_NO_THROW(w.target.agent().peer_prepared(1, 0));
  EXPECT_EQ(w.target.agent().peer_commit(1, 1, soon(w)).what, PeerAnswer::What::opened);
  ASSERT_TRUE(w.try_switch(AgentSide::target));
  w.settle();
  EXPECT_THROW(w.target.agent().peer_commit(1, 1, soon(w)), Error);
  EXPECT_NO_THROW(w.target.agent().peer_prepared(1, 0));
  expect_served(w, AgentSide::source, "after late messages");
}

TEST(Attempt, CancelIsTheLastWord) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  EXPECT_THROW(w.source.agent().cancel(soon(w)), Error);  // not undone yet
  w.settle();
  w.source.agent().cancel(soon(w));
  EXPECT_EQ(w.source.record().decision, Decision::cancelled);
  EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
  EXPECT_THROW(w.source.agent().open(Millis(3000), soon(w)), Error);
  World v;
  ASSERT_TRUE(v.try_switch(AgentSide::source));
  EXPECT_THROW(v.source.agent().cancel(soon(v)), Error);
}

TEST(Attempt, PreparedIsForgottenWhenTheOtherSideBackedOut) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.target.agent().peer_prepared(n, 0);
  EXPECT_EQ(w.target.record().decision, Decision::prepared);
  w.source.agent().abort(n, "asked");
  w.settle();
  EXPECT_EQ(w.target.record().decision, Decision::serving);
}

TEST(Attempt, ForcedOpenWinsOverAReturningHost) {
  World w;
  auto n = begun(w);
  w.source.agent().seal(n, soon(w));
  w.target.agent().peer_prepared(n, 0);
  w.link = false;
  w.source.open = false;  // the host is off
  EXPECT_EQ(w.target.agent().force_open().decision, Decision::prepared);
  EXPECT_EQ(w.target.gate, GateWish::sealed);
  for (int i = 0; i < 20; i++) w.target.agent().work(), w.clock.pass(Millis(200));
  EXPECT_TRUE(w.target.open);
  EXPECT_EQ(w.target.gate, GateWish::local);
  // It comes back, and hears the other before it lets anybody in.
  w.source.failing = {ActionSet::undo};
  w.source.start(true);
  w.link = true;
  w.settle();
  EXPECT_FALSE(w.source.open);
  EXPECT_EQ(w.source.gate, GateWish::peer);
  EXPECT_EQ(w.source.record().serves, AgentSide::target);
  EXPECT_EQ(w.source.done.back(), "kill");
}

// The COMMIT never reached the other side, which a person opened: nobody can take it any more. One that was PREPARED there is opened as it is.
TEST(Attempt, ACommitThatReturnsToAPersonsDecisionCloses) {
  for (bool prepared : {false, true}) {
    World w;
    auto n = begun(w);
    w.source.agent().seal(n, soon(w));
    w.source.open = false;
    if (prepared) w.target.agent().peer_prepared(n, 0);
    w.link = false;
    EXPECT_EQ(w.source.agent().commit(n, soon(w)).what, PeerAnswer::What::pending);
    EXPECT_EQ(w.target.agent().force_open().decision, prepared ? Decision::prepared : Decision::serving);
    w.settle(Millis(3000));
    EXPECT_TRUE(w.target.open);
    w.source.power_off(Millis(0));
    w.settle(Millis(3000));
    EXPECT_EQ(w.source.record().decision, Decision::commit);
    w.link = true;
    w.source.done.clear();
    w.settle();
    expect_served(w, AgentSide::target, "the host is back");
    EXPECT_EQ(w.source.record().attempt, n);
    EXPECT_EQ(w.source.record().forced, !prepared);
    const std::vector<std::string> closing{"cut", "close", "kill"}, tails{"kill", "tail_yields"};
    EXPECT_EQ(w.source.done, prepared ? tails : closing);
    EXPECT_EQ(w.source.agent().status()["opened"], prepared);
    if (!prepared) {
      EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
    }
    EXPECT_TRUE(w.try_switch(AgentSide::target));
    w.settle();
    expect_served(w, AgentSide::source, "the way back");
  }
}

TEST(Attempt, AReturningHostThatHearsNobodyServesAfterAWhile) {
  World w;
  w.link = false;
  w.source.start(true);
  EXPECT_EQ(w.source.gate, GateWish::sealed);
  EXPECT_TRUE(w.source.agent().returning());
  w.settle(Millis(6000));
  EXPECT_EQ(w.source.gate, GateWish::local);
}

// At STORED the host goes off, a person opens the other one again, and it comes back: to nothing that it may open.
TEST(Attempt, AHostThatReturnsAtStoredOpensNothingBeforeItHasHeard) {
  for (bool hears_late : {false, true}) {
    World w;
    auto n = begun(w);
    w.source.agent().seal(n, soon(w));
    w.source.open = w.link = false;
    EXPECT_EQ(w.source.agent().commit(n, soon(w)).what, PeerAnswer::What::pending);
    Record stored;
    stored.seq = 9, stored.epoch = 1, stored.attempt = n, stored.decision = Decision::stored, stored.serves = AgentSide::target, stored.settled = false;
    w.target.blocks.block[0] = encode_record(stored);
    w.source.agent().force_reopen();
    if (hears_late) {
      // It was not off, and is opening its stores when it hears of that.
      w.target.start();
      w.target.during = [&] { w.target.agent().heard(w.source.record()); };
      w.target.agent().work();
      EXPECT_TRUE(w.target.open);
      w.target.agent().work();
      EXPECT_FALSE(w.target.open);
    } else {
      w.target.power_off(Millis(0));
      w.settle(Millis(4000));
      EXPECT_TRUE(w.source.open);
      EXPECT_FALSE(w.target.open);
    }
    w.link = true;
    w.settle();
    expect_served(w, AgentSide::source, "it is back");
    EXPECT_TRUE(w.try_switch(AgentSide::source));
  }
}

TEST(Attempt, ForcedReopenAfterTheTargetIsGone) {
  World w;
  ASSERT_TRUE(w.try_switch(AgentSide::source));
  w.settle();
  w.link = false;
  w.target.open = false;
  EXPECT_THROW(w.target.agent().force_reopen(), Error);
  w.source.agent().force_reopen();
  EXPECT_EQ(w.source.gate, GateWish::sealed);
  for (int i = 0; i < 20; i++) w.source.agent().work(), w.clock.pass(Millis(200));
  EXPECT_TRUE(w.source.open);
  EXPECT_EQ(w.source.gate, GateWish::local);
  EXPECT_EQ(w.source.record().epoch, std::int64_t(1) << 32);
}

// Unknown is not success: nothing is undone and nothing sent before a decision is durable.
TEST(Attempt, AFailedCommitWriteIsUnknown) {
  for (auto how : {FakeBlocks::Fails::before, FakeBlocks::Fails::torn, FakeBlocks::Fails::after, FakeBlocks::Fails::for_good})
    for (bool late : {false, true}) {
      World w;
      auto n = begun(w);
      w.source.agent().seal(n, soon(w));
      w.source.open = false;
      w.source.blocks.fails = how;
      try {
        w.source.agent().commit(n, soon(w));
        FAIL();
      } catch (const Error& e) {
        EXPECT_EQ(e.code, Code::unknown);
      }
      EXPECT_NE(w.target.record().decision, Decision::stored);
      EXPECT_TRUE(w.source.done.empty());
      if (late) w.clock.pass(Millis(4000));
      w.source.agent().work();
      if (how == FakeBlocks::Fails::for_good) {
        EXPECT_EQ(w.source.agent().status()["phase"], "unknown");
        EXPECT_TRUE(w.source.done.empty());
        EXPECT_FALSE(w.target.open);
        w.source.blocks.fails = FakeBlocks::Fails::no;
      }
      w.settle();
      AgentSide expected = late || how == FakeBlocks::Fails::for_good ? served_by(w) : AgentSide::target;
      if (late) expected = AgentSide::source;
      expect_served(w, expected, "after a failed write");
    }
}

TEST(Attempt, AnAgentThatDiesWithAnUnknownWriteReadsOneOfTheTwo) {
  for (auto how : {FakeBlocks::Fails::before, FakeBlocks::Fails::torn, FakeBlocks::Fails::after}) {
    World w;
    auto n = begun(w);
    w.source.agent().seal(n, soon(w));
    w.source.open = false;
    w.source.blocks.fails = how;
    EXPECT_THROW(w.source.agent().commit(n, soon(w)), Error);
    w.source.start();
    w.settle();
    expect_served(w, how == FakeBlocks::Fails::after ? AgentSide::target : AgentSide::source, "restarted");
  }
}

TEST(Attempt, AnUnreadableRecordOpensAndUndoesNothing) {
  World w;
  auto n = begun(w);
  (void)n;
  w.source.open = false;
  w.source.blocks.unreadable = true;
  w.source.gate = GateWish::none;
  w.source.start();
  w.settle(Millis(10'000));
  EXPECT_FALSE(w.source.open);
  EXPECT_TRUE(w.source.done.empty());
  EXPECT_EQ(w.source.gate, GateWish::none);
  EXPECT_EQ(w.source.agent().status()["phase"], "record-error");
  w.source.blocks.unreadable = false;
  w.settle();
  expect_served(w, AgentSide::source, "readable again");
}

// Every point at which either agent can die, in a switch and then a reverse, with the answer of the commit lost or not.
TEST(Attempt, KilledAtEveryPoint) {
  int points = 0, switched = 0, back = 0;
  for (AgentSide side : {AgentSide::source, AgentSide::target})
    for (int lost = 0; lost < 3; lost++)
      for (int k = 0;; k++) {
        World w;
        std::string when = std::string(name_of(side)) + " killed at " + std::to_string(k) + ", lost " + std::to_string(lost);
        w.crash_side = side;
        w.crash_in = k;
        w.lose_answer = lost == 1;
        w.lose_request = lost == 2;
        ASSERT_NO_THROW(w.try_switch(AgentSide::source)) << when;
        ASSERT_NO_THROW(w.settle()) << when;
        bool reached = w.crash_in < 0;
        AgentSide serves = served_by(w);
        expect_served(w, serves, when);
        (serves == AgentSide::target ? switched : back)++;
        w.crash_in = -1;
        w.lose_answer = w.lose_request = false;
        EXPECT_TRUE(w.try_switch(serves)) << when;
        w.settle();
        expect_served(w, other(serves), when + ", the next one");
        points++;
        if (!reached || ::testing::Test::HasFailure()) break;
      }
  EXPECT_GT(points, 50);
  EXPECT_GT(switched, 10);
  EXPECT_GT(back, 10);
}

// The same with the power: the host is gone with all that it had not made durable, at once back or after a while, alone or with the
// other; its boot clock begins again.
TEST(Attempt, PowerFailsAtEveryPoint) {
  int switched = 0, back = 0;
  for (AgentSide side : {AgentSide::source, AgentSide::target})
    for (bool both : {false, true})
      for (Millis off : {Millis(0), Millis(4000), Millis(20'000)})
        for (int lost = 0; lost < 3; lost++)
          for (int k = 0;; k++) {
            World w;
            std::string when = std::string(name_of(side)) + (both ? " and the other" : "") + " off at " + std::to_string(k) + " for " +
                               std::to_string(off.count()) + " ms, lost " + std::to_string(lost);
            w.crash_is_power = true;
            w.crash_both = both;
            w.off_for = off;
            w.crash_side = side;
            w.crash_in = k;
            w.lose_answer = lost == 1;
            w.lose_request = lost == 2;
            bool opened = false;
            ASSERT_NO_THROW(opened = w.try_switch(AgentSide::source)) << when;
            ASSERT_NO_THROW(w.settle(Millis(60'000))) << when;
            bool reached = w.crash_in < 0;
            EXPECT_EQ(w.at(side).boots, reached) << when;
            EXPECT_EQ(w.at(other(side)).boots, reached && both) << when;
            AgentSide serves = served_by(w);
            EXPECT_TRUE(!opened || serves == AgentSide::target) << when;
            expect_served(w, serves, when);
            (serves == AgentSide::target ? switched : back)++;
            w.crash_in = -1;
            w.lose_answer = w.lose_request = false;
            EXPECT_TRUE(w.try_switch(serves)) << when;
            w.settle();
            expect_served(w, other(serves), when + ", the next one");
            if (!reached || ::testing::Test::HasFailure()) break;
          }
  EXPECT_GT(switched, 50);
  EXPECT_GT(back, 50);
}

// Several faults of every kind in one run, in any order.
TEST(Attempt, RandomFaults) {
  for (unsigned seed = 1; seed <= 3000 && !::testing::Test::HasFailure(); seed++) {
    std::minstd_rand random(seed);
    auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    World w;
    std::string when = "seed " + std::to_string(seed);
    auto step = [&] {
      AgentSide side = pick(2) ? AgentSide::source : AgentSide::target;
      switch (pick(8)) {
        case 0:
          w.crash_side = side;
          w.crash_in = pick(30);
          w.crash_is_power = pick(2);
          w.off_for = Millis(pick(8000));
          break;
        case 1: w.link = !w.link; break;
        case 2: (pick(2) ? w.lose_answer : w.lose_request) = true; break;
        case 3: w.at(side).blocks.fails = static_cast<FakeBlocks::Fails>(pick(4)); break;
        case 4:
          if (pick(2)) w.at(side).power_off(Millis(pick(3) * pick(5000)));
          else if (!w.at(side).off()) w.at(side).start();
          break;
        case 5: w.settle(Millis(pick(6000))); break;
        case 6: w.at(side).failing = pick(2) ? std::set<ActionSet>{} : std::set<ActionSet>{static_cast<ActionSet>(pick(kActionSets))}; break;
        default: {
          if (w.at(side).off()) break;
          auto r = w.at(side).agent().record();
          if (r) w.try_switch(pick(8) ? r->serves : side);
        }
      }
    };
    try {
      for (int i = 0; i < 25; i++) w.guarded(step);
      w.crash_in = -1;
      w.link = true;
      w.lose_answer = w.lose_request = false;
      for (FakeSite* s : {&w.source, &w.target}) {
        s->failing.clear();
        s->blocks.fails = FakeBlocks::Fails::no;
      }
      w.settle(Millis(60'000));
    } catch (const std::exception& e) {
      FAIL() << when << ": " << e.what();
    }
    expect_served(w, served_by(w), when);
  }
}

// The link is cut for a while at every message; what was begun ends by itself when it is back.
TEST(Attempt, LinkCutAroundTheCommit) {
  for (bool request : {true, false})
    for (int skip = 0; skip < 4; skip++) {
      World w;
      auto n = begun(w);
      w.source.agent().seal(n, soon(w));
      w.source.open = false;
      (request ? w.lose_request : w.lose_answer) = true;
      if (skip > 0) w.link = false;
      auto a = w.source.agent().commit(n, soon(w));
      EXPECT_TRUE(skip == 0 || a.what == PeerAnswer::What::pending);
      w.settle(Millis(1000 * skip));
      if (skip > 0) {
        EXPECT_FALSE(w.source.open);
        EXPECT_EQ(w.source.gate, GateWish::sealed);
      }
      w.link = true;
      w.settle();
      expect_served(w, AgentSide::target, "healed");
    }
}

}  // namespace
}  // namespace rehome
