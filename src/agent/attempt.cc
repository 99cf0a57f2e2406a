#include "agent/attempt.h"

#include <algorithm>
#include <array>
#include <utility>

namespace rehome {
namespace {

constexpr std::array<std::pair<ActionSet, std::string_view>, kActionSets> kSets{{
    {ActionSet::undo, "undo"}, {ActionSet::open, "open"}, {ActionSet::tail_takes, "tail_takes"},
    {ActionSet::tail_yields, "tail_yields"}, {ActionSet::close, "close"},
}};
// How long T waits for Y to ask for the tails before it ends its followers by itself: everything they could bring is
// there already, or the commit would not have been sent.
constexpr Millis kTailsByMyself{2000};

std::string title(const Record& r) {
  return std::string(name_of(r.decision)) + "(" + std::to_string(r.attempt) + ")";
}

}  // namespace

std::string_view name_of(ActionSet s) {
  for (const auto& [value, name] : kSets)
    if (value == s) return name;
  REHOME_CHECK(false && "every set has a name");
  return {};
}

ActionSet action_set_from(std::string_view wanted) {
  for (const auto& [value, name] : kSets)
    if (name == wanted) return value;
  throw Error(Code::usage, "'" + std::string(wanted) + "' is no set of actions",
              "the sets are undo, open, tail_takes, tail_yields and close");
}

std::string_view name_of(GateWish w) {
  switch (w) {
    case GateWish::none: return "none";
    case GateWish::local: return "local";
    case GateWish::peer: return "peer";
    case GateWish::hold: return "hold";
    case GateWish::sealed: return "sealed";
  }
  return "none";
}

const Record& Attempt::known(Lock&) const {
  if (!p_.record.loaded()) throw Error(Code::state, error_.empty() ? "the record has not been read yet" : error_,
                                       "nothing opens and nothing is undone until the record can be read");
  if (!p_.record.known())
    throw Error(Code::unknown, "the record could not be written; it is being tried again",
                "see status; repair the disk of the state directory", true);
  return p_.record.current();
}

GateWish Attempt::gate_wish(const Record& r) const {
  switch (r.decision) {
    case Decision::attempt:
    case Decision::abort: return GateWish::hold;
    case Decision::commit: return opened_ == r.attempt ? GateWish::peer : GateWish::sealed;
    case Decision::cancelled:
    case Decision::serving:
    case Decision::opened:
      // A site that must still be closed holds its clients until it is.
      if (!serves_here(r) && r.forced && !r.settled) return GateWish::sealed;
      return serves_here(r) ? GateWish::local : GateWish::peer;
    case Decision::prepared:
    case Decision::refused: return GateWish::peer;
    case Decision::stored: return r.forced ? GateWish::sealed : GateWish::peer;
  }
  return GateWish::none;
}

void Attempt::tell_gate(Lock&, Millis wait) {
  const Record& r = p_.record.current();
  p_.gate.wish(gate_wish(r), r.attempt, wait);
}

void Attempt::write(Lock& lock, Record next) {
  p_.record.write(next);
  backoff_ = Millis(100);
  not_before_ = 0;
  waiting_for_.clear();
  duty_step_ = 0;
  p_.hands.log("record " + title(next) + " epoch " + std::to_string(next.epoch) + ", " +
               std::string(name_of(next.serves)) + " serves");
  (void)lock;
  woken_ = true;
  changed_.notify_all();
}

void Attempt::write_abort(Lock& lock, const std::string& reason) {
  Record r = p_.record.current();
  r.decision = Decision::abort;
  r.settled = false;
  reason_ = reason;
  lease_end_ = 0;
  p_.hands.log("attempt " + std::to_string(r.attempt) + " is aborted: " + reason);
  write(lock, r);
}

void Attempt::start() {
  std::lock_guard duty(duty_);
  Lock lock(mutex_);
  try {
    p_.record.load();
  } catch (const Error& e) {
    error_ = e.message;
    p_.hands.log(std::string("record: ") + e.what());
    return;
  }
  error_.clear();
  const Record& r = p_.record.current();
  p_.hands.log("record is " + title(r) + " epoch " + std::to_string(r.epoch) + ", " + std::string(name_of(r.serves)) +
               " serves");
  // Before the services of this host can start: an agent is ordered before them.
  try {
    if (r.decision == Decision::commit || (r.decision == Decision::serving && !serves_here(r) && r.attempt > 0))
      p_.hands.forbid_services();
  } catch (const Error& e) {
    p_.hands.log(std::string("start condition: ") + e.what());
  }
  if (r.decision == Decision::attempt) {
    try {
      write_abort(lock, "the agent was restarted");
    } catch (const Error& e) {
      p_.hands.log(e.what());  // unknown now: work() resolves it
      return;
    }
  }
  tell_gate(lock, Millis(0));
}

std::int64_t Attempt::open(Millis lease) {
  Lock lock(mutex_);
  const Record& r = known(lock);
  if (!serves_here(r)) throw Error(Code::state, "this site does not serve, so it has nothing to yield");
  if (r.decision == Decision::cancelled) throw Error(Code::state, "the run was cancelled", "begin again");
  if (r.decision != Decision::serving && r.decision != Decision::opened)
    throw Error(Code::state, "attempt " + std::to_string(r.attempt) + " is not over yet: " + phase(r), "see status",
                r.decision == Decision::abort);
  if (!r.settled)
    throw Error(Code::state, "the tails of attempt " + std::to_string(r.attempt) + " are not done yet",
                "see status: it says what they wait for", true);
  Record next = r;
  next.attempt++;
  next.decision = Decision::attempt;
  next.forced = false;
  reason_.clear();
  times_ = Json::object();
  lease_ = lease;
  sealed_ = 0;
  write(lock, next);
  lease_end_ = after(p_.clock, lease);
  tell_gate(lock, Millis(0));
  return next.attempt;
}

Millis Attempt::renew(std::int64_t attempt) {
  Lock lock(mutex_);
  const Record& r = p_.record.loaded() ? p_.record.current() : known(lock);
  if (r.decision != Decision::attempt || r.attempt != attempt || lease_over())
    throw Error(Code::state, "the lease of attempt " + std::to_string(attempt) + " is over" +
                                 (reason_.empty() ? "" : ": " + reason_),
                "the yielding site undoes what the attempt left and serves on; try again");
  lease_end_ = after(p_.clock, lease_);
  return lease_;
}

void Attempt::seal(std::int64_t attempt, Deadline deadline) {
  std::int64_t epoch;
  {
    Lock lock(mutex_);
    const Record& r = known(lock);
    if (r.decision != Decision::attempt || r.attempt != attempt || lease_over())
      throw Error(Code::state, "attempt " + std::to_string(attempt) + " is over" + (reason_.empty() ? "" : ": " + reason_),
                  "nothing is sealed");
    epoch = r.epoch;
  }
  p_.gate.seal(attempt, deadline);
  p_.peer.prepared(attempt, epoch, deadline);
  Lock lock(mutex_);
  const Record& r = known(lock);
  if (r.decision != Decision::attempt || r.attempt != attempt || lease_over())
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " ended while it was being sealed", "it is undone");
  sealed_ = attempt;
}

