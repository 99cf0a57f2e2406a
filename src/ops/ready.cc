// The time before a pause: what passes by itself is waited for, and told once.
#include <algorithm>

#include "base/text.h"
#include "ops/life.h"

namespace rehome::ops {
namespace {

class Waiting {
 public:
  Waiting(Run& run, bool when_ready) : run_(run), when_ready_(when_ready) {}
  // In a night of waiting a server is started again, a link is down for seconds.
  bool outlasts(const Error& e) const { return when_ready_ && e.passes(); }
  // Once, not every second for a day: the lag in it changes all the time, so words are compared without their numbers.
  void tell(const std::string& why) {
    std::string words = why;
    std::erase_if(words, [](char ch) { return ch >= '0' && ch <= '9'; });
    if (words == said_) return;
    try {
      run_.journal().append("message", {{"text", "not yet: " + why}});
    } catch (const Error& e) {
      if (!outlasts(e)) throw;
    }
    said_ = words;
  }

 private:
  Run& run_;
  bool when_ready_;
  std::string said_;
};

// The deployment's own checks of the side that is to take over; written down the first time.
void require_checks(Run& run, Side side, bool told) {
  std::string failed;
  for (const auto& r : run_checks(run, side)) {
    if (!told) run.journal().append("check", {{"name", r.name}, {"side", side_name(r.side)}, {"ok", r.ok}, {"ms", r.ms}, {"said", r.said}});
    if (!r.ok) failed += "\n  " + r.name + " on the " + std::string(side_name(r.side)) + ": " + r.said;
  }
  if (!failed.empty()) throw Error(Code::check_failed, "checks failed:" + failed, "mend the service there, then repeat the command");
}

}  // namespace

void require_not_stopped() {
  if (cancel_flag()) throw Error(Code::interrupted, "stopped before the pause", "switch again when you like");
}

void Switchover::await_following(Deadline deadline, bool when_ready) {
  Waiting waiting(run_, when_ready);
  for (auto& store : run_.stores()) {
    while (true) {
      require_not_stopped();
      FollowStatus status;
      try {
        status = store->follow_status(run_.stores_context());
      } catch (const Error& e) {
        if (!waiting.outlasts(e) || deadline.passed()) throw;
        status = {.coming = true, .trouble = e.what()};
      }
      if (status.following) break;
      const std::string why = store->name() + " does not follow: " + status.trouble;
      if (!status.coming) throw Error(Code::state, why, "see status, then rehome resume");
      if (deadline.passed()) throw Error(Code::timeout, why, "it does so by itself in a while: wait for it, or switch --when-ready");
      waiting.tell(why);
      system_clock().sleep(Millis(200));
    }
  }
}

Prediction wait_until_ready(Run& run, Switchover& switchover, Millis patience, bool when_ready) {
  Waiting waiting(run, when_ready);
  Deadline deadline = Deadline::in(patience);
  while (true) {
    try {
      switchover.prepare(deadline, when_ready);
      require_checks(run, switchover.takes_over(), false);
      break;
    } catch (const Error& e) {
      if (!waiting.outlasts(e) || deadline.passed()) throw;
      waiting.tell(e.what());
      require_not_stopped();
      system_clock().sleep(Millis(1000));
    }
  }
  deadline = Deadline::in(patience);
  MicroFences fences;
  Deadline renew = Deadline::in(Millis(60'000)), look = Deadline::in(Millis(5'000));
  std::vector<std::string> last;   // what the last measurement found in the way
  std::string amiss;               // what the last look at the services that take over has
  while (true) {
    require_not_stopped();
    Prediction p;
    try {
      if (renew.passed()) {
        switchover.renew();
        renew = Deadline::in(Millis(60'000));
      }
      p = switchover.predict(nullptr);
      // Hours may have gone since: a service that ended meanwhile must not be found out by its clients.
      if (p.obstacles.empty() && look.passed()) {
        amiss.clear();
        try {
          switchover.require_services();
          require_checks(run, switchover.takes_over(), true);
        } catch (const Error& e) {
          if (!when_ready || e.code == Code::conflict || e.code == Code::interrupted) throw;
          amiss = e.what();
        }
        look = Deadline::in(Millis(5'000));
      }
      if (!amiss.empty()) p.obstacles.push_back(amiss);
      if (p.obstacles.empty()) {
        if (fences.allowed()) {
          p = switchover.predict(&fences);
          if (p.obstacles.empty()) return p;
          last = p.obstacles;
        } else {
          p.obstacles = last;
        }
      }
    } catch (const Error& e) {
      if (!waiting.outlasts(e)) throw;
      p.obstacles.push_back(e.what());
    }
    waiting.tell(join(p.obstacles, "; "));
    if (deadline.passed())
      throw Error(Code::timeout, "no switch now: " + join(p.obstacles, "; "),
                  when_ready ? "see status" : "use --when-ready to wait for the moment");
    system_clock().sleep(Millis(1000));
  }
}

}  // namespace rehome::ops
