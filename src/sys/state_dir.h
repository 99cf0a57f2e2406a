// What rehome makes in a state directory (docs/PROTOCOL.md lists it): these names, and no other, are taken away from there, since a
// person's `state` may be a directory that holds more.
#pragma once

#include <array>
#include <string>
#include <string_view>

namespace rehome {

inline constexpr std::array<std::string_view, 15> kStateNames{"actions.json", "agent.json", "bin", "credentials", "files.json", "gate.json", "generation", "journal.jsonl",
                                                              "lag.jsonl", "log", "not-serving", "record", "reserve", "run", "traffic"};

// A durable write's temporary file, and the start condition that is lifted for a start, belong to their names.
inline bool is_state_name(std::string_view name) {
  for (auto own : kStateNames)
    if (name == own || (name.starts_with(own) && (name.substr(own.size()).starts_with(".new.") || name.substr(own.size()) == ".lifted"))) return true;
  return false;
}

// The same as a pattern of a shell's `case`.
inline std::string state_name_pattern() {
  std::string all;
  for (auto own : kStateNames) all += (all.empty() ? "" : "|") + std::string(own) + "|" + std::string(own) + ".new.*|" + std::string(own) + ".lifted";
  return all;
}

}  // namespace rehome
