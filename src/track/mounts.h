// Closing a tree to everybody but us, by a read-only bind mount over it; and which mount a path is on.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "sys/fd.h"

namespace rehome::track {

struct Mount {
  dev_t dev = 0;
  std::string root;   // of the mount, within its file system
  std::string point;  // where it is mounted
  std::string type;
  bool read_only = false;
};
// In the order in which they were mounted; of this process, or of another with `pid`. Throws Error(io).
std::vector<Mount> read_mounts(const std::string& pid = "self");

// Where `path` lies in its file system ("" when it is on none of `mounts`): the same for every bind mount of it, in
// every mount namespace. The device goes to *dev.
std::string place_in_file_system(const std::vector<Mount>& mounts, const std::string& path, dev_t* dev = nullptr);

// Mount points below `path`, not `path` itself. `path` as resolve_path() gives it.
std::vector<Mount> mounts_below(const std::string& path);

// `path` without symbolic links, "." and "..": the form in which the kernel tells mount points. Of what does not exist, the
// part that does is resolved. Throws Error(io) where it cannot be looked at.
std::string resolve_path(const std::string& path);

// Takes away every mount at `place`. What is not there, or no mount, is fine. Throws Error(io).
void unmount_all(const std::string& place);

// A directory that can be written through `dir` although its path may be closed by close_tree(): the tree is mounted once
// more, writable, at a private place. A descriptor opened before the close would do for us, and not for rsync, which
// asks for the path of its working directory and goes there by it. Unmounted when this is destroyed; what a killed agent left
// there is replaced. Without the right to mount it is the directory itself, which then cannot be closed either.
class WritableRoot {
 public:
  // Throws Error(io) when it cannot be opened, or its file system is read-only. `private_place` as resolve_path() gives it.
  WritableRoot(const std::string& path, const std::string& private_place);
  ~WritableRoot();
  WritableRoot(const WritableRoot&) = delete;
  WritableRoot& operator=(const WritableRoot&) = delete;
  int dir() const { return dir_.get(); }
  // Unmounts now: what replaces this, or removes its place, must not wait for the last who holds it. dir() stays open.
  // Throws Error(io).
  void unmount();

 private:
  Fd dir_;
  std::string mounted_;
};

// The three take `path` by the place that it resolves to.
//
// Mounts the tree over itself, read-only. Idempotent. What is open for writing there already stays so: writers are
// stopped or frozen first. Throws Error(denied) where the rights are missing; nothing has changed then.
void close_tree(const std::string& path);
// Undoes it for everybody, those included who had opened something in the closed tree. Idempotent. Throws Error(io) when the
// tree cannot be written afterwards; a directory that is missing is fine.
void open_tree(const std::string& path);
bool is_closed(const std::string& path);

}  // namespace rehome::track
