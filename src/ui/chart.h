// The lag over time as inline SVG.
#pragma once

#include <string>

#include "ui/story.h"

namespace rehome::ui {

// One line a store, in bytes, with a mark at every switch and reverse; empty when the journal has fewer than two points.
std::string lag_chart(const Story& story);

}  // namespace rehome::ui
