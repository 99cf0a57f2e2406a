#include "agent/boot.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <optional>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

std::string label(const Boot& b) { return "rehome-" + b.name + "-" + b.side; }
std::string unit_path(const Boot& b) { return "/etc/systemd/system/" + label(b) + ".service"; }
// Such programs run in the order of their names: the tree of a side that does not serve must be closed before its services start.
std::string script_path(const Boot& b) { return b.how.substr(10) + "/00-" + label(b); }

std::string own_program() {
  char buf[PATH_MAX];
  ssize_t n = ::readlink("/proc/self/exe", buf, sizeof buf);
  if (n <= 0) throw errno_error(errno, "read", "/proc/self/exe");
  return std::string(buf, static_cast<std::size_t>(n));
}

void systemctl(std::vector<std::string> arguments) {
  arguments.insert(arguments.begin(), "systemctl");
  run_ok({.argv = arguments}, Deadline::in(Millis(30'000)), "systemctl");
}

// The account's table; nothing where it has none. Only one answer means that: any other failure must not be taken for an empty table,
// which would then be written.
std::optional<std::string> crontab() {
  Outcome o = run({.argv = {"crontab", "-l"}, .env = {{"LC_ALL", "C"}}}, Deadline::in(Millis(10'000)));
  if (o.ok() && !o.truncated) return o.out;
  if (o.status == 1 && o.out.empty() && (o.err.find("no crontab for") != std::string::npos || o.err.find("No such file") != std::string::npos)) return {};   // cron's word, and BusyBox's
  throw Error(Code::store, "crontab -l does not tell this account's table: " + (o.truncated ? "it is too long" : "status " + std::to_string(o.status) + ", " + std::string(trim(o.err))),
              "it must print the table, or say with status 1 that there is none; then repeat the command");
}

std::string without_ours(const std::string& table, const std::string& mark) {
  std::string out;
  for (std::size_t from = 0, to; from < table.size(); from = to) {
    to = std::min(table.find('\n', from), table.size() - 1) + 1;
    std::string line = table.substr(from, to - from);
    if (!std::string_view(trim(line)).ends_with(mark)) out += line;
  }
  return out;
}

void write_crontab(const std::string& table) {
  run_ok({.argv = {"crontab", "-"}, .input = table}, Deadline::in(Millis(10'000)), "crontab");
  if (crontab().value_or("") != table)
    throw Error(Code::store, "crontab does not hold the table that it was given", "look at crontab -l: something else may write it; then repeat the command");
}

void remove_file(const std::string& path) {
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) throw errno_error(errno, "remove", path);
}

}  // namespace

std::string unit_text(const Boot& b, const std::string& program) {
  std::vector<std::string> before{"nginx.service"};
  for (const auto& unit : b.before)
    if (unit != "nginx.service") before.push_back(unit);
  // STATE has no blank and no '%': the configuration takes none. The record is in it. The stores' own volumes are not waited for: the agent must answer without them.
  // KillMode=process: the gate outlives a killed supervisor, and its connections with it.
  return "[Unit]\nDescription=rehome agent of " + b.name + " (" + b.side + ")\nBefore=" + join(before, " ") +
         "\nRequiresMountsFor=" + b.state + "\nStartLimitIntervalSec=0\n\n[Service]\nType=notify\nNotifyAccess=main\nTimeoutStartSec=30\nExecStart=" + program +
         " supervise --wait --state " + b.state +
         "\nRestart=always\nRestartSec=100ms\nRestartPreventExitStatus=100\nSuccessExitStatus=100\nKillMode=process\n"
         "OOMScoreAdjust=-900\nLimitNOFILE=65536\n\n[Install]\nWantedBy=multi-user.target\n";
}

std::string install_boot(const Boot& b, std::string program) {
  if (program.empty()) program = own_program();
  std::string start = shell_quote(program) + " supervise --detach --state " + shell_quote(b.state);
  if (b.how == "none") return "nothing";
  if (b.how == "systemd") {
    write_durably(unit_path(b), unit_text(b, program), 0644);
    systemctl({"daemon-reload"});
    systemctl({"enable", label(b) + ".service"});
    // It waits for the running supervisor's lock, and takes over when that one ends.
    systemctl({"start", "--no-block", label(b) + ".service"});
    return unit_path(b);
  }
  if (b.how == "cron") {
    // The second line brings a killed supervisor back; it ends at once while one runs.
    std::string mark = " # " + label(b);
    std::string table = without_ours(crontab().value_or(""), mark);
    if (!table.empty() && !table.ends_with('\n')) table += '\n';
    write_crontab(table + "@reboot " + start + mark + "\n* * * * * " + start + mark + "\n");
    return "crontab lines marked" + mark;
  }
  if (b.how.starts_with("directory:/")) {
    write_durably(script_path(b), "#!/bin/sh\n# Brings the rehome agent back after a reboot; complete removes it.\nexec " + start + "\n", 0755);
    return script_path(b);
  }
  throw Error(Code::config, "'" + b.how + "' is no way to come back after a reboot", "write systemd, cron, none or directory:/path");
}

void remove_boot(const Boot& b) {
  if (b.how == "systemd") {
    // Stopped only where it waits for a supervisor that was started by hand: otherwise that would end the agent that is
    // asked to do this.
    Outcome main = run({.argv = {"systemctl", "show", "--property=MainPID", "--value", label(b) + ".service"}}, Deadline::in(Millis(10'000)));
    if (std::string pid(trim(main.out)); main.ok() && pid != "0" && pid != std::to_string(::getppid()))
      run({.argv = {"systemctl", "stop", label(b) + ".service"}}, Deadline::in(Millis(30'000)));
    run({.argv = {"systemctl", "disable", label(b) + ".service"}}, Deadline::in(Millis(30'000)));
    remove_file(unit_path(b));
    systemctl({"daemon-reload"});
  } else if (b.how == "cron") {
    const std::string mark = " # " + label(b), table = crontab().value_or(""), left = without_ours(table, mark);
    if (left == table) return;
    if (!left.empty()) return write_crontab(left);
    run_ok({.argv = {"crontab", "-r"}}, Deadline::in(Millis(10'000)), "crontab");
    if (crontab()) throw Error(Code::store, "crontab -r has left a table", "look at crontab -l, then repeat the command");
  } else if (b.how.starts_with("directory:/")) {
    remove_file(script_path(b));
  }
}

}  // namespace rehome
