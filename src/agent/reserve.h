// A file that keeps room on the disk of STATE for what must be written when a switch is decided and nobody can go back.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "base/error.h"

namespace rehome {

class Reserve {
 public:
  Reserve(std::string path, std::function<void(const std::string&)> log) : path_(std::move(path)), log_(std::move(log)) {}

  // Makes it where it is missing. Throws Error(state) when the disk has no room for it; nothing is left then.
  void keep();
  // Gives it up when the disk is almost full: before what cannot be called twice.
  void make_room();
  // What `write` returns. Where the disk is full the reserve is given up, and `write` called once more: it must be idempotent.
  template <class F>
  auto with(F write) {
    try {
      return write();
    } catch (const Error& e) {
      if (!full(e) || !give_up()) throw;
    }
    return write();
  }

 private:
  static bool full(const Error& e);
  bool give_up();  // false: there is none

  std::string path_;
  std::function<void(const std::string&)> log_;
  std::mutex mutex_;
};

}  // namespace rehome
