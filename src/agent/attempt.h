// The state machine of an attempt, for the site that yields (Y) and the one that takes over (T): docs/PROTOCOL.md.
// No I/O of its own: clock, record, and everything that acts come in as interfaces, so that every transition, restart
// and lost message is tested in microseconds.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "agent/record.h"
#include "agent/timed_mutex.h"
#include "base/clock.h"
#include "base/json.h"

namespace rehome {

// The stored sets of actions. `undo` lifts what an attempt of Y left; `open` opens T's stores to their application;
// `tail_takes` ends T's forward followers; `tail_yields` ends old sessions on Y and starts its reverse followers;
// `close` hard-fences every store of a site that learns that the other one was opened without it.
enum class ActionSet { undo, open, tail_takes, tail_yields, close };
inline constexpr int kActionSets = 5;
std::string_view name_of(ActionSet s);
ActionSet action_set_from(std::string_view name);  // throws Error(io)

Json record_to_json(const Record& r);
Record record_from_json(const Json& j);  // throws Error(io)

// What the machine has done for it. Everything is idempotent and bounded in time; a thrown Error means that it is tried
// again. Called from one thread at a time.
class AttemptHands {
 public:
  virtual ~AttemptHands() = default;
  virtual void begin_set(ActionSet set) = 0;  // the next run_set starts at the first item
  // From the first item that has not succeeded since begin_set, on behalf of this attempt.
  virtual void run_set(ActionSet set, std::int64_t attempt, std::int64_t epoch) = 0;
  virtual void probe_set(ActionSet set) = 0;  // throws when the set could not run now; changes nothing
  virtual void cut_relays() = 0;              // ends the sessions that hold soft fences
  virtual void thaw() = 0;
  virtual void kill_frozen() = 0;
  virtual void forbid_services() = 0;         // the start condition, durably
  virtual void allow_services() = 0;          // lifts it
  virtual void start_services() = 0;          // those that it made skip, or that ended while frozen
  virtual void log(const std::string& line) = 0;
};

// What this site's gate should be doing. `hold` leaves a hold that the controller asked for in place.
enum class GateWish { none, local, peer, hold, sealed };
std::string_view name_of(GateWish w);

class AttemptGate {
 public:
  virtual ~AttemptGate() = default;
  // From now on, and for a gate that restarts. Tries at once for at most `wait`, then in the background.
  virtual void wish(GateWish wish, std::int64_t attempt, Millis wait) = 0;
  virtual void seal(std::int64_t attempt, Deadline deadline) = 0;  // throws unless the gate says that it is sealed
  virtual bool told() const = 0;  // the gate does what was wished last, or there is none
};

struct PeerAnswer {
  enum class What { opened, refused, pending } what = What::pending;
  std::string reason;
  Json times = Json::object();  // milliseconds of T's steps
};

// The other agent. Every function throws Error(unreachable) or Error(timeout) when no answer came.
class AttemptPeer {
 public:
  virtual ~AttemptPeer() = default;
  struct State {
    Record record;
    bool gate_told = false;
  };
  virtual State state(Deadline deadline) = 0;
  virtual void ready(std::int64_t attempt, std::int64_t epoch, Deadline deadline) = 0;  // throws: it could not open
  // Sent in the background, once, at best: it helps a person to decide, and nothing waits for it.
  virtual void prepared_soon(std::int64_t attempt, std::int64_t epoch) = 0;
  virtual PeerAnswer commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline) = 0;
  virtual void tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline) = 0;  // returns once T's are done
};

inline constexpr Millis kReturning{5000};

class Attempt {
 public:
  struct Ports {
    AgentSide side;
    Clock& clock;
    RecordStore& record;
    AttemptHands& hands;
    AttemptGate& gate;
    AttemptPeer& peer;
  };
  explicit Attempt(Ports ports) : p_(ports) {}
  void set_side(AgentSide side) { p_.side = side; }  // before start()

  // Reads the record and tells the gate. A record that cannot be read is kept as an error: nothing opens, nothing is
  // undone, and work() tries again. `returning`: the host has rebooted, so a person may have opened the other site
  // meanwhile; the gate stays sealed, and nothing is opened, until the peer was heard, or for kReturning.
  void start(bool returning = false);
  bool returning() const;

