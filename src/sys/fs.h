// Files: reading whole, writing durably, directories, temporary places.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sys/fd.h"

namespace rehome {

// The whole file. Throws Error(io) naming the path; a file larger than `most` bytes is an error too.
std::string read_file(const std::string& path, std::size_t most = 256u << 20);
bool exists(const std::string& path);  // lstat finds something

// Replaces `path` so that after a crash at any moment it holds the old or the new content whole: temporary file in the
// same directory, fsync, rename, fsync of the directory. Throws Error(io); the old content then stays.
void write_durably(const std::string& path, std::string_view content, unsigned mode = 0600);
// Appends nothing but order: makes the directory's entries durable.
void fsync_directory(const std::string& path);
// Writes all bytes at the file's position; throws Error(io) naming `what`.
void write_all(int fd, std::string_view bytes, std::string_view what);

void make_directories(const std::string& path, unsigned mode = 0700);  // with parents; existing ones are fine
// With all that is in it; what is missing is fine. Error(state) while anything is mounted below: it would be emptied too.
void remove_tree(const std::string& path);
std::vector<std::string> list_directory(const std::string& path);      // sorted names without . and ..
std::string parent_path(const std::string& path);

// A fresh directory, removed with its content when destroyed.
class TempDir {
 public:
  explicit TempDir(const std::string& prefix = "rehome");
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace rehome
