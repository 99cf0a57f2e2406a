#include "track/writers.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "track/mounts.h"

namespace rehome::track {
namespace {

std::string link_text(const std::string& path) {
  char buf[8192];
  ssize_t n = ::readlink(path.c_str(), buf, sizeof buf);
  return n < 0 ? std::string() : std::string(buf, static_cast<std::size_t>(n));
}

// The whole of a /proc file; empty when the process is gone or not ours to see.
std::string slurp(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  std::string out;
  if (!fd) return out;
  std::size_t at = 0;
  out.resize(65536);
  while (true) {
    ssize_t n = ::read(fd.get(), out.data() + at, out.size() - at);
    if (n <= 0) break;
    at += static_cast<std::size_t>(n);
    if (at == out.size()) out.resize(out.size() * 2);
  }
  out.resize(at);
  return out;
}

bool below(std::string_view path, std::string_view directory) {
  return path.starts_with(directory) && (path.size() == directory.size() || path[directory.size()] == '/');
}

class Scan {
 public:
  Scan(const Tree& tree, const WriterQuery& query) : tree_(tree), query_(query) {
    struct stat st;
    if (::fstat(tree.root(), &st) != 0) throw errno_error(errno, "stat", tree.label());
    dev_ = st.st_dev;
    own_space_ = link_text("/proc/self/ns/mnt");
    spaces_[own_space_] = read_mounts();
    place_ = place_in_file_system(spaces_[own_space_], query.path);
  }

  std::vector<Writer> run() {
    const pid_t self = ::getpid();
    for (const auto& name : list_directory("/proc")) {
      pid_t pid = std::atoi(name.c_str());
      if (pid <= 0 || pid == self) continue;
      std::string base = "/proc/" + name;
      try {
        std::size_t before = found_.size();
        pid_ = name;
        space_.clear();
        maps(pid, slurp(base + "/maps"));
        descriptors(pid, base + "/fd");
        if (found_.size() > before) describe(base, before);
      } catch (const Error&) {
        // Ended while we looked.
      }
    }
    return std::move(found_);
  }

 private:
  // The path relative to the tree; false when it is somewhere else.
  bool inside(std::string path, std::string& relative) {
    if (path.empty() || path[0] != '/') return false;
    if (space_.empty()) {
      space_ = link_text("/proc/" + pid_ + "/ns/mnt");
      if (!spaces_.contains(space_)) spaces_[space_] = read_mounts(pid_);
    }
    std::string place = place_in_file_system(spaces_[space_], path);
    if (place_ == "/") relative = place.substr(1);
    else if (below(place, place_)) relative = place.size() > place_.size() ? place.substr(place_.size() + 1) : "";
    else return false;
    return true;
  }

  // Whether this file can be one of the tree's. Most are on its device; those of an overlay or of a subvolume have another one
  // each, and are known by being what the tree has at their path. `st_dev` 0: not known.
  bool may_be_ours(const struct stat& st, const std::string& path) {
    if (st.st_dev == dev_) return true;
    std::string relative;
    struct stat here;
    if (!inside(path, relative) || ::fstatat(tree_.root(), relative.c_str(), &here, AT_SYMLINK_NOFOLLOW) != 0) return false;
    return here.st_ino == st.st_ino && (st.st_dev == 0 || here.st_dev == st.st_dev);
  }

  void maps(pid_t pid, const std::string& text) {
    for (std::size_t at = 0; at < text.size();) {
      auto end = text.find('\n', at);
      if (end == std::string::npos) end = text.size();
      std::string_view line(text.data() + at, end - at);
      at = end + 1;
      // address perms offset major:minor inode   path
      auto space = line.find(' ');
      if (space == std::string_view::npos || line.substr(space + 1, 4).size() < 4) continue;
      std::string_view perms = line.substr(space + 1, 4);
      if (perms[1] != 'w' || perms[3] != 's') continue;
      unsigned long low, high;
      unsigned major, minor;
      unsigned long long ino;
      int used = 0;
      if (std::sscanf(std::string(line).c_str(), "%lx-%lx %*s %*s %x:%x %llu %n", &low, &high, &major, &minor, &ino, &used) < 5 || ino == 0)
        continue;
      // The device in this line is the file system's own, which is not always the one that stat tells (btrfs): the file itself
      // is asked where that is allowed.
      char name[64];
      std::snprintf(name, sizeof name, "/map_files/%lx-%lx", low, high);
      const std::string one = "/proc/" + pid_ + name;
      std::string path(line.substr(std::min(line.size(), static_cast<std::size_t>(used))));
      struct stat st {};
      if (::stat(one.c_str(), &st) == 0) {
        path = link_text(one);
      } else {
        st.st_ino = static_cast<ino_t>(ino);
        st.st_nlink = 1;
        st.st_dev = makedev(major, minor) == dev_ ? dev_ : 0;
      }
      if (st.st_nlink > 0 && may_be_ours(st, path)) add(pid, path, st.st_ino, true);
    }
  }

