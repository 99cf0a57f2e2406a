#include "track/watch.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/fanotify.h>

#include <cerrno>
#include <cstring>

#include "base/clock.h"
#include "base/error.h"

namespace rehome::track {
namespace {

constexpr std::uint64_t base_mask =
    FAN_CREATE | FAN_DELETE | FAN_MODIFY | FAN_CLOSE_WRITE | FAN_ATTRIB | FAN_ONDIR;
constexpr unsigned init_flags =
    FAN_CLASS_NOTIF | FAN_REPORT_DFID_NAME | FAN_REPORT_FID | FAN_UNLIMITED_QUEUE | FAN_CLOEXEC | FAN_NONBLOCK;
constexpr std::size_t most_places = 65536;

Fd open_watch(int root, const std::string& label) {
  Fd fd(::fanotify_init(init_flags, O_RDONLY | O_CLOEXEC | O_LARGEFILE));
  if (!fd)
    throw Error(Code::denied, "watch " + label + ": fanotify: " + std::strerror(errno),
                errno == EPERM ? "run the agent as root (CAP_SYS_ADMIN); without it changes are found by reading the whole tree"
                : errno == EMFILE ? "raise /proc/sys/fs/fanotify/max_user_groups"
                                  : "Linux 5.9 or newer is needed; without it changes are found by reading the whole tree");
  // FAN_RENAME (Linux 5.17) tells both names at once; before, they come as two events.
  if (::fanotify_mark(fd.get(), FAN_MARK_ADD | FAN_MARK_FILESYSTEM, base_mask | FAN_RENAME, root, ".") == 0) return fd;
  if (::fanotify_mark(fd.get(), FAN_MARK_ADD | FAN_MARK_FILESYSTEM, base_mask | FAN_MOVED_FROM | FAN_MOVED_TO, root, ".") == 0)
    return fd;
  throw Error(Code::io, "watch " + label + ": fanotify: " + std::strerror(errno),
              "this file system reports no changes; they are found by reading the whole tree");
}

bool link_of(int fd, std::string& text) {
  char buf[8192];
  ssize_t n = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), buf, sizeof buf);
  if (n >= 0) text.assign(buf, static_cast<std::size_t>(n));
  return n >= 0;
}

Fd open_handle(int mount, std::string_view handle, int flags) {
  alignas(file_handle) char copy[sizeof(file_handle) + MAX_HANDLE_SZ];
  if (handle.size() > sizeof copy) {
    errno = EOVERFLOW;
    return Fd();
  }
  std::memcpy(copy, handle.data(), handle.size());
  // ENOMEM is also what ext4 says while the inode's number is being given to a new file (iget_locked of an inode with
  // I_CREATING), which is over in microseconds; then it says ESTALE.
  for (int attempt = 0;; attempt++) {
    Fd fd(::open_by_handle_at(mount, reinterpret_cast<file_handle*>(copy), flags | O_CLOEXEC));
    if (fd || errno != ENOMEM || attempt == 20) return fd;
    system_clock().sleep(Millis(1));
  }
}

}  // namespace

std::string Watch::obstacle(const std::string& path) {
  Fd root(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!root) return "open " + path + ": " + std::strerror(errno);
  try {
    open_watch(root.get(), path);
  } catch (const Error& e) {
    return e.message;
  }
  alignas(file_handle) char space[sizeof(file_handle) + MAX_HANDLE_SZ];
  auto* h = reinterpret_cast<file_handle*>(space);
  h->handle_bytes = MAX_HANDLE_SZ;
  int mount_id;
  if (::name_to_handle_at(root.get(), "", h, &mount_id, AT_EMPTY_PATH) != 0)
    return "file handles of " + path + ": " + std::strerror(errno);
  if (Fd fd(::open_by_handle_at(root.get(), h, O_PATH | O_CLOEXEC)); !fd)
    return "opening files of " + path + " by handle: " + std::strerror(errno);
  return {};
}

