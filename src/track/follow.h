// One store at the side that serves: its watch, its dirty set, and the thread that keeps the other side the same.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/module.h"
#include "track/delta.h"
#include "track/root.h"
#include "track/rsync.h"
#include "track/watch.h"
#include "track/writers.h"

namespace rehome::track {

struct StoreSettings {
  std::string path;
  std::vector<std::string> include, exclude;
  bool owner_by_name = true;
};
Json to_json(const StoreSettings& s);
StoreSettings settings_from(const Json& j);  // throws Error(usage, config)

struct Flushed {
  Sent sent;
  double ms = 0;
  int passes = 0;
  bool rescanned = false;  // a whole-tree rsync was needed
  double scan_ms = 0;           // for writers in /proc
  std::vector<Writer> writers;  // final: who has files open for writing, frozen or not
};

class Follower {
 public:
  // Starts tracking at once. `root` is what the path must be: in every pass, or nothing is sent. `why_rescan` non-empty:
  // changes may have been missed already (the agent restarted).
  Follower(AgentHost& host, Accounts& accounts, std::string store, StoreSettings settings, const RootId& root, std::string why_rescan);
  ~Follower();

  const StoreSettings& settings() const { return settings_; }
  const Tree& tree() const { return *tree_; }
  const Filter& filter() const { return filter_; }
  // The bulk copy, in the background; a copy that runs or is done is not started again.
  void start_copy(std::int64_t bandwidth);
  void follow(Millis interval, std::int64_t bandwidth);  // 0: stop following; tracking goes on
  // What is equal now counts as the beginning: the dirty set is emptied. For a tree that was just made equal.
  void arm();
  void rescan(const std::string& reason) { dirty_.rescan(reason); }
  // Sends all that is dirty; `final` also what is mapped, and returns only when nothing is dirty. Throws Error(store)
  // with the first path that cannot be sent.
  Flushed flush(bool final, Deadline deadline);
  Json status();
  // The file system was mounted again, and what is watched here is not what the path shows now: another Follower is needed.
  bool stale() const { return stale_; }
  // Outside a pass: what is dirty only because a name that is not the tree's was changed is dirty no more.
  void drop_outside();
  std::string rescan_reason() const { return watch_trouble_.empty() ? dirty_.rescan_reason() : watch_trouble_; }

 private:
  void loop();
  void sample_lag();
  void require_place();
  Flushed pass(bool final, Deadline deadline, std::int64_t bandwidth, bool asked = false);
  void whole_tree(Dirty dirty, std::int64_t bandwidth, bool copy);
  void add_open(const std::vector<Writer>& writers, bool final);
  Channel& channel(Deadline deadline);
  void hang_up();

  AgentHost& host_;
  Accounts& accounts_;
  const std::string store_;
  const StoreSettings settings_;
  const RootId root_;
  Filter filter_;
  std::optional<Tree> tree_;
  DirtySet dirty_;
  std::optional<LinkIndex> links_;
  std::optional<Watch> watch_;
  std::string watch_trouble_;  // why there is no watch
  std::optional<Sender> sender_;

  std::timed_mutex sending_;  // one pass at a time; guards what is below
  Fd connection_;
  std::optional<Channel> channel_;
  struct Moment {
    Ticks ticks = 0;
    std::int64_t wall_us = 0;
  };
  Moment looked_;   // when last for who has files open for writing
  Ticks look_took_ = 0;
  std::int64_t changed_since_us_ = 0;   // and what may have changed unseen since then: files with this time or a later one
  std::map<std::uint64_t, std::pair<std::int64_t, std::int64_t>> mapped_seen_;  // inode -> mtime

  std::mutex mutex_;  // of the wishes and the status
  std::condition_variable wake_;
  Millis interval_{0};
  std::int64_t bandwidth_ = 0;
  bool wishes_changed_ = false, want_copy_ = false, copying_ = false, copied_ = false;
  std::int64_t copy_bandwidth_ = 0;
  std::string trouble_;
  std::vector<std::pair<std::string, std::string>> failed_;
  std::int64_t sent_files_ = 0, sent_bytes_ = 0, passes_ = 0, rescans_ = 0, copy_failures_ = 0;
  double last_pass_ms_ = 0;
  Ticks clean_at_ = 0;
  int wire_ = -1;              // connection_, for who ends this
  RsyncProgress progress_;
  std::atomic<bool> stop_{false}, index_ready_{false}, stale_{false};
  std::thread thread_, indexer_;
};

}  // namespace rehome::track
