// For tests: an application, a gate in a thread, and two gates that are each other's peers.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "gate/gate.h"
#include "sys/testing/free_port.h"
#include "sys/fs.h"

namespace rehome::testing {


inline Address unix_at(const std::string& path) { return {.path = path, .host = {}, .port = 0}; }
inline Address loopback(std::uint16_t port) { return {.path = {}, .host = "127.0.0.1", .port = port}; }
inline Deadline soon() { return Deadline::in(Millis(10000)); }

inline bool eventually(const std::function<bool()>& condition) {
  Deadline d = soon();
  while (!d.passed()) {
    if (condition()) return true;
    system_clock().sleep(Millis(2));
  }
  return condition();
}


// Reads until the end; "<reset>" is appended when the end was not clean.
inline std::string read_to_end(const Fd& fd) {
  std::string out;
  char buf[65536];
  while (true) {
    pollfd p{fd.get(), POLLIN, 0};
    if (::poll(&p, 1, 20000) <= 0) return out + "<timeout>";
    ssize_t n = ::recv(fd.get(), buf, sizeof buf, 0);
    if (n == 0) return out;
    if (n < 0) return out + "<reset>";
    out.append(buf, static_cast<std::size_t>(n));
  }
}

// An application: calls `serve` for each connection in a thread of its own.
class App {
 public:
  App(const Address& at, std::function<void(const Fd&)> serve) : serve_(std::move(serve)), listener_(listen_on(at)) {
    thread_ = std::thread([this] {
      while (!stop_) {
        auto fd = accept_from(listener_, Deadline::in(Millis(100)), &stop_);
        if (!fd) continue;
        connections++;
        auto own = std::make_shared<Fd>(std::move(*fd));
        {
          std::lock_guard lock(mutex_);
          open_.push_back(own);
        }
        workers_.emplace_back([this, own] {
          try {
            serve_(*own);
          } catch (const Error&) {
          }
          std::lock_guard lock(mutex_);
          own->reset();
        });
      }
    });
  }
  ~App() {
    stop_ = true;
    thread_.join();
    {
      std::lock_guard lock(mutex_);
      for (auto& fd : open_)
        if (*fd) ::shutdown(fd->get(), SHUT_RDWR);
    }
    for (auto& w : workers_) w.join();
  }
  std::atomic<int> connections{0};

 private:
  std::function<void(const Fd&)> serve_;
  Fd listener_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Fd>> open_;
};

// Answers each line with "NAME:LINE\n" until the client ends.
inline std::function<void(const Fd&)> answering(std::string name) {
  return [name](const Fd& fd) {
    Reader reader(fd);
    while (auto line = reader.line(soon())) send_all(fd, name + ":" + *line + "\n", soon());
  };
}

inline Json ask_gate(const std::string& state, const Json& request) {
  Fd fd = connect_to(unix_at(state + "/run/gate.sock"), soon());
  send_all(fd, dump_line(request) + "\n");
  Reader reader(fd);
  return parse_json(reader.line(soon()).value(), "answer");
}

// A gate in a thread, with one route "app".
class Running {
 public:
  explicit Running(Json route = Json::object()) {
    Json one{{"name", "app"},
             {"listen", "unix:" + dir.path() + "/in.sock"},
             {"marked", "unix:" + dir.path() + "/marked.sock"},
             {"local", "unix:" + dir.path() + "/app.sock"}};
    one.update(route);
    write_durably(dir.path() + "/gate.json", Json{{"routes", {one}}}.dump());
    gate = std::make_unique<Gate>(dir.path());
    thread = std::thread([this] { gate->run(); });
    EXPECT_TRUE(eventually([&] { return exists(dir.path() + "/in.sock") && exists(dir.path() + "/marked.sock"); }));
  }
  ~Running() {
    gate->stop();
    thread.join();
  }
  Json ask(const Json& request) { return ask_gate(dir.path(), request); }
  Json ask(const char* op) { return ask(Json{{"op", op}}); }
  Json release(const std::string& to) { return ask(Json{{"op", "release"}, {"to", to}}); }
  Json hold(int attempt, int timer = 60000) { return ask(Json{{"op", "hold"}, {"attempt", attempt}, {"timer_ms", timer}}); }
  Json seal(int attempt) { return ask(Json{{"op", "seal"}, {"attempt", attempt}}); }
  std::string state() { return ask("status")["state"]; }
  std::int64_t count(const char* what) { return ask("status")[what]; }
  Address in() const { return unix_at(dir.path() + "/in.sock"); }
  Address marked() const { return unix_at(dir.path() + "/marked.sock"); }
  Address app() const { return unix_at(dir.path() + "/app.sock"); }
  Fd client() { return connect_to(in(), soon()); }

  TempDir dir;
  std::unique_ptr<Gate> gate;
  std::thread thread;
};

inline std::string ask_line(const Fd& fd, const std::string& line) {
  send_all(fd, line + "\n", soon());
  Reader reader(fd);
  return reader.line(soon()).value_or("<end>");
}

// Two gates, each one's `peer` the other's `marked`.
struct Pair {
  Pair() {
    for (Running* g : {&a, &b}) {
      Running& o = g == &a ? b : a;
      Json j = parse_json(read_file(g->dir.path() + "/gate.json"), "gate.json");
      j["routes"][0]["peer"] = o.marked().text();
      write_durably(g->dir.path() + "/gate.json", j.dump());
      EXPECT_EQ(g->ask("reload")["ok"], true);
    }
  }
  Running a, b;
};

}  // namespace rehome::testing
