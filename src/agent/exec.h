// One program run for a caller: killed when the caller's connection closes or its generation ends.
#pragma once

#include <atomic>

#include "base/json.h"
#include "sys/net.h"
#include "sys/process.h"

namespace rehome {

// argv, env{}, input or input_base64, user, directory of a message. Throws Error(usage).
Command command_from_json(const Json& request);

// Runs to the end; each output at most 16 MiB, and `truncated` when more came. Throws Error(timeout) at the deadline,
// Error(interrupted) when `caller` (may be null) hangs up or `cancelled` becomes true: the process group is ended then.
Outcome run_for(const Command& command, Deadline deadline, const Fd* caller, const std::atomic<bool>& cancelled);

}  // namespace rehome