Watch::Watch(const Tree& tree, const Filter& filter, DirtySet& dirty, LinkIndex* links) : tree_(tree), filter_(filter), dirty_(dirty), links_(links) {
  std::string trouble = obstacle("/proc/self/fd/" + std::to_string(tree.root()));
  if (!trouble.empty())
    throw Error(Code::denied, "watch " + tree.label() + ": " + trouble,
                "changes are found by reading the whole tree, also inside the pause");
  fd_ = open_watch(tree.root(), tree.label());
  buffer_.resize(256 << 10);
  thread_ = std::thread([this] { read_loop(); });
}

Watch::~Watch() {
  stop_ = true;
  thread_.join();
}

void Watch::read_loop() {
  while (!stop_) {
    pollfd p{fd_.get(), POLLIN, 0};
    if (::poll(&p, 1, 100) <= 0) continue;
    try {
      drain();
    } catch (const Error&) {
      // A rescan is asked for, whose reason status shows.
      system_clock().sleep(Millis(100));
    }
  }
}

void Watch::drain() {
  std::lock_guard lock(mutex_);
  try {
    drain_locked();
  } catch (const Error& e) {
    dirty_.rescan(e.what());   // what was read with it is lost
    throw;
  }
}

void Watch::drain_locked() {
  while (true) {
    ssize_t n = ::read(fd_.get(), buffer_.data(), buffer_.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) throw errno_error(errno, "read events of", tree_.label());
    take(buffer_.data(), static_cast<std::size_t>(n));
  }
}

void Watch::take(const char* data, std::size_t size) {
  const char* end = data + size;
  while (data + sizeof(fanotify_event_metadata) <= end) {
    fanotify_event_metadata event;
    std::memcpy(&event, data, sizeof event);
    if (event.vers != FANOTIFY_METADATA_VERSION || event.event_len < sizeof event || data + event.event_len > end)
      throw Error(Code::io, "events of " + tree_.label() + " have a form that is not known");
    events_++;
    if (event.mask & FAN_Q_OVERFLOW) {
      dirty_.rescan("the kernel's event queue overflowed");
      data += event.event_len;
      continue;
    }
    std::string_view handle, name, object, old_handle, old_name, new_handle, new_name;
    const char* info = data + event.metadata_len;
    const char* info_end = data + event.event_len;
    while (info + sizeof(fanotify_event_info_header) <= info_end) {
      fanotify_event_info_header head;
      std::memcpy(&head, info, sizeof head);
      if (head.len < sizeof head || info + head.len > info_end) break;
      const char* h = info + sizeof(fanotify_event_info_fid);
      unsigned bytes = 0;
      if (h + 8 <= info + head.len) {
        std::memcpy(&bytes, h, sizeof bytes);
        std::string_view fid(h, std::min<std::size_t>(8 + bytes, static_cast<std::size_t>(info + head.len - h)));
        const char* text = h + fid.size();
        std::string_view named(text, text < info + head.len ? ::strnlen(text, static_cast<std::size_t>(info + head.len - text)) : 0);
        switch (head.info_type) {
          case FAN_EVENT_INFO_TYPE_DFID_NAME: handle = fid, name = named; break;
          case FAN_EVENT_INFO_TYPE_DFID: handle = fid, name = "."; break;
          case FAN_EVENT_INFO_TYPE_FID: object = fid; break;
          case FAN_EVENT_INFO_TYPE_OLD_DFID_NAME: old_handle = fid, old_name = named; break;
          case FAN_EVENT_INFO_TYPE_NEW_DFID_NAME: new_handle = fid, new_name = named; break;
          default: break;
        }
      }
      info += head.len;
    }
    if (event.mask & FAN_RENAME) moved(event.mask & FAN_ONDIR, old_handle, old_name, new_handle, new_name);
    if (!handle.empty()) one(event.mask, handle, name, object);
    // Of who has no path to it: a server of NFS, say. Attributes alone would be every link() and unlink() of this file system.
    else if (!object.empty() && (event.mask & (FAN_MODIFY | FAN_CLOSE_WRITE)) && !(event.mask & FAN_ONDIR)) changed(object, nullptr);
    data += event.event_len;
  }
}

