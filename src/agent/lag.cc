#include "agent/lag.h"

#include <fcntl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome {

LagSeries::LagSeries(std::string path, std::size_t most, std::int64_t every_us) : path_(std::move(path)), most_(most), every_us_(every_us) {
  count_ = lines().size();
}

std::vector<Json> LagSeries::lines() const {
  std::vector<Json> all;
  if (!exists(path_)) return all;
  for (const auto& line : split(read_file(path_), '\n')) {
    // A host that lost its power may have left half a line.
    Json j = Json::parse(line, nullptr, false);
    if (j.is_object() && j.contains("at")) all.push_back(std::move(j));
  }
  return all;
}

void LagSeries::write(const Json& sample) {
  last_[get_string(sample, "store", "")] = sample;
  std::string line = dump_line(sample) + "\n";
  Fd f(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (f && ::write(f.get(), line.data(), line.size()) > 0 && ++count_ > most_) thin();
}

void LagSeries::add(const std::string& store, std::int64_t bytes, std::int64_t ms) {
  std::int64_t now = system_clock().wall_us();
  std::lock_guard lock(mutex_);
  auto last = last_.find(store);
  if (last != last_.end() && now - get_int(last->second, "at") < every_us_) return;
  write({{"at", now}, {"store", store}, {"bytes", bytes}, {"ms", ms}});
}

Json LagSeries::newest() const {
  std::lock_guard lock(mutex_);
  Json all = Json::array();
  for (const auto& [store, sample] : last_) all.push_back(sample);
  return all;
}

void LagSeries::take(const Json& samples) {
  std::lock_guard lock(mutex_);
  for (const auto& s : samples) {
    auto last = last_.find(get_string(s, "store"));
    if (last == last_.end() || get_int(s, "at") > get_int(last->second, "at"))
      write({{"at", get_int(s, "at")}, {"store", get_string(s, "store")}, {"bytes", get_int(s, "bytes")}, {"ms", get_int(s, "ms")}});
  }
}

void LagSeries::thin() {
  std::string kept;
  std::map<std::string, int> seen;
  count_ = 0;
  for (const auto& j : lines())
    if (seen[get_string(j, "store", "")]++ % 2 == 0) kept += dump_line(j) + "\n", count_++;
  write_durably(path_, kept);
}

Json LagSeries::read(std::int64_t from_us, std::size_t limit) const {
  std::lock_guard lock(mutex_);
  std::vector<Json> found;
  for (auto& j : lines())
    if (get_int(j, "at", 0) > from_us) found.push_back(std::move(j));
  std::size_t step = found.size() / std::max<std::size_t>(limit, 1) + 1;
  Json out = Json::array();
  // The newest is always among them.
  for (std::size_t i = 0; i < found.size(); i++)
    if ((found.size() - 1 - i) % step == 0) out.push_back(std::move(found[i]));
  return out;
}

}  // namespace rehome
