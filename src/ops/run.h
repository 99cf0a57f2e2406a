// ops: what the commands do: a deployment becomes steps, and a switch becomes one cut. This is the only place that knows
// stores, services, traffic and sites together; it includes no driver's own header but their makers.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "config/deployment.h"
#include "engine/journal.h"
#include "engine/step.h"
#include "runtime/runtime.h"
#include "site/agent_site.h"
#include "stores/store.h"
#include "traffic/traffic.h"

namespace rehome::ops {

// The process-wide wish to stop: set by the first Ctrl-C.
std::atomic<bool>& cancel_flag();

// One deployment with everything that a command needs, opened in one of three ways:
//   look     agents in temporary directories, nothing changed on either site (check, plan before begin)
//   observe  the resident agents, nothing changed (status, report)
//   control  the resident agents and a new generation: older controllers are refused from here on (everything else)
//   begin    control, and agents are installed where they are missing
class Run {
 public:
  enum class Mode { look, observe, control, begin };
  // Throws what the sites throw. With `may_miss`, a site that does not answer is left out (source() or target() then
  // throw); for the commands after the loss of a host. `possible` throws where the command is refused: asked before this controller takes
  // the run from another one that is at work, and again when it has it. It may ask for phase(), has(), missing(), deployment() and the journal.
  Run(Deployment deployment, Mode mode, bool may_miss = false, const std::function<void(Run&)>& possible = {});
  ~Run();

  const Deployment& deployment() const { return deployment_; }
  AgentSite& site(Side side);
  bool has(Side side) const { return sites_[side] != nullptr; }
  // A person's word that this site is gone for good: commands that end the run do the other side alone.
  void give_up(Side side);
  // Why a left-out site is missing.
  const Error* missing(Side side) const { return missing_[side].get(); }
  Journal& journal() { return *journal_; }
  StoreContext& stores_context() { return *store_context_; }
  TrafficContext& traffic_context() { return *traffic_context_; }
  std::vector<std::unique_ptr<Store>>& stores() { return stores_; }
  std::vector<std::unique_ptr<Service>>& services() { return services_; }
  std::vector<std::unique_ptr<Traffic>>& traffic() { return traffic_; }

  // Where the run stands, from the journal: none, begun (steps open), following, switched, completing, completed, cancelling, cancelled.
  std::string phase() const;
  // Who serves, from the records of the agents that answer; Error(unknown) as who_serves(), or where a record cannot be read.
  Side serves();
  void set_phase(const std::string& phase) { journal_->set_fact("phase", phase); }
  // Which stores, services and traffic the run has to do with: written down before they are begun. From then on no controller goes
  // on with a file that has lost one: nobody would fence, switch or clean it.
  void remember_parts();
  // A later controller has taken the run over; false where no agent answers.
  bool superseded();

  // What the agents have sampled of the stores' lag since the journal's last entry of it; entries without n.
  std::vector<Json> lag_samples();
  // Writes them into the journal.
  void collect_lag();

  // Moves the journal to the controller's archive, so that report works after complete and cancel; the path.
  std::string archive();

 private:
  void connect(Mode mode, bool may_miss);
  void take_generation();
  void make_journal(Mode mode);
  void make_contexts();
  void require_parts();
  Deployment deployment_;
  BySide<std::unique_ptr<AgentSite>> sites_;
  BySide<std::unique_ptr<Error>> missing_;
  std::unique_ptr<Journal> journal_;
  std::unique_ptr<StoreContext> store_context_;
  std::unique_ptr<TrafficContext> traffic_context_;
  std::vector<std::unique_ptr<Store>> stores_;
  std::vector<std::unique_ptr<Service>> services_;
  std::vector<std::unique_ptr<Traffic>> traffic_;
};

// The run that the sites' agents keep, opened to be looked at; null where there is none.
std::unique_ptr<Run> existing_run(const Deployment& deployment, bool may_miss = false);

// The newest archived journal of this deployment, or empty: what status and report show when no run is there.
std::string newest_archive(const std::string& name);

}  // namespace rehome::ops
