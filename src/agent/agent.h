// agent: the resident helper on a site. It owns what must outlive the person's terminal: the record, the lease, the
// link, relays, listeners, kept programs, stored actions. It links base and sys only and knows no store: what it does to
// stores are actions that a controller registered. docs/PROTOCOL.md has its messages.
#pragma once

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/version.h"
#include "agent/actions.h"
#include "agent/attempt.h"
#include "agent/children.h"
#include "agent/freezer.h"
#include "agent/gate_keeper.h"
#include "agent/journal_file.h"
#include "agent/lag.h"
#include "agent/link.h"
#include "agent/listeners.h"
#include "agent/module.h"
#include "agent/relays.h"
#include "agent/reserve.h"
#include "agent/threads.h"

namespace rehome {

inline constexpr const char* kAgentVersion = kVersion;
// Exit status of `serve` after `shutdown`: its supervisor ends too.
inline constexpr int kEndedByShutdown = 100;

struct AgentOptions {
  std::string state;
  std::string side, name;   // empty: from agent.json, else from the last two parts of the path
  bool ephemeral = false;
};

class Agent : public AgentHost, private AttemptHands, private AttemptPeer {
 public:
  // Reads the state. Throws Error(conflict) when another agent has this state directory, Error(io).
  explicit Agent(AgentOptions options);
  ~Agent() override;

  // Listens, serves until `stop` is set or `shutdown` is asked, ends everything. Returns the exit status.
  int serve(const std::atomic<bool>& stop);

  const std::string& state() const override { return options_.state; }
  std::string side() const override;
  void log(const std::string& line) override;
  Fd open_peer(const Json& request, Deadline deadline) override;
  void sample_lag(const std::string& store, std::int64_t bytes, std::int64_t ms) override;
  const std::atomic<bool>& stopping() const override { return stopping_; }

 private:
  using Handler = Json (Agent::*)(const Json&, AgentConnection&);
  struct Op {
    Handler handler;
    bool changes;   // it must carry the current generation
  };
  static const std::map<std::string, Op>& ops();

  void connection(Fd fd);
  Json handle(const Json& request, AgentConnection& c);
  void check_generation(const Json& request, bool changes) const;
  void work_loop();
  void prepare_loop();
  void close();

  // The config that a restarted agent needs: agent.json.
  Json config(const char* key) const;
  void set_config(const char* key, const Json& value);
  void set_config(const char* key, const std::string& name, const Json& value);  // null erases
  void start_residents();
  // What fails is logged, and does not hold up what comes after it.
  void or_log(const std::string& what, const std::function<void()>& act);
  Json peer_hello() const;
  void new_generation(std::int64_t generation);

