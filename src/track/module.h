// The agent's part for files: messages files.*, listed in docs/PROTOCOL.md under Files.
#pragma once

#include <memory>

#include "agent/module.h"
#include "track/rsync.h"

namespace rehome {

// What is tracked, followed, received and closed is kept in STATE/files.json and taken up again by start(): tracking then
// begins with a rescan, since changes were missed meanwhile.
std::unique_ptr<AgentModule> make_track_module(AgentHost& host);

}  // namespace rehome
