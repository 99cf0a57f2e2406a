// ui: what people see: the terminal and the report. It reads the entries of a journal (docs/JOURNAL.md) and the objects
// that commands emit, as JSON; it knows no store, no site and no step, so that a page made a year later shows the same.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace rehome::ui {

// Each gives finished lines without newlines, safe for a terminal. They never throw for what an object lacks or says.
std::vector<std::string> status_lines(const Json& status);
std::vector<std::string> plan_lines(const Json& plan);
std::vector<std::string> result_lines(const Json& result);
// An entry of any other kind; empty when it is of no interest to a person who watches.
std::vector<std::string> entry_lines(const Json& entry);

// Message, context, hint and exit status, for a person.
std::vector<std::string> error_lines(const Error& error);

// "212 ms", "4.3 ms", "12.4 s": a measured pause keeps its precision.
std::string exact_ms(double ms);
// "1,204,331"
std::string grouped(std::int64_t n);
// Control characters, which could move the cursor or hide text, shown as \xNN.
std::string printable(std::string_view text);
// How many columns UTF-8 text takes on a terminal: none for what combines, two for what is wide (Unicode Standard Annex 11).
std::size_t columns(std::string_view text);

}  // namespace rehome::ui
