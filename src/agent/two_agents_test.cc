#include "agent/two_agents.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <vector>

#include "base/text.h"
#include "sys/testing/sshd.h"

namespace rehome {
namespace {

using testing::TwoAgents;

const char* const kProgram = REHOME_AGENT_PROGRAM;

// What a controller does, as steps between which something may die. Throws whatever the agents answer.
struct Switch {
  TwoAgents& w;
  std::string from;
  std::int64_t n = 0;
  Json result = Json::object();

  std::vector<std::function<void()>> steps() {
    return {
        [this] { n = get_int(w.call(from, "attempt.open"), "attempt"); },
        [this] {
          Json hold{{"op", "hold"}, {"attempt", n}, {"timer_ms", 5000}};
          w.call(TwoAgents::other(from), "gate", {{"request", hold}});
          w.call(from, "gate", {{"request", hold}});
        },
        [this] { w.call(from, "lease.renew", {{"attempt", n}}); },
        [this] { w.call(from, "attempt.seal", {{"attempt", n}}); },
        [this] {
          w.call(from, "lease.renew", {{"attempt", n}});
          // The hard fence, through the agent: a new life of it refuses the attempt.
          w.call(from, "exec", {{"argv", {"rm", "-f", w.directory() + "/" + from + ".open"}}});
        },
        [this] { result = w.call(from, "attempt.commit", {{"attempt", n}, {"wait_ms", 3000}}); },
    };
  }
  void run() {
    for (auto& step : steps()) step();
  }
};

Switch switched(TwoAgents& w, const std::string& from) {
  Switch s{w, from};
  // The side that took over last may still be running its tails.
  Deadline deadline = Deadline::in(Millis(5000));
  while (true) {
    try {
      s.run();
      return s;
    } catch (const Error& e) {
      if (!e.retryable || s.n != 0 || deadline.passed()) throw;
    }
    system_clock().sleep(Millis(20));
  }
}

// Requests wait for each other: a hold whose attempt was undone meanwhile would be taken back by nobody.
TEST(GateKeeper, AHoldWhoseAttemptEndedBeforeItsTurnIsRefused) {
  TempDir dir;
  make_directories(dir.path() + "/run");
  write_durably(dir.path() + "/gate.json", "{\"routes\": []}");
  testing::FakeGate gate(dir.path() + "/run/gate.sock");
  GateKeeper keeper(dir.path(), [](const std::string&) {});
  auto ask = [&](const char* op) { keeper.ask({{"op", op}, {"attempt", 1}, {"timer_ms", 5000}, {"slow_ms", 300}}, Deadline::in(Millis(3000))); };
  keeper.wish(GateWish::local, 0, Millis(1000));  // a gate starts SEALED
  for (auto side : {GateWish::local, GateWish::peer})
    for (auto op : {"hold", "cut"}) {
      keeper.wish(GateWish::hold, 1, Millis(500));
      ask("hold");
      EXPECT_EQ(gate.state(), "HELD");
      std::thread before([&] { ask("status"); });
      system_clock().sleep(Millis(100));
      std::thread late([&] { EXPECT_THROW(ask(op), Error); });
      system_clock().sleep(Millis(100));
      keeper.wish(side, 1, Millis(1000));
      before.join();
      late.join();
      EXPECT_EQ(gate.state(), side == GateWish::local ? "OPEN_LOCAL" : "OPEN_PEER");
    }
  // The side that takes over holds before its record knows of the attempt.
  keeper.wish(GateWish::peer, 0, Millis(1000));
  ask("hold");
  EXPECT_EQ(gate.state(), "HELD");
}

void link_by_socket(TwoAgents& w) {
  w.call("target", "link.set", {{"socket", w.state("source") + "/run/agent.sock"}});
  w.wait_link();
}

// What is down at the freeze, or dies while it is frozen, must not be started by its init system before all is decided.
TEST(TwoAgents, TheStartConditionStandsFromTheFreezeToTheUndo) {
  TwoAgents w(kProgram);
  link_by_socket(w);
  const std::string condition = w.state("source") + "/not-serving";
  w.call("source", "freeze.set", {{"items", {{{"name", "shop"}, {"pid_file", w.directory() + "/no.pid"}}}}});
  const std::int64_t n = get_int(w.call("source", "attempt.open"), "attempt");
  EXPECT_FALSE(exists(condition));
  EXPECT_EQ(w.call("source", "freeze", {{"attempt", n}})["items"][0]["processes"], 0);
  EXPECT_TRUE(exists(condition));
  w.call("source", "attempt.abort", {{"attempt", n}});
  for (Deadline d = Deadline::in(Millis(5000)); exists(condition) && !d.passed();) system_clock().sleep(Millis(5));
  EXPECT_FALSE(exists(condition));
}

TEST(TwoAgents, SwitchAndReverseInMilliseconds) {
  TwoAgents w(kProgram);
  link_by_socket(w);
  std::vector<double> took;
  std::string from = "source";
  for (int i = 0; i < 20; i++) {
    Ticks before = system_clock().now();
    Switch s = switched(w, from);
    double whole = ms_between(before, system_clock().now());
    EXPECT_EQ(s.result["opened"], true) << s.result;
    took.push_back(s.result["times"]["commit_ms"].get<double>() + s.result["times"]["released_ms"].get<double>());
    EXPECT_EQ(w.wait_served(), TwoAgents::other(from));
    EXPECT_LT(whole, 5000);
    from = TwoAgents::other(from);
  }
  std::sort(took.begin(), took.end());
  std::printf("commit to release, %zu switches: median %.2f ms, longest %.2f ms\n", took.size(), took[took.size() / 2], took.back());
  EXPECT_LT(took[took.size() / 2], 50);
  EXPECT_FALSE(w.both_were_open());
  EXPECT_TRUE(exists(w.directory() + "/source.yields"));
  EXPECT_TRUE(exists(w.directory() + "/target.takes"));
}

TEST(TwoAgents, AnAbandonedAttemptIsUndoneWithinLeaseAndTwoSeconds) {
  TwoAgents w(kProgram);
  link_by_socket(w);
  Switch s{w, "source"};
  auto steps = s.steps();
  for (int i = 0; i < 5; i++) steps[static_cast<std::size_t>(i)]();
  EXPECT_FALSE(w.open("source"));
  Ticks from = system_clock().now();
  EXPECT_EQ(w.wait_served(), "source");
  EXPECT_LT(ms_between(from, system_clock().now()), 5000);
  EXPECT_GT(ms_between(from, system_clock().now()), 2000);
  EXPECT_THROW(w.call("source", "attempt.commit", {{"attempt", s.n}}), Error);
  EXPECT_FALSE(w.both_were_open());
}

TEST(TwoAgents, AnotherControllerTakesOver) {
  TwoAgents w(kProgram);
  link_by_socket(w);
  Switch s{w, "source"};
  auto steps = s.steps();
  for (int i = 0; i < 4; i++) steps[static_cast<std::size_t>(i)]();
  EXPECT_EQ(w.call("source", "generation.new")["gen"], 2);
  EXPECT_THROW(steps[5](), Error);  // its generation is over
  EXPECT_THROW(w.call("source", "attempt.commit", {{"attempt", s.n}, {"gen", 2}}), Error);
  EXPECT_THROW(w.call("target", "put", {{"path", "/nowhere"}, {"content", ""}, {"gen", 2}}), Error);  // not adopted yet
  EXPECT_EQ(w.wait_served(), "source");
}

// kill -9 of either agent before each step, and within the commit; each time exactly one side serves in the end.
TEST(TwoAgents, KilledAtEveryPoint) {
  TwoAgents w(kProgram);
  link_by_socket(w);
  int moved = 0, stayed = 0;
  double slowest = 0;
  auto settle = [&](const std::string& before, const std::string& when) {
    Ticks from = system_clock().now();
    std::string now;
    try {
      now = w.wait_served();
    } catch (const Error& e) {
      FAIL() << when << ": " << e.what();
    }
    slowest = std::max(slowest, ms_between(from, system_clock().now()));
    (now == before ? stayed : moved)++;
    ASSERT_FALSE(w.both_were_open()) << when;
    w.wait_link();
  };
  for (bool yields : {true, false})
    for (std::size_t k = 0; k < 6; k++) {
      std::string from = w.wait_served();
      Switch s{w, from};
      auto steps = s.steps();
      try {
        for (std::size_t i = 0; i < steps.size(); i++) {
          if (i == k) {
            w.kill_agent(yields ? from : TwoAgents::other(from));
            // The other agent's death alone ends no attempt: it is back before the lease is over.
            if (!yields) w.wait_link();
          }
          steps[i]();
        }
      } catch (const Error&) {
        // The controller gives up; the agents are left to themselves.
      }
      settle(from, (yields ? "yielding killed before step " : "taking killed before step ") + std::to_string(k));
      if (HasFatalFailure()) return;
    }
  for (bool yields : {true, false})
    for (int delay_us = 0; delay_us <= 6000; delay_us += 400) {
      std::string from = w.wait_served();
      Switch s{w, from};
      auto steps = s.steps();
      std::thread killer;
      try {
        for (std::size_t i = 0; i + 1 < steps.size(); i++) steps[i]();
        int pid = w.pid(yields ? from : TwoAgents::other(from));
        killer = std::thread([=] {
          ::usleep(static_cast<unsigned>(delay_us));
          ::kill(pid, SIGKILL);
        });
        steps.back()();
      } catch (const Error&) {
        // As above.
      }
      if (killer.joinable()) killer.join();
      settle(from, (yields ? "yielding killed after us " : "taking killed after us ") + std::to_string(delay_us));
      if (HasFatalFailure()) return;
    }
  std::printf("killed 44 times: %d moved, %d stayed, slowest to serve again %.0f ms\n", moved, stayed, slowest);
  EXPECT_GT(moved, 0);
  EXPECT_GT(stayed, 0);
}

// A relay of ours in place of the wire, so that it can be cut at any moment.
class Wire {
 public:
  Wire(const std::string& at, const std::string& to) : listener_(listen_on({.path = at})), to_(to) {
    thread_ = std::thread([this] {
      while (!stop_) {
        auto fd = accept_from(listener_, Deadline::in(Millis(100)), &stop_);
        if (!fd || cut_) continue;
        auto shared = std::make_shared<Fd>(std::move(*fd));
        connections_.run([this, shared] {
          try {
            relay(*shared, connect_to({.path = to_}, Deadline::in(Millis(1000))), cut_);
          } catch (const Error&) {
            // nobody there
          }
        });
      }
    });
  }
  ~Wire() {
    stop_ = cut_ = true;
    thread_.join();
    connections_.join();
  }
  void cut(bool yes) { cut_ = yes; }

