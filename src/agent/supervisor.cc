#include "agent/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "agent/agent.h"
#include "agent/client.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"
#include "sys/state_dir.h"

namespace rehome {
namespace {

constexpr Millis kRestart{100};

std::string own_program() {
  char buf[PATH_MAX];
  ssize_t n = ::readlink("/proc/self/exe", buf, sizeof buf);
  if (n <= 0) throw errno_error(errno, "read", "/proc/self/exe");
  return std::string(buf, static_cast<std::size_t>(n));
}

std::string real_path(const std::string& path) {
  char buf[PATH_MAX];
  return ::realpath(path.c_str(), buf) ? buf : path;
}

// The agent answers, and does not wait for the other one after a reboot any more.
bool settled_in(const std::string& state) {
  try {
    AgentClient agent(state + "/run/agent.sock", Deadline::in(Millis(200)));
    return !get_bool(agent.call("hello", Json::object(), Deadline::in(Millis(1000))), "returning", false);
  } catch (const Error&) {
    return false;
  }
}

// Tells systemd that the record has been read and the start condition stands: what is ordered after us may start.
void notify_ready() {
  const char* path = std::getenv("NOTIFY_SOCKET");
  if (!path) return;
  sockaddr_un to{};
  to.sun_family = AF_UNIX;
  if (std::strlen(path) >= sizeof to.sun_path) return;
  std::strcpy(to.sun_path, path);
  socklen_t size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + std::strlen(path));
  if (to.sun_path[0] == '@') to.sun_path[0] = '\0';
  Fd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (fd) (void)!::sendto(fd.get(), "READY=1", 7, MSG_NOSIGNAL, reinterpret_cast<sockaddr*>(&to), size);
}

class Supervisor {
 public:
  explicit Supervisor(const SuperviseOptions& o) : state_(o.state), program_(own_program()) {}

  int run(const std::atomic<int>& stop) {
    bool ready = !std::getenv("NOTIFY_SOCKET");
    Ticks gate_looked = 0;
    while (!stop) {
      reap();
      if (ended_) {
        end(true);
        // With the state its systemd unit has gone, and with it the rule that 100 is no failure.
        return remove_state() ? 0 : kEndedByShutdown;
      }
      Ticks now = system_clock().now();
      if (agent_ == 0 && now >= agent_next_) start_agent();
      if (!ready && settled_in(state_)) {
        ready = true;
        notify_ready();
      }
      if (gate_ == 0 && now >= gate_next_ && ms_between(gate_looked, now) > 100) {
        gate_looked = now;
        if (adopted_gone()) adopted_.reset();
        if (!adopted_ && exists(state_ + "/gate.json") && !find_gate()) start_gate();
      }
      sigset_t child;
      sigemptyset(&child);
      sigaddset(&child, SIGCHLD);
      timespec pause{0, 20'000'000};
      ::sigtimedwait(&child, nullptr, &pause);
    }
    end(stop == 2);
    return 0;
  }

