// Two sites in memory for tests of the state machine: records whose writes fail, tear or are lost, stores, gates, a link that
// loses messages, boot clocks that stand still, and the end of either agent, or host, at any chosen point.
#pragma once

#include <functional>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "agent/attempt.h"

namespace rehome::testing {

class FakeClock : public Clock {
 public:
  Ticks now() override { return now_; }
  std::int64_t wall_us() override { return now_ / 1000; }
  void sleep(Millis d) override { pass(d); }
  virtual void pass(Millis d) { now_ += d.count() * 1'000'000; }
  void set(Ticks now) { now_ = now; }

 private:
  Ticks now_ = 1'000'000'000;
};

struct Crash {
  AgentSide side;
};

// A disk with a cache: a write that fails may be on the disk, torn, or not there.
class FakeBlocks : public BlockFile {
 public:
  enum class Fails { no, before, torn, after, for_good } fails = Fails::no;
  std::string block[2];
  bool unreadable = false;

  std::string read(int b) override {
    if (unreadable) throw Error(Code::io, "read the record: Input/output error");
    return block[b];
  }
  void write(int b, std::string_view bytes) override {
    Fails how = fails;
    if (fails != Fails::for_good) fails = Fails::no;
    if (how == Fails::torn) block[b] = std::string(bytes.substr(0, 60)) + block[b].substr(60);
    if (how == Fails::after) block[b] = bytes;
    if (how != Fails::no) throw Error(Code::io, "write the record: Input/output error");
    block[b] = bytes;
  }
};

class World;

// One site: what outlives its agent, and the agent.
class FakeSite : public AttemptHands, public AttemptGate, public AttemptPeer, private BlockFile {
 public:
  FakeSite(World& world, AgentSide side);
  void start(bool returning = false);   // a new agent
  // The host is off for so long; then it boots, with a boot clock that begins again, and without what lived in its memory.
  void power_off(Millis how_long);
  void boot_when_due();
  bool off() const { return off_until_ != 0; }
  Attempt& agent() {
    if (off()) throw Error(Code::unreachable, "the host is off", "", true);
    return *attempt_;
  }
  Record record() {
    auto r = agent().record();
    if (!r) throw Error(Code::state, "the record cannot be read");
    return *r;
  }

  World& world;
  AgentSide side;
  FakeClock clock;  // of this boot of this host
  int boots = 0;
  FakeBlocks blocks;
  bool open = false, soft = false, frozen = false, forbidden = false, relays = false;
  GateWish gate = GateWish::none;
  bool gate_held = false;
  std::set<ActionSet> failing;          // sets that do not succeed
  std::vector<std::string> done;        // what was done, in order
  std::function<void()> during;         // once, while the next set runs

  void begin_set(ActionSet) override {}
  void run_set(ActionSet set, std::int64_t attempt, std::int64_t epoch) override;
  void probe_set(ActionSet set) override;
  void cut_relays() override;
  void thaw() override;
  void kill_frozen() override;
  void forbid_services() override { forbidden = true; }
  void allow_services() override { forbidden = false; }
  void start_services() override {}
  void log(const std::string&) override {}
  void wish(GateWish wish, std::int64_t, Millis) override;
  void seal(std::int64_t, Deadline) override;
  bool told() const override { return true; }
  State state(Deadline) override;
  void ready(std::int64_t attempt, std::int64_t epoch, Deadline) override;
  void prepared_soon(std::int64_t attempt, std::int64_t epoch) override;
  PeerAnswer commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline) override;
  void tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline) override;

 private:
  std::string read(int block) override { return blocks.read(block); }
  void write(int block, std::string_view bytes) override;

  std::unique_ptr<RecordStore> store_;
  std::unique_ptr<Attempt> attempt_;
  Ticks off_until_ = 0;  // of the world's clock
};

class World {
 public:
  World() : clock(*this), source(*this, AgentSide::source), target(*this, AgentSide::target) {
    // Two hosts' boot clocks have nothing to do with each other.
    target.clock.set(77'000'000'000'000);
    source.open = true;
    source.start();
    target.start();
  }
  FakeSite& at(AgentSide s) { return s == AgentSide::source ? source : target; }

