// A port of this machine that a test may listen on a moment later.
#pragma once

#include <cstdint>
#include <mutex>
#include <random>
#include <set>

#include "base/error.h"
#include "sys/net.h"

namespace rehome {

// Below the range from which the kernel takes the ports of outgoing connections: one of those may take a port that is only known
// to be free before the test listens on it.
inline std::uint16_t free_port() {
  static std::mutex mutex;
  static std::set<std::uint16_t> given;   // another caller of this process may not listen on his yet
  std::lock_guard lock(mutex);
  std::random_device random;
  while (true) {
    auto port = static_cast<std::uint16_t>(10'000 + random() % 20'000);
    if (given.contains(port)) continue;
    try {
      listen_on(Address::parse("127.0.0.1:" + std::to_string(port)));
      given.insert(port);
      return port;
    } catch (const Error&) {
      // Somebody's.
    }
  }
}

}  // namespace rehome
