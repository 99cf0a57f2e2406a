#include "sys/process.h"

#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "base/bytes.h"
#include "base/error.h"
#include "base/text.h"
#include "sys/account.h"

extern char** environ;

namespace rehome {
namespace {

struct PipePair {
  Fd read, write;
  PipePair() {
    int p[2];
    if (::pipe2(p, O_CLOEXEC) != 0) throw errno_error(errno, "pipe", "for a child");
    read = Fd(p[0]);
    write = Fd(p[1]);
  }
};

int decode(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

// PATH lookup before fork, so that a missing program is an error of the caller and not of a child.
std::string find_program(const std::string& name, const std::map<std::string, std::string>& env) {
  if (name.find('/') != std::string::npos) {
    if (::access(name.c_str(), X_OK) == 0) return name;
    throw Error(Code::io, "cannot run " + name + ": " + std::strerror(errno), "install it, or correct its path");
  }
  auto it = env.find("PATH");
  std::string path = it == env.end() ? "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" : it->second;
  for (const auto& dir : split(path, ':')) {
    std::string full = dir + "/" + name;
    if (::access(full.c_str(), X_OK) == 0) return full;
  }
  throw Error(Code::io, "cannot run " + name + ": it is not in PATH (" + path + ")", "install the package that has it");
}

}  // namespace

// The soft limit of open files that this process was started with.
static const rlimit& files_at_start() {
  static const rlimit at_start = [] {
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) limit.rlim_cur = limit.rlim_max = RLIM_INFINITY;
    return limit;
  }();
  return at_start;
}

void raise_file_limit() {
  rlimit limit = files_at_start();
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

void restore_file_limit() {
  rlimit now;
  if (::getrlimit(RLIMIT_NOFILE, &now) != 0) return;
  now.rlim_cur = std::min(files_at_start().rlim_cur, now.rlim_max);
  ::setrlimit(RLIMIT_NOFILE, &now);
}

std::size_t file_limit() {
  rlimit now;
  return ::getrlimit(RLIMIT_NOFILE, &now) == 0 ? static_cast<std::size_t>(now.rlim_cur) : 1024;
}

Json outcome_to_json(const Outcome& o) {
  // A zero byte takes six in JSON: 16 MiB of them would be longer than a message may be.
  auto text = [](const std::string& s) { return is_utf8(s) && s.find('\0') == std::string::npos; };
  Json j{{"status", o.status}};
  text(o.out) ? j["out"] = o.out : j["out_base64"] = to_base64(o.out);
  text(o.err) ? j["err"] = o.err : j["err_base64"] = to_base64(o.err);
  if (o.truncated) j["truncated"] = true;
  return j;
}

Outcome outcome_from_json(const Json& j) {
  auto bytes = [&](const std::string& key) {
    return j.contains(key + "_base64") ? from_base64(get_string(j, (key + "_base64").c_str())) : get_string(j, key.c_str());
  };
  return {static_cast<int>(get_int(j, "status")), bytes("out"), bytes("err"), get_bool(j, "truncated", false)};
}

Child::Child(const Command& command, const Pipes& pipes) {
  if (command.argv.empty()) throw Error(Code::internal, "a command without argv");
  std::map<std::string, std::string> env;
  for (char** e = environ; *e; e++) {
    std::string_view v(*e);
    auto eq = v.find('=');
    if (eq != std::string_view::npos) env[std::string(v.substr(0, eq))] = v.substr(eq + 1);
  }
  std::optional<Account> account;
  if (!command.user.empty()) {
    account = account_named(command.user);
    env["HOME"] = account->home;
    env["USER"] = env["LOGNAME"] = command.user;
    // Who is that account already needs no right to become it.
    if (account->uid == ::geteuid()) account.reset();
  }
  for (const auto& [k, v] : command.env) env[k] = v;
  std::string program = find_program(command.argv[0], env);
  std::vector<std::string> env_text;
  for (const auto& [k, v] : env) env_text.push_back(k + "=" + v);
  std::vector<char*> envp, argv;
  for (auto& e : env_text) envp.push_back(e.data());
  envp.push_back(nullptr);
  for (const auto& a : command.argv) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);

  std::optional<PipePair> pin, pout, perr;
  PipePair failure;  // closed by a successful exec; otherwise carries errno
  if (pipes.in) pin.emplace();
  if (pipes.out) pout.emplace();
  if (pipes.err) perr.emplace();
  Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null) throw errno_error(errno, "open", "/dev/null");
  const int fd_in = pin ? pin->read.get() : pipes.in_fd >= 0 ? pipes.in_fd : null.get();
  const int fd_out = pout ? pout->write.get() : pipes.out_fd;
  const int fd_err = perr ? perr->write.get() : pipes.err_fd;

