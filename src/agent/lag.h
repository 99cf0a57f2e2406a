// The course of the stores' lag, sampled where it arises, so that it is known for the days in which no controller looks.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "base/json.h"

namespace rehome {

// STATE/lag.jsonl: {"at": wall microseconds, "store", "bytes", "ms"} a line. Nothing depends on it: it is not flushed to
// the disk, a line that cannot be written is left out, and beyond `most` lines every second one goes.
class LagSeries {
 public:
  explicit LagSeries(std::string path, std::size_t most = 20'000, std::int64_t every_us = 2'000'000);
  // At most one sample of a store in `every_us`. `bytes`: known to be behind; `ms`: how long it has been behind.
  void add(const std::string& store, std::int64_t bytes, std::int64_t ms);
  // The newest of each store, as the agent at the other site takes them over: either host alone can tell the course.
  Json newest() const;
  // What the other site's agent has sampled; samples that are here already are left out.
  void take(const Json& samples);
  // Samples after `from_us`, at most `limit`; of more, every n-th.
  Json read(std::int64_t from_us, std::size_t limit) const;

 private:
  std::vector<Json> lines() const;
  void write(const Json& sample);
  void thin();

  const std::string path_;
  const std::size_t most_;
  const std::int64_t every_us_;
  mutable std::mutex mutex_;
  std::map<std::string, Json> last_;
  std::size_t count_ = 0;
};

}  // namespace rehome
