// The gate's control socket: its states, and what an agent may ask. The table is in docs/PROTOCOL.md.
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"
#include "gate/gate.h"
#include "sys/fs.h"

namespace rehome {
namespace {

constexpr Ticks kMs = 1'000'000;
constexpr std::size_t kLongestRequest = 1 << 20;

}  // namespace

void Gate::open_control() {
  log_ = Fd(::open((state_dir_ + "/log/gate.log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  control_ = listen_on({.path = state_dir_ + "/run/gate.sock", .host = {}, .port = 0}, 0600, 64);
  ::fcntl(control_.get(), F_SETFL, ::fcntl(control_.get(), F_GETFL) | O_NONBLOCK);
  watch(control_.get(), &control_slot_, false);
}

void Gate::log(const std::string& line) {
  if (!log_) return;
  std::string text = format_wall(system_clock().wall_us()) + " " + line + "\n";
  // A full disk must not stop clients.
  [[maybe_unused]] ssize_t n = ::write(log_.get(), text.data(), text.size());
}

void Gate::note_often(const std::string& line) {
  if (now_ < note_again_) return;
  note_again_ = now_ + 1000 * kMs;
  log(line);
}

void Gate::answer_all() {
  while (true) {
    Fd fd(::accept4(control_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) return;
    auto asking = std::make_unique<Asking>();
    asking->slot = {Slot::Kind::asking, asking.get()};
    asking->fd = std::move(fd);
    watch(asking->fd.get(), &asking->slot, false);
    askings_[asking.get()] = std::move(asking);
  }
}

void Gate::on_asking(Asking& asking) {
  if (!asking.fd) return;
  auto end = [&] {
    asking.fd.reset();
    auto it = askings_.find(&asking);
    asking_graves_.push_back(std::move(it->second));
    askings_.erase(it);
  };
  char buf[16384];
  ssize_t n = ::recv(asking.fd.get(), buf, sizeof buf, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) return end();
  asking.line.append(buf, static_cast<std::size_t>(n));
  for (std::size_t nl; (nl = asking.line.find('\n')) != std::string::npos;) {
    Json answer;
    try {
      answer = handle(parse_json(std::string_view(asking.line).substr(0, nl), "a request"));
      answer["ok"] = true;
      answer["state"] = gate_state_name(at_);
    } catch (const Error& e) {
      answer = Json{{"error", error_to_json(e)}};
    }
    asking.line.erase(0, nl + 1);
    std::string text = dump_line(answer) + "\n";
    // An agent that does not read its answers is cut off, rather than waited for.
    if (::send(asking.fd.get(), text.data(), text.size(), MSG_NOSIGNAL | MSG_DONTWAIT) !=
        static_cast<ssize_t>(text.size()))
      return end();
  }
  if (asking.line.size() > kLongestRequest) end();
}

void Gate::enter(GateState state, const std::string& why) {
  if (state != at_)
    log(std::string(gate_state_name(at_)) + " -> " + std::string(gate_state_name(state)) + ": " + why + ", " +
        std::to_string(waiting_.size()) + " waiting");
  GateState was = at_;
  at_ = state;
  if (state == was) return;
  entered_at_ = now_;
  if (state == GateState::held && was != GateState::sealed) {
    std::vector<Conn*> back;
    for (auto& [conn, owned] : conns_)
      if (conn->phase == Conn::Phase::connecting || conn->phase == Conn::Phase::greeting ||
          (conn->phase == Conn::Phase::attached && conn->movable()))
        back.push_back(conn);
    // In the order in which they came, for the queue's sake.
    std::sort(back.begin(), back.end(), [](Conn* a, Conn* b) { return a->accepted_at < b->accepted_at; });
    for (Conn* conn : back) pull_back(*conn);
    for (auto& [key, conn] : waiting_) {
      if (conn->counted_held) continue;
      conn->counted_held = true;
      ledger_.held++;
    }
  }
  if (state == GateState::open_local || state == GateState::open_peer) {
    // Those on their way to the place that serves no more try again.
    std::vector<Conn*> astray;
    for (auto& [key, conn] : waiting_) {
      conn->retry_at = 0;
      if (conn->phase != Conn::Phase::waiting && conn->to_peer != (state == GateState::open_peer)) astray.push_back(conn);
    }
    for (Conn* conn : astray) pull_back(*conn);
  }
}

std::int64_t Gate::cut(std::int64_t idle_ms) {
  std::vector<Conn*> chosen;
  for (auto& [conn, owned] : conns_)
    if (conn->phase == Conn::Phase::attached &&
        (idle_ms < 0 || (conn->idle() && now_ - conn->last_move >= idle_ms * kMs)))
      chosen.push_back(conn);
  std::int64_t count = 0;
  for (Conn* conn : chosen) {
    // A client whose answer is whole gets a clean end; the others must not take what they have for all there is.
    if (!(conn->idle() && now_ - conn->last_move >= 50 * kMs) && !conn->spent()) conn->reset_both();
    if (in_flight(*conn)) count++;
    drop(*conn);
  }
  ledger_.cut += count;
  if (count) log("cut " + std::to_string(count) + " connections");
  return count;
}

Json Gate::status(std::int64_t older_than_ms) {
  Json routes = Json::array();
  std::map<const Route*, std::int64_t> flying, flying_to_peer;
  std::int64_t in_flight_count = 0, idle_count = 0, older = 0;
  Ticks oldest = now_;
  for (auto& [conn, owned] : conns_) {
    if (!in_flight(*conn)) continue;
    flying[conn->route.get()]++;
    if (conn->to_peer) flying_to_peer[conn->route.get()]++;
    in_flight_count++;
    if (conn->idle()) idle_count++;
    oldest = std::min(oldest, conn->accepted_at);
    if (now_ - conn->accepted_at > older_than_ms * kMs) older++;
  }
  for (auto& [name, r] : routes_) {
    Json one{{"name", name},          {"accepted", r->accepted}, {"in_flight", flying[r.get()]}, {"waiting", r->waiting},
             {"from_peer", r->from_peer}, {"to_peer", r->to_peer},   {"refused", r->refused},
             {"resets", r->resets}};
    std::int64_t minute = 0;
    for (const Route::Second& cell : r->to_peer_seconds)
      if (cell.second > now_ / (1000 * kMs) - 60) minute += cell.count;
    one["to_peer_last_minute"] = minute;
    one["in_flight_to_peer"] = flying_to_peer[r.get()];
    if (!r->trouble.empty()) one["trouble"] = r->trouble;
    routes.push_back(std::move(one));
  }
  double longest = ledger_.longest_wait_ms;
  std::int64_t still = 0;
  for (auto& [key, conn] : waiting_) {
    if (!conn->counted_held) continue;
    still++;
    longest = std::max(longest, ms_between(conn->wait_since, now_));
  }
  return {{"attempt", attempt_},
          {"pid", ::getpid()},
          {"state_ms", static_cast<std::int64_t>(ms_between(entered_at_, now_))},
          {"in_flight", in_flight_count},
          {"idle", idle_count},
          {"waiting", waiting_.size()},
          {"oldest_ms", static_cast<std::int64_t>(ms_between(oldest, now_))},
          {"older", older},
          {"routes", std::move(routes)},
          {"ledger",
           {{"held", ledger_.held},
            {"still_held", still},
            {"longest_wait_ms", longest},
            {"dropped", ledger_.dropped},
            {"cut", ledger_.cut},
            {"resets", ledger_.resets},
            {"reset_by", {{"application", ledger_.reset_by_application}, {"peer", ledger_.reset_by_peer}}}}}};
}

Json Gate::handle(const Json& request) {
  if (!request.is_object()) throw Error(Code::usage, "a request is an object");
  std::string op = get_string(request, "op");
  std::string is = std::string(gate_state_name(at_));
  if (op == "hold") {
    std::int64_t attempt = get_int(request, "attempt"), timer = get_int(request, "timer_ms");
    if (timer <= 0) throw Error(Code::usage, "timer_ms must be positive");
    if (at_ == GateState::sealed && attempt_ != 0) {
      if (attempt_ == attempt) return Json::object();
      // It may be decided already: only a release, which says who serves, ends a seal.
      throw Error(Code::state, "the gate is sealed for attempt " + std::to_string(attempt_), "only its agent releases it");
    }
    if (at_ != GateState::held) before_hold_ = at_;
    attempt_ = attempt;
    timer_ = Millis(timer);
    alive_until_ = now_ + timer * kMs;
    enter(GateState::held, "attempt " + std::to_string(attempt));
    return Json::object();
  }
  if (op == "alive") {
    if (at_ == GateState::held) alive_until_ = now_ + timer_.count() * kMs;
    return Json::object();
  }
  if (op == "seal") {
    std::int64_t attempt = get_int(request, "attempt");
    if (at_ == GateState::sealed && (attempt_ == attempt || attempt_ == 0)) {
      attempt_ = attempt;
      return Json::object();
    }
    // Its timer may have let clients in meanwhile: what was proven since the hold is then proven no more.
    if (at_ != GateState::held)
      throw Error(Code::state, "the gate is " + is + " and can only be sealed when it is HELD",
                  "the hold's timer has ended it; the attempt is over");
    if (attempt != attempt_)
      throw Error(Code::conflict, "the gate is held for attempt " + std::to_string(attempt_) + ", not " +
                                      std::to_string(attempt));
    enter(GateState::sealed, "attempt " + std::to_string(attempt));
    return Json::object();
  }
  if (op == "release") {
    std::string to = get_string(request, "to");
    if (to != "local" && to != "peer") throw Error(Code::usage, "release is to local or peer, not '" + to + "'");
    enter(to == "local" ? GateState::open_local : GateState::open_peer, "released");
    return Json::object();
  }
  if (op == "cut") return {{"cut", cut(get_int(request, "idle_ms", -1))}};
  if (op == "status") return status(get_int(request, "older_than_ms", 0));
  if (op == "ledger.reset") {
    ledger_ = {};
    return Json::object();
  }
  if (op == "reload") {
    reload();
    return Json::object();
  }
  throw Error(Code::usage, "the gate knows no '" + op + "'");
}

}  // namespace rehome
