// The steps of a run's life, shared by the commands.
#pragma once

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
// What of an entry somebody has led past its gates since begin, at either side.
std::vector<std::string> astray(Run& run, Traffic& traffic);
// complete and cancel: everything of ours gone. `committed`: the old side keeps its fence. Returns what was left.
std::vector<std::string> take_down(Run& run, Side serves, bool cancel);
// What of ours is still there on either site. The side `fenced` may keep the start conditions of its services.
std::vector<std::string> leftovers(Run& run, std::optional<Side> fenced);

// Prepares, and waits until the prediction is within max_pause; Error(timeout) after `patience`. With `when_ready` what passes by itself
// is outlasted all the while, and so is a service on the other side that fails meanwhile.
Prediction wait_until_ready(Run& run, Switchover& switchover, Millis patience, bool when_ready);

}  // namespace rehome::ops
