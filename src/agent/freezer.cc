#include "agent/freezer.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <set>

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

std::vector<pid_t> pids_in(const std::string& directory) {
  std::vector<pid_t> pids;
  for (const auto& line : split(read_file(directory + "/cgroup.procs"), '\n'))
    if (!line.empty()) pids.push_back(static_cast<pid_t>(std::stol(line)));
  return pids;
}

// The process and all that descend from it, now.
std::vector<pid_t> tree_of(pid_t root) {
  std::multimap<pid_t, pid_t> children;
  for (const auto& name : list_directory("/proc")) {
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::string stat;
    try {
      stat = read_file("/proc/" + name + "/stat");
    } catch (const Error&) {
      continue;  // it ended meanwhile
    }
    auto close = stat.rfind(')');
    if (close == std::string::npos || close + 4 >= stat.size()) continue;
    auto field = split(std::string_view(stat).substr(close + 2), ' ');
    if (field.size() > 1) children.emplace(static_cast<pid_t>(std::stol(field[1])), static_cast<pid_t>(std::stol(name)));
  }
  std::vector<pid_t> all{root};
  for (std::size_t i = 0; i < all.size(); i++) {
    auto [from, to] = children.equal_range(all[i]);
    for (auto it = from; it != to; ++it) all.push_back(it->second);
  }
  return all;
}

pid_t pid_from(const std::string& file) {
  std::string text(trim(read_file(file, 4096)));
  auto end = text.find_first_not_of("0123456789");
  if (end == 0 || text.empty()) throw Error(Code::config, file + " holds no process number", "is it the service's pid file?");
  return static_cast<pid_t>(std::stol(text));
}

// Stopped or ended.
bool stands(pid_t pid) {
  std::string stat;
  try {
    stat = read_file("/proc/" + std::to_string(pid) + "/stat");
  } catch (const Error&) {
    return true;
  }
  auto close = stat.rfind(')');
  return close != std::string::npos && close + 2 < stat.size() && (stat[close + 2] == 'T' || stat[close + 2] == 'Z' || stat[close + 2] == 'X');
}

// The living processes of the pid file's service; none: it does not run.
std::vector<pid_t> living(const std::string& pid_file) {
  pid_t root = 0;
  try {
    root = pid_from(pid_file);
  } catch (const Error&) {
    return {};
  }
  auto all = tree_of(root);
  std::erase_if(all, [](pid_t pid) { return ::kill(pid, 0) != 0; });
  return all;
}

// One that runs may fork another between two looks: until a look finds none that runs.
std::size_t stop_by_signal(const std::string& pid_file) {
  for (Deadline deadline = Deadline::in(kFreezeDeadline);;) {
    auto all = living(pid_file);
    bool running = false;
    for (pid_t pid : all) {
      if (stands(pid)) continue;
      running = true;
      if (::kill(pid, SIGSTOP) != 0 && errno != ESRCH) throw errno_error(errno, "stop process", std::to_string(pid), "run the agent as the service's account, or as root");
    }
    if (!running) return all.size();
    if (deadline.passed()) throw Error(Code::timeout, "the processes of " + pid_file + " did not stop within 5 s", "look for state D in ps", true);
    ::usleep(200);
  }
}

std::size_t signal_stopped(const std::string& pid_file, int signal) {
  std::size_t n = 0;
  for (pid_t pid : living(pid_file))
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

Freezer::Item Freezer::resolve(const Freezable& f, bool lenient) const {
  Mounts m = find_mounts();
  if (m.v1.empty() && m.v2.empty())
    throw Error(Code::config, "this host has no cgroup file system, so '" + f.name + "' cannot be frozen",
                "stop the service with a command instead");
  Item item{f, {}, false, false};
  if (!f.unit.empty()) {
    Outcome o = run_ok({.argv = {"systemctl", "show", "--property=ControlGroup", "--value", f.unit}}, Deadline::in(Millis(10000)));
    std::string path(trim(o.out));
    if (path.empty() && lenient) return item;
    if (path.empty()) throw Error(Code::config, "unit " + f.unit + " has no cgroup: it does not run", "start it, or correct its name");
    if (!m.v2.empty() && exists(m.v2 + path + "/cgroup.freeze")) {
      item.directory = m.v2 + path;
      return item;
    }
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
    if (!lenient && living(f.pid_file).empty()) throw Error(Code::config, "no process of " + f.pid_file + " runs", "start the service");
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
  pid_t root = pid_from(item.what.pid_file);
  if (::kill(root, 0) != 0 && errno == ESRCH)
    throw Error(Code::config, "process " + std::to_string(root) + " of " + item.what.pid_file + " does not run", "start the service");
  for (int round = 0; round < 10; round++) {
    auto in = pids_in(item.directory);
    std::set<pid_t> have(in.begin(), in.end());
    bool moved = false;
    for (pid_t pid : tree_of(root)) {
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

void Freezer::set(std::vector<Freezable> items, bool lenient) {
  std::vector<Item> next;
  for (const auto& f : items) {
    try {
      next.push_back(resolve(f, lenient));
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
  return each("freeze", false, [this](Item& item) {
    if (item.directory.empty() && !item.by_signal) item = resolve(item.what, false);
    if (item.by_signal) {
      auto count = stop_by_signal(item.what.pid_file);
      if (count == 0) throw Error(Code::store, "there is no process of " + item.what.pid_file + " to stop", "does the service run?");
      return count;
    }
    gather(item);  // a service that was restarted has other processes now
    set_frozen(item.directory, item.v1, true);
    auto count = pids_in(item.directory).size();
    if (count == 0) throw Error(Code::store, "there is no process to freeze in " + item.directory, "does the service run?");
    return count;
  });
}

Json Freezer::thaw() {
  return each("thaw", true, [this](Item& item) -> std::size_t {
    find(item);
    if (item.by_signal) return signal_stopped(item.what.pid_file, SIGCONT);
    if (item.directory.empty() || !exists(item.directory)) return 0;  // systemd removes the cgroup of a unit that has ended
    set_frozen(item.directory, item.v1, false);
    return pids_in(item.directory).size();
  });
}

Json Freezer::kill() {
  return each("kill", true, [this](Item& item) -> std::size_t {
    find(item);
    // A stopped process dies without another instruction.
    if (item.by_signal) return signal_stopped(item.what.pid_file, SIGKILL);
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
    if (item.by_signal) signal_stopped(item.what.pid_file, SIGCONT);
    if (!item.ours || !exists(item.directory)) continue;
    try {
      set_frozen(item.directory, item.v1, false);
      // Its processes go on, in the root cgroup.
      std::string root = parent_path(item.directory);
      for (pid_t pid : pids_in(item.directory)) write_control(root + "/cgroup.procs", std::to_string(pid));
      if (::rmdir(item.directory.c_str()) != 0) throw errno_error(errno, "remove cgroup", item.directory);
    } catch (const Error& e) {
      log_(e.what());
    }
  }
  items_.clear();
}

void Freezer::start_units() {
  std::vector<std::string> units;
  {
    std::lock_guard lock(mutex_);
    for (const auto& item : items_)
      if (!item.what.unit.empty()) units.push_back(item.what.unit);
  }
  for (const auto& unit : units) {
    if (run({.argv = {"systemctl", "is-active", "--quiet", unit}}, Deadline::in(Millis(5000))).ok()) continue;
    run_ok({.argv = {"systemctl", "start", "--no-block", unit}}, Deadline::in(Millis(10000)));
  }
}

}  // namespace rehome