 private:
  Fd listener_;
  std::string to_;
  std::atomic<bool> stop_{false}, cut_{false};
  Threads connections_;
  std::thread thread_;
};

TEST(TwoAgents, LinkCutAroundTheCommit) {
  TwoAgents w(kProgram);
  // Each way has a wire of its own; the socket that peer.hello names is not used where a link is set.
  Wire there(w.directory() + "/a", w.state("source") + "/run/agent.sock"), back(w.directory() + "/b", w.state("target") + "/run/agent.sock");
  w.call("target", "link.set", {{"socket", w.directory() + "/a"}});
  w.call("source", "link.set", {{"socket", w.directory() + "/b"}});
  w.wait_link();
  for (int ms : {-150, 0, 1, 2, 3}) {
    std::string from = w.wait_served();
    Switch s{w, from};
    auto steps = s.steps();
    for (std::size_t i = 0; i + 1 < steps.size(); i++) steps[i]();
    auto cut = [&] {
      there.cut(true);
      back.cut(true);
    };
    std::thread cutter;
    if (ms < 0) {
      cut();
      system_clock().sleep(Millis(-ms));  // a relay looks at its flag every 100 ms
    } else {
      cutter = std::thread([&] {
        system_clock().sleep(Millis(ms));
        cut();
      });
    }
    try {
      s.result = w.call(from, "attempt.commit", {{"attempt", s.n}, {"wait_ms", 500}});
    } catch (const Error&) {
      // looked at below
    }
    if (cutter.joinable()) cutter.join();
    if (ms < 0) {
      EXPECT_EQ(s.result["pending"], true);
      system_clock().sleep(Millis(1500));
      EXPECT_EQ(w.gate(from), "SEALED");  // neither serves, and nobody guesses
      EXPECT_FALSE(w.open(from));
      EXPECT_EQ(w.call(from, "attempt.status")["phase"], "committed");
      EXPECT_EQ(w.call(from, "hello")["link"]["up"], false);
    }
    there.cut(false);
    back.cut(false);
    EXPECT_EQ(w.wait_served(), TwoAgents::other(from));
    w.wait_link();
  }
  EXPECT_FALSE(w.both_were_open());
}

TEST(TwoAgents, OverSsh) {
  TwoAgents w(kProgram);
  testing::Sshd sshd(w.directory() + "/sshd");
  Json argv{"ssh", "-F", "none", "-i", sshd.key(), "-p", std::to_string(sshd.port())};
  for (const auto& o : sshd.options()) argv.insert(argv.end(), {"-o", o});
  argv.push_back(sshd.host());
  Json link{{"argv", argv}, {"peer_state", w.state("source")}};
  w.call("target", "link.set", link);
  w.wait_link();
  Switch s = switched(w, "source");
  EXPECT_EQ(s.result["opened"], true) << s.result;
  std::printf("over ssh, commit to release: %.2f ms\n",
              s.result["times"]["commit_ms"].get<double>() + s.result["times"]["released_ms"].get<double>());
  EXPECT_EQ(w.wait_served(), "target");

  sshd.stop();
  Json down = w.eventually("target", "hello", [](const Json& j) { return j["link"]["up"] == false; });
  EXPECT_FALSE(down["link"]["error"].get<std::string>().empty());
  w.eventually("source", "hello", [](const Json& j) { return j["link"]["up"] == false; });
  EXPECT_THROW(w.call("target", "attempt.open"), Error);  // nobody to ask whether both are steady
  // While it cannot come up, ssh's own words say why.
  Json why = w.eventually("target", "hello", [](const Json& j) { return j["link"]["error"].get<std::string>().find("refused") != std::string::npos; });
  EXPECT_NE(why["link"]["error"].get<std::string>().find("127.0.0.1"), std::string::npos);
  sshd.start();
  w.wait_link();

  // Cut between the seal and the commit: neither serves until it is back, then the agents finish by themselves.
  Switch r{w, "target"};
  auto steps = r.steps();
  for (std::size_t i = 0; i + 1 < steps.size(); i++) steps[i]();
  sshd.stop();
  Json answer = w.call("target", "attempt.commit", {{"attempt", r.n}, {"wait_ms", 300}});
  EXPECT_EQ(answer["pending"], true);
  sshd.start();
  EXPECT_EQ(w.wait_served(), "source");
  EXPECT_FALSE(w.both_were_open());

  // A killed initiator leaves no ssh behind, and its next life raises the link by itself.
  w.kill_agent("target");
  w.wait_link();
  switched(w, "source");
  EXPECT_EQ(w.wait_served(), "target");
}

}  // namespace
}  // namespace rehome
