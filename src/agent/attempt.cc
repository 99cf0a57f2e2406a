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
    case Decision::commit: return GateWish::sealed;
    case Decision::cancelled:
    case Decision::serving:
    case Decision::opened:
      // A site that must still be closed holds its clients until it is.
      if (!serves_here(r) && r.forced && !r.settled) return GateWish::sealed;
      if (serves_here(r) && returning_until_ != 0) return GateWish::sealed;
      return serves_here(r) ? GateWish::local : GateWish::peer;
    case Decision::prepared: return GateWish::peer;
    case Decision::refused:
      // Taken back: sealed since COMMIT, or by a person's decision, until the undo is through.
      return serves_here(r) ? GateWish::sealed : GateWish::peer;
    case Decision::stored: return r.forced ? GateWish::sealed : GateWish::peer;
  }
  return GateWish::none;
}

void Attempt::tell_gate(Lock&, Millis wait) {
  const Record& r = p_.record.current();
  p_.gate.wish(gate_wish(r), r.attempt, wait);
}

void Attempt::write(Lock& lock, Record next) {
  next.wall_us = p_.clock.wall_us();
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

bool Attempt::returning() const {
  Lock lock(mutex_);
  // By the clock, and not by work(), which may at this moment wait for a unit that is ordered after the agent's own.
  return returning_until_ != 0 && p_.clock.now() < returning_until_;
}

void Attempt::start(bool returning) {
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
    // What an attempt may have left that a failing disk kept from being undone.
    if (serves_here(r) && (r.decision == Decision::serving || r.decision == Decision::opened)) p_.hands.allow_services();
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
  // What the host's own boot does not start was started by the tails: a service of commands, a unit that is not enabled.
  if (Record again = p_.record.current(); returning && again.decision == Decision::opened && again.settled) {
    again.settled = false;
    try {
      write(lock, again);
    } catch (const Error& e) {
      p_.hands.log(e.what());  // unknown now: work() resolves it
      return;
    }
  }
  // Somebody who could not reach this host may have opened the other site.
  if (returning && serves_here(p_.record.current())) returning_until_ = after(p_.clock, kReturning);
  tell_gate(lock, Millis(0));
}

void Attempt::check_can_open(const Record& r) const {
  if (!serves_here(r)) throw Error(Code::state, "this site does not serve, so it has nothing to yield");
  if (r.decision == Decision::cancelled) throw Error(Code::state, "the run was cancelled", "rehome cancel takes away what is left of it");
  if (r.decision != Decision::serving && r.decision != Decision::opened)
    throw Error(Code::state, "attempt " + std::to_string(r.attempt) + " is not over yet: " + phase(r), "see status",
                r.decision == Decision::abort);
  if (!r.settled)
    throw Error(Code::state, "the tails of attempt " + std::to_string(r.attempt) + " are not done yet",
                "see status: it says what they wait for", true);
  if (!p_.gate.told())
    throw Error(Code::state, "this site's gate has not been released yet", "see status: is its process up?", true);
}

std::int64_t Attempt::open(Millis lease, Deadline deadline) {
  {
    Lock lock(mutex_);
    check_can_open(known(lock));
  }
  // An attempt in one direction, begun while the other side has not finished the last one, would leave both waiting
  // for each other.
  AttemptPeer::State there = p_.peer.state(deadline);
  Lock lock(mutex_);
  const Record& r = known(lock);
  check_can_open(r);
  const Record& t = there.record;
  bool steady = t.settled && t.serves == p_.side && t.epoch <= r.epoch && there.gate_told &&
                (t.decision == Decision::serving || t.decision == Decision::prepared || t.decision == Decision::refused);
  if (!steady)
    throw Error(Code::state, "the other site has not finished its last attempt: it says " + title(t) + " of epoch " +
                                 std::to_string(t.epoch) + (t.settled ? "" : ", not settled") +
                                 (there.gate_told ? "" : ", and its gate has not been told"),
                "see status", true);
  Record next = r;
  next.attempt = std::max(r.attempt, t.attempt) + 1;
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
  p_.peer.ready(attempt, epoch, deadline);
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
    if (r.forced && !serves_here(r)) throw Error(Code::conflict, "a person opened the other site without attempt " + std::to_string(attempt), "see status on both sites");
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
      // Not earlier: before the last hard fence is up, a write can still be acknowledged here.
      p_.peer.prepared_soon(attempt, r.epoch);
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
    if (r.decision != Decision::commit) {
      // Answered while this thread waited for the other one.
      bool refused = serves_here(r);
      if (!refused && r.forced) return {PeerAnswer::What::pending, reason_};
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
  Record next = r;
  if (a.what == PeerAnswer::What::opened) {
    times_["opened_ms"] = ms_between(from, p_.clock.now());
    times_["taking"] = a.times;
    next.decision = Decision::serving;
    write(lock, next);
    tell_gate(lock, Millis(200));
    times_["released_ms"] = ms_between(from, p_.clock.now());
    a.times = times_;
    return a;
  }
  // Not ABORT: one attempt never has both.
  next.epoch++;
  next.serves = p_.side;
  next.decision = Decision::refused;
  reason_ = "the other site refused: " + a.reason;
  write(lock, next);
  tell_gate(lock, Millis(0));
  return a;
}

void Attempt::abort(std::int64_t attempt, const std::string& reason) {
  Lock lock(mutex_);
  const Record& r = known(lock);
  if (r.attempt != attempt)
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " is not the last one", "see status");
  if (serves_here(r) && (r.decision == Decision::abort || r.decision == Decision::serving || r.decision == Decision::refused)) return;
  if (r.decision != Decision::attempt)
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " is committed: nobody undoes it",
                "the agents finish by themselves; reverse brings the traffic back");
  write_abort(lock, reason.empty() ? "the controller asked for it" : reason);
}

