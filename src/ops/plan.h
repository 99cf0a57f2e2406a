// The plan: what each step does, what it will cost, and the observed facts that it was made from.
#pragma once

#include <string>

#include "ops/run.h"

namespace rehome::ops {

// {"name", "hash", "steps": [{id, title, command, done}], "stores": {name: {bytes, objects, copy_ms, pause_ms, reasons, again}}, "traffic": {name: notes},
//  "pause": {ms, reasons}, "facts": {key: value}}
Json make_plan(Run& run);
// "done" and "again" (what resume copies again, and why) are of a run that was begun.
// The facts that matter, observed now.
Json observe_facts(Run& run);
// Throws Error(stale_plan) naming every fact that changed since the plan in `path` was saved.
void refuse_stale_plan(Run& run, const std::string& path);

}  // namespace rehome::ops
