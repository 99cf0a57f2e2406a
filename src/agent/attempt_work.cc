// The part of the state machine that goes on by itself: what a record leaves to be done, one bounded piece at a time.
#include <algorithm>

#include "agent/attempt.h"

namespace rehome {
namespace {

constexpr Millis kIdle{1000};
constexpr Millis kMostBackoff{2000};

}  // namespace

void Attempt::wake() {
  Lock lock(mutex_);
  woken_ = true;
  not_before_ = 0;
  changed_.notify_all();
}

void Attempt::wait_for_work(Millis most, const std::atomic<bool>& stop) {
  Lock lock(mutex_);
  Deadline end = Deadline::in(most);
  while (!woken_ && !stop && !end.passed()) changed_.wait_for(lock, end.left(Millis(200)));
}

bool Attempt::unchanged(Lock&, std::uint64_t seq) const {
  return p_.record.known() && p_.record.current().seq == seq;
}

Millis Attempt::failed(Lock&, const std::string& doing, const Error& e) {
  waiting_for_ = doing + ": " + e.message;
  p_.hands.log(waiting_for_ + "; tried again in " + std::to_string(backoff_.count()) + " ms");
  Millis wait = backoff_;
  not_before_ = after(p_.clock, wait);
  backoff_ = std::min(backoff_ * 2, kMostBackoff);
  return wait;
}

Millis Attempt::work() {
  {
    Lock lock(mutex_);
    woken_ = false;
    if (!p_.record.loaded()) {
      if (p_.clock.now() < not_before_) return kIdle;
      not_before_ = after(p_.clock, kIdle);
      lock.unlock();
      start();
      return Millis(10);
    }
  }
  // Somebody else runs actions: the other agent's commit.
  std::unique_lock duty(duty_, std::try_to_lock);
  if (!duty) return Millis(20);
  Lock lock(mutex_);
  if (!p_.record.known()) return resolve_unknown(lock);
  if (p_.record.current().decision == Decision::attempt) {
    if (!lease_over()) return std::min(Millis(50), Millis((lease_end_ - p_.clock.now()) / 1'000'000 + 1));
    try {
      write_abort(lock, "the lease ended");
    } catch (const Error& e) {
      return failed(lock, "making the abort durable", e);
    }
    tell_gate(lock, Millis(0));
  }
  if (returning_until_ != 0 && p_.clock.now() >= returning_until_) {
    p_.hands.log("the other site was not heard; this one serves on");
    returning_until_ = 0;
    tell_gate(lock, Millis(0));
  }
  // A person may have opened the other site meanwhile: no store opens, and no service is started, before that is known.
  if (returning_until_ != 0) return Millis(20);
  if (Ticks now = p_.clock.now(); now < not_before_) return Millis((not_before_ - now) / 1'000'000 + 1);
  return one_duty(lock);
}

Millis Attempt::resolve_unknown(Lock& lock) {
  if (p_.clock.now() < not_before_) return Millis(20);
  Record next = p_.record.wanted();
  // Nobody was told the number of an attempt whose ATTEMPT failed, and no lease runs for a COMMIT that came too late;
  // nothing was sent or undone, so either decision is as good as the other.
  if (next.decision == Decision::attempt || (next.decision == Decision::commit && lease_over())) {
    next = p_.record.current();
    next.attempt = p_.record.wanted().attempt;
    next.decision = Decision::abort;
    next.settled = false;
    reason_ = "the record could not be written";
    lease_end_ = 0;
  }
  try {
    write(lock, next);
  } catch (const Error& e) {
    return failed(lock, "writing the record", e);
  }
  if (next.decision == Decision::opened) tails_by_ = p_.clock.now();
  tell_gate(lock, Millis(0));
  return Millis(0);
}

Millis Attempt::one_duty(Lock& lock) {
  const Record r = p_.record.current();
  switch (r.decision) {
    case Decision::abort: undo(lock); break;
    case Decision::commit:
      lock.unlock();
      try {
        p_.hands.forbid_services();
      } catch (const Error& e) {
        p_.hands.log(std::string("start condition: ") + e.what());
      }
      {
        PeerAnswer a;
        try {
          a = send_commit(Deadline(p_.clock, Millis(5000)));
        } catch (const Error& e) {
          a.reason = e.message;  // the record: the next round resolves it
        }
        lock.lock();
        if (a.what == PeerAnswer::What::pending && unchanged(lock, r.seq))
          return failed(lock, "the other site to open its stores", Error(Code::unreachable, a.reason));
      }
      break;
    case Decision::stored:
      lock.unlock();
      try {
        open_stores(r.attempt, r.epoch);
      } catch (const Error& e) {
        p_.hands.log(e.what());  // the record: the next round resolves it
      }
      lock.lock();
      break;
    case Decision::serving:
      if (!r.settled && !serves_here(r)) {
        tails_of_yielding(lock);
        break;
      }
      [[fallthrough]];
    case Decision::opened:
      if (r.decision == Decision::opened && !r.settled) {
        if (!tails_asked_ && p_.clock.now() < tails_by_) return Millis(20);
        tails_of_taking(lock);
        break;
      }
      [[fallthrough]];
    case Decision::refused:
      if (r.decision == Decision::refused && !r.settled) {
        undo(lock);
        break;
      }
      [[fallthrough]];
    case Decision::attempt:
    case Decision::cancelled:
    case Decision::prepared:
      if (p_.record.mirrored()) return kIdle;
      try {
        p_.record.settle();
      } catch (const Error& e) {
        return failed(lock, "writing the record's second block", e);
      }
      return kIdle;
  }
  if (not_before_ == 0) return Millis(0);
  Ticks now = p_.clock.now();
  return now >= not_before_ ? Millis(0) : Millis((not_before_ - now) / 1'000'000 + 1);
}

bool Attempt::run_steps(Lock& lock, const std::vector<Step>& steps) {
  const Record r = p_.record.current();
  if (duty_begun_ != static_cast<std::int64_t>(r.seq)) {
    duty_begun_ = static_cast<std::int64_t>(r.seq);
    duty_step_ = 0;
    for (const auto& s : steps)
      if (s.set) p_.hands.begin_set(*s.set);
  }
  while (duty_step_ < steps.size()) {
    const Step& s = steps[duty_step_];
    lock.unlock();
    try {
      s.set ? p_.hands.run_set(*s.set, r.attempt, r.epoch) : s.run();
    } catch (const Error& e) {
      lock.lock();
      if (unchanged(lock, r.seq)) failed(lock, s.name, e);
      return false;
    }
    lock.lock();
    // Another decision came meanwhile: its own duties are what counts now.
    if (!unchanged(lock, r.seq)) return false;
    duty_step_++;
    backoff_ = Millis(100);
    not_before_ = 0;
    waiting_for_.clear();
  }
  return true;
}

void Attempt::finish(Lock& lock, Record next) {
  next.settled = true;
  try {
    write(lock, next);
  } catch (const Error& e) {
    failed(lock, "making the end of the attempt durable", e);
    return;
  }
  tell_gate(lock, Millis(200));
}

void Attempt::undo(Lock& lock) {
  std::vector<Step> steps{
      {"ending the sessions of the attempt", {}, [this] { p_.hands.cut_relays(); }},
      {"undoing the attempt", ActionSet::undo, {}},
      {"thawing the services", {}, [this] { p_.hands.thaw(); }},
      // A disk that takes no change of a directory keeps none of the steps above from being done.
      {"allowing the services", {}, [this] { p_.hands.allow_services(); }},
      {"starting the services", {}, [this] { p_.hands.start_services(); }},
  };
  if (!run_steps(lock, steps)) return;
  Record next = p_.record.current();
  next.decision = Decision::serving;
  finish(lock, next);
}

std::vector<Attempt::Step> Attempt::yielding_steps(const Record& r) {
  auto forbid = [this] { p_.hands.forbid_services(); };
  auto kill = [this] { p_.hands.kill_frozen(); };
  if (r.forced)
    return {{"forbidding the services", {}, forbid},
            {"ending sessions", {}, [this] { p_.hands.cut_relays(); }},
            {"closing the stores", ActionSet::close, {}},
            {"killing frozen services", {}, kill}};
  // The other site's forward followers end before the reverse ones start: a stream that is still being applied there
  // would come back. Frozen services are killed and never thawed: a thawed one could still write a file.
  return {{"forbidding the services", {}, forbid},
          {"the tails of the other site", {}, [this, r] { p_.peer.tails(r.attempt, r.epoch, Deadline(p_.clock, Millis(5000))); }},
          {"killing frozen services", {}, kill},
          {"the tails of this site", ActionSet::tail_yields, {}}};
}

void Attempt::tails_of_yielding(Lock& lock) {
  if (run_steps(lock, yielding_steps(p_.record.current()))) finish(lock, p_.record.current());
}

void Attempt::tails_of_taking(Lock& lock) {
  if (run_steps(lock, {{"the tails of this site", ActionSet::tail_takes, {}}})) finish(lock, p_.record.current());
}

std::string Attempt::phase(const Record& r) const {
  bool here = serves_here(r);
  switch (r.decision) {
    case Decision::serving:
      if (!r.settled) return r.forced ? "closing" : "tails";
      return here ? "serving" : "closed";
    case Decision::attempt: return sealed_ == r.attempt ? "sealed" : "attempt";
    case Decision::commit: return "committed";
    case Decision::abort: return "undoing";
    case Decision::cancelled: return "cancelled";
    case Decision::prepared: return "prepared";
    case Decision::stored: return "opening";
    case Decision::opened: return r.settled ? "serving" : "tails";
    case Decision::refused: return here ? "undoing" : "refused";
  }
  return "unknown";
}

Json record_to_json(const Record& r) {
  return {{"seq", r.seq}, {"epoch", r.epoch}, {"attempt", r.attempt}, {"decision", name_of(r.decision)},
          {"serves", name_of(r.serves)}, {"forced", r.forced}, {"settled", r.settled}, {"wall_us", r.wall_us}};
}

Record record_from_json(const Json& j) {
  Record r;
  r.seq = static_cast<std::uint64_t>(get_int(j, "seq"));
  r.epoch = get_int(j, "epoch");
  r.attempt = get_int(j, "attempt");
  r.decision = decision_from(get_string(j, "decision"));
  r.serves = agent_side_from(get_string(j, "serves"));
  r.forced = get_bool(j, "forced");
  r.settled = get_bool(j, "settled");
  r.wall_us = get_int(j, "wall_us", 0);
  return r;
}

Json Attempt::status() const {
  Lock lock(mutex_);
  if (!p_.record.loaded()) return {{"phase", "record-error"}, {"record_error", error_}, {"waiting_for", "a readable record"}};
  const Record& r = p_.record.current();
  bool here = serves_here(r);
  bool yielded = !here && r.decision == Decision::serving && r.attempt > 0 && !r.forced;
  Json j = record_to_json(r);
  j["phase"] = p_.record.known() ? phase(r) : "unknown";
  j["undone"] = here && r.decision == Decision::serving && r.attempt > 0;
  j["opened"] = r.decision == Decision::opened || yielded;
  j["refused"] = r.decision == Decision::refused && !r.forced;
  j["sealed"] = sealed_ == r.attempt && r.decision == Decision::attempt;
  j["lease_left_ms"] = lease_over() ? 0 : (lease_end_ - p_.clock.now()) / 1'000'000;
  if (!waiting_for_.empty()) j["waiting_for"] = waiting_for_;
  if (!reason_.empty()) j["reason"] = reason_;
  j["times"] = times_;
  Json tails = Json::array();
  auto add = [&](const std::string& name, std::size_t step) {
    bool done = r.settled || (duty_begun_ == static_cast<std::int64_t>(r.seq) && duty_step_ > step);
    Json one{{"name", name}, {"done", done}};
    if (!done && duty_begun_ == static_cast<std::int64_t>(r.seq) && duty_step_ == step && !waiting_for_.empty())
      one["error"] = waiting_for_;
    tails.push_back(one);
  };
  if (yielded || (r.forced && r.decision == Decision::serving)) {
    std::size_t i = 0;
    for (const auto& s : const_cast<Attempt*>(this)->yielding_steps(r)) add(s.name, i++);
  } else if (r.decision == Decision::opened) {
    add("the tails of this site", 0);
  }
  j["tails"] = tails;
  return j;
}

bool Attempt::busy() const {
  Lock lock(mutex_);
  if (!p_.record.loaded()) return false;
  const Record& r = p_.record.current();
  return !p_.record.known() || r.decision == Decision::abort || r.decision == Decision::commit ||
         r.decision == Decision::stored || !r.settled;
}

std::optional<Record> Attempt::record() const {
  Lock lock(mutex_);
  if (!p_.record.loaded()) return std::nullopt;
  return p_.record.current();
}

std::string Attempt::record_error() const {
  Lock lock(mutex_);
  if (!p_.record.loaded()) return error_.empty() ? "the record has not been read yet" : error_;
  return p_.record.known() ? "" : "the record could not be written; it is being tried again";
}

Millis Attempt::lease_left() const {
  Lock lock(mutex_);
  return lease_over() ? Millis(0) : Millis((lease_end_ - p_.clock.now()) / 1'000'000);
}

}  // namespace rehome
