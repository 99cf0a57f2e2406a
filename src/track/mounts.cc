#include "track/mounts.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome::track {
namespace {

// mountinfo writes space, tab, newline and backslash as \ooo.
std::string unescape(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); i++) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      out += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      out += text[i];
    }
  }
  return out;
}

bool below(std::string_view path, std::string_view directory) {
  if (directory == "/") return true;
  return path.starts_with(directory) && (path.size() == directory.size() || path[directory.size()] == '/');
}

const Mount* top_at(const std::vector<Mount>& mounts, const std::string& path) {
  const Mount* top = nullptr;
  for (const auto& m : mounts)
    if (m.point == path) top = &m;
  return top;
}

unsigned long flags_of(const std::string& path) {
  struct statvfs v;
  if (::statvfs(path.c_str(), &v) != 0) throw errno_error(errno, "look at the file system of", path);
  unsigned long f = 0;
  if (v.f_flag & ST_NOSUID) f |= MS_NOSUID;
  if (v.f_flag & ST_NODEV) f |= MS_NODEV;
  if (v.f_flag & ST_NOEXEC) f |= MS_NOEXEC;
  if (v.f_flag & ST_NOATIME) f |= MS_NOATIME;
  if (v.f_flag & ST_NODIRATIME) f |= MS_NODIRATIME;
  if (v.f_flag & ST_RELATIME) f |= MS_RELATIME;
  return f;
}

bool read_only(int fd) {
  struct statvfs v;
  return ::fstatvfs(fd, &v) == 0 && (v.f_flag & ST_RDONLY);
}

}  // namespace

std::vector<Mount> read_mounts(const std::string& pid) {
  std::vector<Mount> out;
  for (const auto& line : split(read_file("/proc/" + pid + "/mountinfo"), '\n')) {
    auto f = split(line, ' ');
    if (f.size() < 7) continue;
    Mount m;
    unsigned major = 0, minor = 0;
    if (std::sscanf(f[2].c_str(), "%u:%u", &major, &minor) != 2) continue;
    m.dev = makedev(major, minor);
    m.root = unescape(f[3]);
    m.point = unescape(f[4]);
    m.read_only = f[5] == "ro" || f[5].starts_with("ro,");
    for (std::size_t i = 6; i + 1 < f.size(); i++)
      if (f[i] == "-") {
        m.type = f[i + 1];
        break;
      }
    out.push_back(std::move(m));
  }
  return out;
}

std::string place_in_file_system(const std::vector<Mount>& mounts, const std::string& path, dev_t* dev) {
  const Mount* best = nullptr;
  for (const auto& m : mounts)
    if (below(path, m.point) && (!best || m.point.size() >= best->point.size())) best = &m;
  if (!best) return {};
  if (dev) *dev = best->dev;
  std::string rest = best->point == "/" ? path : path.substr(best->point.size());
  if (rest == "/") rest.clear();
  std::string out = best->root == "/" ? rest : best->root + rest;
  return out.empty() ? "/" : out;
}

std::vector<Mount> mounts_below(const std::string& path) {
  std::vector<Mount> out;
  for (auto& m : read_mounts())
    if (m.point != path && below(m.point, path)) out.push_back(std::move(m));
  return out;
}

std::string resolve_path(const std::string& path) {
  std::string at = path, rest;
  while (true) {
    std::unique_ptr<char, void (*)(void*)> real(::realpath(at.c_str(), nullptr), std::free);
    if (real) {
      std::string out = real.get();
      return out == "/" && !rest.empty() ? rest : out + rest;
    }
    if (errno != ENOENT || at.size() < 2) throw errno_error(errno, "resolve", path);
    while (at.size() > 1 && at.back() == '/') at.pop_back();
    rest = at.substr(at.rfind('/')) + rest;
    at = parent_path(at);
  }
}

