#include "track/manifest.h"

#include <dirent.h>
#include <fcntl.h>

#include <cerrno>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "base/error.h"
#include "track/wire.h"

namespace rehome::track {
namespace {

Hash hash_entry_at(int directory, const std::string& name, const std::string& path, const OwnerLookup& owners,
                   std::uint64_t* bytes, Meta* out) {
  auto meta = read_meta(directory, name, path);
  if (!meta) return {};
  Packer p;
  auto mapped = [&](Accounts::Kind kind, id_t id) { return owners ? owners(kind, id) : id; };
  p.bytes(path).u32(meta->mode).u32(mapped(Accounts::Kind::user, meta->uid)).u32(mapped(Accounts::Kind::group, meta->gid));
  p.i64(meta->mtime.tv_sec).i64(meta->mtime.tv_nsec).bytes(meta->target);
  if (S_ISCHR(meta->mode) || S_ISBLK(meta->mode)) p.u64(meta->rdev);
  for (const auto& [k, v] : meta->xattrs) p.bytes(k).bytes(owners && is_acl(k) ? map_acl(v, owners) : v);
  if (meta->is_file()) {
    Fd fd(::openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC | O_NOATIME));
    if (!fd && errno == EPERM) fd = Fd(::openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (!fd) {
      if (errno == ENOENT || errno == ELOOP || errno == ENXIO) return {};
      throw errno_error(errno, "open", shown(path), "the agent must be able to read the tree");
    }
    std::uint64_t size;
    Hash h = hash_file(fd.get(), path, size);
    p.u64(size).u64(h.low).u64(h.high);
    if (bytes) *bytes += size;
  }
  if (out) *out = std::move(*meta);
  return hash_of(p.out());
}

// Walks the tree with several threads; each entry that `wanted` says goes to `take`, with the thread's number.
class Walk {
 public:
  Walk(const Tree& tree, const Filter& filter, const ManifestOptions& options) : tree_(tree), filter_(filter), options_(options) {}

  // take(thread, path, directory, name): called in that thread.
  void run(const std::function<void(int, const std::string&, int, const std::string&)>& take) {
    take_ = take;
    todo_.push_back({"", {}, false});
    const int jobs = std::max(1, options_.jobs);
    std::vector<std::thread> threads;
    for (int i = 0; i < jobs; i++) threads.emplace_back([this, i] { work(i); });
    for (auto& t : threads) t.join();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  struct Item {
    std::string directory;
    std::vector<std::string> names;  // given: these; else the whole directory
    bool part;
  };
  static constexpr std::size_t part_size = 256;

  void work(int me) {
    while (true) {
      Item item;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return !todo_.empty() || busy_ == 0 || failure_; });
        if (failure_ || todo_.empty()) return;
        // Newest first: depth before breadth keeps the list short.
        item = std::move(todo_.back());
        todo_.pop_back();
        busy_++;
      }
      try {
        one(me, item);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
      }
      std::lock_guard lock(mutex_);
      busy_--;
      wake_.notify_all();
    }
  }

  void push(Item item) {
    std::lock_guard lock(mutex_);
    todo_.push_back(std::move(item));
    wake_.notify_one();
  }
  bool hungry() {
    std::lock_guard lock(mutex_);
    return todo_.size() < 8;
  }