  void descriptors(pid_t pid, const std::string& directory) {
    DIR* d = ::opendir(directory.c_str());
    if (!d) return;
    while (dirent* e = ::readdir(d)) {
      std::string one = directory + "/" + e->d_name;
      struct stat link, st;
      // The mode of the link itself says how the file was opened.
      if (e->d_name[0] == '.' || ::lstat(one.c_str(), &link) != 0 || !(link.st_mode & S_IWUSR)) continue;
      if (::stat(one.c_str(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_nlink == 0) continue;
      std::string path = link_text(one);
      if (may_be_ours(st, path)) add(pid, path, st.st_ino, false);
    }
    ::closedir(d);
  }

  void add(pid_t pid, std::string path, ino_t ino, bool mapped) {
    constexpr std::string_view deleted = " (deleted)";
    if (path.ends_with(deleted)) path.resize(path.size() - deleted.size());
    std::string relative;
    if (!inside(path, relative)) return;
    for (auto& w : found_)
      if (w.pid == pid && w.ino == ino) {
        w.mapped = w.mapped || mapped;
        return;
      }
    found_.push_back({pid, {}, {}, std::move(relative), ino, mapped});
  }

  // Version 2 alone, version 2 beside version 1, or version 1's freezer.
  static bool is_frozen(const std::string& cgroup, bool version2) {
    if (!version2) return slurp("/sys/fs/cgroup/freezer" + cgroup + "/freezer.state").starts_with("FROZEN");
    for (const char* base : {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"})
      if (slurp(base + cgroup + "/cgroup.events").find("frozen 1") != std::string::npos) return true;
    return false;
  }

  void describe(const std::string& base, std::size_t from) {
    std::string program(trim(slurp(base + "/comm"))), cgroup;
    bool frozen = false;
    for (const auto& line : split(slurp(base + "/cgroup"), '\n')) {
      // "0::/path" of version 2, or the named systemd hierarchy of version 1.
      auto colon = line.rfind(':');
      if (colon == std::string::npos) continue;
      if (line.starts_with("0::") || line.find("name=systemd") != std::string::npos) cgroup = line.substr(colon + 1);
      if (!line.starts_with("0::") && line.find(":freezer:") == std::string::npos) continue;
      std::string here = line.substr(colon + 1);
      frozen = frozen || is_frozen(here, line.starts_with("0::"));
      for (const auto& e : query_.except_cgroups)
        if (e != "/" && below(here, e)) {
          found_.resize(from);
          return;
        }
    }
    // Stopped by a signal, where the agent may make no cgroup.
    const std::string stat = slurp(base + "/stat");
    if (auto close = stat.rfind(')'); close != std::string::npos && stat.compare(close + 1, 2, " T") == 0) frozen = true;
    for (std::size_t i = from; i < found_.size(); i++) {
      found_[i].program = program;
      found_[i].cgroup = cgroup;
      found_[i].frozen = frozen;
    }
    if (found_.size() > from && query_.except.contains(found_[from].pid)) found_.resize(from);
  }

  const Tree& tree_;
  const WriterQuery& query_;
  dev_t dev_ = 0;
  std::string own_space_, place_, pid_, space_;
  std::map<std::string, std::vector<Mount>> spaces_;
  std::vector<Writer> found_;
};

}  // namespace

std::vector<Writer> find_writers(const Tree& tree, const WriterQuery& query) { return Scan(tree, query).run(); }

Json to_json(const std::vector<Writer>& writers) {
  Json list = Json::array();
  for (const auto& w : writers)
    list.push_back({{"pid", w.pid}, {"program", w.program}, {"cgroup", w.cgroup}, {"path", shown(w.path)}, {"mapped", w.mapped}, {"frozen", w.frozen}});
  return list;
}

Json writers_answer(const Json& request, const std::string& path) {
  Tree tree(Fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), path);
  if (tree.root() < 0) throw errno_error(errno, "open directory", path);
  WriterQuery q{.path = path};
  if (request.contains("pids"))
    for (const auto& p : request["pids"]) q.except.insert(p.get<pid_t>());
  if (request.contains("cgroups"))
    for (const auto& g : request["cgroups"]) q.except_cgroups.push_back(g.get<std::string>());
  return {{"writers", to_json(find_writers(tree, q))}};
}

}  // namespace rehome::track
