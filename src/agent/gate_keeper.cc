#include "agent/gate_keeper.h"

#include "sys/fs.h"

namespace rehome {
namespace {

constexpr Millis kAlive{500};

}  // namespace

void GateKeeper::start() {
  thread_ = std::thread([this] { loop(); });
}

void GateKeeper::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

bool GateKeeper::exists() const { return rehome::exists(state_ + "/gate.json"); }

Json GateKeeper::say(const Json& request, Deadline deadline) {
  if (!client_ || !client_->usable()) {
    client_.reset();
    fresh_ = true;
    client_ = std::make_unique<AgentClient>(state_ + "/run/gate.sock", deadline);
  }
  try {
    return client_->ask(request, deadline);
  } catch (const Error& e) {
    if (!client_->usable()) client_.reset();
    throw Error(e).in("gate");
  }
}

bool GateKeeper::tell(Deadline deadline) {
  GateWish wish;
  std::int64_t attempt;
  std::uint64_t version;
  Json hold;
  {
    std::lock_guard lock(mutex_);
    wish = wish_;
    attempt = attempt_;
    version = version_;
    hold = hold_;
    if (version == told_ && !fresh_ && client_) return true;
  }
  try {
    if (!client_) say({{"op", "alive"}}, deadline);
    switch (wish) {
      case GateWish::none: break;
      case GateWish::local: say({{"op", "release"}, {"to", "local"}}, deadline); break;
      case GateWish::peer: say({{"op", "release"}, {"to", "peer"}}, deadline); break;
      case GateWish::hold:
        // A gate that starts holds by itself; the controller's hold gives it back its timer.
        if (!hold.is_null()) say(hold, deadline);
        break;
      case GateWish::sealed:
        say({{"op", "hold"}, {"attempt", attempt}, {"timer_ms", 60'000}}, deadline);
        say({{"op", "seal"}, {"attempt", attempt}}, deadline);
        break;
    }
    fresh_ = false;
    std::lock_guard lock(mutex_);
    told_ = version;
    error_.clear();
    return true;
  } catch (const Error& e) {
    std::lock_guard lock(mutex_);
    if (error_ != e.what()) log_(std::string(e.what()));
    error_ = e.what();
    return false;
  }
}

void GateKeeper::wish(GateWish wish, std::int64_t attempt, Millis wait) {
  {
    std::lock_guard lock(mutex_);
    if (wish == wish_ && attempt == attempt_) return;
    if (wish != GateWish::hold || attempt != attempt_) hold_ = nullptr;
    wish_ = wish;
    attempt_ = attempt;
    version_++;
    log_("gate: " + std::string(name_of(wish)));
  }
  if (!exists()) return;
  if (wait.count() > 0) {
    Deadline deadline = Deadline::in(wait);
    std::unique_lock talking(talking_, std::defer_lock);
    if (talking.try_lock_for(wait) && tell(deadline)) return;
  }
  std::lock_guard lock(mutex_);
  changed_.notify_all();
}

void GateKeeper::seal(std::int64_t attempt, Deadline deadline) {
  if (!exists()) return;
  std::unique_lock talking(talking_, std::defer_lock);
  if (!talking.try_lock_for(deadline.left(Millis(5000))))
    throw Error(Code::timeout, "the gate is busy", "", true);
  say({{"op", "seal"}, {"attempt", attempt}}, deadline);
  std::lock_guard lock(mutex_);
  if ((wish_ != GateWish::hold && wish_ != GateWish::sealed) || attempt_ != attempt) {
    // The attempt was given up while the gate answered: it is told again what it is to do.
    version_++;
    changed_.notify_all();
    throw Error(Code::state, "attempt " + std::to_string(attempt) + " was given up while its gate was sealed");
  }
  // From here a gate that restarts gets no timer back.
  wish_ = GateWish::sealed;
  hold_ = nullptr;
}

bool GateKeeper::told() const {
  if (!exists()) return true;
  std::lock_guard lock(mutex_);
  return told_ == version_ && error_.empty();
}

Json GateKeeper::ask(const Json& request, Deadline deadline) {
  if (!exists()) throw Error(Code::state, "this site has no gate", "send gate.set first");
  std::unique_lock talking(talking_, std::defer_lock);
  if (!talking.try_lock_for(deadline.left(Millis(5000)))) throw Error(Code::timeout, "the gate is busy", "", true);
  const std::string op = get_string(request, "op");
  if ((op == "hold" || op == "cut") && request.contains("attempt")) {
    std::lock_guard lock(mutex_);
    // It may have waited behind another request, and its attempt be undone by now: nobody would release the gate again.
    const std::int64_t n = get_int(request, "attempt");
    const bool yields = (wish_ == GateWish::hold || wish_ == GateWish::sealed) && attempt_ == n;
    if (!yields && !(op == "hold" && wish_ == GateWish::peer && attempt_ < n))
      throw Error(Code::state, "attempt " + std::to_string(n) + " ended while the gate was busy", "try again");
    if (op == "hold") hold_ = request;
  }
  return say(request, deadline);
}

void GateKeeper::let_go(std::int64_t attempt) {
  std::lock_guard lock(mutex_);
  if (hold_.is_null() || wish_ == GateWish::hold || get_int(hold_, "attempt", 0) > attempt) return;
  hold_ = nullptr;
  version_++;
  changed_.notify_all();
}

Json GateKeeper::release(const std::string& to, Deadline deadline) {
  {
    std::lock_guard lock(mutex_);
    if (to != name_of(wish_))
      throw Error(Code::state, "the gate is not to be released to " + to + ": the record says " + std::string(name_of(wish_)),
                  "attempt.abort and attempt.commit release it");
    hold_ = nullptr;
  }
  return ask({{"op", "release"}, {"to", to}}, deadline);
}

void GateKeeper::loop() {
  while (!stopping_) {
    if (exists()) {
      std::unique_lock talking(talking_, std::defer_lock);
      if (talking.try_lock_for(Millis(100))) {
        Deadline deadline = Deadline::in(Millis(1000));
        try {
          say({{"op", "alive"}}, deadline);
        } catch (const Error&) {
          // tell() says what is wrong
        }
        tell(deadline);
      }
    }
    std::unique_lock lock(mutex_);
    Deadline next = Deadline::in(told_ == version_ && error_.empty() ? kAlive : Millis(100));
    std::uint64_t version = version_;
    while (!stopping_ && version == version_ && !next.passed()) changed_.wait_for(lock, next.left(Millis(100)));
  }
}

Json GateKeeper::status() const {
  std::lock_guard lock(mutex_);
  Json j{{"wish", name_of(wish_)}, {"told", told_ == version_}};
  if (!error_.empty()) j["error"] = error_;
  return j;
}

}  // namespace rehome