 private:
  void log(const std::string& line) {
    std::string text = format_wall(system_clock().wall_us()) + " supervisor: " + line + "\n";
    Fd fd(::open((state_ + "/log/agent.log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (fd) (void)!::write(fd.get(), text.data(), text.size());
  }

  // One thread, so everything is allowed after fork.
  pid_t start(const std::vector<std::string>& argv, bool die_with_us, const std::string& log_name,
              const std::vector<std::pair<std::string, int>>& sockets) {
    Fd log_fd(::open((state_ + "/log/" + log_name).c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    pid_t us = ::getpid(), pid = ::fork();
    if (pid < 0) throw errno_error(errno, "fork for", argv[0]);
    if (pid > 0) return pid;
    ::setpgid(0, 0);
    if (die_with_us) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != us) ::_exit(127);
    }
    Fd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    ::dup2(null.get(), 0);
    if (log_fd) ::dup2(log_fd.get(), 1), ::dup2(log_fd.get(), 2);
    int next = 3;
    std::vector<int> high;
    for (const auto& [name, fd] : sockets) high.push_back(::fcntl(fd, F_DUPFD_CLOEXEC, 100));
    std::string names;
    for (std::size_t i = 0; i < high.size(); i++) {
      ::dup2(high[i], next++);
      names += (i ? ":" : "") + sockets[i].first;
    }
    ::unsetenv("NOTIFY_SOCKET");
    // Each raises it for itself, and knows by this what to give to the programs that it starts.
    restore_file_limit();
    if (!sockets.empty()) {
      ::setenv("LISTEN_FDS", std::to_string(sockets.size()).c_str(), 1);
      ::setenv("LISTEN_FDNAMES", names.c_str(), 1);
      ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
    }
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    for (int s : {SIGTERM, SIGINT, SIGPIPE}) ::signal(s, SIG_DFL);
    std::vector<char*> args;
    for (const auto& a : argv) args.push_back(const_cast<char*>(a.c_str()));
    args.push_back(nullptr);
    ::execv(argv[0].c_str(), args.data());
    ::_exit(127);
  }

  void start_agent() {
    try {
      agent_ = start({program_, "serve", "--state", state_}, true, "agent.log", {});
    } catch (const Error& e) {
      log(e.what());
      agent_next_ = after(system_clock(), kRestart);
    }
  }

  std::string gate_program() const {
    try {
      Json config = parse_json(read_file(state_ + "/agent.json"), "agent.json");
      if (std::string p = get_string(config, "gate_program", ""); !p.empty()) return p;
    } catch (const Error&) {
      // Not there yet, or the agent says what is wrong with it.
    }
    std::string newest;
    timespec at{};
    if (exists(state_ + "/bin"))
      for (const auto& name : list_directory(state_ + "/bin")) {
        struct stat st;
        std::string path = state_ + "/bin/" + name;
        if (!name.starts_with("rehome-gate") || ::stat(path.c_str(), &st) != 0) continue;
        if (newest.empty() || st.st_mtim.tv_sec > at.tv_sec || (st.st_mtim.tv_sec == at.tv_sec && st.st_mtim.tv_nsec > at.tv_nsec)) {
          newest = path;
          at = st.st_mtim;
        }
      }
    return newest.empty() ? parent_path(program_) + "/rehome-gate" : newest;
  }

  // A gate that a killed supervisor left behind goes on, and is ended with the run like one of our own. True: somebody answers there.
  bool find_gate() {
    try {
      Fd fd = connect_to({.path = state_ + "/run/gate.sock"}, Deadline::in(Millis(200)));
      ucred who{};
      socklen_t size = sizeof who;
      if (::getsockopt(fd.get(), SOL_SOCKET, SO_PEERCRED, &who, &size) != 0 || who.pid <= 0) return true;
      Fd process(static_cast<int>(::syscall(SYS_pidfd_open, who.pid, 0)));
      char buf[PATH_MAX];
      ssize_t n = ::readlink(("/proc/" + std::to_string(who.pid) + "/exe").c_str(), buf, sizeof buf);
      std::string program(buf, static_cast<std::size_t>(std::max<ssize_t>(n, 0)));
      // What an update has replaced reads "... (deleted)".
      if (!process || (!program.starts_with(real_path(state_ + "/bin") + "/rehome-gate") && program != real_path(gate_program()))) return true;
      adopted_ = std::move(process);
      log("gate " + program + " was there, pid " + std::to_string(who.pid));
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  bool adopted_gone() const {
    pollfd p{adopted_.get(), POLLIN, 0};
    return adopted_ && ::poll(&p, 1, 0) > 0;
  }

  void signal_adopted(int signal) {
    if (adopted_) ::syscall(SYS_pidfd_send_signal, adopted_.get(), signal, nullptr, 0);
  }

  void start_gate() {
    gate_next_ = after(system_clock(), kRestart);
    try {
      std::string program = gate_program();
      if (::access(program.c_str(), X_OK) != 0) {
        if (gate_error_ != program) log("there is no gate program at " + program);
        gate_error_ = program;
        return;
      }
      Json gate = parse_json(read_file(state_ + "/gate.json"), "gate.json");
      std::map<std::string, Fd> still;
      std::vector<std::pair<std::string, int>> sockets;
      for (const auto& route : gate["routes"])
        for (const char* key : {"listen", "marked"}) {
          std::string at = get_string(route, key, "");
          if (at.empty()) continue;
          std::string name = get_string(route, "name") + (key == std::string("marked") ? ".marked" : "");
          try {
            Fd& fd = still[at] = std::move(sockets_[at]);
            // Clients of any account connect to a unix socket; its directory is what restricts them.
            if (!fd) fd = listen_on(Address::parse(at), static_cast<unsigned>(get_int(route, "mode", 0666)));
            sockets.emplace_back(name, fd.get());
          } catch (const Error& e) {
            log("the gate's " + name + ": " + e.what());  // the gate tries by itself, and says so in its status
          }
        }
      sockets_ = std::move(still);
      gate_ = start({program, "--state", state_}, false, "gate.log", sockets);
      gate_error_.clear();
      log("gate " + program + " starts, pid " + std::to_string(gate_));
    } catch (const std::exception& e) {
      if (gate_error_ != e.what()) log(std::string("gate: ") + e.what());
      gate_error_ = e.what();
    }
  }

  void reap() {
    int status;
    pid_t pid;
    while ((pid = ::waitpid(-1, &status, WNOHANG)) > 0) {
      std::string how = WIFEXITED(status) ? "status " + std::to_string(WEXITSTATUS(status)) : "signal " + std::to_string(WTERMSIG(status));
      if (pid == agent_) {
        agent_ = 0;
        ended_ = WIFEXITED(status) && WEXITSTATUS(status) == kEndedByShutdown;
        agent_next_ = after(system_clock(), kRestart);
        log("the agent ended with " + how);
      } else if (pid == gate_) {
        gate_ = 0;
        gate_next_ = after(system_clock(), kRestart);
        log("the gate ended with " + how);
      }
    }
  }

  // What `shutdown` with remove asked for. The fence is the file that keeps this site's services from starting.
  bool remove_state() {
    const std::string marker = state_ + "/run/remove";
    if (!exists(marker)) return false;
    bool keep = read_file(marker, 64) == "keep the fence" && exists(state_ + "/not-serving");
    // `run` has the marker: whatever else is left after a power cut is then known to be somebody's to remove.
    for (const auto& name : list_directory(state_))
      if (is_state_name(name) && name != "run" && (!keep || name != "not-serving")) remove_tree(state_ + "/" + name);
    remove_tree(state_ + "/run");
    // What is somebody else's stays, and the directory with it.
    if (!keep && ::rmdir(state_.c_str()) != 0 && errno != ENOENT) std::fprintf(stderr, "%s stays: %s\n", state_.c_str(), std::strerror(errno));
    return true;
  }

  void end(bool gate_too) {
    if (!gate_too && (gate_ > 0 || adopted_)) log("the gate goes on without a supervisor");
    std::vector<pid_t*> all{&agent_};
    if (gate_too) all.push_back(&gate_);
    for (pid_t* p : all)
      if (*p > 0) ::kill(*p, SIGTERM);
    if (gate_too) signal_adopted(SIGTERM);
    Deadline deadline = Deadline::in(Millis(5000));
    auto any = [&] { return (gate_too && adopted_ && !adopted_gone()) || std::any_of(all.begin(), all.end(), [](pid_t* p) { return *p > 0; }); };
    while (any() && !deadline.passed()) {
      reap();
      system_clock().sleep(Millis(5));
    }
    for (pid_t* p : all)
      if (*p > 0) ::kill(*p, SIGKILL), ::waitpid(*p, nullptr, 0);
    if (gate_too) signal_adopted(SIGKILL);
  }

  std::string state_, program_, gate_error_;
  pid_t agent_ = 0, gate_ = 0;
  Fd adopted_;                       // the process of a gate that we have not started
  Ticks agent_next_ = 0, gate_next_ = 0;
  bool ended_ = false;
  std::map<std::string, Fd> sockets_;
};

}  // namespace

int supervise(const SuperviseOptions& options, const std::atomic<int>& stop) {
  for (const char* dir : {"", "/run", "/log"}) make_directories(options.state + dir);
  const std::string lock_path = options.state + "/run/supervisor.lock";
  Fd lock(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock) throw errno_error(errno, "open", lock_path);
  while (::flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) throw errno_error(errno, "lock", options.state);
    if (!options.wait) return 0;
    if (stop) return 0;
    if (std::getenv("NOTIFY_SOCKET") && settled_in(options.state)) notify_ready();
    system_clock().sleep(Millis(200));
  }
  // Whom we waited for may have removed it all: the run is over.
  struct stat ours, there;
  if (::fstat(lock.get(), &ours) != 0 || ::stat(lock_path.c_str(), &there) != 0 || ours.st_ino != there.st_ino) return kEndedByShutdown;
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  ::sigprocmask(SIG_BLOCK, &child, nullptr);
  return Supervisor(options).run(stop);
}

void supervise_detached(const SuperviseOptions& options) {
  for (const char* dir : {"", "/run", "/log"}) make_directories(options.state + dir);
  std::string program = own_program(), log = options.state + "/log/agent.log";
  pid_t pid = ::fork();
  if (pid < 0) throw errno_error(errno, "fork for", program);
  if (pid == 0) {
    ::setsid();
    if (::fork() != 0) ::_exit(0);
    int null = ::open("/dev/null", O_RDWR), out = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    ::dup2(null, 0);
    ::dup2(out < 0 ? null : out, 1);
    ::dup2(out < 0 ? null : out, 2);
    // The descriptors of an ssh session would keep it from ending.
    for (int fd = 3; fd < 1024; fd++) ::close(fd);
    if (::chdir("/") != 0) ::_exit(127);
    ::execl(program.c_str(), program.c_str(), "supervise", "--state", options.state.c_str(), nullptr);
    ::_exit(127);
  }
  ::waitpid(pid, nullptr, 0);
  wait_for_agent(options.state);
}

void wait_for_agent(const std::string& state) {
  const std::string log = state + "/log/agent.log";
  Deadline deadline = Deadline::in(Millis(15'000));
  while (!deadline.passed()) {
    if (settled_in(state)) return;
    system_clock().sleep(Millis(10));
  }
  std::string said = exists(log) ? read_file(log) : "";
  if (said.size() > 600) said = said.substr(said.size() - 600);
  throw Error(Code::state, "the agent in " + state + " did not answer within 15 s", std::string("its log ends with: ") + std::string(trim(said)));
}

}  // namespace rehome
