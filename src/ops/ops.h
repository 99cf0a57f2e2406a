// The commands as functions. Each returns the exit status or throws Error; what it prints goes through `out`, so that the
// command line decides about terminals and JSON.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "base/json.h"
#include "stores/store.h"

namespace rehome::ops {

// Where a command's news go: one object at a time, {"kind": ...} as in docs/JOURNAL.md, plus "progress" (store, phase, detail,
// done, total, unit), "finding" (level, id, object, message, mend), "plan", "status", "verdict" and "result". Called from several threads,
// one at a time.
using Emit = std::function<void(const Json&)>;

struct Common {
  std::string file = "rehome.yaml";
  Emit emit = [](const Json&) {};
};

struct CheckOptions : Common {};
struct PlanOptions : Common {
  std::string out;               // save the plan here
};
struct BeginOptions : Common {
  std::string plan;              // a saved plan: refused when stale
  std::string command = "begin"; // what the person asked for
};
struct StatusOptions : Common {};   // --watch is the command line's loop
struct VerifyOptions : Common {
  std::string store;             // empty: all
};
struct SwitchOptions : Common {
  std::string plan;
  bool when_ready = false;
  Millis patience{std::chrono::hours(24)};
  std::optional<std::int64_t> at_us;   // wall time; waits for it
  bool recopy = false;           // copy again what a change of the schema made necessary, first
};
struct ReverseOptions : Common {
  bool target_is_gone = false;
  std::string confirm;           // the name of the host that is off
};
struct CompleteOptions : Common {
  bool unfence_source = false;
  bool anyway = false;           // although clients still arrive at the old address, or a write canary failed
  bool source_is_gone = false;
  std::string confirm;
};
struct CancelOptions : Common {
  bool target_is_gone = false;
  std::string confirm;
};
struct MigrateOptions : Common {
  std::string plan;
};
struct ResumeOptions : Common {
  bool source_is_gone = false;
  std::string confirm;
  bool recopy = false;
};
struct ReportOptions : Common {
  std::string out;               // HTML file; empty: rehome-report.html
};

int check(const CheckOptions&);
int plan(const PlanOptions&);
int begin(const BeginOptions&);
int status(const StatusOptions&);
int verify(const VerifyOptions&);
int switch_over(const SwitchOptions&);
int reverse(const ReverseOptions&);
int complete(const CompleteOptions&);
int cancel(const CancelOptions&);
int migrate(const MigrateOptions&);
int resume(const ResumeOptions&);
// The journal's entries of the current run, or of the newest archived one; the command line makes the page.
std::vector<Json> report_entries(const ReportOptions&);

}  // namespace rehome::ops
