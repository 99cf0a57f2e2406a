// Kept children: programs that the agent keeps running for the run, like receivers and followers.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "base/json.h"
#include "sys/process.h"

namespace rehome {

class Children {
 public:
  using Sample = std::function<void(const std::string& store, std::int64_t bytes, std::int64_t ms)>;
  // A line of output "lag STORE BYTES MS" goes to `sample`, every other one to the tail that status shows.
  Children(std::function<void(const std::string&)> log, Sample sample) : log_(std::move(log)), sample_(std::move(sample)) {}
  ~Children() { stop(); }
  // Replaces the child of that name; it is started at once and again `restart` after each end.
  void set(const std::string& name, const Command& command, Millis restart);
  bool drop(const std::string& name);             // kills and forgets it
  Json status(const std::string& name) const;     // of one, or an array of all for an empty name
  void stop();

 private:
  struct One {
    std::string name;
    Command command;
    Millis restart;
    std::atomic<bool> stop{false};
    std::thread thread;
    mutable std::mutex mutex;
    bool running = false;
    int pid = 0, starts = 0;
    std::optional<int> last_status;
    std::deque<std::string> tail;
  };
  void loop(One& one);
  static Json describe(const One& one);
  bool is_sample(const std::string& line) const;

  std::function<void(const std::string&)> log_;
  Sample sample_;
  mutable std::mutex mutex_;
  std::map<std::string, std::unique_ptr<One>> all_;
};

}  // namespace rehome
