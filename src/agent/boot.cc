#include "agent/boot.h"

#include <unistd.h>

#include <cerrno>
#include <climits>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

std::string label(const Boot& b) { return "rehome-" + b.name + "-" + b.side; }
std::string unit_path(const Boot& b) { return "/etc/systemd/system/" + label(b) + ".service"; }
std::string script_path(const Boot& b) { return b.how.substr(10) + "/" + label(b); }

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

std::string crontab() {
  Outcome o = run({.argv = {"crontab", "-l"}}, Deadline::in(Millis(10'000)));
  return o.ok() ? o.out : "";  // status 1: there is none
}

std::string without_ours(const std::string& table, const std::string& mark) {
  std::string out;
  for (const auto& line : split(table, '\n'))
    if (!line.empty() && !line.ends_with(mark)) out += line + "\n";
  return out;
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
    std::string table = without_ours(crontab(), mark) + "@reboot " + start + mark + "\n* * * * * " + start + mark + "\n";
    run_ok({.argv = {"crontab", "-"}, .input = table}, Deadline::in(Millis(10'000)), "crontab");
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
    ::unlink(unit_path(b).c_str());
    systemctl({"daemon-reload"});
  } else if (b.how == "cron") {
    std::string mark = " # " + label(b), table = crontab(), left = without_ours(table, mark);
    if (left.empty() && !table.empty())
      run_ok({.argv = {"crontab", "-r"}}, Deadline::in(Millis(10'000)), "crontab");
    else if (!table.empty())
      run_ok({.argv = {"crontab", "-"}, .input = left}, Deadline::in(Millis(10'000)), "crontab");
  } else if (b.how.starts_with("directory:/")) {
    ::unlink(script_path(b).c_str());
  }
}

}  // namespace rehome
