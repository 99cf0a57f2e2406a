// What brings an agent's supervisor back after a reboot: a systemd unit, crontab lines, or an executable in a directory.
#pragma once

#include <string>
#include <vector>

namespace rehome {

struct Boot {
  std::string how;                  // "systemd", "cron", "directory:/path" or "none"
  std::string name, side, state;
  std::vector<std::string> before;  // systemd units that must not start before the agent has read its record
};

// Makes it, idempotently, for `program` (empty: this program's own file). Returns what was made, for messages. Throws
// Error(config) for an unknown way, Error(io), Error(store) with what the tool said; what was made by then is removed by
// remove_boot.
std::string install_boot(const Boot& boot, std::string program);
// Throws the same; what was there is then still there, or part of it, and a repetition goes on. A crontab's other lines stay as they are.
void remove_boot(const Boot& boot);
// The unit's text: for tests and for people who want to see it before.
std::string unit_text(const Boot& boot, const std::string& program);

}  // namespace rehome
