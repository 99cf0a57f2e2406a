#include "track/tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <sys/xattr.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "base/error.h"

namespace rehome::track {

std::string_view parent_of(std::string_view path) {
  auto slash = path.rfind('/');
  return slash == std::string_view::npos ? std::string_view() : path.substr(0, slash);
}

std::string_view name_of(std::string_view path) {
  auto slash = path.rfind('/');
  return slash == std::string_view::npos ? path : path.substr(slash + 1);
}

std::string child_of(std::string_view directory, std::string_view name) {
  std::string out(directory);
  if (!out.empty()) out += '/';
  return out += name;
}

std::string shown(std::string_view path) {
  std::string out;
  for (std::size_t i = 0; i < path.size(); i++) {
    auto c = static_cast<unsigned char>(path[i]);
    std::size_t more = c >= 0xc2 && c < 0xe0 ? 1 : c >= 0xe0 && c < 0xf0 ? 2 : c >= 0xf0 && c < 0xf5 ? 3 : 0;
    bool whole = more > 0 && i + more < path.size();
    for (std::size_t k = 1; whole && k <= more; k++) whole = (static_cast<unsigned char>(path[i + k]) & 0xc0) == 0x80;
    if (whole) {
      out += path.substr(i, more + 1);
      i += more;
    } else if (c >= 0x20 && c < 0x7f) {
      out += path[i];
    } else {
      char hex[8];
      std::snprintf(hex, sizeof hex, "\\x%02x", c);
      out += hex;
    }
  }
  return out.empty() ? "." : out;
}

bool says_gone(int err) { return err == ENOENT || err == ENOTDIR || err == ELOOP; }

Fd Tree::open_directory(std::string_view path) const {
  constexpr int flags = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
  if (path.empty()) return Fd(::openat(root(), ".", O_PATH | O_DIRECTORY | O_CLOEXEC));
  std::string whole(path);
  if (whole.size() < 4000) {
    open_how how{};
    how.flags = flags;
    how.resolve = RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH;
    long fd = ::syscall(SYS_openat2, root(), whole.c_str(), &how, sizeof how);
    if (fd >= 0 || (errno != ENOSYS && errno != EAGAIN && errno != EPERM)) return Fd(static_cast<int>(fd));
  }
  // A path longer than PATH_MAX, or a kernel before 5.6: one component at a time.
  Fd fd;
  int at = root();
  while (!path.empty()) {
    auto slash = path.find('/');
    std::string name(path.substr(0, slash));
    path = slash == std::string_view::npos ? std::string_view() : path.substr(slash + 1);
    Fd next(::openat(at, name.c_str(), flags));
    if (!next) return next;
    fd = std::move(next);
    at = fd.get();
  }
  return fd;
}

int Cursor::directory(std::string_view path) {
  if (!known_ || path_ != path) {
    known_ = false;
    fd_ = tree_.open_directory(path);
    if (!fd_) return -1;
    path_ = path;
    known_ = true;
  }
  return fd_.get();
}

int Cursor::at(std::string_view path, std::string& name) {
  if (path.empty()) {
    name = ".";
    return tree_.root();
  }
  name = name_of(path);
  return directory(parent_of(path));
}

std::string proc_path(int directory, const std::string& name) {
  return "/proc/self/fd/" + std::to_string(directory) + "/" + name;
}

namespace {

// rsync copies neither of these: system.* other than ACLs belongs to the file system, user.rsync.* to rsync.
bool carried(std::string_view name) {
  if (name.starts_with("system."))
    return name == "system.posix_acl_access" || name == "system.posix_acl_default";
  return !name.starts_with("user.rsync.") && !name.starts_with("trusted.rsync.");
}

void read_xattrs(const std::string& where, std::string_view path, Meta& m) {
  char fixed[4096];
  std::string large;
  std::string_view names;
  ssize_t n = ::llistxattr(where.c_str(), fixed, sizeof fixed);
  if (n >= 0) {
    names = {fixed, static_cast<std::size_t>(n)};
  } else if (errno == ERANGE) {
    large.resize(65536);
    n = ::llistxattr(where.c_str(), large.data(), large.size());
    if (n >= 0) names = {large.data(), static_cast<std::size_t>(n)};
  }
  if (n < 0) {
    if (errno == ENOTSUP || errno == ENOENT) return;
    throw errno_error(errno, "list extended attributes of", shown(path));
  }
  while (!names.empty()) {
    std::string name(names.substr(0, names.find('\0')));
    names.remove_prefix(name.size() + 1);
    // Without privilege only user attributes can be written at the other end, as with rsync.
    if (!carried(name)) continue;
    if (::geteuid() != 0 && !name.starts_with("user.") && !name.starts_with("system.")) continue;
    std::string value(256, '\0');
    ssize_t got = ::lgetxattr(where.c_str(), name.c_str(), value.data(), value.size());
    if (got < 0 && errno == ERANGE) {
      value.resize(65536);
      got = ::lgetxattr(where.c_str(), name.c_str(), value.data(), value.size());
    }
    if (got < 0) {
      if (errno == ENODATA || errno == ENOENT) continue;  // removed meanwhile
      throw errno_error(errno, "read extended attribute " + name + " of", shown(path));
    }
    value.resize(static_cast<std::size_t>(got));
    m.xattrs.emplace_back(std::move(name), std::move(value));
  }
  std::sort(m.xattrs.begin(), m.xattrs.end());
}

}  // namespace

std::optional<Meta> read_meta(int directory, const std::string& name, std::string_view path, bool xattrs) {
  struct stat st;
  if (::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
    if (says_gone(errno)) return std::nullopt;
    throw errno_error(errno, "stat", shown(path));
  }
  Meta m;
  m.mode = st.st_mode;
  m.uid = st.st_uid;
  m.gid = st.st_gid;
  m.size = st.st_size;
  m.mtime = st.st_mtim;
  m.rdev = st.st_rdev;
  m.dev = st.st_dev;
  m.ino = st.st_ino;
  m.nlink = st.st_nlink;
  if (S_ISLNK(st.st_mode)) {
    char buf[4096];
    ssize_t n = ::readlinkat(directory, name.c_str(), buf, sizeof buf);
    if (n < 0) {
      if (errno == ENOENT || errno == EINVAL) return std::nullopt;  // replaced meanwhile: another event says so
      throw errno_error(errno, "read link", shown(path));
    }
    m.target.assign(buf, static_cast<std::size_t>(n));
  }
  if (xattrs) read_xattrs(proc_path(directory, name), path, m);
  return m;
}

void each_name(int directory, std::string_view path,
               const std::function<bool(std::string_view, ino_t, unsigned char)>& each) {
  Fd fd(::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) {
    if (errno == ENOENT || errno == ENOTDIR) return;
    throw errno_error(errno, "open directory", shown(path));
  }
  // getdents64 itself: readdir's DIR costs an allocation of 32 KiB a directory, and a million of them are read.
  alignas(8) char buf[32768];
  while (true) {
    long n = ::syscall(SYS_getdents64, fd.get(), buf, sizeof buf);
    if (n == 0) return;
    if (n < 0) {
      if (errno == ENOENT) return;
      throw errno_error(errno, "read directory", shown(path));
    }
    for (long at = 0; at < n;) {
      auto* d = reinterpret_cast<dirent64*>(buf + at);
      at += d->d_reclen;
      std::string_view name = d->d_name;
      if (name == "." || name == "..") continue;
      if (!each(name, d->d_ino, d->d_type)) return;
    }
  }
}

}  // namespace rehome::track
