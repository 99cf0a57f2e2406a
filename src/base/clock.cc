#include "base/clock.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <thread>

namespace rehome {
namespace {

class SystemClock : public Clock {
 public:
  Ticks now() override {
    timespec t{};
    clock_gettime(CLOCK_BOOTTIME, &t);
    return static_cast<Ticks>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
  }
  std::int64_t wall_us() override {
    timespec t{};
    clock_gettime(CLOCK_REALTIME, &t);
    return static_cast<std::int64_t>(t.tv_sec) * 1'000'000 + t.tv_nsec / 1000;
  }
  void sleep(Millis d) override { std::this_thread::sleep_for(d); }
};

}  // namespace

Clock& system_clock() {
  static SystemClock clock;
  return clock;
}

Millis Deadline::left(Millis most) const {
  if (!clock_) return most;
  auto ns = at_ - clock_->now();
  if (ns <= 0) return Millis(0);
  return std::min(most, Millis((ns + 999'999) / 1'000'000));
}

std::string format_wall(std::int64_t wall_us) {
  std::time_t s = wall_us / 1'000'000;
  std::tm tm{};
  gmtime_r(&s, &tm);
  char buf[64];
  std::snprintf(buf, sizeof buf, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday,
                tm.tm_hour, tm.tm_min, tm.tm_sec, static_cast<int>(wall_us % 1'000'000 / 1000));
  return buf;
}

}  // namespace rehome
