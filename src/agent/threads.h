// Threads that come and go with connections, all joined in the end.
#pragma once

#include <atomic>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

namespace rehome {

class Threads {
 public:
  ~Threads() { join(); }
  // Starts a thread; those that have ended are joined on the way. `body` must not throw.
  void run(std::function<void()> body) {
    std::lock_guard lock(mutex_);
    for (auto it = all_.begin(); it != all_.end();) {
      if (!it->ended->load()) {
        ++it;
        continue;
      }
      it->thread.join();
      it = all_.erase(it);
    }
    auto ended = std::make_shared<std::atomic<bool>>(false);
    all_.push_back({std::thread([body = std::move(body), ended] {
                      body();
                      *ended = true;
                    }),
                    ended});
  }
  // Waits for all. Whoever calls it has told them to end.
  void join() {
    while (true) {
      std::list<One> all;
      {
        std::lock_guard lock(mutex_);
        all.swap(all_);
      }
      if (all.empty()) return;
      for (auto& one : all) one.thread.join();
    }
  }

 private:
  struct One {
    std::thread thread;
    std::shared_ptr<std::atomic<bool>> ended;
  };
  std::mutex mutex_;
  std::list<One> all_;
};

}  // namespace rehome
