// Who at the target talks to the source's server: programs there would go on writing to the old side after a switch.
#pragma once

#include <vector>

#include "stores/store.h"

namespace rehome {

// Warnings for established connections from the target's host to the source's server, and for systemd units of the target
// whose settings name it. Reads only; contents of environment files are compared on that host and never leave it.
// None where both sites are one host.
std::vector<Finding> clients_of_source(StoreContext& c, const std::string& store, const PostgresServer& source);

}  // namespace rehome
