// The paths of a tree that may differ from the other side's, in bounded memory.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace rehome::track {

// Why a path is dirty; flags.
enum Why : std::uint8_t {
  why_attributes = 1,  // mode, owner, times, extended attributes
  why_content = 2,
  why_name = 4,        // the name was made, removed or bound to another inode
  why_moved = 8,       // the name was moved here: its content is probably at the other side already
  why_tree = 16,       // a directory: everything below may differ
};

struct Dirty {
  std::unordered_map<std::string, std::uint8_t> paths;
  std::vector<std::pair<std::string, std::string>> moves;  // from, to, in order: hints only
  // Changed through one name, which may be gone or outside: all names are looked at. With how many there are, 0: not known.
  std::unordered_map<std::uint64_t, std::uint64_t> inodes;
  bool rescan = false;                // everything may differ
  std::string reason;                 // of the rescan
  bool empty() const { return paths.empty() && inodes.empty() && !rescan; }
};

// Thread-safe.
class DirtySet {
 public:
  // Over `most_bytes` the fullest directory becomes one why_tree path, or, when that is the root, a rescan.
  explicit DirtySet(std::size_t most_bytes = 24u << 20) : most_(most_bytes) {}
  void add(std::string_view path, std::uint8_t why);
  void add_move(std::string_view from, std::string_view to);
  void add_inode(std::uint64_t ino, std::uint64_t names = 0);
  void rescan(std::string_view reason);
  // What is taken counts in size() and open_rescan() until confirm(), which comes after put_back() of what was not done.
  Dirty take();
  void put_back(Dirty&& dirty);
  void confirm();
  std::size_t size() const;
  std::string open_rescan() const;    // empty: none is needed, and none is under way
  bool empty() const;
  std::string rescan_reason() const;  // empty: no rescan is needed

 private:
  void shrink();
  mutable std::mutex mutex_;
  Dirty now_;
  std::size_t bytes_ = 0, taken_ = 0;
  std::string taken_rescan_;
  const std::size_t most_;
};

}  // namespace rehome::track
