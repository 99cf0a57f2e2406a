// The version of all three programs.
#pragma once

namespace rehome {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace rehome
