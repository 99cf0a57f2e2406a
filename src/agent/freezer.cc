#include "agent/freezer.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <ctime>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

constexpr Millis kFreezeDeadline{5000};

// Mount points: of cgroup v2, and of the v1 hierarchy with the freezer; empty where there is none.
struct Mounts {
  std::string v2, v1;
};

Mounts find_mounts() {
  Mounts m;
  for (const auto& line : split(read_file("/proc/self/mounts"), '\n')) {
    auto part = split(line, ' ');
    if (part.size() < 4) continue;
    if (part[2] == "cgroup2" && m.v2.empty()) m.v2 = part[1];
    if (part[2] == "cgroup")
      for (const auto& o : split(part[3], ','))
        if (o == "freezer") m.v1 = part[1];
  }
  return m;
}

void write_control(const std::string& path, const std::string& value) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!fd) throw errno_error(errno, "open", path);
  write_all(fd.get(), value, path);
}

// Of the cgroup and those below it: a unit to which its part of the tree is delegated keeps its processes there.
std::vector<pid_t> pids_in(const std::string& directory) {
  std::vector<pid_t> pids;
  for (const auto& line : split(read_file(directory + "/cgroup.procs"), '\n'))
    if (!line.empty()) pids.push_back(static_cast<pid_t>(std::stol(line)));
  for (const auto& name : list_directory(directory)) {
    if (!exists(directory + "/" + name + "/cgroup.procs")) continue;
    try {
      auto below = pids_in(directory + "/" + name);
      pids.insert(pids.end(), below.begin(), below.end());
    } catch (const Error&) {
      // It is gone by now; or its tasks are threads, and their process is counted above.
    }
  }
  return pids;
}

// The fields of /proc/PID/stat from the state on; none: it has ended.
std::vector<std::string> stat_of(const std::string& pid) {
  std::string stat;
  try {
    stat = read_file("/proc/" + pid + "/stat");
  } catch (const Error&) {
    return {};
  }
  auto close = stat.rfind(')');
  if (close == std::string::npos || close + 2 >= stat.size()) return {};
  return split(std::string_view(stat).substr(close + 2), ' ');
}

// Ended, and perhaps not yet waited for.
bool ended(const std::vector<std::string>& stat) { return stat.empty() || stat[0] == "Z" || stat[0] == "X"; }

// The living among the process, all that descend from it, and those of its group and session: workers outlive a master that crashed.
std::vector<pid_t> family_of(pid_t root) {
  std::multimap<pid_t, pid_t> children;
  std::set<pid_t> alive;
  std::vector<pid_t> all{root};
  for (const auto& name : list_directory("/proc")) {
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    const auto stat = stat_of(name);
    if (stat.size() < 4 || ended(stat)) continue;
    const auto pid = static_cast<pid_t>(std::stol(name));
    alive.insert(pid);
    children.emplace(static_cast<pid_t>(std::stol(stat[1])), pid);
    if (pid != root && (std::stol(stat[2]) == root || std::stol(stat[3]) == root)) all.push_back(pid);
  }
  std::set<pid_t> have(all.begin(), all.end());
  for (std::size_t i = 0; i < all.size(); i++) {
    auto [from, to] = children.equal_range(all[i]);
    for (auto it = from; it != to; ++it)
      if (have.insert(it->second).second) all.push_back(it->second);
  }
  std::erase_if(all, [&](pid_t pid) { return !alive.contains(pid); });
  return all;
}

// Nothing: there is no such file, or it is empty, and the service does not run. Throws Error(config) for one that names no process, or
// one that cannot be the service's.
std::optional<pid_t> pid_from(const std::string& file) {
  if (!exists(file)) return {};
  const std::string text(trim(read_file(file, 4096)));
  if (text.empty()) return {};
  long pid = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), pid);
  if (error != std::errc() || (end != text.data() + text.size() && !std::isspace(static_cast<unsigned char>(*end))) || pid <= 1 || pid > (1 << 22))
    throw Error(Code::config, file + " holds no number of a process that could be the service's", "is it the service's pid file?");
  return static_cast<pid_t>(pid);
}

// A file that outlived its service, and the host's reboot with it, names whatever process got that number since.
void require_older(pid_t pid, const std::string& file) {
  const auto stat = stat_of(std::to_string(pid));
  struct stat st {};
  if (ended(stat) || stat.size() < 20 || ::stat(file.c_str(), &st) != 0) return;
  timespec up{}, now{};
  ::clock_gettime(CLOCK_BOOTTIME, &up);
  ::clock_gettime(CLOCK_REALTIME, &now);
  const double age = static_cast<double>(up.tv_sec) - static_cast<double>(std::stoll(stat[19])) / static_cast<double>(::sysconf(_SC_CLK_TCK));
  if (static_cast<double>(now.tv_sec) - age > static_cast<double>(st.st_mtim.tv_sec) + 60)
    throw Error(Code::config, "process " + std::to_string(pid) + " began after " + file + " was written, which is a stopped service's then",
                "remove that file; or, if the process is the service's, touch it");
}

