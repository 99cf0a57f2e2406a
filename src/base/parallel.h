// The same work in several threads at once.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/error.h"

namespace rehome {

// Runs `work` in n threads and waits for all of them; throws the first Error that one of them threw. `failed` tells the others
// that there is one, so that they end early.
inline void in_parallel(int n, const std::function<void(const std::atomic<bool>& failed)>& work) {
  std::mutex mutex;
  std::optional<Error> failure;
  std::atomic<bool> failed{false};
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < n; i++)
      threads.emplace_back([&] {
        try {
          work(failed);
        } catch (const Error& e) {
          std::lock_guard lock(mutex);
          if (!failure) failure = e;
          failed = true;
        }
      });
  }
  if (failure) throw *failure;
}

}  // namespace rehome
