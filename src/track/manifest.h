// Comparing two trees without holding either in memory: every entry's hash is summed into a bucket chosen by its path's
// hash; only buckets that differ are listed by path.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_set>
#include <vector>

#include "track/filter.h"
#include "track/hash.h"
#include "track/owners.h"
#include "track/tree.h"

namespace rehome::track {

inline constexpr std::uint32_t bucket_count = 65536;

struct Bucket {
  Hash sum;
  std::uint64_t count = 0;
  bool operator==(const Bucket&) const = default;
};

struct Manifest {
  std::vector<Bucket> buckets;  // bucket_count of them
  std::uint64_t entries = 0, bytes = 0;
};

struct Listed {
  std::string path;
  bool group = false;  // not the entry, but which names share its inode
  Hash hash;
};

struct ManifestOptions {
  int jobs = 2;
  OwnerLookup owners;                            // this side's ids as the other side's; empty: as they are
  const std::atomic<bool>* stop = nullptr;
  std::atomic<std::uint64_t>* progress = nullptr;  // entries done
};

// The hash of one entry: type, mode, owner, mtime in nanoseconds, extended attributes and ACLs, link target, content.
// Atime, ctime and a directory's size are not part of it. Nothing is there: a hash of zeros.
Hash entry_hash(Cursor& cursor, const std::string& path, const OwnerLookup& owners, std::uint64_t* bytes = nullptr);

// Reads the whole tree. Memory: 1.5 MB a job, and 64 bytes an inode with more than one name. Throws Error(io) for what
// cannot be read, Error(interrupted).
Manifest make_manifest(const Tree& tree, const Filter& filter, const ManifestOptions& options);

// Calls `each` (from several threads, one at a time) for every entry in the wanted buckets.
void list_buckets(const Tree& tree, const Filter& filter, const ManifestOptions& options,
                  const std::unordered_set<std::uint32_t>& wanted, const std::function<void(const Listed&)>& each);

inline std::uint32_t bucket_of(const Hash& path) { return static_cast<std::uint32_t>(path.low % bucket_count); }

}  // namespace rehome::track
