// Two real agents, supervised, on one host, with a gate of ours that only remembers, and files that stand for open stores.
#pragma once

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "agent/client.h"
#include "agent/gate_keeper.h"
#include "agent/record.h"
#include "agent/threads.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome::testing {

// Answers every request of an agent as a gate does, and keeps its state as the real one would: HELD ends by its own timer.
class FakeGate {
 public:
  explicit FakeGate(const std::string& socket) : listener_(listen_on({.path = socket})) {
    thread_ = std::thread([this] {
      while (!stop_) {
        auto fd = accept_from(listener_, Deadline::in(Millis(100)), &stop_);
        if (!fd) continue;
        auto shared = std::make_shared<Fd>(std::move(*fd));
        connections_.run([this, shared] { serve(*shared); });
      }
    });
  }
  ~FakeGate() {
    stop_ = true;
    thread_.join();
    connections_.join();
  }
  std::string state() {
    std::lock_guard lock(mutex_);
    if (state_ == "HELD" && ms_between(alive_, system_clock().now()) > static_cast<double>(timer_ms_)) state_ = before_;
    return state_;
  }

 private:
  void serve(const Fd& fd) {
    Reader in(fd);
    while (!stop_) {
      std::optional<std::string> line;
      try {
        line = in.line(Deadline::in(Millis(200)));
      } catch (const Error& e) {
        if (e.code == Code::timeout) continue;
        return;
      }
      if (!line) return;
      Json answer{{"ok", true}};
      try {
        act(parse_json(*line, "request"));
        answer["state"] = state();
      } catch (const Error& e) {
        answer = {{"error", error_to_json(e)}};
      }
      try {
        send_json(fd, answer, Deadline::in(Millis(1000)));
      } catch (const Error&) {
        return;
      }
    }
  }
  void act(const Json& r) {
    std::string op = get_string(r, "op"), now = state();
    system_clock().sleep(Millis(get_int(r, "slow_ms", 0)));
    std::lock_guard lock(mutex_);
    alive_ = system_clock().now();
    if (op == "hold") {
      if (now != "HELD" && now != "SEALED") before_ = now;
      timer_ms_ = get_int(r, "timer_ms");
      if (now != "SEALED") state_ = "HELD";
    } else if (op == "seal") {
      if (now != "HELD" && now != "SEALED") throw Error(Code::state, "the gate is " + now);
      state_ = "SEALED";
    } else if (op == "release") {
      state_ = get_string(r, "to") == "local" ? "OPEN_LOCAL" : "OPEN_PEER";
    }
  }

  Fd listener_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::string state_ = "SEALED", before_ = "SEALED";
  std::int64_t timer_ms_ = 0;
  Ticks alive_ = 0;
  Threads connections_;
  std::thread thread_;
};

class TwoAgents {
 public:
  explicit TwoAgents(const std::string& program) : program_(program) {
    for (auto side : {"source", "target"}) {
      std::string s = state(side);
      make_directories(s + "/run");
      create_record_file(s + "/record", {});
      write_durably(s + "/agent.json", Json{{"side", side}, {"name", "x"}, {"began", true}}.dump());
      write_durably(s + "/gate.json", "{\"routes\": []}");
      gates_[side] = std::make_unique<FakeGate>(s + "/run/gate.sock");
      supervisors_[side] = std::make_unique<Child>(Command{.argv = {program, "supervise", "--state", s}}, Child::Pipes{});
    }
    write_durably(dir_.path() + "/source.open", "");
    for (auto side : {"source", "target"}) eventually(side, "hello", [](const Json&) { return true; });
    for (auto side : {"source", "target"}) {
      call(side, "generation.adopt", {{"gen", 1}});
      set_actions(side);
    }
    watcher_ = std::thread([this] {
      while (!stop_) {
        if (open("source") && open("target")) both_ = true;
        ::usleep(200);
      }
    });
  }
  ~TwoAgents() {
    stop_ = true;
    watcher_.join();
  }