  // Called before and after everything that an agent does to the world.
  void point(AgentSide side) {
    if (source.open && target.open) throw std::logic_error("both sites accept writes");
    if (side == crash_side && crash_in >= 0 && crash_in-- == 0) throw Crash{side};
  }
  // A message from `from`: `handle` runs at the other agent. Its crash, or a lost answer, is what Error(unreachable) says.
  template <class F>
  void deliver(AgentSide from, F handle) {
    auto lost = [] { return Error(Code::unreachable, "the link is down", "", true); };
    point(from);
    if (!link || lose_request || at(other(from)).off()) {
      lose_request = false;
      throw lost();
    }
    try {
      handle(at(other(from)).agent());
    } catch (const Crash& c) {
      if (c.side == from) throw;
      if (crash_is_power && crash_both) throw Crash{from};  // the caller's host is gone too; both fall where that one is caught
      fell(c.side);
      throw lost();
    }
    if (lose_answer) {
      lose_answer = false;
      throw lost();
    }
    point(from);
  }
  // Lets both agents work until nothing is left to do, passing time; hellos go both ways when the link is up.
  void settle(Millis at_most = Millis(30'000));
  // A whole switch as a controller asks for it; a crash restarts the agent and ends the controller's try.
  bool try_switch(AgentSide yields);
  void guarded(const std::function<void()>& f);
  void fell(AgentSide side) {
    if (!crash_is_power) return at(side).start();
    at(side).power_off(off_for);
    if (crash_both) at(other(side)).power_off(off_for);
  }

  // Time passes on both hosts.
  struct WorldClock : FakeClock {
    explicit WorldClock(World& world) : w(world) {}
    void pass(Millis d) override {
      FakeClock::pass(d);
      w.source.clock.pass(d);
      w.target.clock.pass(d);
    }
    World& w;
  } clock;
  bool crash_is_power = false, crash_both = false;  // a crash takes the host, or both
  Millis off_for{0};
  bool link = true, lose_request = false, lose_answer = false;
  AgentSide crash_side = AgentSide::source;
  int crash_in = -1;
  FakeSite source, target;
};

inline FakeSite::FakeSite(World& w, AgentSide s) : world(w), side(s) {
  Record first;
  blocks.block[0] = blocks.block[1] = encode_record(first);
}

inline void FakeSite::start(bool returning) {
  attempt_.reset();
  store_ = std::make_unique<RecordStore>(static_cast<BlockFile&>(*this));
  attempt_ = std::make_unique<Attempt>(Attempt::Ports{side, clock, *store_, *this, *this, *this});
  attempt_->start(returning);
}

inline void FakeSite::power_off(Millis how_long) {
  off_until_ = after(world.clock, how_long);
  boot_when_due();
}

inline void FakeSite::boot_when_due() {
  if (!off() || world.clock.now() < off_until_) return;
  off_until_ = 0;
  boots++;
  clock.set(200'000'000);
  // Hard fences and the start condition are on the disk; sessions, frozen processes and the gate's state are not.
  soft = frozen = relays = gate_held = false;
  gate = GateWish::sealed;
  start(true);
}

inline void FakeSite::write(int block, std::string_view bytes) {
  world.point(side);
  blocks.write(block, bytes);
  world.point(side);
}

inline void FakeSite::run_set(ActionSet set, std::int64_t, std::int64_t) {
  world.point(side);
  if (failing.count(set)) throw Error(Code::store, std::string(name_of(set)) + " fails", "", true);
  done.push_back(std::string(name_of(set)));
  if (auto f = std::exchange(during, nullptr)) f();
  if (set == ActionSet::undo || set == ActionSet::open) open = true;
  if (set == ActionSet::undo) soft = false;
  if (set == ActionSet::close) open = false;
  world.point(side);
}

inline void FakeSite::probe_set(ActionSet set) {
  if (failing.count(set)) throw Error(Code::store, std::string(name_of(set)) + " gives no sign of life", "", true);
}

inline void FakeSite::cut_relays() {
  world.point(side);
  relays = soft = false;
  done.push_back("cut");
}

inline void FakeSite::thaw() {
  world.point(side);
  frozen = false;
  done.push_back("thaw");
}

inline void FakeSite::kill_frozen() {
  world.point(side);
  done.push_back("kill");
}

inline void FakeSite::wish(GateWish wish, std::int64_t, Millis) {
  if (wish == GateWish::local && !open) throw std::logic_error("the gate lets clients in to a closed site");
  if (wish == GateWish::hold) {
    if (gate != GateWish::sealed && gate_held) gate = wish;
    return;
  }
  gate = wish;
  gate_held = wish == GateWish::sealed;
}

inline void FakeSite::seal(std::int64_t, Deadline) {
  if (!gate_held) throw Error(Code::state, "the gate is not held");
  gate = GateWish::sealed;
}

inline AttemptPeer::State FakeSite::state(Deadline) {
  State s;
  world.deliver(side, [&](Attempt& there) {
    there.heard(record());
    s = {world.at(other(side)).record(), true};
  });
  return s;
}

inline void FakeSite::ready(std::int64_t attempt, std::int64_t epoch, Deadline) {
  world.deliver(side, [&](Attempt& there) { there.peer_ready(attempt, epoch); });
}

inline void FakeSite::prepared_soon(std::int64_t attempt, std::int64_t epoch) {
  try {
    world.deliver(side, [&](Attempt& there) { there.peer_prepared(attempt, epoch); });
  } catch (const Error&) {
    // nothing waits for it
  }
}

inline PeerAnswer FakeSite::commit(std::int64_t attempt, std::int64_t epoch, Deadline) {
  PeerAnswer a;
  world.deliver(side, [&](Attempt& there) { a = there.peer_commit(attempt, epoch, Deadline(world.clock, Millis(0))); });
  return a;
}

inline void FakeSite::tails(std::int64_t attempt, std::int64_t epoch, Deadline) {
  bool ok = false;
  world.deliver(side, [&](Attempt& there) { ok = there.peer_tails(attempt, epoch, Deadline(world.clock, Millis(0))); });
  if (!ok) throw Error(Code::state, "they are not done", "", true);
}

inline void World::guarded(const std::function<void()>& f) {
  try {
    f();
  } catch (const Crash& c) {
    fell(c.side);
  }
}

inline void World::settle(Millis at_most) {
  Ticks end = after(clock, at_most);
  while (clock.now() < end) {
    bool idle = true;
    for (auto side : {AgentSide::source, AgentSide::target}) guarded([&] { at(side).boot_when_due(); });
    for (auto side : {AgentSide::source, AgentSide::target})
      if (!at(side).off()) guarded([&] { idle = at(side).agent().work() >= Millis(1000) && idle; });
    if (link)
      for (auto side : {AgentSide::source, AgentSide::target}) {
        if (source.off() || target.off()) break;
        auto mine = at(side).agent().record();
        if (mine) guarded([&] { at(other(side)).agent().heard(*mine); });
      }
    clock.pass(Millis(idle ? 1000 : 20));
  }
}

inline bool World::try_switch(AgentSide yields) {
  FakeSite& y = at(yields);
  bool opened = false;
  guarded([&] {
    try {
      auto soon = Deadline(clock, Millis(0));
      auto n = y.agent().open(Millis(3000), soon);
      y.gate_held = true;
      y.gate = GateWish::hold;
      y.soft = y.frozen = y.relays = true;
      point(yields);
      y.agent().renew(n);
      y.agent().seal(n, soon);
      y.agent().renew(n);
      // A hard fence is refused when the attempt's session is gone.
      if (!y.relays) return;
      y.open = false;
      point(yields);
      opened = y.agent().commit(n, soon).what == PeerAnswer::What::opened;
    } catch (const Error&) {
      // The controller gives up and looks at the status later.
    }
  });
  return opened;
}

}  // namespace rehome::testing
