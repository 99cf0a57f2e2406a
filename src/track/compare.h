// Comparing the tree of this agent with the other agent's, and what the other end of that conversation does.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "agent/module.h"
#include "track/follow.h"
#include "track/manifest.h"
#include "track/wire.h"

namespace rehome::track {

struct Compared {
  std::uint64_t entries = 0, bytes = 0;
  struct Difference {
    std::string path, what;
  };
  std::vector<Difference> differences;
  std::uint64_t more = 0;              // others, at least
  std::vector<std::string> changing;   // changed all the time while they were compared: neither equal nor different
  int rounds = 0;
  double ms = 0;
};
Json to_json(const Compared& c);

struct CompareOptions {
  std::size_t most = 1000;
  int jobs = 2;
  const std::atomic<bool>* stop = nullptr;
};

// Both sides read their tree at the same time. A path that differs is flushed and compared again, up to five times, since
// the tree may be in use; one that keeps changing is reported as such. Throws Error(unreachable, io, interrupted).
Compared compare_trees(AgentHost& host, Accounts& accounts, const std::string& store, Follower& follower,
                       const CompareOptions& options);

// Answers requests on the channel until it ends: the whole manifest, the entries of some buckets, or those of some paths.
void serve_manifest(const Tree& tree, const Filter& filter, Accounts& accounts, Channel& channel, const std::atomic<bool>& stop);

}  // namespace rehome::track