  files_at_start();  // before the fork: the child may take no lock
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ < 0) throw errno_error(errno, "fork for", command.argv[0]);
  if (pid_ == 0) {
    // Only async-signal-safe calls from here: other threads may have held any lock.
    auto fail = [&] {
      int e = errno;
      (void)!::write(failure.write.get(), &e, sizeof e);
      ::_exit(127);
    };
    ::setpgid(0, 0);
    // dup2 onto the same number would keep close-on-exec, so move everything above 2 first.
    int a = ::fcntl(fd_in, F_DUPFD_CLOEXEC, 3);
    int b = fd_out >= 0 ? ::fcntl(fd_out, F_DUPFD_CLOEXEC, 3) : -1;
    int c = fd_err >= 0 ? ::fcntl(fd_err, F_DUPFD_CLOEXEC, 3) : -1;
    if (::dup2(a, 0) < 0 || (b >= 0 && ::dup2(b, 1) < 0) || (c >= 0 && ::dup2(c, 2) < 0)) fail();
    for (int s = 1; s < 32; s++) ::signal(s, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    if (!pipes.many_files) restore_file_limit();
    if (account) {
      if (::setgroups(0, nullptr) != 0 || ::setresgid(account->gid, account->gid, account->gid) != 0 ||
          ::setresuid(account->uid, account->uid, account->uid) != 0)
        fail();
    }
    if (pipes.die_with_parent) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(127);
    }
    if (!command.directory.empty() && ::chdir(command.directory.c_str()) != 0) fail();
    ::execve(program.c_str(), argv.data(), envp.data());
    fail();
  }
  ::setpgid(pid_, pid_);
  failure.write.reset();
  if (pin) pin->read.reset();
  int child_errno = 0;
  ssize_t n;
  while ((n = ::read(failure.read.get(), &child_errno, sizeof child_errno)) < 0 && errno == EINTR) {
  }
  if (n == sizeof child_errno) {
    int status;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    throw errno_error(child_errno, "run", command.argv[0]);
  }
  if (pin) in = std::move(pin->write);
  if (pout) out = std::move(pout->read);
  if (perr) err = std::move(perr->read);
}

Child::~Child() {
  if (pid_ < 0 || status_) return;
  kill(SIGKILL);
  int status;
  while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
  }
}

std::optional<int> Child::poll() {
  if (status_) return status_;
  int status;
  pid_t r = ::waitpid(pid_, &status, WNOHANG);
  if (r == pid_) status_ = decode(status);
  return status_;
}

int Child::wait(Deadline deadline) {
  // No portable wait with a deadline: look often at first, then every 20 ms.
  Millis pause(1);
  while (true) {
    if (auto s = poll()) return *s;
    if (deadline.passed()) throw Error(Code::timeout, "process " + std::to_string(pid_) + " did not end in time");
    std::this_thread::sleep_for(std::min(pause, deadline.left(Millis(20))));
    pause = std::min(pause * 2, Millis(20));
  }
}

void Child::kill(int signal) {
  if (pid_ < 0 || poll()) return;
  if (::kill(-pid_, signal) != 0) ::kill(pid_, signal);
}

void Child::end(Millis grace) {
  if (pid_ < 0 || status_) return;
  ::kill(-pid_, SIGTERM);
  // Looked at without reaping: as long as the first process is there, the group's number is nobody else's.
  for (Deadline d = Deadline::in(grace); !d.passed(); std::this_thread::sleep_for(Millis(5))) {
    siginfo_t info{};
    if (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid_) break;
  }
  ::kill(-pid_, SIGKILL);
  wait();
}

Outcome run(const Command& command, Deadline deadline, const std::atomic<bool>* stop) {
  constexpr std::size_t most = 16u << 20;
  Child child(command, {.in = !command.input.empty(), .out = true, .err = true});
  Outcome result;
  std::string_view input = command.input;
  if (child.in) ::fcntl(child.in.get(), F_SETFL, O_NONBLOCK);
  while (child.out || child.err) {
    pollfd p[3] = {{child.out ? child.out.get() : -1, POLLIN, 0},
                   {child.err ? child.err.get() : -1, POLLIN, 0},
                   {child.in ? child.in.get() : -1, POLLOUT, 0}};
    int r = ::poll(p, 3, static_cast<int>(deadline.left(Millis(stop ? 100 : 60'000)).count()));
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", command.argv[0]);
    if (stop && *stop) {
      child.end(Millis(5000));
      throw Error(Code::interrupted, command.argv[0] + " was stopped");
    }
    if (deadline.passed()) {
      child.kill(SIGKILL);
      throw Error(Code::timeout, command.argv[0] + " did not end in time and was stopped");
    }
    if (r <= 0) continue;
    if (p[2].revents) {
      ssize_t n = ::write(child.in.get(), input.data(), input.size());
      if (n > 0) input.remove_prefix(static_cast<std::size_t>(n));
      if (input.empty() || (n < 0 && errno != EAGAIN && errno != EINTR)) child.in.reset();
    }
    auto take = [&](Fd& fd, short revents, std::string& into) {
      if (!revents) return;
      char buf[65536];
      ssize_t n = ::read(fd.get(), buf, sizeof buf);
      if (n > 0) {
        auto room = most - into.size();
        result.truncated = result.truncated || static_cast<std::size_t>(n) > room;
        into.append(buf, std::min(static_cast<std::size_t>(n), room));
      } else if (n == 0 || errno != EINTR) {
        fd.reset();
      }
    };
    take(child.out, p[0].revents, result.out);
    take(child.err, p[1].revents, result.err);
  }
  result.status = child.wait(deadline);
  return result;
}

Outcome run_ok(const Command& command, Deadline deadline, const char* what) {
  Outcome o = run(command, deadline);
  if (o.ok()) return o;
  std::string_view err = trim(o.err);
  if (err.size() > 800) err.remove_prefix(err.size() - 800);
  throw Error(Code::store, std::string(what ? what : command.argv[0]) + " ended with status " +
                               std::to_string(o.status) + (err.empty() ? "" : ": " + std::string(err)));
}

}  // namespace rehome
