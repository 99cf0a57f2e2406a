#include <fcntl.h>
#include <sys/xattr.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/json.h"
#include "track/delta.h"

namespace rehome::track {
namespace {

constexpr std::uint64_t smallest_block = 128 << 10;

std::uint64_t block_for(std::uint64_t size) {
  std::uint64_t block = smallest_block;
  while (size / block > 65536) block *= 2;
  return block;
}

// Never through a symbolic link that somebody has put there meanwhile, which fchmodat would follow. errno as chmod's.
bool set_mode(int directory, const std::string& name, mode_t mode) {
  Fd fd(::openat(directory, name.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
  struct stat st;
  if (!fd || ::fstat(fd.get(), &st) != 0) return false;
  if (S_ISLNK(st.st_mode)) {
    errno = ELOOP;
    return false;
  }
  return ::chmod(("/proc/self/fd/" + std::to_string(fd.get())).c_str(), mode) == 0;
}

Fd open_for_write(int directory, const std::string& name, int more = 0) {
  constexpr int flags = O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  Fd fd(::openat(directory, name.c_str(), flags | more, 0600));
  if (!fd && errno == EACCES && set_mode(directory, name, 0600))
    fd = Fd(::openat(directory, name.c_str(), flags | more, 0600));
  return fd;
}

void pwrite_all(int fd, std::string_view bytes, std::uint64_t offset, std::string_view path) {
  while (!bytes.empty()) {
    ssize_t n = ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0)
      throw errno_error(errno, "write", shown(path), errno == ENOSPC || errno == EDQUOT ? "make room on this side" : "");
    offset += static_cast<std::uint64_t>(n);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

bool same_kind(const struct stat& st, const Meta& m) {
  return (st.st_mode & S_IFMT) == (m.mode & S_IFMT) && (!(S_ISCHR(st.st_mode) || S_ISBLK(st.st_mode)) || st.st_rdev == m.rdev);
}

}  // namespace

void Receiver::serve(Channel& channel, const std::atomic<bool>& stop) {
  Frame f;
  while (!stop) {
    if (!channel.readable(Millis(200))) continue;
    if (!channel.receive_or_end(f)) return;
    Unpacker u(f.payload);
    if (between_batches_) {
      renew_owners();
      cursor_.forget();   // an rsync may have been here
    }
    between_batches_ = false;
    switch (f.type) {
      case FrameType::owner: {
        auto kind = u.u8() ? Accounts::Kind::group : Accounts::Kind::user;
        id_t id = u.u32();
        if (!options_.owner_by_name) break;
        set_owner(*told_.insert_or_assign({kind, id}, std::string(u.bytes())).first);
        break;
      }
      case FrameType::hint: {
        std::string from(u.bytes());
        on_hint(from, std::string(u.bytes()));
        break;
      }
      case FrameType::remove: on_remove(std::string(u.bytes())); break;
      case FrameType::names: on_names(u); break;
      case FrameType::entry: on_entry(channel, unpack_entry(f.payload)); break;
      case FrameType::link: {
        std::string path(u.bytes());
        on_link(path, std::string(u.bytes()));
        break;
      }
      case FrameType::ask:
        channel.send(FrameType::ready, {});
        channel.flush();
        break;
      case FrameType::data:
      case FrameType::zero: {
        auto index = u.u32();
        auto offset = u.u64();
        if (index >= batch_.size()) throw Error(Code::io, "content of a file that was not announced");
        Pending& p = batch_[index];
        if (!p.needed) break;  // it failed before; the failure is told at the end
        try {
          Fd& fd = writing(index);
          if (f.type == FrameType::data) {
            pwrite_all(fd.get(), u.bytes(), offset, p.entry.path);
          } else {
            auto length = u.u64();
            if (::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                            static_cast<off_t>(length)) != 0)
              // No holes on this file system: zeros are the same content.
              for (std::uint64_t at = 0; at < length; at += 65536)
                pwrite_all(fd.get(), std::string(static_cast<std::size_t>(std::min<std::uint64_t>(65536, length - at)), '\0'),
                           offset + at, p.entry.path);
          }
        } catch (const Error& e) {
          fail(p.entry.path, e.message);
          p.needed = false;
        }
        break;
      }
      case FrameType::data_end: {
        auto index = u.u32();
        on_data_end(index, u.u64());
        break;
      }
      case FrameType::commit: on_commit(channel, u.u8() != 0); break;
      default: throw Error(Code::io, "a frame of type " + std::to_string(static_cast<int>(f.type)) + " makes no sense here");
    }
  }
}

void Receiver::set_owner(const std::pair<const std::pair<Accounts::Kind, id_t>, std::string>& told) {
  auto [kind, id] = told.first;
  owners_.set(kind, id, accounts_.id(kind, told.second).value_or(id));
}

// Accounts that were made here since the connection began take effect with the next batch.
void Receiver::renew_owners() {
  auto now = accounts_.renew();
  if (now == accounts_then_) return;
  accounts_then_ = now;
  for (const auto& told : told_) set_owner(told);
}

void Receiver::fail(const std::string& path, const std::string& why, bool parent_missing) {
  failures_.push_back({path, why, parent_missing});
}

// The descriptor of the directory that must hold `path`; -1 after noting the failure.
int Receiver::need_parent(const std::string& path, std::string& name) {
  int directory = cursor_.at(path, name);
  if (directory < 0) {
    bool missing = says_gone(errno);
    fail(path, errno_error(errno, "open directory", shown(parent_of(path))).message, missing);
  }
  return directory;
}

void Receiver::touch(const std::string& directory) {
  changed_directories_.insert(directory);
  if (touched_.contains(directory)) return;
  std::string name;
  Cursor cursor(tree_);
  int at = cursor.at(directory, name);
  struct stat st;
  if (at >= 0 && ::fstatat(at, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) touched_.emplace(directory, st.st_mtim);
}

// Removes what is there, with all below it, but nothing that the filter excludes: like rsync --delete without
// --delete-excluded. False when something had to stay.
bool Receiver::remove_at(int directory, const std::string& name, const std::string& path) {
  struct stat st;
  if (::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
    if (says_gone(errno)) return true;
    throw errno_error(errno, "stat", shown(path));
  }
  bool is_directory = S_ISDIR(st.st_mode);
  if (!filter_.includes(path, is_directory)) return false;
  if (!is_directory) {
    if (::unlinkat(directory, name.c_str(), 0) == 0 || errno == ENOENT) return true;
    throw errno_error(errno, "remove", shown(path));
  }
  if (::unlinkat(directory, name.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT) return true;
  if (errno != ENOTEMPTY && errno != EEXIST) throw errno_error(errno, "remove directory", shown(path));
  Fd fd(::openat(directory, name.c_str(), O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (!fd) throw errno_error(errno, "open directory", shown(path));
  std::vector<std::string> names;
  each_name(fd.get(), path, [&](std::string_view n, ino_t, unsigned char) {
    names.emplace_back(n);
    return true;
  });
  bool all = true;
  for (const auto& n : names) all = remove_at(fd.get(), n, child_of(path, n)) && all;
  if (!all) return false;
  if (::unlinkat(directory, name.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT)
    throw errno_error(errno, "remove directory", shown(path));
  return true;
}

void Receiver::on_remove(const std::string& path) {
  entries_++;
  std::string name;
  int directory = cursor_.at(path, name);
  try {
    if (path.empty()) throw Error(Code::io, "the root of a tree is never removed");
    struct stat st;
    if (directory < 0 || ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
      if (says_gone(errno)) return;  // it, or its directory too
      throw errno_error(errno, "remove", shown(path));
    }
    touch(std::string(parent_of(path)));
    remove_at(directory, name, path);
    if (S_ISDIR(st.st_mode)) cursor_.forget();
  } catch (const Error& e) {
    fail(path, e.message);
  }
}

void Receiver::on_hint(const std::string& from, const std::string& to) {
  Cursor old_place(tree_), new_place(tree_);
  std::string old_name, new_name;
  int a = old_place.at(from, old_name), b = new_place.at(to, new_name);
  struct stat st;
  if (a < 0 || b < 0 || from.empty() || to.empty()) return;
  if (::fstatat(a, old_name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) return;
  touch(std::string(parent_of(from)));
  touch(std::string(parent_of(to)));
  // Never over something: what is there may be needed, and everything is compared afterwards anyway.
  if (::renameat2(a, old_name.c_str(), b, new_name.c_str(), RENAME_NOREPLACE) == 0 && S_ISDIR(st.st_mode)) {
    cursor_.forget();
    // What was noted below the old name would be set at the wrong place.
    auto below = [&](const std::string& p) { return p == from || (p.size() > from.size() && p.starts_with(from) && p[from.size()] == '/'); };
    std::map<std::string, timespec> renamed;
    for (auto it = touched_.begin(); it != touched_.end();) {
      if (!below(it->first)) {
        ++it;
        continue;
      }
      renamed.emplace(to + it->first.substr(from.size()), it->second);
      it = touched_.erase(it);
    }
    touched_.merge(renamed);
  }
}

void Receiver::on_names(Unpacker u) {
  std::string directory(u.bytes());
  bool last = u.u8() != 0;
  if (directory != names_of_) names_.clear();
  names_of_ = directory;
  for (auto n = u.u32(); n > 0; n--) names_.insert(hash_of(u.bytes()));
  if (!last) return;
  try {
    Fd fd = tree_.open_directory(directory);
    if (!fd) {
      int err = errno;
      names_.clear();
      if (says_gone(err)) return;  // its entry has failed, and said so
      throw errno_error(err, "open directory", shown(directory));
    }
    std::vector<std::string> extra;
    each_name(fd.get(), directory, [&](std::string_view name, ino_t, unsigned char) {
      if (!names_.contains(hash_of(name))) extra.emplace_back(name);
      return true;
    });
    for (const auto& name : extra) {
      touch(directory);
      remove_at(fd.get(), name, child_of(directory, name));
    }
    if (!extra.empty()) cursor_.forget();
  } catch (const Error& e) {
    // As something in it, whose directory must come again with its list: its own entry would remove nothing.
    fail(child_of(directory, "."), e.message, true);
  }
  names_.clear();
}

void Receiver::on_entry(Channel& channel, Entry entry) {
  entries_++;
  entry.meta.uid = owners_.get(Accounts::Kind::user, entry.meta.uid);
  entry.meta.gid = owners_.get(Accounts::Kind::group, entry.meta.gid);
  for (auto& [k, v] : entry.meta.xattrs)
    if (is_acl(k)) v = map_acl(v, [&](Accounts::Kind kind, id_t id) { return owners_.get(kind, id); });
  batch_.emplace_back();
  Pending& pending = batch_.back();
  try {
    apply_entry(entry, pending, channel);
  } catch (const Error& e) {
    fail(entry.path, e.message);
    pending.needed = false;
  }
  // The content is not needed any more; what is asked for comes in pieces.
  entry.extents.clear();
  pending.entry = std::move(entry);
}

void Receiver::apply_entry(Entry& e, Pending& pending, Channel& channel) {
  std::string name;
  int directory = need_parent(e.path, name);
  if (directory < 0) return;
  std::string parent(parent_of(e.path));
  struct stat st;
  bool there = ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0;
  if (there && !same_kind(st, e.meta)) {
    touch(parent);
    bool was_directory = S_ISDIR(st.st_mode);
    if (!remove_at(directory, name, e.path))
      throw Error(Code::io, "replace directory " + shown(e.path) + ": excluded files are in it", "remove them on this side");
    if (was_directory) cursor_.forget();
    directory = need_parent(e.path, name);
    if (directory < 0) return;
    there = false;
  }
  if (e.meta.is_directory()) {
    if (!there) {
      touch(parent);
      if (::mkdirat(directory, name.c_str(), 0700) != 0) throw errno_error(errno, "make directory", shown(e.path));
    }
    changed_directories_.insert(e.path);
    directories_[e.path] = e;
    return;
  }
  if (e.meta.is_file()) {
    if (apply_file(e, pending, channel, directory, name)) write_meta(e, directory, name);
    return;
  }
  // Links, fifos, sockets and devices: made anew where they differ. Another name of the same inode would be changed
  // with them, so one that has others is made anew too; links are joined later.
  if (S_ISLNK(e.meta.mode) && there) {
    char buf[4096];
    ssize_t n = ::readlinkat(directory, name.c_str(), buf, sizeof buf);
    if (n < 0 || std::string_view(buf, static_cast<std::size_t>(n)) != e.meta.target) st.st_nlink = 2, e.names.clear();
  }
  if (there && st.st_nlink > 1 && e.names.empty()) {
    touch(parent);
    if (::unlinkat(directory, name.c_str(), 0) != 0) throw errno_error(errno, "remove", shown(e.path));
    there = false;
  }
  if (!there) {
    touch(parent);
    int rc = S_ISLNK(e.meta.mode) ? ::symlinkat(e.meta.target.c_str(), directory, name.c_str())
                                  : ::mknodat(directory, name.c_str(), e.meta.mode, e.meta.rdev);
    if (rc != 0) throw errno_error(errno, "make", shown(e.path));
  }
  write_meta(e, directory, name);
}

// True when the file's content is as it must be and its metadata can be set; false when content was asked for.
bool Receiver::apply_file(Entry& e, Pending& pending, Channel& channel, int directory, const std::string& name) {
  struct stat st{};
  std::string parent(parent_of(e.path));
  bool there = ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0;
  if (there && st.st_nlink > 1) {
    // Writing into an inode that has a name outside this group would change that name's content too.
    nlink_t ours = 1;
    Cursor cursor(tree_);
    for (const auto& n : e.names) {
      std::string other;
      int at = cursor.at(n, other);
      struct stat os;
      if (at >= 0 && ::fstatat(at, other.c_str(), &os, AT_SYMLINK_NOFOLLOW) == 0 && os.st_ino == st.st_ino && os.st_dev == st.st_dev)
        ours++;
    }
    if (ours != st.st_nlink) {
      touch(parent);
      if (::unlinkat(directory, name.c_str(), 0) != 0) throw errno_error(errno, "remove", shown(e.path));
      there = false;
    }
  }
  auto index = static_cast<std::uint32_t>(batch_.size() - 1);
  auto size = static_cast<std::uint64_t>(e.meta.size);
  auto make = [&] {
    touch(parent);
    Fd fd = open_for_write(directory, name, O_CREAT | O_EXCL);
    if (!fd) throw errno_error(errno, "create", shown(e.path), errno == ENOSPC ? "make room on this side" : "");
    return fd;
  };
  auto open = [&] {
    if (!there) return make();
    Fd fd = open_for_write(directory, name);
    if (!fd && errno == ETXTBSY) {
      // A program that runs from it keeps the old file.
      touch(parent);
      if (::unlinkat(directory, name.c_str(), 0) != 0) throw errno_error(errno, "remove", shown(e.path));
      there = false;
      return make();
    }
    if (!fd) throw errno_error(errno, "open", shown(e.path));
    return fd;
  };
  auto ask = [&](bool blocks) {
    Fd fd = open();
    pending.needed = true;
    Packer p;
    p.u32(index);
    if (blocks && there) {
      std::uint64_t block = block_for(size);
      p.u32(static_cast<std::uint32_t>(block));
      std::string bytes(block, '\0');
      for (std::uint64_t at = 0; at < static_cast<std::uint64_t>(st.st_size); at += block) {
        ssize_t n = ::pread(fd.get(), bytes.data(), block, static_cast<off_t>(at));
        if (n < 0) throw errno_error(errno, "read", shown(e.path));
        Hash h = hash_of({bytes.data(), static_cast<std::size_t>(n)});
        p.u64(h.low).u64(h.high);
      }
    } else {
      p.u32(0);
      if (::ftruncate(fd.get(), 0) != 0) throw errno_error(errno, "truncate", shown(e.path));
    }
    channel.send(FrameType::need, p.out());
    return false;
  };
  const bool old_is_useful = there && static_cast<std::uint64_t>(st.st_size) >= smallest_block && size >= smallest_block;
  switch (e.content) {
    case Content::keep:
      if (there && st.st_size == e.meta.size) return true;
      return ask(old_is_useful);
    case Content::hashed: {
      if (there && st.st_size == e.meta.size) {
        Fd fd(::openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
        std::uint64_t read = 0;
        if (fd && hash_file(fd.get(), e.path, read) == e.hash && read == size) {
          written_.push_back(e.path);
          return true;
        }
      }
      return ask(old_is_useful);
    }
    case Content::changed: return ask(old_is_useful);
    case Content::whole: {
      Fd fd = open();
      // Truncated first, so that holes stay holes.
      if (st.st_size > 0 && there && ::ftruncate(fd.get(), 0) != 0) throw errno_error(errno, "truncate", shown(e.path));
      for (const auto& [offset, bytes] : e.extents) pwrite_all(fd.get(), bytes, offset, e.path);
      if (::ftruncate(fd.get(), e.meta.size) != 0) throw errno_error(errno, "truncate", shown(e.path));
      written_.push_back(e.path);
      return true;
    }
  }
  throw Error(Code::io, "an entry without a known way of content");
}

// The file whose content comes now. One is open at a time: a batch may ask for more than a process may have open.
Fd& Receiver::writing(std::uint32_t index) {
  if (!writing_ || writing_index_ != index) {
    const std::string& path = batch_[index].entry.path;
    std::string name;
    int directory = cursor_.at(path, name);
    writing_ = directory < 0 ? Fd() : open_for_write(directory, name);
    if (!writing_) throw errno_error(errno, "open", shown(path));
    writing_index_ = index;
  }
  return writing_;
}

void Receiver::on_data_end(std::uint32_t index, std::uint64_t size) {
  if (index >= batch_.size()) throw Error(Code::io, "content of a file that was not announced");
  Pending& p = batch_[index];
  if (!p.needed) return;
  p.needed = false;
  try {
    if (::ftruncate(writing(index).get(), static_cast<off_t>(size)) != 0)
      throw errno_error(errno, "truncate", shown(p.entry.path));
    written_.push_back(p.entry.path);
    std::string name;
    int directory = need_parent(p.entry.path, name);
    if (directory >= 0) write_meta(p.entry, directory, name);
  } catch (const Error& e) {
    fail(p.entry.path, e.message);
  }
}

void Receiver::write_meta(const Entry& e, int directory, const std::string& name) {
  const Meta& m = e.meta;
  const std::string where = proc_path(directory, name);
  auto now = read_meta(directory, name, e.path);
  if (!now) throw Error(Code::io, shown(e.path) + " vanished while it was written", "something else writes on this side");
  const bool root = ::geteuid() == 0;
  if (now->uid != m.uid || now->gid != m.gid) {
    if (::fchownat(directory, name.c_str(), root ? m.uid : static_cast<uid_t>(-1), m.gid, AT_SYMLINK_NOFOLLOW) != 0 && root)
      throw errno_error(errno, "change owner of", shown(e.path));
    now = read_meta(directory, name, e.path);  // this clears set-id bits and file capabilities
    if (!now) throw Error(Code::io, shown(e.path) + " vanished while it was written");
  }
  auto change_mode = [&] {
    if (!S_ISLNK(m.mode) && !set_mode(directory, name, m.mode & 07777))
      throw errno_error(errno, "change mode of", shown(e.path));
  };
  bool acl = std::any_of(now->xattrs.begin(), now->xattrs.end(), [](const auto& x) { return is_acl(x.first); }) ||
             std::any_of(m.xattrs.begin(), m.xattrs.end(), [](const auto& x) { return is_acl(x.first); });
  if ((now->mode & 07777) != (m.mode & 07777) && !acl) change_mode();
  if (now->xattrs != m.xattrs) {
    for (const auto& [k, v] : now->xattrs) {
      bool wanted = std::any_of(m.xattrs.begin(), m.xattrs.end(), [&](const auto& x) { return x.first == k; });
      if (!wanted && ::lremovexattr(where.c_str(), k.c_str()) != 0 && errno != ENODATA)
        throw errno_error(errno, "remove extended attribute " + k + " of", shown(e.path));
    }
    for (const auto& x : m.xattrs) {
      if (std::find(now->xattrs.begin(), now->xattrs.end(), x) != now->xattrs.end()) continue;
      if (::lsetxattr(where.c_str(), x.first.c_str(), x.second.data(), x.second.size(), 0) != 0)
        throw errno_error(errno, "set extended attribute " + x.first + " of", shown(e.path),
                          errno == ENOTSUP ? "the file system of this side has no such attributes; see check" : "");
    }
  }
  // An ACL and the mode's group bits are one thing seen twice: the mode is set when both are there.
  if (acl) change_mode();
  timespec times[2] = {{0, UTIME_OMIT}, m.mtime};
  if (::utimensat(directory, name.c_str(), times, AT_SYMLINK_NOFOLLOW) != 0)
    throw errno_error(errno, "set times of", shown(e.path));
  if (m.is_file()) {
    if (written_.empty() || written_.back() != e.path) written_.push_back(e.path);
  } else {
    changed_directories_.insert(std::string(parent_of(e.path)));
  }
}

void Receiver::on_link(const std::string& path, const std::string& of) {
  entries_++;
  try {
    Cursor other(tree_);
    std::string name, of_name;
    int directory = need_parent(path, name);
    if (directory < 0) return;
    int of_directory = other.at(of, of_name);
    struct stat a, b;
    if (of_directory < 0 || ::fstatat(of_directory, of_name.c_str(), &b, AT_SYMLINK_NOFOLLOW) != 0) {
      fail(path, "its other name " + shown(of) + " is missing on this side");
      return;
    }
    if (::fstatat(directory, name.c_str(), &a, AT_SYMLINK_NOFOLLOW) == 0) {
      if (a.st_ino == b.st_ino && a.st_dev == b.st_dev) return;
      touch(std::string(parent_of(path)));
      if (!remove_at(directory, name, path)) throw Error(Code::io, "replace " + shown(path) + ": excluded files are in it");
      if (S_ISDIR(a.st_mode)) cursor_.forget();
      directory = need_parent(path, name);
      if (directory < 0) return;
    }
    touch(std::string(parent_of(path)));
    if (::linkat(of_directory, of_name.c_str(), directory, name.c_str(), 0) != 0)
      throw errno_error(errno, "link " + shown(path) + " to", shown(of));
  } catch (const Error& e) {
    fail(path, e.message);
  }
}

}  // namespace rehome::track
