// The steps of a run's life, shared by the commands.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "ops/cut.h"
#include "ops/run.h"

namespace rehome::ops {

// Every finding of the sites, stores, services, traffic and checks; changes nothing.
std::vector<Finding> preflight(Run& run);
// Throws Error(preflight) when there are errors among them, and lists these unless they were shown already.
void require_clean(const std::vector<Finding>& findings, bool shown = false);

// begin: link, guards, stores prepared, copied and following, traffic through the gates, services warm.
std::vector<Step> begin_steps(Run& run);
// complete and cancel: everything of ours gone. `committed`: the old side keeps its fence. Returns what was left.
std::vector<std::string> take_down(Run& run, Side serves, bool cancel);
// What of ours is still there on either site. The side `fenced` may keep the start conditions of its services.
std::vector<std::string> leftovers(Run& run, std::optional<Side> fenced);

// When the micro-fence may be run while a switch waits: three times, soon after one another since what is in its way is mostly gone in
// a moment, and then not for five minutes each: it cancels autovacuum on the tables that it locks. Never more than three in five minutes.
class MicroFences {
 public:
  explicit MicroFences(Clock& clock = system_clock()) : clock_(clock) {}
  bool allowed() const { return made_ == 0 || next_.passed(); }
  void count() {
    constexpr Millis rests[] = {Millis(1'000), Millis(30'000), Millis(300'000)};
    next_ = Deadline(clock_, rests[std::min<std::size_t>(made_++, 2)]);
  }

 private:
  Clock& clock_;
  std::size_t made_ = 0;
  Deadline next_;
};

// Waits until the stores' lag allows the prediction to be within max_pause; Error(timeout) after `patience`.
Prediction wait_until_ready(Run& run, Switchover& switchover, Millis patience, bool when_ready);

}  // namespace rehome::ops