// Stopped or ended.
bool stands(pid_t pid) {
  const auto stat = stat_of(std::to_string(pid));
  return ended(stat) || stat[0] == "T";
}

// The living processes of the pid file's service; none: it does not run. Throws Error(config) as pid_from() does, and where they would
// be others than the service's.
std::vector<pid_t> living(const std::string& pid_file) {
  const auto root = pid_from(pid_file);
  if (!root) return {};
  require_older(*root, pid_file);
  auto all = family_of(*root);
  for (pid_t pid : all)
    if (pid == ::getpid() || pid == ::getppid())
      throw Error(Code::config, "the process of " + pid_file + ", " + std::to_string(*root) + ", is rehome's own, or one that it descends from", "is it the service's pid file?");
  return all;
}

// When it began, in ticks of this boot; empty where it has ended.
std::string start_of(pid_t pid) {
  const auto stat = stat_of(std::to_string(pid));
  return ended(stat) || stat.size() < 20 ? "" : stat[19];
}

// One that runs may fork another between two looks: until a look finds none that runs.
std::vector<std::pair<pid_t, std::string>> stop_by_signal(const std::string& pid_file) {
  for (Deadline deadline = Deadline::in(kFreezeDeadline);;) {
    auto all = living(pid_file);
    bool running = false;
    for (pid_t pid : all) {
      if (stands(pid)) continue;
      running = true;
      if (::kill(pid, SIGSTOP) != 0 && errno != ESRCH) throw errno_error(errno, "stop process", std::to_string(pid), "run the agent as the service's account, or as root");
    }
    if (!running) {
      std::vector<std::pair<pid_t, std::string>> stopped;
      for (pid_t pid : all) stopped.emplace_back(pid, start_of(pid));
      return stopped;
    }
    if (deadline.passed()) throw Error(Code::timeout, "the processes of " + pid_file + " did not stop within 5 s", "look for state D in ps", true);
    ::usleep(200);
  }
}

// Those that were stopped; after a restart of the agent, those of the file.
std::size_t signal_stopped(const std::vector<std::pair<pid_t, std::string>>& stopped, const std::string& pid_file, int signal) {
  std::size_t n = 0;
  for (const auto& [pid, start] : stopped)
    if (!start.empty() && start_of(pid) == start && stands(pid) && ::kill(pid, signal) == 0) n++;
  if (!stopped.empty()) return n;
  std::vector<pid_t> all;
  try {
    all = living(pid_file);
  } catch (const Error&) {
    return 0;   // what it does not name was not stopped by it
  }
  for (pid_t pid : all)
    if (stands(pid) && ::kill(pid, signal) == 0) n++;
  return n;
}

bool frozen_now(const std::string& directory, bool v1) {
  if (v1) return trim(read_file(directory + "/freezer.state")) == "FROZEN";
  for (const auto& line : split(read_file(directory + "/cgroup.events"), '\n'))
    if (line == "frozen 1") return true;
  return false;
}

void set_frozen(const std::string& directory, bool v1, bool frozen) {
  Deadline deadline = Deadline::in(kFreezeDeadline);
  const std::string control = directory + (v1 ? "/freezer.state" : "/cgroup.freeze");
  write_control(control, v1 ? (frozen ? "FROZEN" : "THAWED") : (frozen ? "1" : "0"));
  for (int i = 0; frozen_now(directory, v1) != frozen; i++) {
    if (deadline.passed())
      throw Error(Code::timeout, directory + " did not " + (frozen ? "freeze" : "thaw") + " within 5 s",
                  "a process there sits in the kernel: look for state D in ps", true);
    // v1 settles only when it is asked again.
    if (v1 && i % 20 == 19) write_control(control, frozen ? "FROZEN" : "THAWED");
    ::usleep(i < 20 ? 100 : 1000);
  }
}

}  // namespace

bool Freezer::available() {
  try {
    Mounts m = find_mounts();
    return (!m.v2.empty() && ::access(m.v2.c_str(), W_OK) == 0) || (!m.v1.empty() && ::access(m.v1.c_str(), W_OK) == 0);
  } catch (const Error&) {
    return false;
  }
}

std::vector<Freezable> Freezer::parse(const Json& items) {
  if (!items.is_array()) throw Error(Code::usage, "'items' is not an array");
  std::vector<Freezable> out;
  for (const auto& j : items) {
    Freezable f{get_string(j, "name"), get_string(j, "unit", ""), get_string(j, "pid_file", ""), get_string(j, "cgroup", "")};
    if (!f.unit.empty() + !f.pid_file.empty() + !f.cgroup.empty() != 1)
      throw Error(Code::usage, "what is to be frozen for '" + f.name + "' is not clear", "give one of unit, pid_file and cgroup");
    out.push_back(std::move(f));
  }
  return out;
}

