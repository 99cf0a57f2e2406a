// A plan is an ordered list of steps; the runner takes them through the journal.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "engine/journal.h"

namespace rehome {

struct Step {
  std::string id;      // stable across versions: "copy db"
  std::string title;   // what it does, in words; the plan shows it
  // Steps of one group run side by side, one thread each; neighbours in the list only. Empty: alone.
  std::string group;
  // Does it. Idempotent: a step that was interrupted is run again from its start.
  std::function<void()> run;
  // Takes it back, also when it was only started. Idempotent. Empty: nothing to take back.
  std::function<void()> undo;
  // Asked of a step that the journal says is done: false means it must run again. Empty: done stays done.
  std::function<bool()> still_done;
};

// Runs the steps in order and skips those that are done. Before each: `started` is durable; after: `done`. A failing step
// is recorded as failed and its error thrown with the step's title as context; steps of the same group are let to their
// end first. `cancelled` is looked at between steps: then Error(interrupted).
void run_steps(const std::vector<Step>& steps, Journal& journal, const std::atomic<bool>& cancelled);

// Undoes every step that was ever started, last first, and records it. Goes on past a failing one, and throws the first
// error at the end: what could not be undone is in the journal as failed, and calling again tries it again.
void undo_steps(const std::vector<Step>& steps, Journal& journal);

}  // namespace rehome
