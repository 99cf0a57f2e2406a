// One try of a switch or a reverse: everything outside the pause made ready, then the pause, then its end. The same code
// for both directions; protocol: docs/PROTOCOL.md and docs/ARCHITECTURE.md.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "ops/checks.h"
#include "ops/run.h"

namespace rehome::ops {

// What a pause is expected to cost, and why; made from measurements, not from hope.
struct Prediction {
  Millis pause{0};
  bool within = false;                  // max_pause
  std::vector<std::string> reasons;
  std::vector<std::string> obstacles;   // why no switch may start now
};

// When the micro-fence may be run while a switch waits: three times, soon after one another since what is in its way is mostly gone in
// a moment, and then not for five minutes each: it cancels autovacuum on the tables that it locks. Never more than three in five minutes.
class MicroFences {
 public:
  explicit MicroFences(Clock& clock = system_clock()) : clock_(clock) {}
  bool allowed() const { return made_ == 0 || next_.passed(); }
  void count() {
    constexpr Millis rests[] = {Millis(1'000), Millis(30'000), Millis(300'000)};
    next_ = Deadline(clock_, rests[std::min<std::size_t>(made_++, 2)]);
  }

 private:
  Clock& clock_;
  std::size_t made_ = 0;
  Deadline next_;
};

struct CutResult {
  std::int64_t attempt = 0;
  double pause_ms = 0;                  // hold to release
  Json phases = Json::array();          // {name, ms, from_us, to_us}
  Json ledger = Json::object();
};

// Throws Error(state) where a change of the schema must be copied first: until then the store's follower may stand still. `before` names
// what is refused.
void require_copied(Store& store, StoreContext& context, Side serving, const std::string& before);

// Throws Error(interrupted) where somebody asked to stop; for the time before a pause.
void require_not_stopped();

class Switchover {
 public:
  Switchover(Run& run, Direction direction);
  ~Switchover();

  // What the agents must be able to do without a controller is stored with them, and tried. From begin on they have it: a host may be
  // lost before any switch. Idempotent.
  void store_actions();
  // Idempotent, outside the pause: reverse followers prepared, actions stored and tried, services warm. A store that does not follow
  // yet, and will by itself, is waited for; Error(timeout) after the deadline; `when_ready`: what passes by
  // itself, a link that is down for a moment, is waited for there as well.
  void prepare(Deadline deadline, bool when_ready);
  // Of prepare(): the warm services run on the side that takes over, and its applications answer. For who waits after it.
  void require_services();
  Side takes_over() const { return direction_.takes(); }
  // With `measure` the micro-fence of every store is run, where nothing else is in the way, and counted there.
  Prediction predict(MicroFences* measure);
  // For who waits between prepare() and cut(), every minute or so.
  void renew();
  // The pause. On return the other side serves. Error(backed_out): Y serves as before, nothing is lost, it can be tried
  // again. Error(unknown): the commit was asked for and its outcome is not known here; the agents decide it, see status.
  CutResult cut();
  // After cut(), also of another controller: waits for the agents' tails, runs the write canaries; Error(check_failed) when one fails.
  void settle();

 private:
  class Lease;
  struct Phase;
  void start_services();
  void require_applications();
  void phase(const char* name, const std::function<void()>& work);
  void each_cut(void (Cut::*what)(Deadline));
  void hold();
  void drain();
  void freeze();
  void require_still_down();
  void await_following(Deadline deadline, bool when_ready);
  void warm_up();
  void ask_canaries();
  void commit();
  void write_ledger(bool switched);
  void flush_journal();
  [[noreturn]] void back_out(const Error& reason);
  Json decided(Deadline deadline);
  Site& yields() { return run_.site(direction_.yields); }
  Site& takes() { return run_.site(direction_.takes()); }
  bool gated() const { return !run_.deployment().traffic.empty(); }

  Run& run_;
  Direction direction_;
  std::vector<std::unique_ptr<Cut>> cuts_;
  std::vector<std::unique_ptr<HttpCanary>> canaries_;
  std::unique_ptr<Lease> lease_;
  std::int64_t attempt_ = 0, epoch_ = 0;
  Deadline pause_deadline_;
  Ticks pause_from_ = 0;
  double predicted_ms_ = 0;
  std::optional<std::int64_t> past_gate_;   // by the last measured predict(): a switch ends them, and nobody else would tell
  std::set<std::string> down_;              // services that did not run when the others were frozen
  CutResult result_;
};

}  // namespace rehome::ops
