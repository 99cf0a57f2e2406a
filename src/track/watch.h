// fanotify on the file system of a tree: every change of a name, content or attribute becomes a dirty path. Events are
// queued by the kernel before the writer's system call returns, so that after writers are frozen drain() has seen all.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>

#include "track/dirty.h"
#include "track/filter.h"
#include "track/links.h"
#include "track/tree.h"

namespace rehome::track {

class Watch {
 public:
  // Starts watching and a thread that reads. Borrows all. `links`: knows which files with several names have none in the tree. Throws Error(denied) where rights or the kernel are
  // missing (CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH; Linux 5.9), Error(io) for a file system without file handles.
  Watch(const Tree& tree, const Filter& filter, DirtySet& dirty, LinkIndex* links = nullptr);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Takes in all events that are queued now. Thread-safe.
  void drain();
  std::uint64_t events() const { return events_; }
  // Why this tree cannot be watched; empty: it can. Changes nothing.
  static std::string obstacle(const std::string& path);

 private:
  void read_loop();
  void drain_locked();
  void take(const char* data, std::size_t size);
  void one(std::uint64_t mask, std::string_view handle, std::string_view name, std::string_view object);
  void moved(bool directory, std::string_view old_handle, std::string_view old_name, std::string_view new_handle,
             std::string_view new_name);
  std::optional<std::string> find(std::string_view handle, std::string* why) const;
  int is_below_root(const Fd& directory) const;
  // False: outside the tree, or a rescan is asked for, or, with *removed, it is no more.
  bool place(std::string_view handle, std::string& path, bool* removed = nullptr);
  void changed(std::string_view object, const std::string* path, bool removed = false);
  void added(const std::string& path, bool directory, std::uint8_t why);
  void gone(const std::string& path, bool directory);

  const Tree& tree_;
  const Filter& filter_;
  DirtySet& dirty_;
  LinkIndex* links_;
  Fd fd_;
  std::mutex mutex_;  // of reading, and of what is below
  std::unordered_map<std::string, std::string> places_;  // handle -> relative path; "/" for outside, "//" for removed
  std::string buffer_;
  std::atomic<std::uint64_t> events_{0};
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace rehome::track
