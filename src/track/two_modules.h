// Two files modules with a host of our own, joined by socket pairs: what a store driver asks of two agents. For tests.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/socket.h>

#include <thread>

#include "base/error.h"
#include "sys/fs.h"
#include "sys/process.h"
#include "track/module.h"

namespace rehome::testing {

// An agent's core as far as the module needs it: its socket, and the way to the other one.
class FakeAgent : public AgentHost {
 public:
  FakeAgent(std::string state, std::string side) : state_(std::move(state)), side_(std::move(side)) {
    make_directories(state_ + "/run");
    listener_ = listen_on({.path = state_ + "/run/agent.sock"});
  }
  ~FakeAgent() override { down(); }
  void up(FakeAgent& peer) {
    peer_ = &peer;
    stopping_ = false;
    module_ = make_track_module(*this);
    module_->start();
    accepting_ = std::thread([this] {
      while (auto fd = accept_from(listener_, {}, &stopping_)) serve(std::move(*fd));
    });
  }
  void down() {
    if (!module_) return;
    stopping_ = true;
    accepting_.join();
    module_->stop();
    std::vector<std::thread> threads;
    {
      std::lock_guard lock(mutex_);
      threads.swap(threads_);
    }
    for (auto& t : threads) t.join();
    module_.reset();
  }
  Json call(const std::string& op, Json args = Json::object()) {
    args["op"] = op;
    Fd fd = connect_to({.path = state_ + "/run/agent.sock"}, Deadline::in(Millis(5000)));
    send_all(fd, dump_line(args) + "\n");
    Reader in(fd);
    Json answer = parse_json(in.line(Deadline::in(Millis(60000))).value_or("{}"), "answer");
    if (answer.contains("error")) throw error_from_json(answer["error"]);
    return answer;
  }
  const std::string& state() const override { return state_; }
  std::string side() const override { return side_; }
  void log(const std::string& line) override {
    std::lock_guard lock(mutex_);
    log_ += line + "\n";
  }
  Fd open_peer(const Json& request, Deadline deadline) override {
    if (cut_) throw Error(Code::unreachable, "the link is down", "", true);
    Fd fd = connect_to({.path = peer_->state_ + "/run/agent.sock"}, deadline);
    send_all(fd, dump_line(request) + "\n");
    std::string line;
    char c;
    while (::recv(fd.get(), &c, 1, 0) == 1 && c != '\n') line += c;
    Json answer = parse_json(line, "answer");
    if (answer.contains("error")) throw error_from_json(answer["error"]);
    return fd;
  }
  void sample_lag(const std::string&, std::int64_t, std::int64_t) override {}
  const std::atomic<bool>& stopping() const override { return stopping_; }
  std::string log_text() {
    std::lock_guard lock(mutex_);
    return log_;
  }
  std::atomic<bool> cut_{false};

 private:
  void serve(Fd fd) {
    std::lock_guard lock(mutex_);
    threads_.emplace_back([this, fd = std::move(fd)]() mutable {
      try {
        Reader in(fd);
        while (!stopping_) {
          pollfd p{fd.get(), POLLIN, 0};
          if (::poll(&p, 1, 100) <= 0) continue;
          auto line = in.line(Deadline::in(Millis(5000)));
          if (!line) return;
          Json request = parse_json(*line, "request"), answer;
          AgentConnection c{fd, in, true};
          try {
            answer = module_->handle(get_string(request, "op"), request, c);
            if (answer.is_null()) return;
            answer["ok"] = true;
          } catch (const Error& e) {
            answer = {{"error", error_to_json(e)}};
          }
          send_all(fd, dump_line(answer) + "\n");
        }
      } catch (const Error& e) {
        log(std::string("connection: ") + e.what());
      }
    });
  }
  std::string state_, side_;
  FakeAgent* peer_ = nullptr;
  std::unique_ptr<AgentModule> module_;
  Fd listener_;
  std::thread accepting_;
  std::mutex mutex_;
  std::vector<std::thread> threads_;
  std::string log_;
  std::atomic<bool> stopping_{false};
};

class Files : public ::testing::Test {
 protected:
  Files() : source(dir.path() + "/s", "source"), target(dir.path() + "/t", "target") {
    make_directories(from);
    source.up(target);
    target.up(source);
  }
  ~Files() override {
    source.down();
    target.down();
    for (const auto& at : {from, to, source.state() + "/run/tree-files", target.state() + "/run/tree-files"})
      while (::umount2(at.c_str(), MNT_DETACH) == 0) {
      }
  }
  void sh(const std::string& script) {
    Outcome o = run({.argv = {"bash", "-c", "set -e; " + script}, .directory = from});
    ASSERT_TRUE(o.ok()) << script << "\n" << o.err;
  }
  Json settings(const std::string& path) {
    return {{"store", "files"}, {"path", path}, {"include", Json::array()}, {"exclude", Json::array()}};
  }
  Json receive(const std::string& path) {
    Json j = settings(path);
    j["active"] = true;
    return j;
  }
  void begin() {
    source.call("files.track", settings(from));
    target.call("files.receive", receive(to));
    source.call("files.copy", {{"store", "files"}});
    wait([&] { return status()["copied"] == true; });
  }
  Json status() { return source.call("files.status", {{"store", "files"}}); }
  Json flush(bool final = true) { return source.call("files.flush", {{"store", "files"}, {"final", final}}); }
  template <class F>
  void wait(F done) {
    for (int i = 0; i < 600; i++) {
      if (done()) return;
      system_clock().sleep(Millis(50));
    }
    FAIL() << status().dump(1) << "\n" << source.log_text() << target.log_text();
  }
  std::string differences() { return differences(from, to); }
  static std::string differences(const std::string& a, const std::string& b) {
    Outcome o = run({.argv = {"rsync", "-aHAXc", "--delete", "-ni", "--modify-window=-1", a + "/", b + "/"}});
    return o.out + o.err;
  }

  TempDir dir;
  std::string from = dir.path() + "/from", to = dir.path() + "/to";
  FakeAgent source, target;
};

}  // namespace rehome::testing