PeerAnswer Attempt::commit(std::int64_t attempt, Deadline deadline) {
  {
    Lock lock(mutex_);
    const Record& r = known(lock);
    bool done = r.attempt == attempt && r.decision == Decision::serving && !serves_here(r);
    if (done) return {PeerAnswer::What::opened, {}, times_};
    if (!(r.attempt == attempt && r.decision == Decision::commit)) {
      if (r.attempt != attempt || r.decision != Decision::attempt)
        throw Error(Code::backed_out, "attempt " + std::to_string(attempt) + " was aborted" +
                                          (reason_.empty() ? "" : ": " + reason_),
                    "the yielding site serves; try again");
      if (lease_over()) {
        write_abort(lock, "the lease had ended when the commit came");
        throw Error(Code::backed_out, "the lease of attempt " + std::to_string(attempt) + " ended before its commit",
                    "the yielding site undoes it and serves; try again");
      }
      if (sealed_ != attempt)
        throw Error(Code::state, "attempt " + std::to_string(attempt) + " is not sealed", "send attempt.seal first");
      Record next = r;
      next.decision = Decision::commit;
      next.epoch++;
      next.serves = other(p_.side);
      next.settled = false;
      Ticks from = p_.clock.now();
      write(lock, next);
      times_["commit_ms"] = ms_between(from, p_.clock.now());
      lease_end_ = 0;
      tell_gate(lock, Millis(0));
    }
  }
  while (true) {
    PeerAnswer a = send_commit(deadline);
    if (a.what != PeerAnswer::What::pending || deadline.passed()) return a;
    Lock lock(mutex_);
    changed_.wait_for(lock, deadline.left(Millis(50)));
  }
}