  // The controller's. All throw Error(state) for a wrong moment, Error(unknown) while the record's write is unknown.
  std::int64_t open(Millis lease, Deadline deadline);
  Millis renew(std::int64_t attempt);
  void seal(std::int64_t attempt, Deadline deadline);
  PeerAnswer commit(std::int64_t attempt, Deadline deadline);
  void abort(std::int64_t attempt, const std::string& reason);
  bool wait_undone(std::int64_t attempt, Deadline deadline);  // false: not yet
  void cancel(Deadline deadline);
  // A new controller took over: an attempt of the old one is aborted. Throws Error(unknown).
  void controller_changed();

  // The other agent's.
  void peer_ready(std::int64_t attempt, std::int64_t epoch);
  void peer_prepared(std::int64_t attempt, std::int64_t epoch);
  PeerAnswer peer_commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline);
  bool peer_tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline);
  void heard(const Record& peers);

  // A person's, who knows that the other host is off. Throw Error(state) where it makes no sense. force_open returns
  // what was recorded before: with STORED nothing acknowledged is missing here, with PREPARED only what the other site
  // may have acknowledged after that time, having backed out.
  Record force_open();
  void force_reopen();

  // One bounded piece of what is to be done next, from one persistent thread. Returns how long nothing needs doing;
  // wake() ends that time early.
  Millis work();
  void wait_for_work(Millis most, const std::atomic<bool>& stop);
  void wake();

  Json status() const;
  // True while a change of actions or resident services would change what is being done right now.
  bool busy() const;
  std::optional<Record> record() const;       // nullopt: unreadable
  std::string record_error() const;           // empty: none
  Millis lease_left() const;                  // 0: none held

 private:
  using Lock = std::unique_lock<std::mutex>;
  const Record& known(Lock&) const;           // throws Error(unknown) or the error of the record
  bool serves_here(const Record& r) const { return r.serves == p_.side; }
  bool lease_over() const { return lease_end_ == 0 || p_.clock.now() >= lease_end_; }
  void write(Lock&, Record next);
  void check_can_open(const Record& r) const;
  void check_follows(const Record& r, const char* what, std::int64_t attempt, std::int64_t epoch) const;
  std::int64_t epoch_by_hand() const;
  void write_abort(Lock&, const std::string& reason);
  void tell_gate(Lock&, Millis wait);
  GateWish gate_wish(const Record& r) const;
  PeerAnswer send_commit(Deadline deadline);
  PeerAnswer open_stores(std::int64_t attempt, std::int64_t epoch);
  Millis resolve_unknown(Lock&);
  Millis one_duty(Lock& lock);
  // What follows a decision: steps in order, each one a stored set or a function.
  struct Step {
    std::string name;
    std::optional<ActionSet> set;
    std::function<void()> run;
  };
  bool run_steps(Lock& lock, const std::vector<Step>& steps);  // true: all have succeeded for the current record
  std::vector<Step> yielding_steps(const Record& r);
  void finish(Lock& lock, Record next);
  void undo(Lock& lock);
  void tails_of_yielding(Lock& lock);
  void tails_of_taking(Lock& lock);
  bool unchanged(Lock&, std::uint64_t seq) const;
  Millis failed(Lock&, const std::string& doing, const Error& e);
  std::string phase(const Record& r) const;

  Ports p_;
  mutable std::mutex mutex_;         // the fields below and every durable write
  TimedMutex duty_;            // held while actions run; taken before mutex_
  TimedMutex sending_;         // one commit message at a time; taken before mutex_
  std::condition_variable changed_;
  bool woken_ = false;
  std::string error_;                // of reading the record
  Ticks lease_end_ = 0;
  Millis lease_{3000};
  std::int64_t sealed_ = 0;          // the attempt for which gate and peer have answered the seal
  std::int64_t duty_begun_ = -1;     // the record's seq for which begin_set was called
  std::size_t duty_step_ = 0;
  bool tails_asked_ = false;
  Ticks tails_by_ = 0;
  Ticks not_before_ = 0;             // backoff
  Millis backoff_{100};
  std::string waiting_for_, reason_;
  Json times_ = Json::object();
  std::int64_t peer_epoch_ = 0;
  Ticks returning_until_ = 0;
};

}  // namespace rehome
