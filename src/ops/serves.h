// Who serves, by what the agents' records say together.
#pragma once

#include "base/json.h"
#include "config/deployment.h"

namespace rehome::ops {

// `records` as in hello; null: that agent does not answer. Throws Error(unknown) where a decision has not been carried out, or may be
// made and not heard of; retryable where neither side serves and the agents end that by themselves.
Side who_serves(const BySide<Json>& records);

}  // namespace rehome::ops