PeerAnswer Attempt::send_commit(Deadline deadline) {
  std::unique_lock sending(sending_, std::defer_lock);
  if (!sending.try_lock_for(deadline.left(Millis(5000)))) return {PeerAnswer::What::pending, "another thread is sending it"};
  Record r;
  {
    Lock lock(mutex_);
    r = known(lock);
    if (!(r.decision == Decision::commit && opened_ != r.attempt)) {
      // Answered while this thread waited for the other one.
      bool refused = serves_here(r);
      return {refused ? PeerAnswer::What::refused : PeerAnswer::What::opened, reason_, times_};
    }
  }
  PeerAnswer a;
  Ticks from = p_.clock.now();
  try {
    a = p_.peer.commit(r.attempt, r.epoch, deadline);
  } catch (const Error& e) {
    a.reason = e.message;
  }
  Lock lock(mutex_);
  if (a.what == PeerAnswer::What::pending) {
    waiting_for_ = "the other site to open its stores: " + a.reason;
    return a;
  }
  if (!p_.record.known() || !unchanged(lock, r.seq)) return {PeerAnswer::What::pending, "the record changed"};
  if (a.what == PeerAnswer::What::opened) {
    opened_ = r.attempt;
    // The clients are waiting: before the record says SERVING, since a restart finds the same answer by asking again.
    times_["opened_ms"] = ms_between(from, p_.clock.now());
    p_.gate.wish(GateWish::peer, r.attempt, Millis(200));
    times_["released_ms"] = ms_between(from, p_.clock.now());
    times_["taking"] = a.times;
    a.times = times_;
    waiting_for_.clear();
    p_.hands.log("the other site has opened attempt " + std::to_string(r.attempt));
    woken_ = true;
    changed_.notify_all();
    return a;
  }
  Record next = r;
  next.epoch++;
  next.serves = p_.side;
  next.decision = Decision::abort;
  reason_ = "the other site refused: " + a.reason;
  write(lock, next);
  return a;
}

void Attempt::abort(std::int64_t attempt, const std::string& reason) {
  Lock lock(mutex_);
  const Record& r = known(lock);
  if (r.attempt != attempt)
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " is not the last one", "see status");
  if (r.decision == Decision::abort || (r.decision == Decision::serving && serves_here(r))) return;
  if (r.decision != Decision::attempt)
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " is committed: nobody undoes it",
                "the agents finish by themselves; reverse brings the traffic back");
  write_abort(lock, reason.empty() ? "the controller asked for it" : reason);
}

bool Attempt::wait_undone(std::int64_t attempt, Deadline deadline) {
  Lock lock(mutex_);
  while (true) {
    const Record& r = known(lock);
    if (r.attempt != attempt || (r.decision != Decision::attempt && r.decision != Decision::abort)) return true;
    if (deadline.passed()) return false;
    changed_.wait_for(lock, deadline.left(Millis(100)));
  }
}

void Attempt::cancel(Deadline deadline) {
  {
    Lock lock(mutex_);
    const Record& r = known(lock);
    if (r.decision == Decision::cancelled) return;
    if (!serves_here(r))
      throw Error(Code::state, "attempt " + std::to_string(r.attempt) + " is committed: it cannot be cancelled",
                  "reverse brings the traffic back");
    if (!r.settled && r.decision != Decision::abort)
      throw Error(Code::state, "the tails of attempt " + std::to_string(r.attempt) + " are not done yet", "see status", true);
    if (r.decision == Decision::attempt) write_abort(lock, "the run is cancelled");
  }
  Lock lock(mutex_);
  while (true) {
    Record r = known(lock);
    if (r.decision == Decision::cancelled) return;
    if ((r.decision == Decision::serving || r.decision == Decision::opened) && serves_here(r)) {
      r.decision = Decision::cancelled;
      write(lock, r);
      tell_gate(lock, Millis(0));
      return;
    }
    if (r.decision != Decision::abort) throw Error(Code::state, "the run moved on: " + phase(r), "see status");
    if (deadline.passed())
      throw Error(Code::timeout, "attempt " + std::to_string(r.attempt) + " is not undone yet" +
                                     (waiting_for_.empty() ? "" : ": " + waiting_for_),
                  "the agent goes on trying; cancel again when it is", true);
    changed_.wait_for(lock, deadline.left(Millis(100)));
  }
}

