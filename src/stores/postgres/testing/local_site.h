// A Site without an agent: what the driver asks of one, done in this process.
#pragma once

#include <atomic>
#include <list>
#include <map>
#include <mutex>
#include <thread>

#include "site/site.h"
#include "stores/store.h"
#include "sys/fs.h"

namespace rehome::testing {

class LocalSite : public Site {
 public:
  explicit LocalSite(Side side) : side_(side), state_("rehome-state") {}
  ~LocalSite() override;
  void set_peer(LocalSite* peer) { peer_ = peer; }

  Side side() const override { return side_; }
  std::string label() const override { return std::string(side_name(side_)); }
  std::string state() const override { return state_.path(); }
  std::int64_t generation() const override { return 1; }
  Json call(const std::string& op, Json args, Deadline deadline) override;
  using Site::call;
  Fd open_relay(const std::string& address, const std::string& as_user, const std::string& keep) override;
  std::string local_socket_for(const std::string& address, const std::string& as_user, const std::string& keep) override;

  // Runs a stored set as an agent does: in order, each one tried again until it succeeds (5 s).
  void run_actions(const std::vector<Action>& actions, std::int64_t epoch = 1);
  // Ends every connection made through local_socket_for, as an agent does with a controller's sessions.
  void cut();
  // Sessions to a socket directory go straight to it, without a relay in this process.
  bool direct = false;
  // While true, listeners let nothing through: a link that is down.
  void link_down(bool down);

 private:
  struct Door {
    std::unique_ptr<TempDir> dir;
    Fd listener;
    std::atomic<bool> stop{false}, cut{false};
    std::thread thread;
    std::mutex mutex;
    std::list<std::thread> sessions;
  };
  using Dial = std::function<Fd()>;
  void serve(Door& door, Dial dial, bool keep, std::string keep_name);

  Side side_;
  LocalSite* peer_ = nullptr;
  TempDir state_;
  std::mutex mutex_;
  std::atomic<bool> link_down_{false};
  std::map<std::string, std::pair<std::string, std::string>> services_;   // name -> address, as_user
  std::map<std::string, std::unique_ptr<Door>> doors_, listeners_;
  std::map<std::string, Fd> kept_;
  struct Kept {
    std::unique_ptr<Child> child;
    std::jthread writer;
  };
  std::map<std::string, Kept> children_;
};

// Two sites, a journal in memory, and the StoreContext that a driver gets.
struct World {
  explicit World(Deployment d);
  ~World();   // removes what a test that ends before finish() leaves outside the servers
  StoreContext& context() { return *context_; }
  bool said(const std::string& what);   // in a line of the log
  Deployment deployment;
  LocalSite source{Side::source}, target{Side::target};
  std::map<std::string, Json> facts;
  std::vector<std::string> notes, lines;
  std::vector<Progress> progress;
  std::atomic<bool> cancelled{false};
  std::function<void(const std::string& key)> remembered;   // called without the mutex, by whichever thread remembers
  std::mutex mutex;

 private:
  std::unique_ptr<StoreContext> context_;
};

// A deployment with one postgres store "db" between two servers' socket directories.
Deployment deployment_between(const std::string& source_dir, const std::string& target_dir, std::vector<std::string> databases, int jobs = 2);

}  // namespace rehome::testing
