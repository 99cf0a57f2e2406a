// What check asks of a site about a store's tree: docs/PROTOCOL.md, files.probe. Changes nothing.
#pragma once

#include <functional>

#include "base/json.h"
#include "track/owners.h"

namespace rehome::track {

// With "count" the whole tree is read, unless `stopping`. Throws Error(io) where the agent cannot look.
Json probe(const Json& request, Accounts& accounts, const std::function<bool()>& stopping);

}  // namespace rehome::track
