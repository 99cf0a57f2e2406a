// A run as its journal tells it, put in the order in which a person asks.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/json.h"

namespace rehome::ui {

struct StoryStep {
  std::string id, title, state;     // done, failed, undone, or started: it never ended
  std::int64_t from_us = 0, to_us = 0;
  std::string error;
};

struct StoryPhase {
  std::string name, error;
  double ms = 0;
};

// One try to switch or reverse.
struct StoryAttempt {
  std::int64_t number = 0, at_us = 0;
  std::string direction;            // switch or reverse
  std::string result;               // switched, backed out, finished or undone by the agents, or empty: the journal ends inside it
  double total_ms = 0, predicted_ms = 0;
  std::string error, hint;
  std::vector<StoryPhase> phases;
  Json ledger;                      // null when there was no gate, or it was not asked
  bool switched() const { return result == "switched"; }
};

struct StoryLag {
  std::int64_t at_us = 0, bytes = 0;
  double ms = 0;
};

struct StoryCheck {
  std::int64_t at_us = 0;
  std::string kind, name, side, said;   // kind: check or canary
  bool ok = false;
  double ms = 0;
};

struct StoryVerify {
  std::int64_t at_us = 0, compared = 0, more = 0;
  std::string store;
  bool equal = false;
  Json differences, detail;
};

struct StoryNote {
  std::int64_t at_us = 0, until_us = 0;
  std::int64_t times = 1;               // the same text again and again is one note
  bool error = false;
  std::string text, hint;
};

struct StoryChange {
  std::int64_t at_us = 0;
  std::string what, where, undo;
};

struct StoryServes {
  std::int64_t at_us = 0;
  std::string side;
  bool forced = false, found = false;
};

struct Story {
  std::string name, hash, command, phase;
  double max_pause_ms = 0;
  std::map<std::string, std::string> sites, versions;
  std::int64_t from_us = 0, to_us = 0;
  std::size_t entries = 0;
  std::vector<StoryStep> steps;
  std::vector<StoryAttempt> attempts;
  std::map<std::string, std::vector<StoryLag>> lag;
  std::vector<StoryCheck> checks;
  std::vector<StoryVerify> verified;    // in order; the last one of a store is what holds
  std::vector<StoryChange> changes;
  std::vector<StoryNote> notes;
  std::vector<StoryServes> serves;
  bool ended = false;                   // complete or cancel wrote what is left
  std::vector<std::string> left, unexpected;
  std::map<std::string, std::int64_t> milestones;  // phase of the run -> when it was reached first
};

// Never throws: a line that is odd is left out.
Story tell(const std::vector<Json>& entries);

}  // namespace rehome::ui
