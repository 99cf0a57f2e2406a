// One program run for a caller: killed when the caller's connection closes or its generation ends.
#pragma once

#include <atomic>

#include "base/json.h"
#include "sys/net.h"
#include "sys/process.h"

namespace rehome {

// argv, env{}, input or input_base64, user, directory of a message. Throws Error(usage).
Command command_from_json(const Json& request);

// Runs to the end; {status, out, err}, with out_base64 or err_base64 where they are not UTF-8, each at most 16 MiB, and
// `truncated` when more came. Throws Error(timeout) at the deadline, Error(interrupted) when `caller` (may be null) hangs
// up or `cancelled` becomes true: the process group is killed then.
Json run_for(const Command& command, Deadline deadline, const Fd* caller, const std::atomic<bool>& cancelled);

}  // namespace rehome
