#include "cli/print.h"

#include <cstdio>
#include <string>

#include "base/text.h"
#include "sys/fs.h"
#if __has_include("ui/report.h")
#include "ui/report.h"
#else
namespace rehome {
static std::string report_html(const std::vector<Json>&) { throw Error(Code::internal, "this build has no report"); }
}
#endif

namespace rehome::cli {
namespace {

void line(const std::string& text, FILE* to = stdout) {
  std::fputs((text + "\n").c_str(), to);
  std::fflush(to);
}

std::string ms(double v) {
  char buf[32];
  std::snprintf(buf, sizeof buf, v < 10 ? "%.1f ms" : "%.0f ms", v);
  return v < 10000 ? buf : human_duration(Millis(static_cast<std::int64_t>(v)));
}

void print_status(const Json& s) {
  line(get_string(s, "name") + ": " + get_string(s, "phase") + (s.contains("serves") ? "; " + get_string(s, "serves") + " serves" : ""));
  if (s.contains("why")) line("  " + get_string(s["why"], "message"));
  if (s.contains("last_journal")) line("  the last run's journal: " + get_string(s, "last_journal"));
  for (const char* side : {"source", "target"}) {
    if (!s.contains(side)) continue;
    const Json& at = s[side];
    if (at.contains("missing")) {
      line(std::string("  ") + side + ": does not answer: " + get_string(at["missing"], "message"));
      continue;
    }
    std::string text = std::string("  ") + side + ": agent up";
    if (at.contains("record")) text += ", record " + get_string(at["record"], "decision") + " epoch " + std::to_string(get_int(at["record"], "epoch"));
    if (at.contains("record_error")) text += ", RECORD UNREADABLE: " + get_string(at, "record_error");
    if (at.contains("link")) text += get_bool(at["link"], "up", false) ? ", link up" : ", link DOWN: " + get_string(at["link"], "error", "");
    if (at.contains("gate") && at["gate"].contains("state"))
      text += ", gate " + get_string(at["gate"], "state") + " (" + std::to_string(get_int(at["gate"], "in_flight")) + " in flight, " + std::to_string(get_int(at["gate"], "waiting")) + " waiting)";
    line(text);
    if (at.contains("attempt") && at["attempt"].contains("waiting_for") && at["attempt"]["waiting_for"].is_string() && !at["attempt"]["waiting_for"].get<std::string>().empty())
      line("    waiting for: " + at["attempt"]["waiting_for"].get<std::string>());
  }
  if (!s.contains("stores")) return;
  for (auto& [name, store] : s["stores"].items()) {
    if (store.contains("error")) {
      line("  " + name + ": " + get_string(store["error"], "message"));
      continue;
    }
    std::string trouble = get_string(store, "trouble", "");
    line("  " + name + ": " + (get_bool(store, "following") ? "follows, " + human_bytes(get_int(store, "lag_bytes")) + " behind" : "does NOT follow") + (trouble.empty() ? "" : ": " + trouble));
    for (const auto& again : store["needs_recopy"]) line("    must be copied again: " + again.get<std::string>());
  }
}

void print_plan(const Json& p) {
  line("Plan for " + get_string(p, "name"));
  int n = 1;
  for (const auto& s : p["steps"]) line("  " + std::to_string(n++) + ". [" + get_string(s, "command") + "] " + get_string(s, "title"));
  for (auto& [name, s] : p["stores"].items())
    line("  " + name + ": " + human_bytes(get_int(s, "bytes")) + ", " + std::to_string(get_int(s, "objects")) + (get_string(s, "kind") == "files" ? " files" : " rows") + ", about " +
         human_duration(Millis(get_int(s, "copy_ms"))) + " to copy");
  line("  pause: about " + human_duration(Millis(get_int(p["pause"], "ms"))) + " of at most " + human_duration(Millis(get_int(p["pause"], "max_ms"))) + ", because");
  for (const auto& r : p["pause"]["reasons"]) line("    - " + r.get<std::string>());
  for (auto& [name, notes] : p["traffic"].items())
    for (const auto& note : notes) line("  " + name + ": " + note.get<std::string>());
}

}  // namespace

void print(const PrintOptions& o, const Json& e) {
  if (o.json) return line(dump_line(e));
  std::string kind = get_string(e, "kind", "");
  if (kind == "finding") {
    line(get_string(e, "level") + ": " + get_string(e, "object") + ": " + get_string(e, "message"));
    if (std::string mend = get_string(e, "mend", ""); !mend.empty()) line("    " + mend);
    return;
  }
  if (kind == "plan") return print_plan(e);
  if (kind == "status") return print_status(e);
  if (kind == "result") {
    std::string text = get_string(e, "what");
    if (e.contains("text")) text += ": " + get_string(e, "text");
    if (e.contains("pause_ms")) text += ": done, the pause was " + ms(e["pause_ms"].get<double>());
    line(text);
    if (e.contains("phases"))
      for (const auto& p : e["phases"]) line("    " + get_string(p, "name") + " " + ms(p["ms"].get<double>()));
    if (e.contains("ledger") && e["ledger"].contains("held"))
      line("    held " + std::to_string(get_int(e["ledger"], "held")) + " connections, the longest " + ms(e["ledger"]["longest_wait_ms"].get<double>()) + "; dropped " +
           std::to_string(get_int(e["ledger"], "dropped")) + ", cut " + std::to_string(get_int(e["ledger"], "cut")));
    if (e.contains("left"))
      for (const auto& l : e["left"]) line("    left: " + l.get<std::string>());
    if (e.contains("journal")) line("    journal: " + get_string(e, "journal"));
    return;
  }
  if (o.quiet) return;
  if (kind == "step") {
    std::string state = get_string(e, "state");
    if (state == "started") line(get_string(e, "title") + " ...");
    if (state == "failed") line(get_string(e, "title") + ": FAILED: " + get_string(e["error"], "message"));
    if (state == "undone") line("undone: " + get_string(e, "title"));
  } else if (kind == "progress") {
    std::int64_t done = get_int(e, "done"), total = get_int(e, "total");
    std::string text = "  " + get_string(e, "store") + ": " + get_string(e, "phase");
    if (total > 0) text += get_string(e, "unit") == "bytes" ? " " + human_bytes(done) + " of " + human_bytes(total) : " " + std::to_string(done) + " of " + std::to_string(total) + " " + get_string(e, "unit");
    line(text + " " + get_string(e, "detail", ""));
  } else if (kind == "message") {
    line("  " + get_string(e, "text"));
  } else if (kind == "verify") {
    line("  verify " + get_string(e, "store") + ": " + (get_bool(e, "equal") ? "equal" : "DIFFERENT") + ", " + std::to_string(get_int(e, "compared")) + " compared");
    for (const auto& d : e["differences"]) line("    " + get_string(d, "object") + ": " + get_string(d, "what"));
  } else if (kind == "serves") {
    line("  " + get_string(e, "side") + " serves");
  }
}

void print_error(const PrintOptions& o, const Error& e) {
  if (o.json) {
    line(dump_line({{"kind", "error"}, {"error", error_to_json(e)}}));
    return;
  }
  line(std::string("rehome: ") + e.what(), stderr);
  if (!e.hint.empty()) line("  " + e.hint, stderr);
}

int write_report(const PrintOptions& options, const ops::ReportOptions& report) {
  auto entries = ops::report_entries(report);
  std::string path = report.out.empty() ? "rehome-report.html" : report.out;
  write_durably(path, report_html(entries), 0644);
  print(options, {{"kind", "result"}, {"what", "report"}, {"text", path}});
  return 0;
}

}  // namespace rehome::cli