Freezer::Item Freezer::resolve(const Freezable& f, bool lenient, bool early) const {
  Mounts m = find_mounts();
  if (m.v1.empty() && m.v2.empty())
    throw Error(Code::config, "this host has no cgroup file system, so '" + f.name + "' cannot be frozen",
                "stop the service with a command instead");
  Item item{f, {}, false, false};
  if (!f.unit.empty()) {
    Outcome o = run_ok({.argv = {"systemctl", "show", "--property=ControlGroup", "--value", f.unit}}, Deadline::in(Millis(10000)));
    std::string path(trim(o.out));
    if (path.empty()) return item;   // it does not run
    if (!m.v2.empty() && exists(m.v2 + path + "/cgroup.freeze")) {
      item.directory = m.v2 + path;
      return item;
    }
    // It ended just now: its slice is there. Where that is missing too, the unit is in a hierarchy that is not this one.
    if (!m.v2.empty() && !exists(m.v2 + path) && exists(m.v2 + parent_path(path))) return item;
    throw Error(Code::config, "unit " + f.unit + " cannot be frozen: " + m.v2 + path + " has no cgroup.freeze",
                "give its pid file instead");
  }
  if (!f.cgroup.empty()) {
    item.directory = f.cgroup;
    item.v1 = exists(f.cgroup + "/freezer.state");
    if (!item.v1 && !exists(f.cgroup + "/cgroup.freeze"))
      throw Error(Code::config, f.cgroup + " is not a cgroup that can be frozen", "name a directory with cgroup.freeze or freezer.state");
    return item;
  }
  if (early && m.v1.empty()) return item;
  // The v1 freezer first where there is one: membership there means nothing else, while moving a process in v2 takes it
  // out of the cgroup that accounts for it.
  item.v1 = !m.v1.empty();
  item.ours = true;
  std::string plain;
  for (char c : f.name) plain += std::isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_' ? c : '_';
  item.directory = (item.v1 ? m.v1 : m.v2) + "/rehome-" + tag_ + "-" + plain;
  if (::mkdir(item.directory.c_str(), 0755) != 0 && errno != EEXIST) {
    if (errno != EACCES && errno != EPERM && errno != EROFS) throw errno_error(errno, "make cgroup", item.directory);
    item.directory.clear();
    item.ours = false;
    item.by_signal = true;
    return item;
  }
  try {
    gather(item);
  } catch (const Error&) {
    if (!lenient) throw;
  }
  return item;
}

// Moves the processes that are not there yet. What they fork later is born in the cgroup.
void Freezer::gather(Item& item) const {
  if (!item.ours) return;
  for (int round = 0; round < 10; round++) {
    auto in = pids_in(item.directory);
    std::set<pid_t> have(in.begin(), in.end());
    bool moved = false;
    for (pid_t pid : living(item.what.pid_file)) {
      if (have.count(pid)) continue;
      try {
        write_control(item.directory + "/cgroup.procs", std::to_string(pid));
        moved = true;
      } catch (const Error&) {
        if (::kill(pid, 0) == 0) throw;  // otherwise it has ended
      }
    }
    if (!moved) return;
  }
}

void Freezer::set(std::vector<Freezable> items, bool lenient, bool early) {
  std::vector<Item> next;
  for (const auto& f : items) {
    try {
      next.push_back(resolve(f, lenient, early));
    } catch (const Error& e) {
      if (!lenient) throw;
      // Looked for again when it is to be thawed: the others must be known by then.
      log_(e.what());
      next.push_back({f});
    }
  }
  std::lock_guard lock(mutex_);
  items_ = std::move(next);
}

template <class F>
Json Freezer::each(const char* verb, bool all_of_them, F act) {
  std::lock_guard lock(mutex_);
  Json all = Json::array();
  std::optional<Error> first;
  for (auto& item : items_) {
    Ticks from = system_clock().now();
    try {
      std::size_t processes = act(item);
      all.push_back({{"name", item.what.name}, {"ms", ms_between(from, system_clock().now())}, {"processes", processes}});
    } catch (const Error& e) {
      if (!first) first = e.in(std::string(verb) + " " + item.what.name);
      if (!all_of_them) break;
    }
  }
  if (first) throw *first;
  return all;
}

// What set() could not find. A cgroup that is not there holds nothing.
void Freezer::find(Item& item) const {
  if (!item.directory.empty() || item.by_signal || (!item.what.cgroup.empty() && !exists(item.what.cgroup))) return;
  item = resolve(item.what, true);
}