  // AttemptHands
  void begin_set(ActionSet set) override { actions_.begin(set); }
  void run_set(ActionSet set, std::int64_t attempt, std::int64_t epoch) override { actions_.run(set, attempt, epoch); }
  void probe_set(ActionSet set) override { actions_.probe(set); }
  void cut_relays() override { relays_.cut_all(); }
  void thaw() override { freezer_.thaw(); }
  void kill_frozen() override { freezer_.kill(); }
  // Units and command services start on this host only where there is no such file.
  std::string start_condition() const { return options_.state + "/not-serving"; }
  void forbid_services() override;
  void forbid_in_attempt();
  void unfreeze_late();
  void allow_services() override;
  // Also those that ended while they were frozen and could not be restarted.
  void start_services() override { freezer_.start_units(); }
  // AttemptPeer
  AttemptPeer::State state(Deadline deadline) override;
  void ready(std::int64_t attempt, std::int64_t epoch, Deadline deadline) override;
  void prepared_soon(std::int64_t attempt, std::int64_t epoch) override;
  PeerAnswer commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline) override;
  void tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline) override;

  // ops_basic.cc
  Json op_hello(const Json&, AgentConnection&);
  Json op_generation_new(const Json&, AgentConnection&);
  Json op_generation_adopt(const Json&, AgentConnection&);
  Json op_record_init(const Json&, AgentConnection&);
  Json op_exec(const Json&, AgentConnection&);
  Json op_put(const Json&, AgentConnection&);
  Json op_get(const Json&, AgentConnection&);
  Json op_relay(const Json&, AgentConnection&);
  Json op_keep_list(const Json&, AgentConnection&);
  Json op_keep_drop(const Json&, AgentConnection&);
  Json op_journal_append(const Json&, AgentConnection&);
  Json op_journal_read(const Json&, AgentConnection&);
  Json op_lag_read(const Json&, AgentConnection&);
  Json op_shutdown(const Json&, AgentConnection&);
  // ops_resident.cc
  Json op_link_set(const Json&, AgentConnection&);
  Json op_service_set(const Json&, AgentConnection&);
  Json op_service_drop(const Json&, AgentConnection&);
  Json op_listen_set(const Json&, AgentConnection&);
  Json op_listen_drop(const Json&, AgentConnection&);
  Json op_listen_try(const Json&, AgentConnection&);
  Json op_listen_status(const Json&, AgentConnection&);
  Json op_child_set(const Json&, AgentConnection&);
  Json op_child_status(const Json&, AgentConnection&);
  Json op_child_drop(const Json&, AgentConnection&);
  Json op_freeze_set(const Json&, AgentConnection&);
  Json op_freeze(const Json&, AgentConnection&);
  Json op_thaw(const Json&, AgentConnection&);
  Json op_kill_frozen(const Json&, AgentConnection&);
  Json op_action_set(const Json&, AgentConnection&);
  Json op_action_try(const Json&, AgentConnection&);
  Json op_action_warm(const Json&, AgentConnection&);
  Json op_gate_set(const Json&, AgentConnection&);
  Json op_gate(const Json&, AgentConnection&);
  Json op_boot_install(const Json&, AgentConnection&);
  Json op_boot_remove(const Json&, AgentConnection&);
  // ops_attempt.cc
  Json op_attempt_open(const Json&, AgentConnection&);
  Json op_lease_renew(const Json&, AgentConnection&);
  Json op_attempt_seal(const Json&, AgentConnection&);
  Json op_attempt_commit(const Json&, AgentConnection&);
  Json op_attempt_abort(const Json&, AgentConnection&);
  Json op_attempt_cancel(const Json&, AgentConnection&);
  Json op_attempt_status(const Json&, AgentConnection&);
  Json op_force_open(const Json&, AgentConnection&);
  Json op_force_reopen(const Json&, AgentConnection&);
  Json op_peer_hello(const Json&, AgentConnection&);
  Json op_peer_ready(const Json&, AgentConnection&);
  Json op_peer_prepared(const Json&, AgentConnection&);
  Json op_peer_commit(const Json&, AgentConnection&);
  Json op_peer_tails(const Json&, AgentConnection&);
  Json op_peer_service(const Json&, AgentConnection&);
  void check_alone(const Json& request) const;
  void require_open(std::int64_t attempt) const;  // throws Error(state)

  AgentOptions options_;
  Fd lock_;                          // the state directory is ours while this is open
  mutable std::mutex log_mutex_;
  Fd log_file_;
  mutable std::mutex config_mutex_;  // config_ and its file
  Json config_ = Json::object();
  std::atomic<std::int64_t> generation_{0};
  std::mutex generation_mutex_;      // one change at a time
  std::atomic<bool> stopping_{false};
  std::atomic<int> exit_status_{0};
  std::string boot_id_, user_;

  std::unique_ptr<BlockFile> record_file_;
  RecordStore record_;
  Reserve reserve_;
  Relays relays_;
  Actions actions_;
  Freezer freezer_;
  GateKeeper gate_;
  Link link_;
  Listeners listeners_;
  JournalFile journal_;
  LagSeries lag_;
  Children children_;                // its programs report to lag_
  Attempt attempt_;
  std::vector<std::unique_ptr<AgentModule>> modules_;

  std::mutex open_mutex_;
  std::set<int> open_;               // descriptors of connections, to be shut down at the end
  int connections_ever_ = 0;
  // Programs that end with their generation.
  std::mutex running_mutex_;
  std::multimap<std::int64_t, std::shared_ptr<std::atomic<bool>>> running_;
  std::thread worker_, preparer_;
  std::mutex freeze_mutex_;          // one request of freeze, to its end
  std::mutex prepare_mutex_;
  std::condition_variable prepare_changed_;
  Json prepare_;                     // the message to be sent, or null
  Threads threads_;
};

}  // namespace rehome
