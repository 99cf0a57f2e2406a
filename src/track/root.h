// Which directory a store's path was when the run began with it. The path alone does not tell: before its volume is mounted
// an empty directory stands there, and an rsync --delete of that would empty the other side.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>

#include "base/json.h"

namespace rehome::track {

struct RootId {
  // What a reboot does not change. A directory's birth is as good as a name for it; fsid, where there is none, is not stable
  // everywhere (xfs makes it of the device number, network file systems have none) and is 0 then.
  std::uint64_t ino = 0, file_system = 0, fsid = 0;
  std::int64_t born = 0;  // nanoseconds since the epoch, 0 where the file system does not keep it
  dev_t dev = 0;          // of this boot only; not written down
};
Json to_json(const RootId& r);
RootId root_from(const Json& j);  // throws Error(usage)
bool same_root(const RootId& a, const RootId& b);

// What is at `path` now. Throws Error(store, retryable) when there is no directory, Error(io).
RootId root_at(const std::string& path);
// The same, and throws Error(store, retryable) when that is not `expected`.
RootId require_root(const std::string& path, const RootId& expected);

}  // namespace rehome::track