void unmount_all(const std::string& place) {
  // A mount of somebody else's namespace that comes back with every round must not keep us here.
  for (int i = 0; i < 1000; i++) {
    if (::umount2(place.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) == 0) continue;
    int err = errno;
    if (err == EINVAL || err == ENOENT) return;
    // Without the right to mount nothing of ours can be there.
    if (err == EPERM && !top_at(read_mounts(), place)) return;
    throw errno_error(err, "unmount", place, "umount " + place);
  }
  throw Error(Code::io, "mounts at " + place + " come back as fast as they are taken away", "umount " + place);
}

WritableRoot::WritableRoot(const std::string& path, const std::string& private_place) {
  // A private mount that a killed agent left.
  unmount_all(private_place);
  make_directories(private_place);
  std::string at = path;
  if (::mount(path.c_str(), private_place.c_str(), nullptr, MS_BIND, nullptr) == 0) {
    mounted_ = at = private_place;
    // A closed tree's copy is closed too until it is told otherwise; the original stays as it is.
    if (::mount(nullptr, at.c_str(), nullptr, MS_REMOUNT | MS_BIND | flags_of(path), nullptr) != 0) {
      int err = errno;
      ::umount2(mounted_.c_str(), MNT_DETACH);
      throw errno_error(err, "make a writable mount of " + path + " at", at);
    }
  } else if (errno != EPERM && errno != EACCES) {
    throw errno_error(errno, "mount " + path + " at", private_place);
  }
  dir_ = Fd(::open(at.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  int err = errno;
  if (dir_ && !read_only(dir_.get())) return;
  if (!mounted_.empty()) ::umount2(mounted_.c_str(), MNT_DETACH);
  if (!dir_) throw errno_error(err, "open directory", at);
  throw Error(Code::io, path + " is on a file system that is mounted read-only", "mount it writable");
}

void WritableRoot::unmount() {
  if (mounted_.empty()) return;
  unmount_all(mounted_);
  ::rmdir(mounted_.c_str());
  mounted_.clear();
}

WritableRoot::~WritableRoot() {
  dir_.reset();
  try {
    unmount();
  } catch (const Error&) {
    // The next agent tries again, and nothing below is removed meanwhile: remove_tree() refuses.
  }
}

bool is_closed(const std::string& path) {
  auto mounts = read_mounts();
  const Mount* top = top_at(mounts, resolve_path(path));
  return top && top->read_only;
}

void close_tree(const std::string& unresolved) {
  const std::string path = resolve_path(unresolved);
  if (is_closed(path)) return;
  unsigned long flags = flags_of(path);
  auto denied = [&](int err) {
    return Error(err == EPERM || err == EACCES ? Code::denied : Code::io,
                 "close " + path + " by a read-only bind mount: " + std::strerror(err),
                 err == EPERM ? "run the agent as root; without it only the services' start condition keeps writers away" : "");
  };
  // With what is mounted below, or it would be hidden.
  if (::mount(path.c_str(), path.c_str(), nullptr, MS_BIND | MS_REC, nullptr) != 0) throw denied(errno);
  if (::mount(nullptr, path.c_str(), nullptr, MS_REMOUNT | MS_BIND | MS_RDONLY | flags, nullptr) != 0) {
    int err = errno;
    ::umount2(path.c_str(), MNT_DETACH);
    throw denied(err);
  }
}

void open_tree(const std::string& unresolved) {
  const std::string path = resolve_path(unresolved);
  // Writable first: a service that was started early keeps this mount, through its working directory say.
  for (int i = 0; i < 16 && is_closed(path); i++) {
    unsigned long flags = flags_of(path);
    if (::mount(nullptr, path.c_str(), nullptr, MS_REMOUNT | MS_BIND | flags, nullptr) != 0)
      throw errno_error(errno, "make writable", path, "umount " + path);
    if (::umount2(path.c_str(), MNT_DETACH | UMOUNT_NOFOLLOW) != 0) throw errno_error(errno, "unmount", path, "umount " + path);
  }
  struct statvfs v;
  if (::statvfs(path.c_str(), &v) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return;
    throw errno_error(errno, "look at the file system of", path);
  }
  if (v.f_flag & ST_RDONLY)
    throw Error(Code::io, path + " is still read-only", "findmnt -T " + path + " says what is mounted there; mount it writable, then try again", true);
}

}  // namespace rehome::track
