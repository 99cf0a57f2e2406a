// Which names of a tree are one file: an index of the inodes with more than one name.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "track/filter.h"
#include "track/tree.h"

namespace rehome::track {

// Calls `each` for everything in the tree that the filter includes, directories before what is in them; sequential.
// `each` returns false to stop. A directory that vanishes meanwhile is no error.
void walk(const Tree& tree, const Filter& filter,
          const std::function<bool(const std::string& path, ino_t ino, unsigned char type, int directory)>& each);

// Thread-safe. What it holds are candidates: every answer is verified against the tree, so a stale entry costs time only.
class LinkIndex {
 public:
  LinkIndex(const Tree& tree, const Filter& filter, std::size_t most_bytes = 16u << 20)
      : tree_(tree), filter_(filter), most_(most_bytes) {}
  // Reads the whole tree once (about 2 s a million files); returns early when *stop becomes true.
  void build(const std::atomic<bool>& stop);
  void add(ino_t ino, const std::string& path);
  // Makes names() of these inodes complete: one pass over the names of the tree when some are not known. `nlink` is what
  // stat said, or 0 when it is not known; names outside the tree are counted there and are remembered as such.
  void complete(const std::unordered_map<ino_t, nlink_t>& inodes);
  // The names of this inode in the tree, verified.
  std::vector<std::string> names(ino_t ino);
  // Whether it had several names, one of them perhaps in the tree still. `unknown`: the answer where the index is full, or not built yet.
  bool knows(ino_t ino, bool unknown) const;
  // Whether complete() has found none of these names in the tree.
  bool is_outside(ino_t ino, nlink_t nlink);
  // After a time in which changes were not noted: a name outside may have become one in the tree.
  void forget_outside();
  std::uint64_t passes() const { return passes_; }  // over the whole tree, after build

 private:
  std::vector<std::string> verified(ino_t ino);
  const Tree& tree_;
  const Filter& filter_;
  const std::size_t most_;
  mutable std::mutex mutex_;
  std::unordered_map<ino_t, std::vector<std::string>> names_;
  std::unordered_map<ino_t, std::pair<nlink_t, std::size_t>> outside_;  // nlink -> how many of them are in the tree
  std::size_t bytes_ = 0;
  bool built_ = false;
  std::atomic<std::uint64_t> passes_{0};
};

}  // namespace rehome::track
