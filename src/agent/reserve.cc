#include "agent/reserve.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "sys/fs.h"

namespace rehome {
namespace {

constexpr std::size_t kSize = 256 * 1024;

}  // namespace

bool Reserve::full(const Error& e) { return e.err == ENOSPC || e.err == EDQUOT; }

void Reserve::keep() {
  std::lock_guard lock(mutex_);
  struct stat st;
  if (::stat(path_.c_str(), &st) == 0 && st.st_size == static_cast<off_t>(kSize)) return;
  // Written, and not only allocated: with bytes that no file system leaves out or packs.
  std::string bytes(kSize, 0);
  std::uint32_t x = 2463534242;
  for (char& c : bytes) {
    x ^= x << 13, x ^= x >> 17, x ^= x << 5;
    c = static_cast<char>(x);
  }
  try {
    write_durably(path_, bytes);
  } catch (const Error& e) {
    if (!full(e)) throw;
    Error refused(Code::state, "the disk is too full for a switch: " + e.message + "; after the decision nothing could be written there",
                  "make room for 1 MB on the file system of " + parent_path(path_));
    refused.err = e.err;
    throw refused;
  }
}

void Reserve::make_room() {
  struct statvfs v;
  if (::statvfs(parent_path(path_).c_str(), &v) != 0) return;
  if ((::geteuid() == 0 ? v.f_bfree : v.f_bavail) * v.f_frsize < kSize / 2) give_up();
}

bool Reserve::give_up() {
  std::lock_guard lock(mutex_);
  if (::unlink(path_.c_str()) != 0) return false;
  log_("the disk is full: the room that was kept is used now");
  return true;
}

}  // namespace rehome
