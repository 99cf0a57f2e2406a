// The page that is read the morning after.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"

namespace rehome::ui {

// One self-contained HTML page (no script, no other file, light and dark) from the entries of one journal. Times are UTC.
// Every text from a journal is escaped. Never throws for what entries lack or say.
std::string report_html(const std::vector<Json>& entries);

}  // namespace rehome::ui