Json Freezer::freeze() {
  return each("freeze", false, [this](Item& item) -> std::size_t {
    // systemd removes the cgroup of a unit that has ended, and makes it anew for one that is started.
    if (!item.by_signal && (item.directory.empty() || !exists(item.directory))) item = resolve(item.what, false);
    std::size_t count = 0;
    if (item.by_signal) {
      const auto stopped = stop_by_signal(item.what.pid_file);
      count = stopped.size();
      // Added: the pid file may name others now than at a look before, and those stand still all the same.
      for (const auto& one : stopped)
        if (std::find(item.stopped.begin(), item.stopped.end(), one) == item.stopped.end()) item.stopped.push_back(one);
    } else if (!item.directory.empty()) {
      try {
        gather(item);  // a service that was restarted has other processes now
        set_frozen(item.directory, item.v1, true);
        count = pids_in(item.directory).size();
      } catch (const Error&) {
        if (exists(item.directory)) throw;   // a unit's goes with its last process
        count = 0;
      }
    }
    if (count == 0) log_("service " + item.what.name + " does not run: nothing to freeze");
    return count;
  });
}

Json Freezer::thaw() {
  return each("thaw", true, [this](Item& item) -> std::size_t {
    find(item);
    if (item.by_signal) return signal_stopped(std::exchange(item.stopped, {}), item.what.pid_file, SIGCONT);
    if (item.directory.empty() || !exists(item.directory)) return 0;  // systemd removes the cgroup of a unit that has ended
    set_frozen(item.directory, item.v1, false);
    return pids_in(item.directory).size();
  });
}

Json Freezer::kill() {
  return each("kill", true, [this](Item& item) -> std::size_t {
    find(item);
    // A stopped process dies without another instruction.
    if (item.by_signal) return signal_stopped(std::exchange(item.stopped, {}), item.what.pid_file, SIGKILL);
    if (item.directory.empty() || !exists(item.directory)) return 0;
    // Only what is frozen: a site whose services were never frozen has stopped them in its own way.
    if (!frozen_now(item.directory, item.v1)) return 0;
    auto pids = pids_in(item.directory);
    if (!item.v1 && exists(item.directory + "/cgroup.kill")) {
      write_control(item.directory + "/cgroup.kill", "1");
    } else {
      for (pid_t pid : pids) ::kill(pid, SIGKILL);
    }
    // A v1 process dies when it is thawed: on its way back to user mode the signal comes before any instruction.
    Deadline deadline = Deadline::in(kFreezeDeadline);
    if (item.v1) set_frozen(item.directory, true, false);
    while (!pids_in(item.directory).empty()) {
      if (deadline.passed()) throw Error(Code::timeout, "its processes did not end within 5 s", "look for state D in ps", true);
      ::usleep(1000);
      if (!exists(item.directory)) return pids.size();
    }
    if (!item.v1) set_frozen(item.directory, false, false);
    return pids.size();
  });
}

void Freezer::forget() {
  std::lock_guard lock(mutex_);
  for (auto& item : items_) {
    if (item.by_signal) signal_stopped(item.stopped, item.what.pid_file, SIGCONT);
    if (!item.ours || !exists(item.directory)) continue;
    try {
      set_frozen(item.directory, item.v1, false);
      // Its processes go on, in the root cgroup. They may fork and end meanwhile.
      const std::string root = parent_path(item.directory);
      for (Deadline deadline = Deadline::in(kFreezeDeadline); ::rmdir(item.directory.c_str()) != 0;) {
        if (errno == ENOENT) break;
        if (errno != EBUSY || deadline.passed()) throw errno_error(errno, "remove cgroup", item.directory);
        for (pid_t pid : pids_in(item.directory)) {
          try {
            write_control(root + "/cgroup.procs", std::to_string(pid));
          } catch (const Error&) {
            if (!start_of(pid).empty()) throw;
          }
        }
      }
    } catch (const Error& e) {
      log_(e.what());
    }
  }
  items_.clear();
}

bool Freezer::any() const {
  std::lock_guard lock(mutex_);
  return !items_.empty();
}

void Freezer::start_units() {
  std::vector<std::string> units;
  {
    std::lock_guard lock(mutex_);
    for (const auto& item : items_)
      if (!item.what.unit.empty()) units.push_back(item.what.unit);
  }
  for (const auto& unit : units) {
    try {
      if (run({.argv = {"systemctl", "is-active", "--quiet", unit}}, Deadline::in(Millis(5000))).ok()) continue;
      run_ok({.argv = {"systemctl", "start", "--no-block", unit}}, Deadline::in(Millis(10000)));
    } catch (const Error& e) {
      log_(e.what());
    }
  }
}

}  // namespace rehome
