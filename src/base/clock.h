// Time as rehome uses it: durations in milliseconds, deadlines on CLOCK_BOOTTIME (which counts suspended time, so that
// a lease ends while a host sleeps), wall time for people and journals only.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace rehome {

using Millis = std::chrono::milliseconds;
using Micros = std::chrono::microseconds;

// A point on CLOCK_BOOTTIME of one host, in nanoseconds. Never compared across hosts or boots.
using Ticks = std::int64_t;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual Ticks now() = 0;
  // Microseconds since the Unix epoch.
  virtual std::int64_t wall_us() = 0;
  virtual void sleep(Millis d) = 0;
};

Clock& system_clock();

// now() + d, in ticks.
inline Ticks after(Clock& c, Millis d) { return c.now() + d.count() * 1'000'000; }
inline double ms_between(Ticks from, Ticks to) { return static_cast<double>(to - from) / 1e6; }

// A moment by which something must have happened. Default: never.
class Deadline {
 public:
  Deadline() = default;
  Deadline(Clock& clock, Millis d) : clock_(&clock), at_(after(clock, d)) {}
  static Deadline in(Millis d) { return Deadline(system_clock(), d); }
  bool passed() const { return clock_ && clock_->now() >= at_; }
  // What is left, at least 0, at most `most`; for poll(2) and the like.
  Millis left(Millis most = std::chrono::hours(1)) const;

 private:
  Clock* clock_ = nullptr;
  Ticks at_ = 0;
};

// "2026-03-01T12:00:00.123Z" from microseconds since the epoch.
std::string format_wall(std::int64_t wall_us);

}  // namespace rehome
