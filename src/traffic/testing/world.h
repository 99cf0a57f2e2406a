// Two sites on this machine, without agents: what a driver asks of one is done in this process, but each has a real gate.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "sys/fs.h"
#include "traffic/testing/web.h"
#include "traffic/traffic.h"

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
  Fd open_relay(const std::string& address, const std::string&, const std::string&) override;
  std::string local_socket_for(const std::string&, const std::string&, const std::string&) override;

  // What its agent would say to the gate: {"op": "hold", ...}.
  Json gate(const Json& request);
  pid_t gate_pid() const { return gate_ ? gate_->pid() : -1; }
  // Where `release` leads when the gate starts.
  std::string opens_to = "local";
  // Commands whose name starts with this fail, for tests of what a failure leaves behind.
  std::string failing;

 private:
  struct Door {
    Fd listener;
    std::atomic<bool> stop{false};
    Sessions sessions;
    std::thread thread;
  };
  Side side_;
  LocalSite* peer_ = nullptr;
  TempDir state_;
  std::mutex mutex_;
  std::map<std::string, std::string> services_;
  std::map<std::string, std::unique_ptr<Door>> listeners_;
  std::map<std::string, std::unique_ptr<Child>> children_;
  std::unique_ptr<Child> gate_;
};

// The sites, a journal in memory, and the TrafficContext that a driver gets. The source serves.
struct World {
  explicit World(Deployment d);
  TrafficContext& context() { return *context_; }
  // What a switch does to the gates; returns how long clients were held at most, in ms.
  void hold();
  void release(Side serves);
  // What a switch does to the gates, with this deployment's drain and choice: hold, drain, cut or back out, `pause`, release.
  // False when it backed out: the other side serves as before.
  bool switch_to(Side takes, Millis pause = Millis(100));
  Deployment deployment;
  LocalSite source{Side::source}, target{Side::target};
  std::map<std::string, Json> facts;
  std::vector<std::string> notes, lines;
  std::atomic<bool> cancelled{false};
  std::mutex mutex;

 private:
  std::unique_ptr<TrafficContext> context_;
  std::int64_t attempt_ = 0;
};

}  // namespace rehome::testing