void Attempt::controller_changed() {
  Lock lock(mutex_);
  if (!p_.record.loaded()) return;
  const Record& r = known(lock);
  if (r.decision == Decision::attempt) write_abort(lock, "another controller took over");
}

void Attempt::peer_prepared(std::int64_t attempt, std::int64_t epoch) {
  std::unique_lock duty(duty_, std::defer_lock);
  if (!duty.try_lock_for(Millis(2000))) throw Error(Code::state, "this site is busy with its last attempt", "", true);
  {
    Lock lock(mutex_);
    const Record& r = known(lock);
    if (r.decision == Decision::prepared && r.attempt == attempt && r.epoch == epoch) return;
    if (serves_here(r) || epoch < r.epoch || attempt <= r.attempt)
      throw Error(Code::conflict, "PREPARED(" + std::to_string(attempt) + ") of epoch " + std::to_string(epoch) +
                                      " does not follow " + title(r) + " of epoch " + std::to_string(r.epoch),
                  "see status on both sites");
    if (!r.settled) throw Error(Code::state, "the tails of attempt " + std::to_string(r.attempt) + " are not done yet",
                                "see status", true);
  }
  // A set that cannot run is found now, when backing out is cheap.
  p_.hands.probe_set(ActionSet::open);
  Lock lock(mutex_);
  Record next = known(lock);
  next.decision = Decision::prepared;
  next.attempt = attempt;
  next.epoch = epoch;
  next.serves = other(p_.side);
  next.forced = false;
  next.settled = true;
  write(lock, next);
}

PeerAnswer Attempt::peer_commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline) {
  std::unique_lock duty(duty_, std::defer_lock);
  if (!duty.try_lock_for(deadline.left(Millis(5000)))) return {PeerAnswer::What::pending, "it is being opened"};
  Ticks from = p_.clock.now();
  {
    Lock lock(mutex_);
    const Record& r = known(lock);
    if (r.attempt == attempt && r.decision == Decision::opened) return {PeerAnswer::What::opened, {}, times_};
    if (r.attempt == attempt && r.decision == Decision::refused && r.epoch == epoch)
      return {PeerAnswer::What::refused, reason_, times_};
    bool stored = r.attempt == attempt && r.decision == Decision::stored;
    if (!stored && !(r.attempt == attempt && r.decision == Decision::prepared && r.epoch + 1 == epoch))
      throw Error(Code::conflict, "COMMIT(" + std::to_string(attempt) + ") of epoch " + std::to_string(epoch) +
                                      " does not follow " + title(r) + " of epoch " + std::to_string(r.epoch),
                  "see status on both sites");
    if (!stored) {
      lock.unlock();
      std::string refusal;
      try {
        p_.hands.probe_set(ActionSet::open);
      } catch (const Error& e) {
        refusal = e.message;
      }
      lock.lock();
      Record next = known(lock);
      next.epoch = epoch;
      if (!refusal.empty()) {
        next.decision = Decision::refused;
        reason_ = refusal;
        write(lock, next);
        return {PeerAnswer::What::refused, refusal, Json::object()};
      }
      next.decision = Decision::stored;
      next.serves = p_.side;
      next.settled = false;
      times_ = Json::object();
      write(lock, next);
      times_["stored_ms"] = ms_between(from, p_.clock.now());
    }
  }
  return open_stores(attempt, epoch);
}

