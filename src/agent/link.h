// The link: the way to the other agent. The site that can reach the other keeps an ssh process with two socket forwards
// up; the other site answers through the reverse forward. Whether the link is up is what peer.hello says, once a second.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "agent/client.h"
#include "agent/timed_mutex.h"
#include "base/json.h"
#include "sys/process.h"

namespace rehome {

class Link {
 public:
  struct Ports {
    std::string state;                             // STATE
    std::function<Json()> hello;                   // what this side says of itself in peer.hello
    std::function<void(const Json&)> heard;        // the other's, each time it is heard; may be called from any thread
    std::function<void()> up;                      // when the link has come up
    std::function<void(const std::string&)> log;
  };
  explicit Link(Ports ports);
  ~Link() { stop(); }

  // {"argv": [ssh, ..., host], "peer_state": PATH} or {"socket": PATH} or null: nothing to be kept up from here.
  void set(const Json& config);
  static void check(const Json& config);  // throws Error(usage)
  void start();
  void stop();

  // The other side said hello through a connection that it opened, and by which socket here it can be reached.
  void peer_came(const Json& hello);
  // One request on a connection kept open for `purpose`. Throws Error(unreachable) while the link is down, and the
  // other's errors. A broken connection is opened again once: every peer message is idempotent.
  Json call(const std::string& purpose, const Json& request, Deadline deadline);
  // A connection of its own on which `request` was answered: a stream from there.
  Fd open(const Json& request, Deadline deadline);

  Json status() const;                 // {up, since_ms, error, path}
  bool up() const;
  Ticks last_heard() const;            // 0: never since start

 private:
  struct Channel {
    TimedMutex mutex;
    std::unique_ptr<AgentClient> client;
    std::string path;
  };
  std::string peer_path() const;
  Channel& channel(const std::string& purpose);
  void loop();
  void keep_ssh();
  void say_hello();
  void set_up(bool up, const std::string& error);
  void clear_ways();
  std::string ssh_error();

  Ports p_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Json config_;
  bool new_config_ = false;
  std::string reverse_;                // the socket through which the other side, the initiator, can be reached
  std::string cleared_;                // reverse_ when the others were last cleared away
  bool up_ = false;
  Ticks since_ = 0, heard_ = 0;
  std::string error_ = "no link is set";
  std::map<std::string, std::unique_ptr<Channel>> channels_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
  // The link thread's own.
  std::unique_ptr<Child> ssh_;
  std::string ssh_text_, ssh_reverse_;
  Ticks ssh_started_ = 0, ssh_next_ = 0, back_works_ = 0;
  Millis ssh_wait_{100};
};

}  // namespace rehome
