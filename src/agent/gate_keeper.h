// The agent's side of its gate: the heartbeat, what the gate should be doing, and telling it again when it restarts.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "agent/attempt.h"
#include "agent/client.h"
#include "agent/timed_mutex.h"

namespace rehome {

class GateKeeper : public AttemptGate {
 public:
  GateKeeper(std::string state, std::function<void(const std::string&)> log) : state_(std::move(state)), log_(std::move(log)) {}
  ~GateKeeper() override { stop(); }
  void start();
  void stop();

  // Without gate.json there is no gate: nothing to tell, nothing to seal.
  bool exists() const;
  void wish(GateWish wish, std::int64_t attempt, Millis wait) override;
  void seal(std::int64_t attempt, Deadline deadline) override;
  bool told() const override;
  // A controller's request. A `hold` of the yielding side is repeated to a gate that restarts. Throws Error(state) for a hold or
  // cut whose attempt was over when its turn came.
  Json ask(const Json& request, Deadline deadline);
  // The other side's attempt is over: a hold that a controller asked for here, where the other side serves, ends. Also by a
  // controller's `release`, which must be what the record says anyway: Error(state) otherwise.
  void let_go(std::int64_t attempt);
  Json release(const std::string& to, Deadline deadline);
  Json status() const;  // {told, error}

 private:
  Json say(const Json& request, Deadline deadline);  // with talking_ held
  bool tell(Deadline deadline);                      // with talking_ held: true when the gate knows
  void loop();

  std::string state_;
  std::function<void(const std::string&)> log_;
  TimedMutex talking_;           // the connection
  std::unique_ptr<AgentClient> client_;
  bool fresh_ = true;                  // a gate that was connected to anew has not been told anything
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  GateWish wish_ = GateWish::none;
  std::int64_t attempt_ = 0;
  std::uint64_t version_ = 1, told_ = 0;
  Json hold_;                          // the controller's request, while its attempt lasts
  std::string error_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace rehome