// What is at `handle`: its path in the tree, "/" when it is proven to be none of the tree's, or "//" when it is no more. Nothing when it cannot be told
// now, with the reason in *why.
std::optional<std::string> Watch::find(std::string_view handle, std::string* why) const {
  auto unknown = [&](int err) {
    *why = std::strerror(err);
    return std::nullopt;
  };
  // A path from /proc is only believed when the tree has that very directory there: the tree's mount may be a bind of
  // a part of the file system, and the directory may be moved while we look.
  for (int attempt = 0; attempt < 4; attempt++) {
    Fd fd = open_handle(tree_.root(), handle, O_PATH | O_DIRECTORY);
    // Removed: its own removal is another event, and where a new directory has its name by now, that one's names are listed.
    if (!fd && errno == ESTALE) return "//";
    if (!fd) return unknown(errno);
    std::string root, at, root_after;
    struct stat st{}, seen{};
    // A path that is longer than a page has no text in /proc.
    if (!link_of(tree_.root(), root) || !link_of(fd.get(), at) || !link_of(tree_.root(), root_after) || ::fstat(fd.get(), &st) != 0)
      return unknown(errno);
    if (root != root_after) continue;
    if (root == "/") root.clear();
    std::string relative;
    if (at.size() > root.size() && at.starts_with(root) && at[root.size()] == '/')
      relative = at.substr(root.size() + 1);
    else if (at != root && !(root.empty() && at == "/"))
      return "/";
    Fd again = tree_.open_directory(relative);
    if (again) {
      if (::fstat(again.get(), &seen) != 0) return unknown(errno);
      if (seen.st_dev != st.st_dev) return "/";  // hidden by a mount: what is sent is what the path shows
      if (seen.st_ino == st.st_ino) return relative;
    } else {
      if (!says_gone(errno)) return unknown(errno);
      if (at.ends_with(" (deleted)")) return "//";
    }
    // The text is none of the tree's: it was moved just now, or it is outside, which a mount of a part of the file system
    // shows as if it were below its root.
    int inside = is_below_root(fd);
    if (inside < 0) return unknown(errno);
    if (inside == 0) return "/";
  }
  *why = "it is moved all the time";
  return std::nullopt;
}

// 1 when the way up leads to the tree's root, 0 when it does not, -1 with errno set.
int Watch::is_below_root(const Fd& directory) const {
  struct stat root, st;
  if (::fstat(tree_.root(), &root) != 0) return -1;
  Fd at;
  int fd = directory.get();
  ino_t below = 0;
  while (true) {
    if (::fstat(fd, &st) != 0) return -1;
    if (st.st_ino == root.st_ino && st.st_dev == root.st_dev) return 1;
    if (st.st_dev != root.st_dev || st.st_ino == below) return 0;
    below = st.st_ino;
    Fd up(::openat(fd, "..", O_PATH | O_DIRECTORY | O_CLOEXEC));
    // So for what is not below the root of the mount.
    if (!up) return errno == ENOENT ? 0 : -1;
    at = std::move(up);
    fd = at.get();
  }
}

bool Watch::place(std::string_view handle, std::string& path, bool* removed) {
  std::string key(handle);
  auto it = places_.find(key);
  if (it == places_.end()) {
    std::string why;
    auto found = find(handle, &why);
    if (!found) {
      dirty_.rescan("a changed directory could not be found: " + why);
      return false;
    }
    if (places_.size() >= most_places) places_.clear();
    it = places_.emplace(std::move(key), std::move(*found)).first;
  }
  if (removed) *removed = it->second == "//";
  if (it->second.starts_with("/")) return false;
  path = it->second;
  return true;
}

void Watch::added(const std::string& path, bool directory, std::uint8_t why) {
  if (!filter_.includes(path, directory)) return;
  dirty_.add(path, why);
}

void Watch::gone(const std::string& path, bool directory) {
  if (filter_.includes(path, directory)) dirty_.add(path, why_name);
}

