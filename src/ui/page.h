// The pieces a page is made of.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rehome::ui {

// Text for HTML, in elements and in quoted attributes; control characters become visible.
std::string esc(std::string_view text);
std::string date_utc(std::int64_t wall_us);               // "21 Nov 2026"
std::string time_utc(std::int64_t wall_us);               // "22:00:03"
std::string time_ms_utc(std::int64_t wall_us);            // "22:00:03.412"
std::string span_of(std::int64_t from_us, std::int64_t to_us);  // "4 min 7 s"
std::string number(double v);                             // for attributes: no exponent, no locale

struct Cell {
  std::string html;            // already escaped
  const char* style = "";      // class: "n" for numbers, "" for text
};
// Header names are plain text; one "n" style makes a column of numbers.
std::string table(const std::vector<Cell>& head, const std::vector<std::vector<Cell>>& rows);
std::string badge(bool good, std::string_view text);      // "✓ equal", "✗ differs": never colour alone

// The page around `body`; `title` is plain text.
std::string page(std::string_view title, std::string_view body);

}  // namespace rehome::ui