// With duty_ held and STORED durable.
PeerAnswer Attempt::open_stores(std::int64_t attempt, std::int64_t epoch) {
  Ticks from = p_.clock.now();
  Lock lock(mutex_);
  Record r = known(lock);
  if (duty_begun_ != static_cast<std::int64_t>(r.seq)) {
    duty_begun_ = static_cast<std::int64_t>(r.seq);
    p_.hands.begin_set(ActionSet::open);
  }
  lock.unlock();
  try {
    p_.hands.run_set(ActionSet::open);
    p_.hands.allow_services();
  } catch (const Error& e) {
    lock.lock();
    failed(lock, "opening the stores", e);
    return {PeerAnswer::What::pending, e.message, times_};
  }
  lock.lock();
  times_["open_ms"] = ms_between(from, p_.clock.now());
  Record next = known(lock);
  REHOME_CHECK(next.decision == Decision::stored && next.attempt == attempt && next.epoch == epoch);
  next.decision = Decision::opened;
  from = p_.clock.now();
  write(lock, next);
  times_["opened_ms"] = ms_between(from, p_.clock.now());
  tails_asked_ = next.forced;
  tails_by_ = after(p_.clock, kTailsByMyself);
  tell_gate(lock, Millis(200));
  return {PeerAnswer::What::opened, {}, times_};
}

bool Attempt::peer_tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline) {
  Lock lock(mutex_);
  while (true) {
    const Record& r = known(lock);
    if (r.attempt != attempt || r.decision != Decision::opened) {
      if (r.attempt > attempt || r.epoch > epoch) return true;
      throw Error(Code::conflict, "the tails of attempt " + std::to_string(attempt) + " do not follow " + title(r), "see status");
    }
    if (r.settled) return true;
    if (!tails_asked_) {
      tails_asked_ = woken_ = true;
      changed_.notify_all();
    }
    if (deadline.passed()) return false;
    changed_.wait_for(lock, deadline.left(Millis(50)));
  }
}

void Attempt::heard(const Record& peers) {
  Lock lock(mutex_);
  if (!p_.record.known()) return;
  Record r = p_.record.current();
  peer_epoch_ = peers.epoch;
  // The yielding site aborted: what was prepared must not be opened by anybody later.
  if (r.decision == Decision::prepared && peers.attempt >= r.attempt && peers.epoch >= r.epoch &&
      peers.serves == other(p_.side) && (peers.decision == Decision::abort || peers.decision == Decision::serving ||
                                         peers.decision == Decision::cancelled)) {
    r.decision = Decision::serving;
    r.epoch = peers.epoch;
    write(lock, r);
    return;
  }
  // Each believes that it serves: somebody opened the other one by force. The higher epoch wins; of two equal ones,
  // which take two people, the source's.
  bool both = serves_here(r) && peers.serves == other(p_.side) && peers.decision != Decision::commit;
  if (!both || peers.epoch < r.epoch || (peers.epoch == r.epoch && p_.side == AgentSide::source)) return;
  if (peers.epoch == r.epoch && r.decision == Decision::stored) return;
  r.decision = Decision::serving;
  r.serves = other(p_.side);
  r.epoch = peers.epoch;
  r.forced = true;
  r.settled = false;
  lease_end_ = 0;
  reason_ = "the other site was opened without this one";
  p_.hands.log("closing: " + reason_);
  write(lock, r);
  tell_gate(lock, Millis(200));
}

void Attempt::force_open() {
  Lock lock(mutex_);
  Record r = known(lock);
  if (serves_here(r)) {
    if (r.forced) return;
    throw Error(Code::state, "this site serves already: " + phase(r), "see status");
  }
  if (r.decision == Decision::commit)
    throw Error(Code::state, "this site has just yielded; the other one is to be opened", "see reverse --target-is-gone");
  // The other one is at most one epoch ahead of what is stored here, so two more is above anything it can have.
  r.epoch = std::max(r.epoch, peer_epoch_) + 2;
  r.decision = Decision::stored;
  r.serves = p_.side;
  r.forced = true;
  r.settled = false;
  write(lock, r);
}

void Attempt::force_reopen() {
  Lock lock(mutex_);
  Record r = known(lock);
  if (serves_here(r)) {
    if (r.forced) return;
    throw Error(Code::state, "this site serves already: " + phase(r), "see status");
  }
  if (r.decision != Decision::commit && r.decision != Decision::serving)
    throw Error(Code::state, "this site never yielded", "see resume --source-is-gone");
  r.epoch = std::max(r.epoch, peer_epoch_) + 2;
  r.decision = Decision::abort;
  r.serves = p_.side;
  r.forced = true;
  r.settled = false;
  reason_ = "reopened by hand: the other site is gone";
  write(lock, r);
}

}  // namespace rehome
