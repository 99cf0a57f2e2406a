#include "track/hash.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <memory>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#define XXH_INLINE_ALL
#include <xxhash.h>
#pragma GCC diagnostic pop

#include "base/error.h"
#include "track/tree.h"

namespace rehome::track {

Hash hash_of(std::string_view bytes) {
  XXH128_hash_t h = XXH3_128bits(bytes.data(), bytes.size());
  return {h.low64, h.high64};
}

Hash hash_file(int fd, std::string_view path, std::uint64_t& total) {
  struct Free {
    void operator()(XXH3_state_t* s) const { XXH3_freeState(s); }
  };
  constexpr std::size_t chunk = 256 << 10;
  thread_local std::unique_ptr<char[]> buffer(new char[chunk]);
  thread_local std::unique_ptr<XXH3_state_t, Free> state(XXH3_createState());
  total = 0;
  bool begun = false;
  while (true) {
    ssize_t n = ::pread(fd, buffer.get(), chunk, static_cast<off_t>(total));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, "read", shown(path));
    auto got = static_cast<std::size_t>(n);
    // Most files are shorter than the buffer: one call, no state.
    if (!begun && got < chunk) {
      std::uint64_t at = got;
      // A short read is the end only when the next one is empty.
      char probe;
      if (got == 0 || ::pread(fd, &probe, 1, static_cast<off_t>(at)) == 0) {
        total = at;
        return hash_of({buffer.get(), got});
      }
    }
    if (!begun) XXH3_128bits_reset(state.get()), begun = true;
    if (got == 0) break;
    XXH3_128bits_update(state.get(), buffer.get(), got);
    total += got;
  }
  XXH128_hash_t h = XXH3_128bits_digest(state.get());
  return {h.low64, h.high64};
}

std::string hex(const Hash& h) {
  char buf[40];
  std::snprintf(buf, sizeof buf, "%016llx%016llx", static_cast<unsigned long long>(h.high), static_cast<unsigned long long>(h.low));
  return buf;
}

}  // namespace rehome::track
