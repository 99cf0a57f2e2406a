#include "base/text.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <numeric>

namespace rehome {
namespace {

template <class... Args>
std::string printed(const char* format, Args... args) {
  char buf[96];
  std::snprintf(buf, sizeof buf, format, args...);
  return buf;
}

struct Unit {
  std::string_view name;
  double factor;
};

// A number, optional space, then one of `units`.
std::optional<double> parse_with_unit(std::string_view text, const Unit* units, std::size_t count, bool unit_required) {
  text = trim(text);
  double value = 0;
  auto [end, err] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (err != std::errc() || value < 0 || !std::isfinite(value)) return std::nullopt;
  std::string_view unit = trim(text.substr(static_cast<std::size_t>(end - text.data())));
  if (unit.empty()) return unit_required ? std::nullopt : std::optional(value);
  for (std::size_t i = 0; i < count; i++) {
    if (unit.size() == units[i].name.size() &&
        std::equal(unit.begin(), unit.end(), units[i].name.begin(),
                   [](char a, char b) { return std::tolower(a) == std::tolower(b); }))
      return value * units[i].factor;
  }
  return std::nullopt;
}

}  // namespace

std::string counted(std::int64_t n, std::string_view thing) { return std::to_string(n) + " " + std::string(thing) + (n == 1 ? "" : "s"); }

std::string human_bytes(std::int64_t bytes) {
  static constexpr std::array units{"B", "kB", "MB", "GB", "TB", "PB"};
  double v = static_cast<double>(bytes);
  std::size_t i = 0;
  while (v >= 999.5 && i + 1 < units.size()) v /= 1000, i++;
  return printed(i == 0 || v >= 99.5 ? "%.0f %s" : "%.1f %s", v, units[i]);
}

std::string human_duration(Millis d) {
  double ms = static_cast<double>(d.count());
  if (ms < 1000) return printed("%.0f ms", ms);
  if (ms < 59950) return printed("%.1f s", ms / 1000);
  long s = std::lround(ms / 1000);
  if (s < 3600) return printed("%ld min %ld s", s / 60, s % 60);
  return printed("%ld h %ld min", s / 3600, s % 3600 / 60);
}

std::optional<std::int64_t> parse_bytes(std::string_view text) {
  static constexpr std::array units{Unit{"B", 1},         Unit{"kB", 1e3},      Unit{"MB", 1e6},       Unit{"GB", 1e9},
                                    Unit{"TB", 1e12},     Unit{"k", 1e3},       Unit{"M", 1e6},        Unit{"G", 1e9},
                                    Unit{"T", 1e12},      Unit{"KiB", 1024},    Unit{"MiB", 1048576},  Unit{"GiB", 1073741824},
                                    Unit{"TiB", 1099511627776.0}};
  auto v = parse_with_unit(text, units.data(), units.size(), false);
  if (!v || *v > 9e18) return std::nullopt;
  return static_cast<std::int64_t>(std::llround(*v));
}

std::optional<Millis> parse_duration(std::string_view text) {
  static constexpr std::array units{Unit{"ms", 1},    Unit{"s", 1e3},      Unit{"sec", 1e3}, Unit{"min", 6e4},
                                    Unit{"m", 6e4},   Unit{"h", 3.6e6},    Unit{"d", 8.64e7}};
  auto v = parse_with_unit(text, units.data(), units.size(), true);
  if (!v || *v > 9e15) return std::nullopt;
  return Millis(std::llround(*v));
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  std::size_t from = 0;
  while (true) {
    auto at = text.find(separator, from);
    parts.emplace_back(text.substr(from, at == std::string_view::npos ? at : at - from));
    if (at == std::string_view::npos) return parts;
    from = at + 1;
  }
}

std::string join(const std::vector<std::string>& parts, std::string_view separator) {
  std::string out;
  for (std::size_t i = 0; i < parts.size(); i++) {
    if (i) out += separator;
    out += parts[i];
  }
  return out;
}

std::string first_few(std::vector<std::string> names, std::size_t most) {
  const std::string more = names.size() > most ? " and " + std::to_string(names.size() - most) + " more" : "";
  if (names.size() > most) names.resize(most);
  return join(names, ", ") + more;
}

std::string_view trim(std::string_view text) {
  auto space = [](char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; };
  while (!text.empty() && space(text.front())) text.remove_prefix(1);
  while (!text.empty() && space(text.back())) text.remove_suffix(1);
  return text;
}

std::optional<std::string> nearest(std::string_view word, const std::vector<std::string>& candidates) {
  std::size_t best = std::max<std::size_t>(2, word.size() / 3) + 1;
  std::optional<std::string> found;
  for (const auto& c : candidates) {
    // Levenshtein, one row at a time.
    std::vector<std::size_t> row(c.size() + 1);
    std::iota(row.begin(), row.end(), std::size_t{0});
    for (std::size_t i = 1; i <= word.size(); i++) {
      std::size_t diagonal = row[0];
      row[0] = i;
      for (std::size_t k = 1; k <= c.size(); k++) {
        std::size_t cost = std::min({row[k] + 1, row[k - 1] + 1, diagonal + (word[i - 1] == c[k - 1] ? 0u : 1u)});
        diagonal = row[k];
        row[k] = cost;
      }
    }
    if (row[c.size()] < best) best = row[c.size()], found = c;
  }
  return found;
}

std::string shell_quote(std::string_view word) {
  if (!word.empty() && word.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                              "@%_+=:,./-") == std::string_view::npos)
    return std::string(word);
  std::string out = "'";
  for (char c : word) {
    if (c == '\'')
      out += "'\\''";
    else
      out += c;
  }
  return out + "'";
}

}  // namespace rehome