void Watch::moved(bool directory, std::string_view old_handle, std::string_view old_name, std::string_view new_handle,
                  std::string_view new_name) {
  if (directory) places_.clear();
  std::string from, to;
  bool from_inside = !old_handle.empty() && place(old_handle, from);
  bool to_inside = !new_handle.empty() && place(new_handle, to);
  if (from_inside) {
    dirty_.add(from, why_attributes);
    from = child_of(from, old_name);
    gone(from, directory);
  }
  if (to_inside) {
    dirty_.add(to, why_attributes);
    to = child_of(to, new_name);
    added(to, directory, static_cast<std::uint8_t>(why_name | why_moved | why_attributes | (directory ? why_tree : why_content)));
  }
  if (from_inside && to_inside && filter_.includes(from, directory) && filter_.includes(to, directory))
    dirty_.add_move(from, to);
}

void Watch::one(std::uint64_t mask, std::string_view handle, std::string_view name, std::string_view object) {
  const bool directory = mask & FAN_ONDIR;
  if (directory && (mask & (FAN_MOVED_FROM | FAN_MOVED_TO))) places_.clear();
  std::string parent;
  bool removed = false;
  if (!place(handle, parent, &removed)) {
    // A file that was changed through a name outside, or one that went with its directory, may have another in the tree.
    if ((mask & (FAN_MODIFY | FAN_CLOSE_WRITE | FAN_ATTRIB)) && !directory && name != "." && !object.empty()) changed(object, nullptr, removed);
    return;
  }
  if (name == ".") {
    // The directory itself.
    if (mask & FAN_ATTRIB) added(parent, true, why_attributes);
    return;
  }
  std::string path = child_of(parent, name);
  if (mask & (FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO)) dirty_.add(parent, why_attributes);
  if (mask & (FAN_DELETE | FAN_MOVED_FROM)) gone(path, directory);
  if (mask & FAN_CREATE)
    added(path, directory, static_cast<std::uint8_t>(why_name | why_attributes | (directory ? 0 : why_content)));
  if (mask & FAN_MOVED_TO)
    added(path, directory, static_cast<std::uint8_t>(why_name | why_moved | why_attributes | (directory ? why_tree : why_content)));
  if (mask & (FAN_MODIFY | FAN_CLOSE_WRITE | FAN_ATTRIB)) {
    std::uint8_t why = why_attributes;
    if (mask & (FAN_MODIFY | FAN_CLOSE_WRITE)) why |= why_content;
    added(path, directory, why);
    if (!directory && !object.empty()) changed(object, &path);
  }
}

// A change through one name of a file changes its other names, which get no event of their own; and the name in the event, `path`,
// may be gone, now or by the time that it is looked at. Without a path it is none of the tree's, or went with its directory (`removed`).
void Watch::changed(std::string_view object, const std::string* path, bool removed) {
  Fd fd = open_handle(tree_.root(), object, O_PATH);
  struct stat st{}, named{};
  if (!fd && errno == ESTALE) return;
  if (!fd || ::fstat(fd.get(), &st) != 0) {
    dirty_.rescan(std::string("the other names of a changed file could not be found: ") + std::strerror(errno));
    return;
  }
  if (st.st_nlink == 0) return;
  if (!path) {
    // It may be its last name that is the tree's. Those that have none here are looked for once: who writes one all the time must
    // not keep this tree from ever being clean.
    if (links_ && links_->knows(st.st_ino, removed)) dirty_.add_inode(st.st_ino);
    else if (st.st_nlink > 1 && !(links_ && links_->is_outside(st.st_ino, st.st_nlink))) dirty_.add_inode(st.st_ino, st.st_nlink);
  } else if (st.st_nlink > 1 || ::fstatat(tree_.root(), path->c_str(), &named, AT_SYMLINK_NOFOLLOW) != 0 || named.st_ino != st.st_ino) {
    dirty_.add_inode(st.st_ino);
  }
}

}  // namespace rehome::track