  std::string state(const std::string& side) const { return dir_.path() + "/" + side; }
  const std::string& directory() const { return dir_.path(); }
  bool open(const std::string& side) const { return exists(dir_.path() + "/" + side + ".open"); }
  bool both_were_open() const { return both_; }
  std::string gate(const std::string& side) { return gates_[side]->state(); }
  Json call(const std::string& side, const std::string& op, Json args = Json::object(), Millis most = Millis(15'000)) {
    if (!args.contains("gen")) args["gen"] = 1;
    return AgentClient(state(side) + "/run/agent.sock", Deadline::in(Millis(5000))).call(op, args, Deadline::in(most));
  }
  template <class F>
  Json eventually(const std::string& side, const std::string& op, F good, Millis most = Millis(15'000)) {
    Deadline deadline = Deadline::in(most);
    Json last;
    while (true) {
      try {
        last = call(side, op);
        if (good(last)) return last;
      } catch (const Error& e) {
        last = e.what();
      }
      if (deadline.passed()) throw Error(Code::timeout, side + " " + op + ": " + last.dump());
      system_clock().sleep(Millis(5));
    }
  }
  void wait_link() {
    for (auto side : {"source", "target"}) eventually(side, "hello", [](const Json& j) { return j["link"]["up"] == true; });
  }
  void kill_agent(const std::string& side) {
    try {
      pid_t pid = static_cast<pid_t>(get_int(call(side, "hello"), "pid"));
      ::kill(pid, SIGKILL);
    } catch (const Error&) {
      // it is being restarted
    }
  }
  int pid(const std::string& side) { return static_cast<int>(get_int(call(side, "hello"), "pid")); }

  static std::string other(const std::string& side) { return side == "source" ? "target" : "source"; }

  // One side serves with its gate open, the other is closed and sends its clients there. Returns the side.
  std::string wait_served(Millis most = Millis(20'000)) {
    Deadline deadline = Deadline::in(most);
    while (true) {
      for (std::string a : {"source", "target"}) {
        std::string b = other(a);
        if (!open(a) || open(b) || gate(a) != "OPEN_LOCAL" || gate(b) != "OPEN_PEER") continue;
        try {
          Json x = call(a, "attempt.status"), y = call(b, "attempt.status");
          bool over = x["decision"] == "SERVING" || x["decision"] == "OPENED";
          if (over && x["serves"] == a && y["serves"] == a && x["settled"] == true && y["settled"] == true) return a;
        } catch (const Error&) {
          // its agent is being restarted
        }
      }
      if (deadline.passed())
        throw Error(Code::timeout, "nobody serves alone: source " + describe("source") + ", target " + describe("target"));
      system_clock().sleep(Millis(5));
    }
  }
  std::string describe(const std::string& side) {
    std::string text = (open(side) ? "open, gate " : "closed, gate ") + gate(side);
    try {
      return text + ", " + call(side, "attempt.status").dump();
    } catch (const Error& e) {
      return text + ", " + e.what();
    }
  }

  void set_actions(const std::string& side) {
    std::string mine = dir_.path() + "/" + side + ".open", done = dir_.path() + "/" + side + ".";
    auto item = [&](const std::string& name, const std::string& input, bool warm) {
      return Json{{"name", name}, {"argv", {"sh", "-e"}}, {"input", input}, {"try_input", ":"}, {"warm", warm}, {"timeout_ms", 5000}};
    };
    call(side, "action.set", {{"set", "undo"}, {"items", {item("unfence", ": >" + mine, true)}}});
    call(side, "action.set", {{"set", "open"}, {"items", {item("open", ": >" + mine, true)}}});
    call(side, "action.set", {{"set", "close"}, {"items", {item("close", "rm -f " + mine, false)}}});
    call(side, "action.set", {{"set", "tail_takes"}, {"items", {item("off", ": >" + done + "takes", false)}}});
    call(side, "action.set", {{"set", "tail_yields"}, {"items", {item("on", ": >" + done + "yields", false)}}});
    for (auto set : {"undo", "open"}) call(side, "action.warm", {{"set", set}});
  }

 private:
  std::string program_;
  TempDir dir_;
  std::map<std::string, std::unique_ptr<FakeGate>> gates_;
  std::map<std::string, std::unique_ptr<Child>> supervisors_;
  std::atomic<bool> stop_{false}, both_{false};
  std::thread watcher_;
};

}  // namespace rehome::testing
