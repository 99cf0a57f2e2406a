// The supervisor: keeps a site's agent and gate running, and owns the gate's listening sockets, so that a gate that
// restarts refuses nobody.
#pragma once

#include <atomic>
#include <string>

namespace rehome {

struct SuperviseOptions {
  std::string state;
  bool wait = false;    // for the lock of a supervisor that runs already, instead of ending
};

// Serves until the agent ends by `shutdown` (returns kEndedByShutdown, the gate has ended too) or `stop` is set:
// 1 ends the agent and leaves the gate to the next supervisor, 2 ends both. Returns 0 at once when another supervisor
// has the state directory and `wait` is not set. Must run in a process with one thread. Throws Error(io).
int supervise(const SuperviseOptions& options, const std::atomic<int>& stop);

// Starts `supervise` in a session of its own and returns when the agent answers. Throws Error(state) with the end of
// the log when it does not within 15 s.
void supervise_detached(const SuperviseOptions& options);
// The second half of that: for an agent that something else starts.
void wait_for_agent(const std::string& state);

}  // namespace rehome
