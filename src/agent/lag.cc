#include "agent/lag.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "base/clock.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// Of each store's samples the worst of every `step`, for a peak is what people look for, and its newest.
std::vector<Json> worst_of_each(const std::vector<Json>& all, std::size_t step) {
  std::map<std::string, std::vector<const Json*>> by_store;
  for (const auto& j : all) by_store[get_string(j, "store", "")].push_back(&j);
  auto behind = [](const Json* j) { return std::pair(get_int(*j, "bytes", 0), get_int(*j, "ms", 0)); };
  std::vector<const Json*> kept;
  for (const auto& [store, samples] : by_store) {
    for (std::size_t i = 0; i < samples.size(); i += step)
      kept.push_back(*std::max_element(samples.begin() + static_cast<std::ptrdiff_t>(i), samples.begin() + static_cast<std::ptrdiff_t>(std::min(i + step, samples.size())),
                                       [&](const Json* a, const Json* b) { return behind(a) < behind(b); }));
    if (kept.back() != samples.back()) kept.push_back(samples.back());
  }
  std::stable_sort(kept.begin(), kept.end(), [](const Json* a, const Json* b) { return get_int(*a, "at", 0) < get_int(*b, "at", 0); });
  std::vector<Json> out;
  for (const Json* j : kept) out.push_back(*j);
  return out;
}

}  // namespace

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
  count_ = 0;
  for (const auto& j : worst_of_each(lines(), 2)) kept += dump_line(j) + "\n", count_++;
  write_durably(path_, kept);
}

Json LagSeries::read(std::int64_t from_us, std::size_t limit) const {
  std::lock_guard lock(mutex_);
  std::vector<Json> found;
  for (auto& j : lines())
    if (get_int(j, "at", 0) > from_us) found.push_back(std::move(j));
  return worst_of_each(found, found.size() / std::max<std::size_t>(limit, 1) + 1);
}

}  // namespace rehome
