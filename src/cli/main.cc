#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <optional>

#include "base/text.h"
#include "base/version.h"
#include "cli/report.h"
#include "cli/streams.h"
#include "ops/ops.h"
#include "ops/run.h"
#include "ui/terminal.h"
#include "ui/text_view.h"

namespace {

using namespace rehome;

// The second Ctrl-C means it: the agents hold what must be held, so that ending here loses nothing.
void on_interrupt(int) {
  if (ops::cancel_flag().exchange(true)) std::_Exit(130);
}

// "2026-03-01 22:00" or "22:00", also with seconds, local time; microseconds since the epoch.
std::int64_t parse_when(const std::string& text) {
  std::tm tm{};
  std::time_t now = std::time(nullptr);
  localtime_r(&now, &tm);
  std::tm day = tm;
  const char* end = nullptr;
  for (const char* format : {"%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S", "%H:%M", "%H:%M:%S"}) {
    day = tm;
    day.tm_sec = 0;
    end = ::strptime(text.c_str(), format, &day);
    if (end && !*end) break;
  }
  if (!end || *end) throw Error(Code::usage, "--at " + text + " is not a time", "write \"2026-03-01 22:00\" or 22:00");
  day.tm_isdst = -1;
  const int asked = day.tm_mday;
  std::time_t at = std::mktime(&day);
  if (day.tm_mday != asked) throw Error(Code::usage, "--at " + text + " is no day of that month", "name a day that there is");
  if (at < now && text.find('-') == std::string::npos) {
    // The same time of tomorrow: days are not all of one length.
    day.tm_mday++;
    day.tm_isdst = -1;
    at = std::mktime(&day);
  }
  if (at < now) throw Error(Code::usage, "--at " + text + " is in the past", "name a time to come");
  return static_cast<std::int64_t>(at) * 1'000'000;
}

std::string exit_statuses() {
  std::string out = "Exit statuses:\n  0    done\n";
  std::size_t n = 0;
  const CodeInfo* rows = error_table(n);
  for (std::size_t i = 0; i < n; i++) {
    char buf[160];
    std::snprintf(buf, sizeof buf, "  %-4d %-13s %s\n", rows[i].exit_status, std::string(rows[i].name).c_str(), std::string(rows[i].meaning).c_str());
    out += buf;
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  cli::ensure_standard_streams();
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGHUP, SIG_IGN);   // a closed terminal stops nothing that follows
  struct sigaction interrupt{};
  interrupt.sa_handler = on_interrupt;
  ::sigaction(SIGINT, &interrupt, nullptr);
  ::sigaction(SIGTERM, &interrupt, nullptr);

  CLI::App app{"rehome moves a live, stateful deployment to a new server or version, and back, without losing a write."};
  app.footer(exit_statuses());
  app.set_version_flag("--version", std::string("rehome ") + kVersion);
  app.require_subcommand(1);
  app.fallthrough();
  ui::TerminalOptions print;
  std::optional<ui::Terminal> terminal;
  std::string file = "rehome.yaml";
  app.add_option("-f,--file", file, "the deployment")->capture_default_str();
  app.add_flag("--json", print.json, "one JSON object a line");
  app.add_flag("-q,--quiet", print.quiet, "results and errors only");

  std::function<int()> action;
  auto emit = [&terminal](const Json& e) { (*terminal)(e); };
  auto common = [&](auto& o) -> auto& {
    o.file = file;
    o.emit = emit;
    return o;
  };
  auto command = [&](const char* name, const char* what, const char* examples) {
    CLI::App* c = app.add_subcommand(name, what);
    c->footer(std::string("Examples:\n") + examples);
    return c;
  };

  ops::CheckOptions check;
  command("check", "find what would break the migration; changes nothing", "  rehome check\n  rehome -f shop.yaml check --json")
      ->callback([&] { action = [&] { return ops::check(common(check)); }; });

  ops::PlanOptions plan;
  auto* c = command("plan", "show every step, its size, time and the expected pause; changes nothing", "  rehome plan\n  rehome plan --out friday.plan");
  c->add_option("--out", plan.out, "save the plan with the facts it was made from");
  c->callback([&] { action = [&] { return ops::plan(common(plan)); }; });

  ops::BeginOptions begin;
  c = command("begin", "connect the sites, copy everything, and follow", "  rehome begin\n  rehome begin --plan friday.plan");
  c->add_option("--plan", begin.plan, "refuse when this saved plan is stale");
  c->callback([&] { action = [&] { return ops::begin(common(begin)); }; });

  ops::StatusOptions status;
  bool watch = false;
  c = command("status", "who serves, how far behind the other is, what is waited for", "  rehome status\n  rehome status --watch\n  rehome status --json\nEnds with 0 as long as it is known who serves, also while a site is not reached.");
  c->add_flag("--watch", watch, "again every second, until Ctrl-C or until nobody reads it");
  c->callback([&] {
    action = [&] {
      std::signal(SIGHUP, SIG_DFL);   // it stops nothing but itself
      int result = ops::status(common(status));
      while (watch && !ops::cancel_flag() && terminal->alive()) {
        system_clock().sleep(Millis(1000));
        try {
          result = ops::status(status);
        } catch (const Error& e) {
          // An agent went away between two of its answers: the next look says what is there.
          if (!e.passes()) throw;
          terminal->error(e);
        }
      }
      return result;
    };
  });

  ops::VerifyOptions verify;
  c = command("verify", "compare both sites at one consistent point, and name what differs", "  rehome verify\n  rehome verify --store db");
  c->add_option("--store", verify.store, "this store only");
  c->callback([&] { action = [&] { return ops::verify(common(verify)); }; });

  ops::SwitchOptions sw;
  std::string at, patience;
  c = command("switch", "the target takes over, within max_pause, or nothing changes", "  rehome switch\n  rehome switch --when-ready\n  rehome switch --at 22:00 --when-ready");
  c->add_flag("--when-ready", sw.when_ready, "wait until the predicted pause is within max_pause");
  c->add_option("--patience", patience, "how long --when-ready waits (24h)");
  c->add_option("--at", at, "not before this time, \"2026-03-01 22:00\" or 22:00, also with seconds");
  c->add_option("--plan", sw.plan, "refuse when this saved plan is stale");
  c->add_flag("--recopy", sw.recopy, "first copy again what a change of the schema made necessary");
  c->callback([&] {
    action = [&] {
      if (!at.empty()) sw.at_us = parse_when(at);
      if (!patience.empty()) {
        if (!sw.when_ready) throw Error(Code::usage, "--patience says how long --when-ready waits, which is not asked for", "add --when-ready");
        auto d = parse_duration(patience);
        if (!d) throw Error(Code::usage, "--patience " + patience + " is not a duration", "write 30min or 2h");
        sw.patience = *d;
      }
      return ops::switch_over(common(sw));
    };
  });

  ops::ReverseOptions reverse;
  c = command("reverse", "back to the side that served before; the same pause, nothing lost", "  rehome reverse\n  rehome reverse --target-is-gone --confirm new.example.org");
  c->add_flag("--target-is-gone", reverse.target_is_gone, "the target is off for good: its last writes may be lost, see status for the lag");
  c->add_option("--confirm", reverse.confirm, "the host that you know is off");
  c->callback([&] { action = [&] { return ops::reverse(common(reverse)); }; });

  ops::CompleteOptions complete;
  c = command("complete", "end the run: everything of rehome gone from both sites, but the old side's fence", "  rehome complete\n  rehome complete --unfence-source\n  rehome complete --source-is-gone --confirm old.example.org\nIt first watches the old address for up to 60 s, and refuses while clients arrive there.");
  c->add_flag("--unfence-source", complete.unfence_source, "lift the old side's fence too");
  c->add_flag("--anyway", complete.anyway, "although clients still arrive at the old address, or a write canary failed");
  c->add_flag("--source-is-gone", complete.source_is_gone, "the source is off for good: the target alone is cleaned");
  c->add_option("--confirm", complete.confirm, "the host that you know is off");
  c->callback([&] { action = [&] { return ops::complete(common(complete)); }; });

  ops::CancelOptions cancel;
  c = command("cancel", "before a switch: take everything back, the source never stopped serving", "  rehome cancel\n  rehome cancel --target-is-gone --confirm new.example.org");
  c->add_flag("--target-is-gone", cancel.target_is_gone, "the target is off for good: the source alone is cleaned");
  c->add_option("--confirm", cancel.confirm, "the host that you know is off");
  c->callback([&] { action = [&] { return ops::cancel(common(cancel)); }; });

  ops::MigrateOptions migrate;
  c = command("migrate", "begin, verify and switch in one go", "  rehome migrate\n  rehome migrate --plan friday.plan");
  c->add_option("--plan", migrate.plan, "refuse when this saved plan is stale");
  c->callback([&] { action = [&] { return ops::migrate(common(migrate)); }; });

  ops::ResumeOptions resume;
  c = command("resume", "go on after an interruption, from any machine that reaches both sites", "  rehome resume\n  rehome resume --recopy\n  rehome resume --source-is-gone --confirm old.example.org");
  c->add_flag("--recopy", resume.recopy, "copy again what a change of the schema made necessary");
  c->add_flag("--source-is-gone", resume.source_is_gone, "the source is off for good: open the target with what it has");
  c->add_option("--confirm", resume.confirm, "the host that you know is off");
  c->callback([&] { action = [&] { return ops::resume(common(resume)); }; });

  ops::ReportOptions report;
  c = command("report", "one HTML page: what was done, the pause and where it went, what was verified and left", "  rehome report\n  rehome report --out friday.html");
  c->add_option("--out", report.out, "the file (rehome-report.html)");
  c->callback([&] {
    action = [&] {
      common(report);
      return cli::write_report(report);
    };
  });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (auto words = app.remaining(); e.get_exit_code() != 0 && app.get_subcommands().empty() && !words.empty()) {
      std::vector<std::string> known;
      for (const auto* s : app.get_subcommands(nullptr)) known.push_back(s->get_name());
      auto meant = nearest(words[0], known);
      std::fprintf(stderr, "rehome: '%s' is no %s%s; rehome --help lists them\n", ui::printable(words[0]).c_str(), words[0].starts_with('-') ? "option" : "command", meant ? (", did you mean " + *meant + "?").c_str() : "");
      return error_info(Code::usage).exit_status;
    }
    if (e.get_exit_code() != 0) return std::fprintf(stderr, "rehome: %s; --help says more\n", ui::printable(e.what()).c_str()), error_info(Code::usage).exit_status;
    return app.exit(e);
  }
  terminal.emplace(print);
  try {
    return action();
  } catch (const Error& e) {
    terminal->error(e);
    return error_info(e.code).exit_status;
  } catch (const std::exception& e) {  // what no code of ours threw: a bug, and said as one
    terminal->error(Error(Code::internal, e.what(), "what was made durable stays; see rehome status"));
    return error_info(Code::internal).exit_status;
  }
}
