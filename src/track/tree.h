// One directory tree, reached through a descriptor of its root: nothing here follows a symbolic link or leaves the tree.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "sys/fd.h"

namespace rehome::track {

struct Meta {
  mode_t mode = 0;  // with the type
  uid_t uid = 0;
  gid_t gid = 0;
  std::int64_t size = 0;
  timespec mtime{};
  dev_t rdev = 0, dev = 0;
  ino_t ino = 0;
  nlink_t nlink = 0;
  std::string target;                                        // of a symbolic link
  std::vector<std::pair<std::string, std::string>> xattrs;   // sorted; POSIX ACLs are among them

  bool is_directory() const { return S_ISDIR(mode); }
  bool is_file() const { return S_ISREG(mode); }
};

// "a/b" -> "a"; "a" -> ""; paths here are relative to the root, which is "".
std::string_view parent_of(std::string_view path);
std::string_view name_of(std::string_view path);
std::string child_of(std::string_view directory, std::string_view name);

// The path for messages: bytes that are no printable ASCII or UTF-8 are shown as \xNN.
std::string shown(std::string_view path);

// Whether this errno of a look at a path says that nothing is there. Any other one (too many open files, no memory, a disk or
// server that fails) says nothing about the path.
bool says_gone(int err);

class Tree {
 public:
  // Borrows nothing: keeps `root`, an open descriptor of the directory; `label` names it in messages.
  Tree(Fd root, std::string label) : root_(std::move(root)), label_(std::move(label)) {}
  int root() const { return root_.get(); }
  const std::string& label() const { return label_; }
  // An O_PATH descriptor of a directory, or none with errno set (ENOENT, ENOTDIR, ELOOP, ...).
  Fd open_directory(std::string_view path) const;

 private:
  Fd root_;
  std::string label_;
};

// Remembers the directory that was asked for last: neighbours are the rule. One per thread.
class Cursor {
 public:
  explicit Cursor(const Tree& tree) : tree_(tree) {}
  // Descriptor of the directory that holds `path`, -1 with errno set; valid until the next call. *name is the last
  // component, "." for the root.
  int at(std::string_view path, std::string& name);
  int directory(std::string_view path);
  void forget() { fd_.reset(), known_ = false; }
  const Tree& tree() const { return tree_; }

 private:
  const Tree& tree_;
  Fd fd_;
  std::string path_;
  bool known_ = false;
};

// What is at (directory, name); nullopt when nothing is. Throws Error(io) for anything else, naming `path`. `xattrs`
// false leaves them out.
std::optional<Meta> read_meta(int directory, const std::string& name, std::string_view path, bool xattrs = true);

// "/proc/self/fd/N/name": for the calls that know no *at form. The last component is not followed by the l* calls.
std::string proc_path(int directory, const std::string& name);

// Calls `each` with every name in the directory (without . and ..) and its inode number and d_type; false stops. Throws
// Error(io); a directory that is gone has no names.
void each_name(int directory, std::string_view path,
               const std::function<bool(std::string_view name, ino_t ino, unsigned char type)>& each);

}  // namespace rehome::track
