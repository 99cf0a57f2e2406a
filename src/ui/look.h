// Tolerant access to entries: a missing or odd member is a fallback, since a page must not fail for one line of a journal.
#pragma once

#include <cmath>
#include <string>

#include "base/json.h"

namespace rehome::ui {

inline const Json& at(const Json& j, const char* key) {
  static const Json nothing;
  if (!j.is_object()) return nothing;
  auto it = j.find(key);
  return it == j.end() ? nothing : *it;
}
inline std::string str(const Json& j, const char* key, std::string_view fallback = {}) {
  const Json& v = at(j, key);
  if (v.is_string()) return v.get<std::string>();
  return v.is_null() ? std::string(fallback) : dump_line(v);
}
inline double num(const Json& j, const char* key, double fallback = 0) {
  const Json& v = at(j, key);
  return v.is_number() ? v.get<double>() : fallback;
}
inline std::int64_t whole(const Json& j, const char* key, std::int64_t fallback = 0) {
  const Json& v = at(j, key);
  // Also for a number with a fraction; one that no 64 bits hold is no number of ours.
  if (v.is_number_float()) return std::abs(v.get<double>()) < 9e18 ? static_cast<std::int64_t>(v.get<double>()) : fallback;
  return v.is_number() ? v.get<std::int64_t>() : fallback;
}
inline bool yes(const Json& j, const char* key, bool fallback = false) {
  const Json& v = at(j, key);
  return v.is_boolean() ? v.get<bool>() : fallback;
}

}  // namespace rehome::ui
