// XXH3-128 of contents: differences are found by it, never proven absent against an adversary.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace rehome::track {

struct Hash {
  std::uint64_t low = 0, high = 0;
  bool operator==(const Hash&) const = default;
  auto operator<=>(const Hash&) const = default;
  // Order-independent sum, for sets.
  Hash& operator+=(const Hash& o) {
    std::uint64_t before = low;
    low += o.low;
    high += o.high + (low < before ? 1 : 0);
    return *this;
  }
};

Hash hash_of(std::string_view bytes);
// Hash of `size` bytes of the file from its start (fewer when it is shorter: *read says how many). Throws Error(io).
Hash hash_file(int fd, std::string_view path, std::uint64_t& read);
std::string hex(const Hash& h);

}  // namespace rehome::track