  void one(int me, const Item& item) {
    if (options_.stop && *options_.stop) throw Error(Code::interrupted, "comparing was stopped");
    Fd fd = tree_.open_directory(item.directory);
    if (!fd) {
      if (says_gone(errno)) return;
      throw errno_error(errno, "open directory", shown(item.directory));
    }
    if (item.part) {
      for (const auto& name : item.names) take_(me, child_of(item.directory, name), fd.get(), name);
      return;
    }
    if (item.directory.empty()) take_(me, "", fd.get(), ".");
    std::vector<std::string> names;
    each_name(fd.get(), item.directory, [&](std::string_view name, ino_t, unsigned char type) {
      std::string path = child_of(item.directory, name);
      if (type == DT_UNKNOWN) {
        struct stat st;
        if (::fstatat(fd.get(), std::string(name).c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) return true;
        type = static_cast<unsigned char>(IFTODT(st.st_mode));
      }
      if (!filter_.includes_child(path, type == DT_DIR)) return true;
      names.emplace_back(name);
      if (type == DT_DIR) push({std::move(path), {}, false});
      if (names.size() == part_size) {
        if (hungry()) {
          push({item.directory, std::move(names), true});
        } else {
          for (const auto& n : names) take_(me, child_of(item.directory, n), fd.get(), n);
        }
        names.clear();
      }
      return !(options_.stop && *options_.stop);
    });
    for (const auto& n : names) take_(me, child_of(item.directory, n), fd.get(), n);
  }

  const Tree& tree_;
  const Filter& filter_;
  const ManifestOptions& options_;
  std::function<void(int, const std::string&, int, const std::string&)> take_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<Item> todo_;
  int busy_ = 0;
  std::exception_ptr failure_;
};

// Names that share an inode: the sum of their paths' hashes, under the smallest of these.
struct Group {
  Hash sum, smallest{~0ull, ~0ull};
  std::uint32_t count = 0;
  std::string path;  // of the smallest, where it is wanted
};

class Groups {
 public:
  void add(const Meta& m, const Hash& path_hash, const std::string& path, bool keep_path) {
    if (m.nlink < 2 || m.is_directory()) return;
    std::lock_guard lock(mutex_);
    Group& g = groups_[m.ino];
    g.sum += path_hash;
    g.count++;
    if (path_hash < g.smallest) {
      g.smallest = path_hash;
      if (keep_path) g.path = path;
    }
  }
  template <class F>
  void each(F f) {
    for (const auto& [ino, g] : groups_)
      if (g.count > 1) f(g, hash_of(Packer().u64(g.sum.low).u64(g.sum.high).u32(g.count).out()));
  }

 private:
  std::mutex mutex_;
  std::unordered_map<ino_t, Group> groups_;
};

}  // namespace

Hash entry_hash(Cursor& cursor, const std::string& path, const OwnerLookup& owners, std::uint64_t* bytes) {
  std::string name;
  int directory = cursor.at(path, name);
  return directory < 0 ? Hash{} : hash_entry_at(directory, name, path, owners, bytes, nullptr);
}

Manifest make_manifest(const Tree& tree, const Filter& filter, const ManifestOptions& options) {
  struct Part {
    std::vector<Bucket> buckets = std::vector<Bucket>(bucket_count);
    std::uint64_t entries = 0, bytes = 0;
  };
  std::vector<Part> parts(static_cast<std::size_t>(std::max(1, options.jobs)));
  Groups groups;
  Walk(tree, filter, options).run([&](int thread, const std::string& path, int directory, const std::string& name) {
    Part& part = parts[static_cast<std::size_t>(thread)];
    Meta meta;
    Hash h = hash_entry_at(directory, name, path, options.owners, &part.bytes, &meta);
    if (h == Hash{}) return;  // vanished
    Hash where = hash_of(path);
    Bucket& b = part.buckets[bucket_of(where)];
    b.sum += h;
    b.count++;
    part.entries++;
    if (options.progress) (*options.progress)++;
    groups.add(meta, where, path, false);
  });
  Manifest out;
  out.buckets.resize(bucket_count);
  for (const auto& part : parts) {
    for (std::uint32_t i = 0; i < bucket_count; i++) {
      out.buckets[i].sum += part.buckets[i].sum;
      out.buckets[i].count += part.buckets[i].count;
    }
    out.entries += part.entries;
    out.bytes += part.bytes;
  }
  groups.each([&](const Group& g, const Hash& h) { out.buckets[bucket_of(g.smallest)].sum += h; });
  return out;
}

void list_buckets(const Tree& tree, const Filter& filter, const ManifestOptions& options,
                  const std::unordered_set<std::uint32_t>& wanted, const std::function<void(const Listed&)>& each) {
  std::mutex mutex;
  Groups groups;
  Walk(tree, filter, options).run([&](int, const std::string& path, int directory, const std::string& name) {
    Hash where = hash_of(path);
    bool mine = wanted.contains(bucket_of(where));
    struct stat st;
    if (::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_nlink > 1) {
      Meta m;
      m.mode = st.st_mode;
      m.ino = st.st_ino;
      m.nlink = st.st_nlink;
      groups.add(m, where, path, true);
    }
    if (!mine) return;
    Hash h = hash_entry_at(directory, name, path, options.owners, nullptr, nullptr);
    if (h == Hash{}) return;
    std::lock_guard lock(mutex);
    each({path, false, h});
  });
  groups.each([&](const Group& g, const Hash& h) {
    if (wanted.contains(bucket_of(g.smallest))) each({g.path, true, h});
  });
}

}  // namespace rehome::track
