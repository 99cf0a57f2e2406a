#include "sys/testing/power_cut.h"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <random>

#include "base/error.h"
#include "sys/fd.h"
#include "sys/fs.h"

namespace rehome::testing {
namespace {

constexpr std::size_t sector = 512;

// An inode that outlives its names, and is told apart from a later one of the same number.
using Key = std::string;

struct Attributes {
  mode_t mode = 0;
  uid_t uid = 0;
  gid_t gid = 0;
  timespec mtime{};
  std::map<std::string, std::string> extended;
};

struct Name {
  Key key;
  mode_t type = 0;
  bool operator==(const Name&) const = default;
};

struct Node {
  Attributes attributes;
  dev_t rdev = 0;
  std::string content;  // or a link's target
  std::map<std::string, Name> names;
};

using Nodes = std::map<Key, Node>;

std::string fd_path(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

Key key_of(int fd) {
  struct {
    file_handle head;
    unsigned char bytes[MAX_HANDLE_SZ];
  } h{};
  h.head.handle_bytes = MAX_HANDLE_SZ;
  int mount;
  if (::name_to_handle_at(fd, "", &h.head, &mount, AT_EMPTY_PATH) != 0) throw errno_error(errno, "identify", fd_path(fd));
  struct stat st;
  if (::fstat(fd, &st) != 0) throw errno_error(errno, "stat", fd_path(fd));
  return std::to_string(st.st_dev) + ":" + std::string(reinterpret_cast<const char*>(h.head.f_handle), h.head.handle_bytes);
}

Attributes attributes_of(int fd) {
  struct stat st;
  if (::fstat(fd, &st) != 0) throw errno_error(errno, "stat", fd_path(fd));
  Attributes a{st.st_mode, st.st_uid, st.st_gid, st.st_mtim, {}};
  char list[8192], value[65536];
  ssize_t n = ::listxattr(fd_path(fd).c_str(), list, sizeof list);
  for (ssize_t at = 0; at < n;) {
    std::string name(list + at);
    ssize_t length = ::getxattr(fd_path(fd).c_str(), name.c_str(), value, sizeof value);
    if (length >= 0) a.extended[name] = std::string(value, static_cast<std::size_t>(length));
    at += static_cast<ssize_t>(name.size()) + 1;
  }
  return a;
}

Fd open_path(int directory, const std::string& name) {
  return Fd(::openat(directory, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
}

std::map<std::string, Name> names_of(int fd) {
  std::map<std::string, Name> out;
  int dup = ::open(fd_path(fd).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dup < 0) throw errno_error(errno, "open", fd_path(fd));
  DIR* d = ::fdopendir(dup);
  while (dirent* e = ::readdir(d)) {
    std::string name = e->d_name;
    if (name == "." || name == "..") continue;
    Fd entry = open_path(dup, name);
    struct stat st;
    if (!entry || ::fstat(entry.get(), &st) != 0 || S_ISSOCK(st.st_mode)) continue;
    out[name] = {key_of(entry.get()), st.st_mode & S_IFMT};
  }
  ::closedir(d);
  return out;
}

// The inode as it is now, without what is below it.
Node node_of(int fd) {
  Node n;
  n.attributes = attributes_of(fd);
  struct stat st;
  if (::fstat(fd, &st) != 0) throw errno_error(errno, "stat", fd_path(fd));
  n.rdev = st.st_rdev;
  if (S_ISDIR(st.st_mode)) n.names = names_of(fd);
  if (S_ISREG(st.st_mode)) n.content = read_file(fd_path(fd));
  if (S_ISLNK(st.st_mode)) {
    char buf[4096];
    ssize_t length = ::readlinkat(fd, "", buf, sizeof buf);
    if (length > 0) n.content.assign(buf, static_cast<std::size_t>(length));
  }
  return n;
}

void walk(int fd, Nodes& out) {
  Key key = key_of(fd);
  if (out.contains(key)) return;
  Node node = node_of(fd);
  for (const auto& [name, entry] : node.names)
    if (Fd child = open_path(fd, name)) walk(child.get(), out);
  out.emplace(key, std::move(node));
}

}  // namespace

struct PowerCut::Disk {
  struct Root {
    std::string path;
    Key key;
  };
  std::vector<Root> roots;
  Nodes durable;
  std::optional<Nodes> frozen;  // what there was when the power failed
  bool off = false, lose = false;
  std::uint64_t calls = 0, fail_at = std::numeric_limits<std::uint64_t>::max();
  mutable std::mutex mutex;

  Nodes everything() const {
    Nodes out;
    for (const auto& r : roots) {
      Fd fd = open_path(AT_FDCWD, r.path);
      if (!fd) throw errno_error(errno, "open", r.path);
      walk(fd.get(), out);
    }
    return out;
  }
  void settle() {
    for (auto& r : roots) {
      Fd fd = open_path(AT_FDCWD, r.path);
      if (!fd) throw errno_error(errno, "open", r.path);
      r.key = key_of(fd.get());
    }
    durable = everything();
    frozen.reset();
    off = false;
    calls = 0;
    fail_at = std::numeric_limits<std::uint64_t>::max();
  }
  bool ours(const std::string& path) const {
    return std::any_of(roots.begin(), roots.end(), [&](const Root& r) { return path == r.path || path.starts_with(r.path + "/"); });
  }

  // A call begins, and ends: the one in which the power fails may have been done or not.
  bool begin() {
    if (calls++ != fail_at) return false;
    off = true;
    return true;
  }
  void end(bool failing) {
    if (failing) frozen = everything();
  }

  void sync(int fd, bool attributes) {
    if (off || lose) return;
    Key key = key_of(fd);
    Node now = node_of(fd);
    auto old = durable.find(key);
    // fdatasync promises the content and what is needed to read it.
    if (!attributes && old != durable.end()) now.attributes = old->second.attributes;
    // What is neither file nor directory cannot be fsynced: it is part of its directory.
    for (const auto& [name, entry] : now.names)
      if (entry.type != S_IFREG && entry.type != S_IFDIR)
        if (Fd child = open_path(fd, name)) durable[entry.key] = node_of(child.get());
    durable[key] = std::move(now);
  }
  void sync_all() {
    if (off || lose) return;
    for (auto& [key, node] : everything()) durable[key] = std::move(node);
  }
  void synced_write(int fd, std::uint64_t offset, std::string_view bytes) {
    if (off || lose) return;
    Node& n = durable[key_of(fd)];
    if (n.attributes.mode == 0) n.attributes = attributes_of(fd);
    if (n.content.size() < offset + bytes.size()) n.content.resize(offset + bytes.size());
    n.content.replace(offset, bytes.size(), bytes);
  }
};

namespace {

std::atomic<PowerCut::Disk*> active{nullptr};
std::atomic<pid_t> owner{0};
thread_local bool inside = false;

struct Inside {
  bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

// A child between fork and exec must not take our mutex.
PowerCut::Disk* disk() {
  PowerCut::Disk* d = inside ? nullptr : active.load();
  return d && ::getpid() == owner ? d : nullptr;
}

std::string path_of(int directory, const char* name) {
  if (name && name[0] == '/') return name;
  char buf[4096];
  std::string link = directory == AT_FDCWD ? "/proc/self/cwd" : fd_path(directory);
  ssize_t n = ::readlink(link.c_str(), buf, sizeof buf);
  std::string base(buf, static_cast<std::size_t>(std::max<ssize_t>(0, n)));
  return name && *name ? base + "/" + name : base;
}

// Runs `call` as one of the calls that are counted, and `then` after its success, unless nobody looks.
template <class Call, class Then>
auto counted(int directory, const char* name, Call call, Then then) -> decltype(call()) {
  PowerCut::Disk* d = disk();
  // A write to a pipe may wait for another thread: not under our mutex.
  if (!d || !d->ours(path_of(directory, name))) return call();
  Inside guard;
  std::lock_guard lock(d->mutex);
  bool failing = d->begin();
  auto result = call();
  int error = errno;
  if (result >= 0) then(*d, result);
  d->end(failing);
  errno = error;
  return result;
}
template <class Call>
auto counted(int directory, const char* name, Call call) -> decltype(call()) {
  return counted(directory, name, call, [](PowerCut::Disk&, auto) {});
}

// fsync and its like, which the real disk need not do. Also where the descriptor's path is hidden by a mount of ours.
template <class Then>
int synced(int fd, Then then) {
  PowerCut::Disk* d = disk();
  if (!d || ::fcntl(fd, F_GETFL) < 0) return d ? -1 : 0;
  Inside guard;
  std::lock_guard lock(d->mutex);
  bool failing = d->ours(path_of(fd, nullptr)) && d->begin();
  then(*d);
  d->end(failing);
  return 0;
}

void after_write(PowerCut::Disk& d, int fd, ssize_t n, const void* bytes, off_t offset) {
  if (n <= 0 || (::fcntl(fd, F_GETFL) & O_DSYNC) == 0) return;
  if (offset < 0) offset = ::lseek(fd, 0, SEEK_CUR) - n;
  if (offset >= 0) d.synced_write(fd, static_cast<std::uint64_t>(offset), {static_cast<const char*>(bytes), static_cast<std::size_t>(n)});
}

// What the disk holds after the cut, out of what was durable and what there was besides.
class Remains {
 public:
  Remains(const Nodes& durable, const Nodes& latest, unsigned seed) : durable_(durable), latest_(latest), seed_(seed), random_(seed) {}

  const Node& at(const Name& name) {
    auto [it, fresh] = made_.emplace(name.key, Node{});
    if (fresh) it->second = choose(name);
    return it->second;
  }

 private:
  bool newer() { return seed_ != 0 && random_() % 2 == 1; }

  Node choose(const Name& name) {
    Node nothing;
    nothing.attributes.mode = name.type | (name.type == S_IFDIR ? 0700 : 0600);
    auto d = durable_.find(name.key), l = latest_.find(name.key);
    const Node& old = d == durable_.end() ? nothing : d->second;
    if (seed_ == 0 || l == latest_.end()) return old;
    const Node& now = l->second;
    Node out = newer() ? now : old;
    out.rdev = now.rdev;
    if (name.type == S_IFREG) out.content = mixed(old.content, now.content);
    if (name.type == S_IFLNK) out.content = now.content;
    if (name.type == S_IFDIR) {
      out.names.clear();
      auto all = old.names;
      all.insert(now.names.begin(), now.names.end());
      for (const auto& [n, entry] : all) {
        auto o = old.names.find(n), w = now.names.find(n);
        if (o != old.names.end() && w != now.names.end() && o->second == w->second) out.names.insert(*o);
        else if (auto [from, end] = newer() ? std::pair(w, now.names.end()) : std::pair(o, old.names.end()); from != end) out.names.insert(*from);
      }
    }
    return out;
  }

  std::string mixed(const std::string& old, const std::string& now) {
    if (old == now) return old;
    std::size_t less = std::min(old.size(), now.size()), more = std::max(old.size(), now.size());
    std::size_t size = random_() % 3 == 0 ? less + random_() % (more - less + 1) : newer() ? now.size() : old.size();
    std::string out(size, '\0');
    for (std::size_t at = 0; at < size; at += sector) {
      const std::string& from = newer() ? now : old;
      if (at < from.size()) {
        std::size_t n = std::min({sector, size - at, from.size() - at});
        out.replace(at, n, from, at, n);
      }
    }
    return out;
  }

  const Nodes& durable_;
  const Nodes& latest_;
  unsigned seed_;
  std::mt19937 random_;
  Nodes made_;
};

void set_attributes(const std::string& path, const Attributes& a) {
  bool link = S_ISLNK(a.mode);
  if (::lchown(path.c_str(), a.uid, a.gid) != 0) throw errno_error(errno, "put back the owner of", path);
  if (!link) (void)::chmod(path.c_str(), a.mode & 07777);
  for (const auto& [name, value] : a.extended)
    if (::lsetxattr(path.c_str(), name.c_str(), value.data(), value.size(), 0) != 0) throw errno_error(errno, "put back " + name + " of", path);
  timespec times[2] = {{0, UTIME_OMIT}, a.mtime};
  ::utimensat(AT_FDCWD, path.c_str(), times, AT_SYMLINK_NOFOLLOW);
}

class Builder {
 public:
  explicit Builder(Remains& remains) : remains_(remains) {}
  void below(const std::string& path, const Node& directory) {
    for (const auto& [name, entry] : directory.names) make(path + "/" + name, entry);
    set_attributes(path, directory.attributes);
  }

 private:
  void make(const std::string& path, const Name& entry) {
    if (auto it = made_.find(entry.key); it != made_.end()) {
      // A directory that a torn rename left with two names: one of them is enough.
      if (entry.type == S_IFDIR) return;
      if (::link(it->second.c_str(), path.c_str()) != 0) throw errno_error(errno, "put back", path);
      return;
    }
    made_[entry.key] = path;
    const Node& n = remains_.at(entry);
    switch (entry.type) {
      case S_IFDIR:
        if (::mkdir(path.c_str(), 0700) != 0) throw errno_error(errno, "put back", path);
        below(path, n);
        return;
      case S_IFREG: {
        Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
        if (!fd) throw errno_error(errno, "put back", path);
        write_all(fd.get(), n.content, path);
        break;
      }
      case S_IFLNK:
        if (::symlink(n.content.c_str(), path.c_str()) != 0) throw errno_error(errno, "put back", path);
        break;
      default:
        if (::mknod(path.c_str(), entry.type | 0600, n.rdev) != 0) throw errno_error(errno, "put back", path);
    }
    set_attributes(path, n.attributes);
  }

  Remains& remains_;
  std::map<Key, std::string> made_;
};

}  // namespace

PowerCut::PowerCut(std::vector<std::string> directories) : disk_(std::make_unique<Disk>()) {
  REHOME_CHECK(!active.load());
  Inside guard;
  for (auto& path : directories) disk_->roots.push_back({std::filesystem::canonical(path).string(), {}});
  disk_->settle();
  owner = ::getpid();
  active = disk_.get();
}

PowerCut::~PowerCut() {
  active = nullptr;
  std::lock_guard lock(disk_->mutex);  // whoever is inside a call leaves first
}

void PowerCut::lose_syncs(bool yes) {
  std::lock_guard lock(disk_->mutex);
  disk_->lose = yes;
}

void PowerCut::fail_at(std::uint64_t call) {
  std::lock_guard lock(disk_->mutex);
  disk_->fail_at = call;
}

std::uint64_t PowerCut::calls() const {
  std::lock_guard lock(disk_->mutex);
  return disk_->calls;
}

void PowerCut::crash(unsigned seed) {
  Inside guard;
  std::lock_guard lock(disk_->mutex);
  Nodes latest = disk_->frozen ? std::move(*disk_->frozen) : disk_->everything();
  Remains remains(disk_->durable, latest, seed);
  for (const auto& root : disk_->roots)
    for (const auto& e : std::filesystem::directory_iterator(root.path)) std::filesystem::remove_all(e.path());
  Builder builder(remains);
  for (const auto& root : disk_->roots) builder.below(root.path, remains.at({root.key, S_IFDIR}));
  disk_->settle();
}

}  // namespace rehome::testing

// The calls. Each finds the one that it stands before.
#define REAL(name) static const auto real = reinterpret_cast<decltype(&::name)>(::dlsym(RTLD_NEXT, #name))

extern "C" {

using rehome::testing::after_write;
using rehome::testing::counted;
using rehome::testing::disk;
using rehome::testing::synced;

int open(const char* path, int flags, ...) {
  REAL(open);
  va_list rest;
  va_start(rest, flags);
  mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if ((flags & (O_CREAT | O_TRUNC)) == 0) return real(path, flags, mode);
  return counted(AT_FDCWD, path, [&] { return real(path, flags, mode); });
}

int openat(int directory, const char* path, int flags, ...) {
  REAL(openat);
  va_list rest;
  va_start(rest, flags);
  mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : 0;
  va_end(rest);
  if ((flags & (O_CREAT | O_TRUNC)) == 0) return real(directory, path, flags, mode);
  return counted(directory, path, [&] { return real(directory, path, flags, mode); });
}

ssize_t write(int fd, const void* bytes, size_t n) {
  REAL(write);
  return counted(fd, nullptr, [&] { return real(fd, bytes, n); }, [&](auto& d, ssize_t done) { after_write(d, fd, done, bytes, -1); });
}

ssize_t pwrite(int fd, const void* bytes, size_t n, off_t at) {
  REAL(pwrite);
  return counted(fd, nullptr, [&] { return real(fd, bytes, n, at); }, [&](auto& d, ssize_t done) { after_write(d, fd, done, bytes, at); });
}

int ftruncate(int fd, off_t size) noexcept {
  REAL(ftruncate);
  return counted(fd, nullptr, [&] { return real(fd, size); });
}

int rename(const char* from, const char* to) noexcept {
  REAL(rename);
  return counted(AT_FDCWD, to, [&] { return real(from, to); });
}

int link(const char* from, const char* to) noexcept {
  REAL(link);
  return counted(AT_FDCWD, to, [&] { return real(from, to); });
}

int unlink(const char* path) noexcept {
  REAL(unlink);
  return counted(AT_FDCWD, path, [&] { return real(path); });
}

int mkdir(const char* path, mode_t mode) noexcept {
  REAL(mkdir);
  return counted(AT_FDCWD, path, [&] { return real(path, mode); });
}

int fchmod(int fd, mode_t mode) noexcept {
  REAL(fchmod);
  return counted(fd, nullptr, [&] { return real(fd, mode); });
}

int fsync(int fd) {
  REAL(fsync);
  return disk() ? synced(fd, [&](auto& d) { d.sync(fd, true); }) : real(fd);
}

int fdatasync(int fd) {
  REAL(fdatasync);
  return disk() ? synced(fd, [&](auto& d) { d.sync(fd, false); }) : real(fd);
}

int syncfs(int fd) noexcept {
  REAL(syncfs);
  return disk() ? synced(fd, [&](auto& d) { d.sync_all(); }) : real(fd);
}

int sync_file_range(int fd, off64_t from, off64_t to, unsigned flags) {
  REAL(sync_file_range);
  // It promises nothing about durability.
  return disk() ? 0 : real(fd, from, to, flags);
}

}  // extern "C"
