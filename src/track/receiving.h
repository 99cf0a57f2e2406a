// A tree that the other agent may write into, and the streams through which it does.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "agent/module.h"
#include "base/error.h"
#include "track/follow.h"
#include "track/mounts.h"
#include "track/root.h"

namespace rehome::track {

struct Receiving {
  StoreSettings settings;
  Filter filter;
  RootId id;
  WritableRoot root;
  std::optional<Tree> tree;
  Receiving(StoreSettings s, const RootId& r, const std::string& private_place)
      : settings(std::move(s)), filter(settings.include, settings.exclude), id(r), root(settings.path, private_place) {
    Fd copy(::fcntl(root.dir(), F_DUPFD_CLOEXEC, 3));
    if (!copy) throw errno_error(errno, "keep open", settings.path);
    tree.emplace(std::move(copy), settings.path);
  }
  bool holds(const RootId& now) const {
    struct stat st;
    if (::fstat(root.dir(), &st) != 0) throw errno_error(errno, "stat", settings.path);
    return st.st_dev == now.dev && st.st_ino == now.ino;
  }
  // Throws unless the application will find at the path what is written here.
  void require_place() const {
    RootId now = require_root(settings.path, id);
    if (!holds(now))
      throw Error(Code::store, settings.path + " was mounted again since it is written here", "it is taken up again in a few seconds", true);
  }
  // The path is the run's directory, and what is written here is not what it shows: another Receiving is needed.
  bool stale() const {
    try {
      return !holds(require_root(settings.path, id));
    } catch (const Error&) {
      return false;  // not there now: whoever writes is told so by require_place()
    }
  }

  // Streams of the peer that write here, one at a time. They end, all of them, before the tree is opened to its application.
  std::mutex mutex;
  std::atomic<bool> revoked{true};  // the peer may write only while this is false
  std::set<int> streams;
  std::condition_variable ended;
  std::string rsync_failure;  // of the last rsync server here: its client may not hear of it
  int rsyncs = 0;             // that run
  void revoke() {
    std::unique_lock lock(mutex);
    revoked = true;
    for (int fd : streams) ::shutdown(fd, SHUT_RDWR);
    ended.wait(lock, [&] { return streams.empty(); });
  }
};

class Stream {
 public:
  Stream(Receiving& r, int fd, const std::string& store) : r_(r), fd_(fd) {
    std::unique_lock lock(r.mutex);
    // The sender has given up the earlier one, of which some may still be under way here: it is older, and must not come after this.
    for (int earlier : r.streams) ::shutdown(earlier, SHUT_RDWR);
    if (!r.ended.wait_for(lock, std::chrono::seconds(4), [&] { return r.streams.empty(); }))
      throw Error(Code::timeout, "an earlier pass still writes into store " + store, "it is tried again", true);
    if (r.revoked)
      throw Error(Code::denied, "store " + store + " is in use on this side; nothing is written from the other",
                  "see status: which side serves?");
    r.streams.insert(fd);
  }
  ~Stream() {
    std::lock_guard lock(r_.mutex);
    r_.streams.erase(fd_);
    r_.ended.notify_all();
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

 private:
  Receiving& r_;
  int fd_;
};

// The receiving end of a pass of rsync, which writes below the tree's descriptor; the connection is joined to it until it ends. How it
// ended is left in `r` for files.sync. `request`: files.rsync_server's; its argv is judged first.
void serve_rsync(AgentHost& host, Receiving& r, const Json& request, AgentConnection& connection);

// Until no rsync writes into it; throws what the last one failed with.
void await_rsync(const AgentHost& host, Receiving& r);

}  // namespace rehome::track
