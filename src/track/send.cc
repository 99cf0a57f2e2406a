#include <dirent.h>
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "base/json.h"
#include "track/delta.h"

namespace rehome::track {
namespace {

constexpr std::size_t most_inline = 128 << 10;   // content that travels with its entry
constexpr std::size_t most_entries = 2048;       // of one batch
constexpr std::size_t most_pending = 16u << 20;  // bytes of one batch
constexpr std::size_t data_chunk = 256 << 10;

Fd open_file(int directory, const std::string& name) {
  constexpr int flags = O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC;
  Fd fd(::openat(directory, name.c_str(), flags | O_NOATIME));
  if (!fd && errno == EPERM) fd = Fd(::openat(directory, name.c_str(), flags));  // not the owner
  return fd;
}

std::string read_range(int fd, std::uint64_t offset, std::size_t size, std::string_view path) {
  std::string out(size, '\0');
  std::size_t got = 0;
  while (got < size) {
    ssize_t n = ::pread(fd, out.data() + got, size - got, static_cast<off_t>(offset + got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, "read", shown(path));
    if (n == 0) break;
    got += static_cast<std::size_t>(n);
  }
  out.resize(got);
  return out;
}

// Calls data(offset, length) for the extents of [0, size) that hold data. A file system without SEEK_DATA is all data.
template <class F>
void each_extent(int fd, std::uint64_t size, F data) {
  std::uint64_t at = 0;
  while (at < size) {
    off_t from = ::lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    if (from < 0 && errno == ENXIO) return;
    if (from < 0) {
      data(at, size - at);
      return;
    }
    off_t to = ::lseek(fd, from, SEEK_HOLE);
    std::uint64_t end = to < 0 ? size : std::min(size, static_cast<std::uint64_t>(to));
    if (static_cast<std::uint64_t>(from) >= size) return;
    data(static_cast<std::uint64_t>(from), end - static_cast<std::uint64_t>(from));
    at = end;
  }
}

}  // namespace

std::string pack(const Entry& e) {
  Packer p;
  p.bytes(e.path).u32(e.meta.mode).u32(e.meta.uid).u32(e.meta.gid).i64(e.meta.size);
  p.i64(e.meta.mtime.tv_sec).u32(static_cast<std::uint32_t>(e.meta.mtime.tv_nsec)).u64(e.meta.rdev).bytes(e.meta.target);
  p.u32(static_cast<std::uint32_t>(e.meta.xattrs.size()));
  for (const auto& [k, v] : e.meta.xattrs) p.bytes(k).bytes(v);
  p.u32(static_cast<std::uint32_t>(e.names.size()));
  for (const auto& n : e.names) p.bytes(n);
  p.u8(static_cast<std::uint8_t>(e.content)).u64(e.hash.low).u64(e.hash.high);
  p.u32(static_cast<std::uint32_t>(e.extents.size()));
  for (const auto& [offset, bytes] : e.extents) p.u64(offset).bytes(bytes);
  return p.out();
}

Entry unpack_entry(std::string_view payload) {
  Unpacker u(payload);
  Entry e;
  e.path = u.bytes();
  e.meta.mode = u.u32();
  e.meta.uid = u.u32();
  e.meta.gid = u.u32();
  e.meta.size = u.i64();
  e.meta.mtime.tv_sec = u.i64();
  e.meta.mtime.tv_nsec = u.u32();
  e.meta.rdev = u.u64();
  e.meta.target = u.bytes();
  for (auto n = u.u32(); n > 0; n--) {
    std::string k(u.bytes());
    e.meta.xattrs.emplace_back(std::move(k), u.bytes());
  }
  for (auto n = u.u32(); n > 0; n--) e.names.emplace_back(u.bytes());
  e.content = static_cast<Content>(u.u8());
  e.hash.low = u.u64();
  e.hash.high = u.u64();
  for (auto n = u.u32(); n > 0; n--) {
    auto offset = u.u64();
    e.extents.emplace_back(offset, u.bytes());
  }
  return e;
}

Sent Sender::send(Channel& channel, Dirty dirty, DirtySet& again, const SendOptions& options) {
  sent_ = {};
  if (dirty.empty()) return sent_;
  REHOME_CHECK(!dirty.rescan);
  channel_ = &channel;
  again_ = &again;
  dirty_ = &dirty;
  options_ = options;
  asked_.clear();
  pending_ = 0;
  groups_.clear();
  linked_.clear();
  linked_names_.clear();
  removed_.clear();
  uncommitted_ = all_links_known_ = false;
  began_ = system_clock().now();
  sent_before_ = channel.sent();
  cursor_.forget();
  if (auto now = accounts_.renew(); now != accounts_then_) {
    accounts_then_ = now;
    told_.clear();
  }
  try {
    send_all(channel, dirty, again);
  } catch (...) {
    again.put_back(std::move(dirty));
    throw;
  }
  sent_.bytes = static_cast<std::int64_t>(channel.sent() - sent_before_);
  return std::move(sent_);
}

void Sender::send_all(Channel& channel, const Dirty& dirty, DirtySet&) {
  std::vector<std::pair<std::string, std::uint8_t>> paths(dirty.paths.begin(), dirty.paths.end());
  // Directories sort before what is in them.
  std::sort(paths.begin(), paths.end());

  // Everything that has more than one name, so that the index is completed by one pass at most.
  std::unordered_map<ino_t, nlink_t> shared;
  for (const auto& [path, why] : paths) {
    std::string name;
    int directory = cursor_.at(path, name);
    struct stat st;
    if (directory < 0 || ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) continue;
    if (S_ISDIR(st.st_mode) || st.st_nlink < 2) continue;
    links_.add(st.st_ino, path);
    shared.emplace(st.st_ino, st.st_nlink);
  }
  // Where it is not known how many names an inode has, 0 never matches, so that they are looked for.
  for (auto [ino, names] : dirty.inodes) shared.emplace(ino, names);
  if (!shared.empty()) links_.complete(shared);
  for (auto [ino, names] : dirty.inodes)
    for (const auto& path : links_.names(ino)) paths.emplace_back(path, static_cast<std::uint8_t>(why_content | why_attributes));
  std::sort(paths.begin(), paths.end());

  for (const auto& [from, to] : dirty.moves) {
    channel.send(FrameType::hint, Packer().bytes(from).bytes(to).out(), options_.deadline);
    uncommitted_ = true;
  }
  std::vector<const std::pair<std::string, std::uint8_t>*> there;
  for (const auto& one : paths) {
    std::string name;
    int directory = cursor_.at(one.first, name);
    struct stat st;
    if (directory >= 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0) there.push_back(&one);
    else if (int err = errno; says_gone(err)) remove(one.first);
    else put_back(one.first, one.second, errno_error(err, directory < 0 ? "open directory of" : "stat", shown(one.first)).message);
  }
  std::string tree;  // the directory that was sent with all below it
  bool in_tree = false;
  for (const auto* one : there) {
    const auto& [path, why] = *one;
    if (in_tree && (tree.empty() || (path.size() > tree.size() && path.starts_with(tree) && path[tree.size()] == '/'))) continue;
    send_path(path, why);
    if (why & why_tree) {
      tree = path;
      in_tree = true;
    }
  }
  // Names of one inode are joined when all of their directories are there.
  for (const auto& [path, of] : linked_) {
    count(path);
    channel.send(FrameType::link, Packer().bytes(path).bytes(of).out(), options_.deadline);
    uncommitted_ = true;
  }
  finish_batch();
}

void Sender::count(const std::string& path) {
  sent_.files++;
  sent_.paths += hash_of(path);
}

void Sender::remove(const std::string& path) {
  if (path.empty()) throw Error(Code::store, "the directory " + tree_.label() + " is gone", "restore it, then resume");
  if (!removed_.empty() && path.starts_with(removed_) && path.size() > removed_.size() && path[removed_.size()] == '/') return;
  removed_ = path;
  count(path);
  channel_->send(FrameType::remove, Packer().bytes(path).out(), options_.deadline);
  uncommitted_ = true;
}

void Sender::put_back(const std::string& path, std::uint8_t why, const std::string& message) {
  sent_.failed.emplace_back(path, message);
  again_->add(path, why);
}

bool Sender::dirty_name(const std::string& path) const {
  auto it = dirty_->paths.find(path);
  if (it != dirty_->paths.end() && (it->second & (why_name | why_moved))) return true;
  for (std::string_view at = path;; at = parent_of(at)) {
    it = dirty_->paths.find(std::string(at));
    if (it != dirty_->paths.end() && (it->second & (why_tree | why_name))) return true;
    if (at.empty()) return false;
  }
}

void Sender::send_path(const std::string& path, std::uint8_t why) {
  std::optional<Meta> meta;
  std::string name;
  try {
    int directory = cursor_.at(path, name);
    if (directory >= 0) meta = read_meta(directory, name, path);
    else if (!says_gone(errno)) throw errno_error(errno, "open directory of", shown(path));
  } catch (const Error& e) {
    put_back(path, why, e.message);
    return;
  }
  if (!meta) {
    remove(path);
    return;
  }
  if (!filter_.includes(path, meta->is_directory())) {
    // A rule for directories alone, and it was none before: what it was is not to stay at the other side.
    if (filter_.includes(path, !meta->is_directory())) remove(path);
    return;
  }
  bool tree = meta->is_directory() && (why & why_tree);
  // A directory that was removed and made again: what happened in the one before may have been told too late to find out
  // where, so what it held and the new one does not is removed by the list.
  bool made = meta->is_directory() && (why & why_name);
  send_entry(path, std::move(*meta), why);
  if (tree) send_tree(path);
  else if (made) send_names(path, why);
}

// The list of names in `directory`, in parts: the receiver removes what is not in it. So it is read to its end before any of
// it is sent. Returns the names and the directory; nothing when it could not be read, which is put back as `why`, or is gone.
std::optional<Sender::Listed> Sender::send_names(const std::string& directory, std::uint8_t why) {
  Listed listed{tree_.open_directory(directory), {}};
  if (!listed.fd) {
    // Moved or removed meanwhile is an event.
    if (int err = errno; !says_gone(err)) put_back(directory, why, errno_error(err, "open directory", shown(directory)).message);
    return std::nullopt;
  }
  try {
    each_name(listed.fd.get(), directory, [&](std::string_view name, ino_t, unsigned char type) {
      if (type == DT_UNKNOWN) {
        struct stat st;
        if (::fstatat(listed.fd.get(), std::string(name).c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0)
          type = static_cast<unsigned char>(IFTODT(st.st_mode));
      }
      if (filter_.includes_child(child_of(directory, name), type == DT_DIR)) listed.names.emplace_back(name);
      return true;
    });
  } catch (const Error& e) {
    put_back(directory, why, e.message);
    return std::nullopt;
  }
  std::uint32_t in_part = 0;
  std::string names;
  auto send_part = [&](bool last) {
    Packer p;
    p.bytes(directory).u8(last).u32(in_part);
    channel_->send(FrameType::names, p.out() + names, options_.deadline);
    names.clear();
    in_part = 0;
    uncommitted_ = true;
  };
  for (const auto& name : listed.names) {
    names += Packer().bytes(name).out();
    in_part++;
    if (names.size() > (1u << 20)) send_part(false);
  }
  send_part(true);
  return listed;
}

void Sender::send_tree(const std::string& top) {
  std::vector<std::string> todo{top};
  while (!todo.empty()) {
    std::string directory = std::move(todo.back());
    todo.pop_back();
    constexpr std::uint8_t whole = why_tree | why_name | why_attributes;
    auto listed = send_names(directory, whole);
    if (!listed) continue;
    for (const auto& name : listed->names) {
      std::string path = child_of(directory, name);
      std::optional<Meta> meta;
      try {
        meta = read_meta(listed->fd.get(), name, path);
      } catch (const Error& e) {
        put_back(path, whole | why_content, e.message);
      }
      if (!meta) continue;
      bool is_directory = meta->is_directory();
      send_entry(path, std::move(*meta), why_name | why_moved | why_content | why_attributes);
      if (is_directory) todo.push_back(std::move(path));
    }
  }
}

void Sender::tell_owner(Accounts::Kind kind, id_t id) {
  if (id == 0 || !told_.emplace(kind == Accounts::Kind::group, id).second) return;
  std::string name = accounts_.name(kind, id);
  if (!name.empty())
    channel_->send(FrameType::owner, Packer().u8(kind == Accounts::Kind::group).u32(id).bytes(name).out(), options_.deadline);
}

// Sets how the content travels; false when the file cannot be opened because it is gone.
bool Sender::read_content(const std::string& path, Entry& e) {
  std::string name;
  int directory = cursor_.at(path, name);
  Fd fd = directory < 0 ? Fd() : open_file(directory, name);
  if (!fd) {
    if (says_gone(errno) || errno == ENXIO) return false;
    throw errno_error(errno, "open", shown(path));
  }
  struct stat st;
  if (::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode)) return false;
  e.meta.size = st.st_size;
  if (e.content == Content::hashed) {
    std::uint64_t size;
    e.hash = hash_file(fd.get(), path, size);
    e.meta.size = static_cast<std::int64_t>(size);
  } else if (static_cast<std::uint64_t>(st.st_size) <= most_inline) {
    e.content = Content::whole;
    each_extent(fd.get(), static_cast<std::uint64_t>(st.st_size), [&](std::uint64_t offset, std::uint64_t length) {
      e.extents.emplace_back(offset, read_range(fd.get(), offset, static_cast<std::size_t>(length), path));
    });
  }
  return true;
}

void Sender::send_entry(const std::string& path, Meta meta, std::uint8_t why) {
  Entry e;
  e.path = path;
  e.meta = std::move(meta);
  const std::pair inode(e.meta.dev, e.meta.ino);
  if (!e.meta.is_directory() && e.meta.nlink > 1) {
    links_.add(e.meta.ino, path);
    if (auto known = groups_.find(inode); known != groups_.end()) {
      if (known->second != path && linked_names_.insert(path).second) linked_.emplace_back(path, known->second);
      return;
    }
    auto names = links_.names(e.meta.ino);
    if (names.size() != e.meta.nlink && !all_links_known_) {
      // Found below a moved directory: one pass for all that may follow.
      links_.complete({{e.meta.ino, e.meta.nlink}});
      names = links_.names(e.meta.ino);
    }
    if (std::find(names.begin(), names.end(), path) == names.end()) names.push_back(path);   // the index is full
    // A name that the other side has already, if there is one: nothing but links need be made then.
    auto stands = std::find_if(names.begin(), names.end(), [&](const std::string& n) { return n != path && !dirty_name(n); });
    if (stands != names.end() && dirty_name(path)) e.path = *stands;
    groups_.emplace(inode, e.path);
    for (const auto& n : names) {
      if (n == e.path) continue;
      e.names.push_back(n);
      if (linked_names_.insert(n).second) linked_.emplace_back(n, e.path);
    }
    // What happened through any of its names happened to the file, and through one that is gone or outside too.
    if (dirty_->inodes.contains(e.meta.ino)) why |= why_content;
    for (const auto& n : names) {
      auto it = dirty_->paths.find(n);
      if (it != dirty_->paths.end()) why |= it->second;
      else if (dirty_name(n)) why |= why_content;
    }
    if (why & why_name) why |= why_content | why_moved;
  }
  if (e.meta.is_file() && (why & why_content)) {
    // A small file is cheaper to send than to ask about; of a moved one the other side probably has the content.
    e.content = (why & why_moved) && e.meta.size > 4096 ? Content::hashed : Content::changed;
    try {
      if (!read_content(e.path, e)) return;
    } catch (const Error& err) {
      put_back(path, why, err.message);
      return;
    }
  }
  tell_owner(Accounts::Kind::user, e.meta.uid);
  tell_owner(Accounts::Kind::group, e.meta.gid);
  for (const auto& [k, v] : e.meta.xattrs)
    if (is_acl(k)) each_acl_id(v, [&](Accounts::Kind kind, id_t id) { tell_owner(kind, id); });
  std::string payload = pack(e);
  count(e.path);
  channel_->send(FrameType::entry, payload, options_.deadline);
  pending_ += payload.size();
  asked_.push_back({e.path, why});
  uncommitted_ = true;
  throttle();
  if (asked_.size() >= most_entries || pending_ >= most_pending) finish_batch();
}

void Sender::send_data(std::uint32_t index, std::uint64_t offset, std::string_view bytes) {
  channel_->send(FrameType::data, Packer().u32(index).u64(offset).bytes(bytes).out(), options_.deadline);
  throttle();
}

void Sender::require_running() const {
  if (options_.stop && *options_.stop) throw Error(Code::interrupted, "the agent stops");
}

void Sender::throttle() {
  require_running();
  if (options_.bandwidth <= 0) return;
  auto sent = channel_->sent() - sent_before_;
  double should = static_cast<double>(sent) / static_cast<double>(options_.bandwidth) * 1000.0;
  while (true) {
    double ahead = should - ms_between(began_, system_clock().now());
    if (ahead <= 5) return;
    if (options_.deadline.passed()) throw Error(Code::timeout, "what changed in " + tree_.label() + " could not be sent in time at the bandwidth that is allowed", "raise limits: bandwidth", true);
    // In steps: whoever stops the agent does not wait for a large file's turn.
    system_clock().sleep(Millis(static_cast<std::int64_t>(std::min(ahead, 500.0))));
    require_running();
  }
}

void Sender::answer_need(Unpacker in) {
  std::uint32_t index = in.u32(), block = in.u32();
  if (index >= asked_.size()) throw Error(Code::io, "the other agent asks for a file that was not sent");
  const std::string& path = asked_[index].path;
  std::string name;
  int directory = cursor_.at(path, name);
  Fd fd = directory < 0 ? Fd() : open_file(directory, name);
  struct stat st{};
  if (!fd || ::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode)) {
    // Gone meanwhile, which is an event of its own; the receiver keeps what it has.
    if (fd || says_gone(errno)) again_->add(path, why_name | why_content | why_attributes);
    else put_back(path, asked_[index].why, errno_error(errno, "open", shown(path)).message);
    return;
  }
  auto size = static_cast<std::uint64_t>(st.st_size);
  if (block == 0) {
    each_extent(fd.get(), size, [&](std::uint64_t offset, std::uint64_t length) {
      while (length > 0) {
        std::string bytes = read_range(fd.get(), offset, static_cast<std::size_t>(std::min<std::uint64_t>(length, data_chunk)), path);
        if (bytes.empty()) break;  // it became shorter
        send_data(index, offset, bytes);
        offset += bytes.size();
        length -= bytes.size();
      }
    });
  } else {
    std::vector<Hash> theirs;
    while (!in.empty()) {
      Hash h;
      h.low = in.u64();
      h.high = in.u64();
      theirs.push_back(h);
    }
    std::uint64_t data_end = 0;
    bool in_data = false;
    for (std::uint64_t at = 0, n = 0; at < size; at += block, n++) {
      auto length = static_cast<std::size_t>(std::min<std::uint64_t>(block, size - at));
      if (at >= data_end) {
        // Where the next data begins: a hole is sent as one, not as zeros.
        off_t from = ::lseek(fd.get(), static_cast<off_t>(at), SEEK_DATA);
        std::uint64_t begin = from < 0 ? (errno == ENXIO ? size : at) : static_cast<std::uint64_t>(from);
        in_data = begin < at + length;
        if (in_data) {
          off_t to = ::lseek(fd.get(), static_cast<off_t>(std::max(begin, at)), SEEK_HOLE);
          data_end = to < 0 ? size : static_cast<std::uint64_t>(to);
        }
      }
      if (!in_data) {
        channel_->send(FrameType::zero, Packer().u32(index).u64(at).u64(length).out(), options_.deadline);
        continue;
      }
      std::string bytes = read_range(fd.get(), at, length, path);
      if (n < theirs.size() && theirs[n] == hash_of(bytes)) continue;
      if (!bytes.empty()) send_data(index, at, bytes);
    }
  }
  channel_->send(FrameType::data_end, Packer().u32(index).u64(size).out(), options_.deadline);
}

void Sender::finish_batch() {
  if (!uncommitted_) return;
  channel_->send(FrameType::ask, {}, options_.deadline);
  channel_->flush(options_.deadline);
  // All needs are read before any is answered: both ends sending at once could block each other.
  std::vector<std::string> needs;
  while (true) {
    Frame f = channel_->receive(options_.deadline);
    if (f.type == FrameType::ready) break;
    if (f.type != FrameType::need) throw Error(Code::io, "the other agent answered out of turn");
    needs.push_back(std::move(f.payload));
  }
  for (const auto& n : needs) answer_need(Unpacker(n));
  channel_->send(FrameType::commit, Packer().u8(options_.durable).out(), options_.deadline);
  channel_->flush(options_.deadline);
  Frame f = channel_->receive(options_.deadline);
  if (f.type == FrameType::failed) throw error_from_json(parse_json(f.payload, "the other agent's answer"));
  if (f.type != FrameType::done) throw Error(Code::io, "the other agent answered out of turn");
  Unpacker u(f.payload);
  u.u32();
  for (auto n = u.u32(); n > 0; n--) {
    std::string path(u.bytes());
    bool parent_missing = u.u8() != 0;
    std::string message(u.bytes());
    // A missing directory is sent whole; anything else is tried again as it was.
    if (parent_missing)
      again_->add(parent_of(path), why_tree | why_name | why_attributes);
    else
      again_->add(path, why_name | why_content | why_attributes);
    sent_.failed.emplace_back(std::move(path), std::move(message));
  }
  asked_.clear();
  pending_ = 0;
  uncommitted_ = false;
}

}  // namespace rehome::track
