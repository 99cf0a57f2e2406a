#include "agent/journal_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "sys/fs.h"

namespace rehome {

void JournalFile::open() {
  if (fd_) return;
  Fd fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (!fd) throw errno_error(errno, "open", path_);
  // Also of a file that was there: who made it may have died before this.
  fsync_directory(parent_path(path_));
  std::string all = read_file(path_);
  // A line without its end was never acknowledged. Nor was one with a hole: a power cut in an append may leave later blocks of it on
  // the disk without the earlier ones, which then read as zeros.
  auto end = all.rfind('\n', all.find('\0'));
  std::size_t whole = end == std::string::npos ? 0 : end + 1;
  if (whole != all.size() && ::ftruncate(fd.get(), static_cast<off_t>(whole)) != 0) throw errno_error(errno, "truncate", path_);
  next_ = std::count(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(whole), '\n');
  fd_ = std::move(fd);
}

std::int64_t JournalFile::append(std::int64_t from, const std::vector<std::string>& lines) {
  std::lock_guard lock(mutex_);
  open();
  if (from != next_)
    throw Error(Code::conflict, "the journal's next line is " + std::to_string(next_) + ", not " + std::to_string(from),
                "read it from there: another controller may have written");
  std::string bytes;
  for (const auto& line : lines) {
    if (line.find_first_of(std::string_view("\n\0", 2)) != std::string::npos)
      throw Error(Code::usage, "a journal line holds a newline or a zero byte");
    bytes += line + "\n";
  }
  off_t before = ::lseek(fd_.get(), 0, SEEK_END);
  try {
    write_all(fd_.get(), bytes, path_);
    if (::fdatasync(fd_.get()) != 0) throw errno_error(errno, "fsync", path_);
  } catch (const Error&) {
    // Half a line must not stay in front of the next one. If even that fails, the file is read anew.
    if (::ftruncate(fd_.get(), before) != 0) fd_.reset();
    throw;
  }
  next_ += static_cast<std::int64_t>(lines.size());
  return next_;
}

std::vector<std::string> JournalFile::read(std::int64_t from, std::int64_t* next) {
  std::lock_guard lock(mutex_);
  open();
  std::string all = read_file(path_);
  std::vector<std::string> lines;
  std::size_t at = 0, taken = 0;
  std::int64_t number = 0;
  while (at < all.size() && taken < 8u << 20) {
    auto nl = all.find('\n', at);
    if (nl == std::string::npos) break;
    if (number >= from) {
      lines.push_back(all.substr(at, nl - at));
      taken += nl - at;
    }
    number++;
    at = nl + 1;
  }
  *next = std::max(number, std::min(from, next_));
  return lines;
}

}  // namespace rehome
