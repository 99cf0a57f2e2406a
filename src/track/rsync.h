// rsync between the agents: whole-tree passes (the bulk copy, and whenever changes may have been missed). rsync's transport
// is the agents' link: its --rsh is this program as `rsync-shim`, which asks the local agent for the stream.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "sys/fd.h"

namespace rehome::track {

struct RsyncPass {
  std::string state;       // of this agent
  std::string store;
  std::string path;        // what is sent
  std::vector<std::string> include, exclude;
  bool owner_by_name = true;
  std::int64_t bandwidth = 0;  // bytes a second; 0: no limit
};

struct RsyncProgress {
  std::atomic<std::int64_t> bytes{0};
  std::atomic<int> percent{0};
};

// Runs one pass to its end; a second one continues where a broken one stopped. Returns whether files vanished while it
// ran (no failure: their removal is an event of its own). Throws Error(store) with rsync's last words.
bool run_rsync(const RsyncPass& pass, RsyncProgress& progress, const std::atomic<bool>& stop);

// argv of rsync for that pass, for messages and tests.
std::vector<std::string> rsync_argv(const RsyncPass& pass);

// What the receiving agent runs for a request's argv: the same, if it is an rsync server that writes into "./" with options
// that rsync_argv() leads to; Error(denied) otherwise.
std::vector<std::string> check_server_argv(const std::vector<std::string>& argv);

// The shim: joins standard input and output to the other agent's rsync. argv is what rsync gave (host, rsync, --server, ...).
// Exit status.
int rsync_shim(const std::vector<std::string>& argv);

// "3.2.7" from `rsync --version`; empty when there is none.
std::string rsync_version();

}  // namespace rehome::track
