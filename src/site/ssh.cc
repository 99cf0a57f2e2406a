#include "site/ssh.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.h"
#include "base/text.h"

namespace rehome {

std::vector<std::string> ssh_argv(const SshHost& host) {
  std::vector<std::string> argv{"ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=2",
                                "-o", "ServerAliveCountMax=3"};
  if (host.port) argv.insert(argv.end(), {"-p", std::to_string(host.port)});
  if (!host.key.empty()) argv.insert(argv.end(), {"-i", host.key, "-o", "IdentitiesOnly=yes"});
  for (const auto& o : host.options) argv.insert(argv.end(), {"-o", o});
  argv.push_back(host.host);
  return argv;
}

std::string in_sh(const std::string& line) {
  // Outside of quotes a backslash means the same to all of them; inside, it and the exclamation mark do not.
  std::string quoted;
  for (char c : line) {
    bool odd = c == '\'' || c == '\\' || c == '!';
    quoted += odd ? std::string("'\\") + c + "'" : std::string(1, c);
  }
  return "exec sh -c '" + quoted + "'";
}

Error ssh_error(const SshHost& host, const std::string& text) {
  auto has = [&](const char* s) { return text.find(s) != std::string::npos; };
  std::string last(trim(text));
  if (auto nl = last.rfind('\n'); nl != std::string::npos) last = last.substr(nl + 1);
  if (has("REMOTE HOST IDENTIFICATION HAS CHANGED") || has("Host key verification failed"))
    return Error(Code::denied, "ssh " + host.host + ": the host key is not the one in known_hosts",
                 "if the host was reinstalled, verify its new key and replace the line with ssh-keygen -R; otherwise "
                 "somebody else answers there");
  if (has("Permission denied") || has("Too many authentication failures"))
    return Error(Code::denied, "ssh " + host.host + ": no key is accepted without a person (" + last + ")",
                 "make a key with ssh-keygen, install it with ssh-copy-id, or name one with key:");
  return Error(Code::unreachable, "ssh " + host.host + " does not connect" + (last.empty() ? "" : ": " + last),
               "try the same command by hand: ssh " + host.host + " true", true);
}

SshMaster::SshMaster(SshHost host, Deadline deadline) : host_(std::move(host)), dir_("rehome-ssh") {
  control_ = dir_.path() + "/c";
  dial(deadline);
}

void SshMaster::dial(Deadline deadline) {
  ::unlink(control_.c_str());   // of one that was killed: ssh would do without sharing
  auto argv = ssh_argv(host_);
  std::string target = argv.back();
  argv.pop_back();
  // -f returns when the connection stands; the master then lives by itself until -O exit. ControlPersist ends it
  // when a killed controller leaves it behind.
  // -tt: without a terminal ssh leaves Nagle's delay on, which costs 40 ms whenever two small messages follow each other.
  argv.insert(argv.end(), {"-tt", "-M", "-o", "ControlPath=" + control_, "-o", "ControlPersist=60", "-o",
                           "StreamLocalBindUnlink=yes", target, "true"});
  // ssh's background master keeps standard error open: a file, or reading to its end would wait for ever.
  std::string err_file = dir_.path() + "/err";
  Fd err(::open(err_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!err) throw errno_error(errno, "create", err_file);
  Fd null(::open("/dev/null", O_WRONLY | O_CLOEXEC));
  Child child({.argv = argv}, {.out_fd = null.get(), .err_fd = err.get(), .die_with_parent = false});
  int status;
  try {
    status = child.wait(deadline);
  } catch (const Error&) {
    throw Error(Code::unreachable, "ssh " + host_.host + " did not connect in time",
                "try the same command by hand: ssh " + host_.host + " true", true);
  }
  if (status != 0) throw ssh_error(host_, read_file(err_file));
}

SshMaster::~SshMaster() {
  try {
    ::rehome::run({.argv = through({"-O", "exit"})}, Deadline::in(Millis(2000)));
  } catch (const Error&) {
    // The master then ends by itself through ControlPersist.
  }
}

std::vector<std::string> SshMaster::through(std::vector<std::string> more) const {
  // All that a connection of its own needs: without a master ssh makes one.
  auto argv = ssh_argv(host_);
  argv.pop_back();
  argv.insert(argv.end(), {"-S", control_});
  if (more.size() >= 2 && more[0] == "-O") {
    argv.insert(argv.end(), more.begin(), more.end());
    argv.push_back(host_.host);
  } else {
    argv.push_back(host_.host);
    argv.insert(argv.end(), more.begin(), more.end());
  }
  return argv;
}

Outcome SshMaster::run(const std::string& command_line, const std::string& input, Deadline deadline) {
  Outcome o = ::rehome::run({.argv = through({in_sh(command_line)}), .input = input}, deadline);
  if (o.status == 255) throw ssh_error(host_, o.err);
  return o;
}

Outcome SshMaster::run_ok(const std::string& command_line, const std::string& input, Deadline deadline) {
  Outcome o = run(command_line, input, deadline);
  if (!o.ok())
    throw Error(Code::store, host_.host + ": '" + command_line.substr(0, 120) + "' ended with status " +
                                 std::to_string(o.status) + ": " + std::string(trim(o.err)));
  return o;
}

void SshMaster::upload(const std::string& local, const std::string& remote, unsigned mode) {
  char octal[8];
  std::snprintf(octal, sizeof octal, "%04o", mode);
  std::string temp = shell_quote(remote + ".new");
  run_ok("umask 077; mkdir -p " + shell_quote(parent_path(remote)) + " && cat > " + temp + " && chmod " + octal + " " +
             temp + " && sync " + temp + " && mv " + temp + " " + shell_quote(remote),
         read_file(local), Deadline::in(Millis(300000)));
}

std::string SshMaster::forward(const std::string& remote_socket) {
  std::lock_guard lock(mutex_);
  std::string local = dir_.path() + "/f" + std::to_string(forwards_.size());
  forward(local, remote_socket);
  forwards_[local] = remote_socket;
  return local;
}

void SshMaster::forward(const std::string& local, const std::string& remote_socket) {
  Outcome o = ::rehome::run({.argv = through({"-O", "forward", "-L", local + ":" + remote_socket})}, Deadline::in(Millis(10000)));
  // `-O forward -L` must be in front of the host: through() puts the host last for -O.
  if (!o.ok())
    throw Error(Code::denied, "ssh " + host_.host + " does not forward sockets: " + std::string(trim(o.err)),
                "set AllowStreamLocalForwarding yes in its sshd_config");
}

void SshMaster::redial(Deadline deadline) {
  std::unique_lock lock(mutex_, deadline.left());
  if (!lock) throw Error(Code::unreachable, "ssh " + host_.host + " does not connect again in time", "", true);
  if (::rehome::run({.argv = through({"-O", "check"})}, deadline).ok()) return;
  dial(deadline);
  for (const auto& [local, remote] : forwards_) forward(local, remote);
}

}  // namespace rehome
