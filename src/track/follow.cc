#include "track/follow.h"

#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/error.h"
#include "track/mounts.h"

namespace rehome::track {
namespace {

constexpr Millis look_every{5000};
// What a file's time may be behind the clock by: a tick of the kernel's, with room.
constexpr std::int64_t tick_us = 20'000;

std::vector<std::string> strings(const Json& j, const char* key) {
  std::vector<std::string> out;
  if (!j.contains(key)) return out;
  if (!j[key].is_array()) throw Error(Code::usage, std::string("'") + key + "' is not an array");
  for (const auto& v : j[key]) out.push_back(v.get<std::string>());
  return out;
}

}  // namespace

Json to_json(const StoreSettings& s) {
  return {{"path", s.path}, {"include", s.include}, {"exclude", s.exclude}, {"owner_by_name", s.owner_by_name}};
}

StoreSettings settings_from(const Json& j) {
  StoreSettings s;
  s.path = get_string(j, "path");
  if (s.path.empty() || s.path[0] != '/') throw Error(Code::usage, "the path '" + s.path + "' is not absolute");
  // Mounts, the watch and /proc tell of places without symbolic links.
  s.path = resolve_path(s.path);
  s.include = strings(j, "include");
  s.exclude = strings(j, "exclude");
  s.owner_by_name = get_bool(j, "owner_by_name", true);
  return s;
}

Follower::Follower(AgentHost& host, Accounts& accounts, std::string store, StoreSettings settings, const RootId& root,
                   std::string why_rescan)
    : host_(host), accounts_(accounts), store_(std::move(store)), settings_(std::move(settings)), root_(root),
      filter_(settings_.include, settings_.exclude) {
  Fd directory(::open(settings_.path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory) throw errno_error(errno, "open directory", settings_.path, "correct the store's path");
  tree_.emplace(std::move(directory), settings_.path);
  links_.emplace(*tree_, filter_);
  sender_.emplace(*tree_, filter_, *links_, accounts_);
  try {
    watch_.emplace(*tree_, filter_, dirty_, &*links_);
    if (!why_rescan.empty()) dirty_.rescan(why_rescan);
  } catch (const Error& e) {
    // Without events every pass reads the whole tree: slower, not less right.
    watch_trouble_ = e.message;
    host_.log("files " + store_ + ": " + e.message);
  }
  indexer_ = std::thread([this] {
    try {
      links_->build(stop_);
    } catch (const std::exception& e) {
      host_.log("files " + store_ + ": index of hard links: " + e.what());
    }
    index_ready_ = true;
  });
  thread_ = std::thread([this] { loop(); });
}

Follower::~Follower() {
  stop_ = true;
  {
    std::lock_guard lock(mutex_);
    wake_.notify_all();
    // A pass may be waiting for a host that has lost its power, and that wait is long.
    if (wire_ >= 0) ::shutdown(wire_, SHUT_RDWR);
  }
  thread_.join();
  indexer_.join();
}

void Follower::start_copy(std::int64_t bandwidth) {
  std::lock_guard lock(mutex_);
  if (copied_ || copying_) return;
  want_copy_ = true;
  copy_failures_ = 0;
  copy_bandwidth_ = bandwidth;
  trouble_.clear();
  wake_.notify_all();
}

void Follower::follow(Millis interval, std::int64_t bandwidth) {
  std::lock_guard lock(mutex_);
  interval_ = interval;
  bandwidth_ = bandwidth;
  wishes_changed_ = true;
  wake_.notify_all();
}

void Follower::arm() {
  std::lock_guard sending(sending_);
  require_place();
  if (watch_) watch_->drain();
  dirty_.take();
  std::lock_guard lock(mutex_);
  copied_ = true;
  clean_at_ = system_clock().now();
}

void Follower::loop() {
  Millis retry(200);
  while (!stop_) {
    bool copy;
    Millis interval;
    std::int64_t bandwidth;
    {
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, interval_.count() > 0 ? interval_ : Millis(60'000), [&] { return stop_ || want_copy_ || wishes_changed_; });
      if (stop_) return;
      wishes_changed_ = false;
      copy = want_copy_;
      interval = interval_;
      bandwidth = bandwidth_;
      if (copy) {
        want_copy_ = false;
        copying_ = true;
      }
    }
    try {
      if (copy) {
        std::lock_guard sending(sending_);
        // What changed before now is copied with everything else.
        dirty_.take();
        dirty_.confirm();
        whole_tree({}, copy_bandwidth_, true);
      } else if (interval.count() > 0) {
        std::lock_guard sending(sending_);
        pass(false, Deadline::in(std::chrono::minutes(30)), bandwidth);
      }
      retry = Millis(200);
      {
        std::lock_guard lock(mutex_);
        trouble_.clear();
      }
      sample_lag();
    } catch (const Error& e) {
      std::unique_lock lock(mutex_);
      if (trouble_ != e.message) host_.log("files " + store_ + ": " + e.message);
      trouble_ = e.message + (e.hint.empty() ? "" : " (" + e.hint + ")");
      lock.unlock();
      sample_lag();
      lock.lock();
      if (copy) {
        copying_ = false;
        copy_failures_++;
        want_copy_ = !stop_;
      }
      wake_.wait_for(lock, retry, [&] { return stop_.load(); });
      retry = std::min(retry * 2, Millis(5000));
    }
  }
}

// Bytes are not known before they are sent: how long ago both sides were equal is.
void Follower::sample_lag() {
  std::int64_t ms;
  {
    std::lock_guard lock(mutex_);
    if (!copied_ || interval_.count() == 0) return;
    ms = clean_at_ ? static_cast<std::int64_t>(ms_between(clean_at_, system_clock().now())) : 0;
  }
  host_.sample_lag(store_, 0, ms);
}

void Follower::hang_up() {
  {
    std::lock_guard lock(mutex_);
    wire_ = -1;
  }
  channel_.reset();
  connection_.reset();
}

Channel& Follower::channel(Deadline deadline) {
  if (channel_ && channel_->readable(Millis(0))) {
    // Nothing was asked, so this is the end of the stream.
    hang_up();
  }
  if (!channel_) {
    connection_ = host_.open_peer({{"op", "files.apply"}, {"store", store_}}, Deadline::in(std::min(deadline.left(), Millis(5000))));
    {
      std::lock_guard lock(mutex_);
      wire_ = connection_.get();
      if (stop_) ::shutdown(wire_, SHUT_RDWR);
    }
    channel_.emplace(connection_.get());
    sender_->forget_names();
  }
  return *channel_;
}

// Throws Error(store) unless the path is the directory that the run began with, and the one that is watched.
void Follower::require_place() {
  RootId now = require_root(settings_.path, root_);
  struct stat st;
  if (::fstat(tree_->root(), &st) != 0) throw errno_error(errno, "stat", settings_.path);
  if (st.st_dev == now.dev && st.st_ino == now.ino) return;
  stale_ = true;
  throw Error(Code::store, settings_.path + " was mounted again since it is followed", "it is read again in a few seconds", true);
}

void Follower::whole_tree(Dirty dirty, std::int64_t bandwidth, bool copy) {
  RsyncPass p{.state = host_.state(), .store = store_, .path = settings_.path, .include = settings_.include,
              .exclude = settings_.exclude, .owner_by_name = settings_.owner_by_name, .bandwidth = bandwidth};
  progress_.bytes = 0;
  progress_.percent = 0;
  links_->forget_outside();
  try {
    require_place();
    if (run_rsync(p, progress_, stop_) && !watch_)
      throw Error(Code::store, "files vanished while " + settings_.path + " was read", "it is read again", true);
    // rsync's files are in the page cache of the other side: the cut counts on them.
    Fd peer = host_.open_peer({{"op", "files.sync"}, {"store", store_}}, Deadline::in(std::chrono::minutes(10)));
  } catch (...) {
    if (!copy) dirty_.put_back(std::move(dirty));
    throw;
  }
  std::lock_guard lock(mutex_);
  rescans_ += !copy;
  copying_ = false;
  copied_ = true;
}

// Writes through memory raise no event, and those by libaio neither (io_submit; Linux 6.18). The first move the file's time later, so
// that at the end all that is mapped is sent; the second move it at once.
void Follower::add_open(const std::vector<Writer>& writers, bool final) {
  for (const auto& w : writers) {
    struct stat st {};
    std::string name;
    Cursor cursor(*tree_);
    int directory = cursor.at(w.path, name);
    bool named = directory >= 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && st.st_ino == w.ino;
    if (!w.mapped) {
      // Not open at the last look, or without a write since: every earlier one was followed then.
      if (named && st.st_mtim.tv_sec * 1'000'000 + st.st_mtim.tv_nsec / 1000 < changed_since_us_) continue;
    } else if (!final && named) {
      // While following only when its time has moved: a mapped database would be read through every few seconds.
      std::pair<std::int64_t, std::int64_t> time(st.st_mtim.tv_sec, st.st_mtim.tv_nsec);
      auto [it, fresh] = mapped_seen_.emplace(w.ino, time);
      if (!fresh && it->second == time) continue;
      it->second = time;
    }
    if (!named) dirty_.add_inode(w.ino);
    else if (filter_.includes(w.path, false)) dirty_.add(w.path, why_content | why_attributes);
    if (mapped_seen_.size() > 10000) mapped_seen_.clear();
  }
}

Flushed Follower::pass(bool final, Deadline deadline, std::int64_t bandwidth, bool asked) {
  Flushed out;
  Ticks began = system_clock().now();
  require_place();
  if (!watch_) dirty_.rescan(watch_trouble_);
  Ticks from = system_clock().now();
  // On a host with ten thousands of open files a look takes a while: a hundredth of the time for it.
  const Ticks every = std::max<Ticks>(look_every.count() * 1'000'000, 100 * look_took_);
  if (final || (watch_ && (asked || from - looked_.ticks > every))) {
    Moment now{from, system_clock().wall_us()};
    // Where the clock was set meanwhile, times of files say nothing.
    bool steady = looked_.wall_us > 0 && std::abs((now.wall_us - looked_.wall_us) - (now.ticks - looked_.ticks) / 1000) < tick_us / 2;
    changed_since_us_ = steady ? looked_.wall_us - tick_us : 0;
    auto writers = find_writers(*tree_, {.path = settings_.path});
    add_open(writers, final);
    if (final) out.writers = std::move(writers);
    looked_ = now;
    look_took_ = system_clock().now() - from;
    out.scan_ms = static_cast<double>(look_took_) / 1e6;
  }
  try {
    for (int round = 0; round < (final ? 10 : 3); round++) {
      if (watch_) watch_->drain();
      if (dirty_.empty()) break;
      // The way there first: what is taken out must not be lost when there is none.
      Channel* c = dirty_.rescan_reason().empty() ? &channel(deadline) : nullptr;
      Dirty dirty = dirty_.take();
      struct Confirm {
        DirtySet& set;
        ~Confirm() { set.confirm(); }
      } confirm{dirty_};
      if (!c && !dirty.rescan) {
        dirty_.put_back(std::move(dirty));
        continue;
      }
      out.passes++;
      if (dirty.rescan) {
        out.rescanned = true;
        whole_tree(std::move(dirty), bandwidth, false);
        // rsync takes a file for unchanged by its time, which a write through memory moves later; and what was noted while
        // everything was dirty is not kept.
        if (final) add_open(out.writers, true);
        else if (!watch_) break;
        continue;
      }
      Sent sent = sender_->send(*c, std::move(dirty), dirty_, {.durable = true, .bandwidth = bandwidth, .deadline = deadline, .stop = &stop_});
      out.sent.files += sent.files;
      out.sent.bytes += sent.bytes;
      out.sent.paths += sent.paths;
      out.sent.failed = std::move(sent.failed);
      if (!out.sent.failed.empty() && !final && round > 0) break;
    }
  } catch (...) {
    hang_up();
    throw;
  }
  out.ms = ms_between(began, system_clock().now());
  bool clean = dirty_.empty();
  {
    std::lock_guard lock(mutex_);
    sent_files_ += out.sent.files;
    sent_bytes_ += out.sent.bytes;
    passes_ += out.passes;
    failed_ = out.sent.failed;
    last_pass_ms_ = out.ms;
    if (clean) clean_at_ = system_clock().now();
  }
  if (!out.sent.failed.empty()) {
    const auto& [path, why] = out.sent.failed.front();
    throw Error(Code::store, std::to_string(out.sent.failed.size()) + " paths of " + settings_.path + " cannot be sent; the first is " +
                                 shown(path) + ": " + why, "", true);
  }
  if (final && !clean)
    throw Error(Code::store, settings_.path + " still changes: something writes there that is not frozen",
                "files.writers names who has it open", true);
  return out;
}

Flushed Follower::flush(bool final, Deadline deadline) {
  {
    std::lock_guard lock(mutex_);
    if (copying_ || want_copy_)
      throw Error(Code::state, "the copy of " + settings_.path + " is not finished", "wait for it; status shows how far it is", true);
  }
  std::unique_lock sending(sending_, std::chrono::milliseconds(deadline.left()));
  if (!sending)
    throw Error(Code::timeout, "an earlier pass over " + settings_.path + " has not ended", "see files.status", true);
  // The way is opened ahead of the pause, and who has files open is looked for: the less is left to be looked at in it.
  if (!final && watch_) channel(deadline);
  // Without a watch a file that vanishes while the tree is read fails the pass, and where a service makes and removes them all the time
  // one pass in a few does: outside the pause it is read again.
  for (int again = 0;; again++) {
    try {
      return pass(final, deadline, 0, true);
    } catch (const Error& e) {
      if (final || watch_ || !e.retryable || again == 10 || deadline.passed() || stop_) throw;
    }
    system_clock().sleep(Millis(50));
  }
}

// A file with several names that was changed through one of them, which is not the tree's: does it have another one here? A pass would
// find out, and so does this, without sending anything.
void Follower::drop_outside() {
  std::lock_guard sending(sending_);
  if (watch_) watch_->drain();
  Dirty dirty = dirty_.take();
  std::exception_ptr failed;
  if (!dirty.rescan && !dirty.inodes.empty()) {
    try {
      links_->complete({dirty.inodes.begin(), dirty.inodes.end()});
      std::erase_if(dirty.inodes, [&](const auto& one) { return links_->names(one.first).empty(); });
    } catch (...) {
      // Whatever it is: what was taken out goes back first.
      failed = std::current_exception();
    }
  }
  dirty_.put_back(std::move(dirty));
  dirty_.confirm();
  if (failed) std::rethrow_exception(failed);
}

Json Follower::status() {
  if (watch_) watch_->drain();
  std::string rescan = watch_trouble_.empty() ? dirty_.open_rescan() : watch_trouble_;
  std::lock_guard lock(mutex_);
  Json j{{"state", !rescan.empty() ? "rescan" : "tracking"}, {"tracking", watch_.has_value()}, {"path", settings_.path},
         {"dirty", dirty_.size()}, {"following", interval_.count() > 0}, {"copied", copied_},
         {"copy", {{"running", copying_ || want_copy_}, {"bytes", progress_.bytes.load()}, {"percent", progress_.percent.load()}}},
         {"sent_files", sent_files_}, {"sent_bytes", sent_bytes_}, {"passes", passes_}, {"rescans", rescans_}, {"copy_failures", copy_failures_},
         {"last_pass_ms", last_pass_ms_}, {"events", watch_ ? watch_->events() : 0}, {"links_indexed", index_ready_.load()},
         {"clean_ms_ago", clean_at_ ? static_cast<std::int64_t>(ms_between(clean_at_, system_clock().now())) : -1}};
  if (!rescan.empty()) j["reason"] = rescan;
  if (!trouble_.empty()) j["trouble"] = trouble_;
  if (!failed_.empty()) {
    Json list = Json::array();
    for (std::size_t i = 0; i < std::min<std::size_t>(20, failed_.size()); i++)
      list.push_back({{"path", shown(failed_[i].first)}, {"why", failed_[i].second}});
    j["failed"] = list;
  }
  return j;
}

}  // namespace rehome::track
