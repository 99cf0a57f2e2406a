#include "agent/relays.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>

#include "agent/wire.h"

namespace rehome {
namespace {

bool ended(const Fd& fd) {
  pollfd p{fd.get(), POLLRDHUP, 0};
  return ::poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

}  // namespace

void Relays::run(AgentConnection& caller, const Address& to, const std::string& as_user, const std::string& keep,
                 std::int64_t generation, const std::function<void()>& still_allowed) {
  if (!keep.empty()) {
    std::lock_guard lock(mutex_);
    bool taken = kept_.count(keep) > 0;
    for (const auto& r : running_) taken = taken || r->keep == keep;
    if (taken) throw Error(Code::conflict, "a connection is kept under the name '" + keep + "' already", "drop it first: keep.drop");
  }
  Fd upstream = connect_to(to, Deadline::in(Millis(5000)), as_user);
  auto one = std::make_shared<One>();
  one->generation = generation;
  one->caller = caller.fd.get();
  one->upstream = upstream.get();
  one->keep = keep;
  {
    std::lock_guard lock(mutex_);
    running_.push_back(one);
  }
  try {
    still_allowed();
    send_json(caller.fd, {{"ok", true}}, Deadline::in(Millis(5000)));
    // What the caller sent right behind its request belongs to the stream.
    std::string ahead = caller.in.take_buffered();
    if (!ahead.empty()) send_all(upstream, ahead, Deadline::in(Millis(5000)));
    relay(caller.fd, upstream, one->stop, !keep.empty());
  } catch (...) {
    std::lock_guard lock(mutex_);
    running_.remove(one);
    over_.notify_all();
    throw;
  }
  std::lock_guard lock(mutex_);
  running_.remove(one);
  over_.notify_all();
  if (!keep.empty() && !ended(upstream)) kept_[keep] = std::move(upstream);
}

void Relays::cut_older(std::int64_t generation) {
  std::lock_guard lock(mutex_);
  for (auto& r : running_) {
    if (r->generation >= generation) continue;
    r->stop = true;
    // The flag alone is looked at every 100 ms; this ends the session now. A kept upstream is left as it is.
    ::shutdown(r->caller, SHUT_RDWR);
    if (r->keep.empty()) ::shutdown(r->upstream, SHUT_RDWR);
  }
}

void Relays::cut_all() { cut_older(INT64_MAX); }

Json Relays::list() {
  std::lock_guard lock(mutex_);
  Json j = Json::array();
  for (auto& [name, fd] : kept_) j.push_back({{"name", name}, {"alive", !ended(fd)}, {"attached", false}});
  for (auto& r : running_)
    if (!r->keep.empty()) j.push_back({{"name", r->keep}, {"alive", true}, {"attached", true}});
  return j;
}

bool Relays::drop(const std::string& name) {
  std::unique_lock lock(mutex_);
  bool found = kept_.erase(name) > 0;
  for (auto& r : running_) {
    if (r->keep != name) continue;
    found = r->stop = true;
    ::shutdown(r->upstream, SHUT_RDWR);
  }
  // Whoever dropped it takes the name again at once.
  auto attached = [&] { return std::any_of(running_.begin(), running_.end(), [&](const auto& r) { return r->keep == name; }); };
  if (!over_.wait_for(lock, std::chrono::seconds(5), [&] { return !attached(); }))
    throw Error(Code::timeout, "the connection that is kept as '" + name + "' does not end", "try again", true);
  return found;
}

void Relays::stop() {
  cut_all();
  std::lock_guard lock(mutex_);
  kept_.clear();
}

}  // namespace rehome
