// Words for people and from people: sizes, durations, near misses.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"

namespace rehome {

std::string counted(std::int64_t n, std::string_view thing);   // "1 table", "2 tables"
std::string human_bytes(std::int64_t bytes);                   // "1.4 GB", decimal units
std::string human_duration(Millis d);                          // "340 ms", "2.1 s", "3 min 20 s", "2 h 5 min"
std::optional<std::int64_t> parse_bytes(std::string_view);     // "10GB", "512 MiB", "100"; nullopt when it is none
std::optional<Millis> parse_duration(std::string_view);        // "300ms", "2s", "5 min", "1h"; a unit is required
std::vector<std::string> split(std::string_view text, char separator);
std::string join(const std::vector<std::string>& parts, std::string_view separator);
std::string first_few(std::vector<std::string> names, std::size_t most = 8);   // "a, b and 5 more"
std::string_view trim(std::string_view text);
// The candidate nearest to `word` by edit distance, when it is near enough to be what was meant.
std::optional<std::string> nearest(std::string_view word, const std::vector<std::string>& candidates);
// Quoted for a POSIX shell.
std::string shell_quote(std::string_view word);

}  // namespace rehome
