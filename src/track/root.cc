#include "track/root.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"

namespace rehome::track {

Json to_json(const RootId& r) {
  return {{"ino", r.ino}, {"file_system", r.file_system}, {"fsid", r.fsid}, {"born", r.born}};
}

RootId root_from(const Json& j) {
  RootId r;
  auto number = [&](const char* key) {
    if (!j.contains(key) || !j[key].is_number_integer()) throw Error(Code::usage, std::string("'") + key + "' of a directory is no number");
    return j[key].get<std::uint64_t>();
  };
  r.ino = number("ino");
  r.file_system = number("file_system");
  r.fsid = number("fsid");
  r.born = static_cast<std::int64_t>(number("born"));
  return r;
}

bool same_root(const RootId& a, const RootId& b) {
  if (a.ino != b.ino || a.file_system != b.file_system) return false;
  if (a.born != 0 && b.born != 0) return a.born == b.born;
  return a.fsid == b.fsid || a.fsid == 0 || b.fsid == 0;
}

RootId root_at(const std::string& path) {
  struct statx st {};
  struct statfs fs {};
  if (::statx(AT_FDCWD, path.c_str(), 0, STATX_BASIC_STATS | STATX_BTIME, &st) != 0 || ::statfs(path.c_str(), &fs) != 0) {
    if (errno == ENOENT || errno == ENOTDIR)
      throw Error(Code::store, path + " is not there", "mount its volume, or put the directory back", true);
    throw errno_error(errno, "look at", path);
  }
  if (!S_ISDIR(st.stx_mode)) throw Error(Code::store, path + " is no directory", "correct the store's path", true);
  RootId r;
  r.ino = st.stx_ino;
  r.file_system = static_cast<std::uint64_t>(fs.f_type);
  if (fs.f_type != XFS_SUPER_MAGIC) std::memcpy(&r.fsid, &fs.f_fsid, sizeof r.fsid);
  if (st.stx_mask & STATX_BTIME) r.born = st.stx_btime.tv_sec * 1'000'000'000 + st.stx_btime.tv_nsec;
  r.dev = makedev(st.stx_dev_major, st.stx_dev_minor);
  return r;
}

RootId require_root(const std::string& path, const RootId& expected) {
  RootId now = root_at(path);
  if (!same_root(now, expected))
    throw Error(Code::store, path + " is another directory than the one that this run began with (is its volume mounted?)",
                "mount its volume, or put the directory back, and it goes on by itself; if it was replaced on purpose, cancel and begin again", true);
  return now;
}

}  // namespace rehome::track