bool Attempt::wait_undone(std::int64_t attempt, Deadline deadline) {
  Lock lock(mutex_);
  while (true) {
    const Record& r = known(lock);
    bool undoing = r.decision == Decision::attempt || r.decision == Decision::abort || (r.decision == Decision::refused && serves_here(r));
    if (r.attempt != attempt || !undoing) return true;
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
    if (!r.settled && r.decision != Decision::abort && r.decision != Decision::refused && r.decision != Decision::attempt)
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
    if (r.decision != Decision::abort && r.decision != Decision::refused) throw Error(Code::state, "the run moved on: " + phase(r), "see status");
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

// T's half of "steady": what may follow it.
void Attempt::check_follows(const Record& r, const char* what, std::int64_t attempt, std::int64_t epoch) const {
  bool fits = !serves_here(r) && r.settled && attempt > r.attempt && epoch >= r.epoch &&
              (r.decision == Decision::serving || r.decision == Decision::prepared || r.decision == Decision::refused);
  if (!fits)
    throw Error(Code::conflict, std::string(what) + "(" + std::to_string(attempt) + ") of epoch " + std::to_string(epoch) +
                                    " does not follow " + title(r) + " of epoch " + std::to_string(r.epoch),
                "see status on both sites");
}

void Attempt::peer_ready(std::int64_t attempt, std::int64_t epoch) {
  {
    Lock lock(mutex_);
    check_follows(known(lock), "ATTEMPT", attempt, epoch);
  }
  // A set that cannot run is found now, when backing out is cheap.
  p_.hands.probe_set(ActionSet::open);
}

void Attempt::peer_prepared(std::int64_t attempt, std::int64_t epoch) {
  Lock lock(mutex_);
  const Record& r = known(lock);
  if (attempt <= r.attempt) return;  // the COMMIT overtook it, or it comes again
  check_follows(r, "PREPARED", attempt, epoch);
  Record next = r;
  next.decision = Decision::prepared;
  next.attempt = attempt;
  next.epoch = epoch;
  next.forced = false;
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
    if (r.attempt == attempt && r.decision == Decision::refused && !serves_here(r))
      return {PeerAnswer::What::refused, reason_, times_};
    bool stored = r.attempt == attempt && r.decision == Decision::stored;
    bool prepared = r.attempt == attempt && r.decision == Decision::prepared && r.epoch + 1 == epoch;
    if (!stored && !prepared) check_follows(r, "COMMIT", attempt, epoch - 1);
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
      // PREPARED may have come in between; nothing else writes while this thread has duty_, but a person.
      if (next.attempt > attempt || serves_here(next) || next.epoch >= epoch) return {PeerAnswer::What::pending, "the record changed"};
      next.attempt = attempt;
      next.forced = false;
      if (!refusal.empty()) {
        next.decision = Decision::refused;
        reason_ = refusal;
        write(lock, next);
        return {PeerAnswer::What::refused, refusal, Json::object()};
      }
      next.epoch = epoch;
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
    // First: the set may start services.
    p_.hands.allow_services();
    p_.hands.run_set(ActionSet::open, attempt, epoch);
  } catch (const Error& e) {
    lock.lock();
    failed(lock, "opening the stores", e);
    return {PeerAnswer::What::pending, e.message, times_};
  }
  lock.lock();
  times_["open_ms"] = ms_between(from, p_.clock.now());
  Record next = known(lock);
  // A person opened the other site meanwhile; what is open here is closed again next.
  if (next.seq != r.seq) return {PeerAnswer::What::pending, "the record changed", times_};
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
  bool was_returning = returning_until_ != 0;
  returning_until_ = 0;
  // The yielding site aborted: what was prepared must not be opened by anybody later.
  if (r.decision == Decision::prepared && peers.attempt >= r.attempt && peers.epoch >= r.epoch &&
      peers.serves == other(p_.side) && (peers.decision == Decision::abort || peers.decision == Decision::serving ||
                                         peers.decision == Decision::cancelled || peers.decision == Decision::refused)) {
    r.decision = Decision::serving;
    r.epoch = peers.epoch;
    write(lock, r);
    return;
  }
  // Each believes that it serves: somebody opened the other one by force. The higher epoch wins; of two equal ones,
  // which take two people, the source's.
  bool both = serves_here(r) && peers.serves == other(p_.side) && peers.decision != Decision::commit &&
              (peers.epoch > r.epoch || (peers.epoch == r.epoch && p_.side == AgentSide::target));
  // A person opened the other site, which had never heard of this COMMIT and can take it no more; of the same attempt it says that it is open.
  bool without = r.decision == Decision::commit && peers.serves == other(p_.side) && peers.attempt != r.attempt &&
                 (peers.epoch >> 32) > (r.epoch >> 32);
  if (!both && !without) {
    if (was_returning) tell_gate(lock, Millis(0));
    return;
  }
  r.decision = Decision::serving;
  r.serves = other(p_.side);
  r.epoch = peers.epoch;
  r.attempt = std::max(r.attempt, peers.attempt);
  r.forced = true;
  r.settled = false;
  lease_end_ = 0;
  reason_ = "the other site was opened without this one";
  p_.hands.log("closing: " + reason_);
  write(lock, r);
  tell_gate(lock, Millis(200));
}

// Above all that either side can have reached without a person: their lower halves never carry over.
std::int64_t Attempt::epoch_by_hand() const {
  return ((std::max(p_.record.current().epoch, peer_epoch_) >> 32) + 1) << 32;
}

Record Attempt::force_open() {
  Lock lock(mutex_);
  Record r = known(lock);
  const Record before = r;
  if (serves_here(r) && r.decision == Decision::stored) return before;  // it opens by itself
  if (serves_here(r)) {
    if (r.forced) return before;
    throw Error(Code::state, "this site serves already: " + phase(r), "see status");
  }
  if (r.decision == Decision::commit || (r.decision == Decision::serving && r.attempt > 0 && !r.forced && !r.settled))
    throw Error(Code::state, "this site has just yielded; the other one is to be opened", "see reverse --target-is-gone");
  r.epoch = epoch_by_hand();
  r.decision = Decision::stored;
  r.serves = p_.side;
  r.forced = true;
  r.settled = false;
  write(lock, r);
  // A gate that goes on sending to the lost host would make a circle when that one comes back and sends here.
  tell_gate(lock, Millis(1000));
  return before;
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
  r.epoch = epoch_by_hand();
  r.decision = Decision::refused;
  r.serves = p_.side;
  r.forced = true;
  r.settled = false;
  reason_ = "reopened by hand: the other site is gone";
  write(lock, r);
  tell_gate(lock, Millis(1000));
}

}  // namespace rehome
