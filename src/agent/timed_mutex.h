// A mutex with a timed lock that thread checkers understand: std::timed_mutex's own call is unknown to some of them, and
// everything that it protects would look unprotected.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace rehome {

class TimedMutex {
 public:
  void lock() {
    std::unique_lock lock(mutex_);
    while (held_) freed_.wait(lock);
    held_ = true;
  }
  bool try_lock() {
    std::lock_guard lock(mutex_);
    if (held_) return false;
    return held_ = true;
  }
  template <class Duration>
  bool try_lock_for(Duration d) {
    auto end = std::chrono::system_clock::now() + std::chrono::duration_cast<std::chrono::system_clock::duration>(d);
    std::unique_lock lock(mutex_);
    while (held_)
      if (freed_.wait_until(lock, end) == std::cv_status::timeout && held_) return false;
    return held_ = true;
  }
  void unlock() {
    std::lock_guard lock(mutex_);
    held_ = false;
    freed_.notify_one();
  }

 private:
  std::mutex mutex_;
  std::condition_variable freed_;
  bool held_ = false;
};

}  // namespace rehome
