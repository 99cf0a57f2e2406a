// Freezing services: the cgroup freezer stops every thread of a service within milliseconds, without its knowing.
// Both layouts are handled: cgroup v2 (cgroup.freeze), and the v1 freezer hierarchy beside it. An agent that may make no cgroup (it is
// not root) stops the processes of a pid file by SIGSTOP, one by one until none runs; what notices that is the service itself,
// and anybody of its account can wake it.
#pragma once

#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/json.h"

namespace rehome {

struct Freezable {
  std::string name;
  std::string unit;      // a systemd unit: its own cgroup
  std::string pid_file;  // or the process named there and its descendants, moved into a cgroup of ours
  std::string cgroup;    // or a cgroup directory
};

// Thread-safe; one operation at a time.
class Freezer {
 public:
  // `tag` names the cgroups that are made here, so that two agents on one host stay apart.
  Freezer(std::string tag, std::function<void(const std::string&)> log) : tag_(std::move(tag)), log_(std::move(log)) {}

  static std::vector<Freezable> parse(const Json& items);  // throws Error(usage)
  // Resolves every item now, so that freezing needs no program; one that does not run is looked for again when it is frozen. Throws
  // Error(io), Error(config); the old items stay. `lenient`, for a restarted agent: what cannot be found is logged, and looked for again
  // when it is thawed or killed.
  // `early`: no freeze is near, and no process is moved out of a cgroup that accounts for it: only into the v1 freezer's.
  void set(std::vector<Freezable> items, bool lenient = false, bool early = false);
  // Each answers [{name, ms, processes}]; a service that does not run has none, and is no failure. Throw Error(io) or Error(timeout) naming the first item that failed: freeze() ends there,
  // the others have done all that they could.
  Json freeze();
  Json thaw();
  Json kill();     // frozen processes die without running another instruction; then the cgroup is thawed, empty
  bool any() const;
  // Starts the systemd units among the items that do not run: those that a start condition made skip. Without waiting; one that cannot
  // be started is logged.
  void start_units();
  // Thaws what is frozen and removes the cgroups that were made here: at the end of a run.
  void forget();
  static bool available();

 private:
  struct Item {
    Freezable what;
    std::string directory;  // of the cgroup
    bool v1 = false;
    bool ours = false;
    bool by_signal = false;
    std::vector<std::pair<pid_t, std::string>> stopped;   // by signal: process and its start time, since the file may name another by then
  };
  Item resolve(const Freezable& f, bool lenient, bool early = false) const;
  void gather(Item& item) const;
  void find(Item& item) const;
  // Not `all_of_them`: up to the first that fails.
  template <class F>
  Json each(const char* verb, bool all_of_them, F act);

  std::string tag_;
  std::function<void(const std::string&)> log_;
  mutable std::mutex mutex_;
  std::vector<Item> items_;
};

}  // namespace rehome
