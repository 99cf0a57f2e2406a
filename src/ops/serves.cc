#include "ops/serves.h"

#include "base/error.h"

namespace rehome::ops {

Side who_serves(const BySide<Json>& records) {
  auto known = [&](Side side) { return records[side].is_object(); };
  auto epoch = [&](Side side) { return known(side) ? get_int(records[side], "epoch") : -1; };
  const Json& newest = records[epoch(Side::target) > epoch(Side::source) ? Side::target : Side::source];
  const Side takes = get_string(newest, "serves") == "target" ? Side::target : Side::source, yields = other(takes);
  auto named = [](Side side) { return "the " + std::string(side_name(side)); };
  auto decision = [&](Side side) { return get_string(records[side], "decision"); };
  const std::string attempt = "attempt " + std::to_string(get_int(newest, "attempt", 0));

  if (known(takes)) {
    if (decision(takes) == "STORED")
      throw Error(Code::unknown, "neither side serves: " + attempt + " is decided, and " + named(takes) + " has not opened all its stores yet",
                  "its agent tries until they are open; rehome status shows what it waits for", true);
    if (get_string(records[takes], "serves") == side_name(takes)) return takes;
    // The one that yields says so alone.
    throw Error(Code::unknown, "neither side serves: " + attempt + " is decided at " + named(yields) + ", and " + named(takes) + " has not heard of it",
                "the agents finish it as soon as the link between them is up; rehome status shows why it is not", true);
  }
  // What the one that is not reached may have come to; a person can open the other only where it has all of it.
  if (decision(yields) == "COMMIT")
    throw Error(Code::unknown, attempt + " is decided at " + named(yields) + ", and " + named(takes) + " is not reached: if it has not heard of it, neither side serves",
                "bring the " + std::string(side_name(takes)) + "'s host back: the agents finish it by themselves" +
                    (yields == Side::source ? "; or, if it is off for good: rehome reverse --target-is-gone" : ""));
  if (decision(yields) == "PREPARED")
    throw Error(Code::unknown, named(takes) + " is not reached, and may have decided " + attempt + ": if its host is off, neither side serves",
                "bring that host back; or, if it is off for good: rehome " + std::string(takes == Side::source ? "resume --source-is-gone" : "reverse --target-is-gone"));
  return takes;
}

}  // namespace rehome::ops
