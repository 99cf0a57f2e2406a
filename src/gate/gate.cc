#include "gate/gate.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "gate/proxy.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

// Waiting connections are connected at this rate, and so many of a route at a time, so that an application that has just been given
// its clients is not run over by all that have gathered.
constexpr double kStartsPerMs = 20;
constexpr std::size_t kConnectingAtOnce = 128;
constexpr Ticks kMs = 1'000'000;
constexpr Ticks kLinger = 2000 * kMs;
constexpr int kLingerRounds = 16;
constexpr Ticks kSpent = 5000 * kMs;

constexpr std::string_view kSorry =
    "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n";

void set_nonblocking(int fd) { ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK); }

// Lets the packet filter lead connections to other ports here, or not any more. An inherited socket may have been made
// for another configuration.
void set_transparent(int fd, const RouteConfig& config) {
  if (config.listen.is_unix()) return;
  sockaddr_storage at{};
  socklen_t size = sizeof at;
  int on = config.transparent;
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&at), &size);
  int rc = at.ss_family == AF_INET6 ? ::setsockopt(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &on, sizeof on)
                                    : ::setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &on, sizeof on);
  // Taking it away needs no right on most kernels; where it does, it was never there.
  if (rc != 0 && config.transparent)
    throw errno_error(errno, "take connections of other ports at", config.listen.text(), "run the gate as root");
}

}  // namespace

std::string_view gate_state_name(GateState s) {
  switch (s) {
    case GateState::open_local: return "OPEN_LOCAL";
    case GateState::open_peer: return "OPEN_PEER";
    case GateState::held: return "HELD";
    case GateState::sealed: return "SEALED";
  }
  return "?";
}

Gate::Gate(std::string state, std::map<std::string, Fd> inherited, int signals)
    : state_dir_(std::move(state)), inherited_(std::move(inherited)), signals_(signals) {
  raise_file_limit();
  epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_) throw errno_error(errno, "make", "an epoll instance");
  watch(wake_.get(), &wake_slot_, false);
  if (signals_ >= 0) watch(signals_, &signal_slot_, false);
  make_directories(state_dir_ + "/run");
  make_directories(state_dir_ + "/log");
  open_control();
}

Gate::~Gate() = default;

void Gate::stop() {
  std::uint64_t one = 1;
  [[maybe_unused]] ssize_t n = ::write(wake_.get(), &one, sizeof one);
}

void Gate::watch(int fd, Slot* slot, bool edge) {
  epoll_event e{};
  e.events = edge ? EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET : EPOLLIN;
  e.data.ptr = slot;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &e) != 0) throw errno_error(errno, "watch", "a socket");
}

// ---- routes

bool Gate::open_listeners(Route& route) {
  auto open = [&](Fd& fd, const Address& at, const std::string& name, Slot* slot, unsigned mode) {
    if (fd || !is_set(at)) return;
    auto given = inherited_.find(name);
    if (given != inherited_.end()) {
      fd = std::move(given->second);
      inherited_.erase(given);
    } else {
      if (at.is_unix()) make_directories(parent_path(at.path));
      fd = listen_on(at, mode, 4096);
    }
    set_nonblocking(fd.get());
    watch(fd.get(), slot, false);
  };
  try {
    open(route.listen, route.config.listen, route.config.name, &route.listen_slot, route.config.listen_mode);
    set_transparent(route.listen.get(), route.config);
    open(route.marked, route.config.marked, route.config.name + ".marked", &route.marked_slot, 0600);
    route.trouble.clear();
    return true;
  } catch (const Error& e) {
    if (route.trouble != e.what()) log("route " + route.config.name + ": " + e.what());
    route.trouble = e.what();
    return false;
  }
}

void Gate::reload() {
  std::vector<RouteConfig> wanted = parse_routes(read_file(state_dir_ + "/gate.json"));
  std::map<std::string, std::shared_ptr<Route>> next;
  for (RouteConfig& c : wanted) {
    auto old = routes_.find(c.name);
    std::shared_ptr<Route> route = old != routes_.end() ? old->second : std::make_shared<Route>();
    route->listen_slot = {Slot::Kind::listener, route.get()};
    route->marked_slot = {Slot::Kind::marked_listener, route.get()};
    if (route->config.listen.text() != c.listen.text()) route->listen.reset();
    if (route->config.marked.text() != c.marked.text()) route->marked.reset();
    route->config = std::move(c);
    next[route->config.name] = std::move(route);
  }
  for (auto& [name, route] : routes_) {
    if (next.contains(name)) continue;
    // Its connections go on; only the listeners end.
    route->removed = true;
    route->listen.reset();
    route->marked.reset();
    route_graves_.push_back(route);
  }
  routes_ = std::move(next);
  have_routes_ = true;
  std::string troubles;
  for (auto& [name, route] : routes_)
    if (!open_listeners(*route)) troubles += (troubles.empty() ? "" : "; ") + route->trouble;
  log("routes: " + std::to_string(routes_.size()));
  if (!troubles.empty()) throw Error(Code::io, troubles, "free the address; the gate tries again every second", true);
}

void Gate::accept_all(Route& route, bool marked) {
  Fd& listener = marked ? route.marked : route.listen;
  for (int i = 0; i < 256 && listener; i++) {
    Fd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno != EAGAIN) {
        // Out of descriptors or memory. The backlog keeps them; a level-triggered listener would only spin.
        note_often(std::string("cannot accept: ") + std::strerror(errno));
        ::poll(nullptr, 0, 5);
      }
      return;
    }
    int one = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    ::setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    route.accepted++;
    if (marked) route.from_peer++;
    std::string name = marked ? std::string() : proxy_line(fd.get());
    auto owned = std::make_unique<Conn>(std::move(fd), routes_.at(route.config.name), marked, std::move(name), now_);
    Conn& conn = *owned;
    conn.prelude_done = !marked && !route.config.accept_proxy;
    conns_[&conn] = std::move(owned);
    watch(conn.client.get(), &conn.client_slot, true);
    wait(conn, 0);
    if (route.waiting > route.config.max_waiting) {
      refuse(conn);
    } else if (route.waiting == 1 && !marked) {
      start(conn);  // nobody is in front of it
    }
  }
}

// ---- connections

// Puts it into the queue, at the end, until it is attached.
void Gate::wait(Conn& conn, Ticks retry_at) {
  conn.phase = Conn::Phase::waiting;
  conn.retry_at = retry_at;
  if (conn.waiting_key) return;
  conn.waiting_key = next_key_++;
  // A connection that is tried over and over waits since the first time.
  if (conn.tries == 0) conn.wait_since = now_;
  waiting_[conn.waiting_key] = &conn;
  conn.route->waiting++;
  if ((at_ == GateState::held || at_ == GateState::sealed) && !conn.counted_held) {
    conn.counted_held = true;
    ledger_.held++;
  }
}

void Gate::unqueue(Conn& conn) {
  if (!conn.waiting_key) return;
  if (conn.counted_held) {
    ledger_.longest_wait_ms = std::max(ledger_.longest_wait_ms, ms_between(conn.wait_since, now_));
    conn.counted_held = false;
  }
  waiting_.erase(conn.waiting_key);
  conn.waiting_key = 0;
  conn.route->waiting--;
}

void Gate::serve_waiting() {
  if (now_ > pace_at_) {
    pace_ = std::min(4 * kStartsPerMs, pace_ + kStartsPerMs * static_cast<double>(now_ - pace_at_) / kMs);
    pace_at_ = now_;
  }
  if (at_ == GateState::held || at_ == GateState::sealed) return;
  for (auto it = waiting_.begin(); it != waiting_.end() && pace_ >= 1;) {
    Conn& conn = *it->second;
    ++it;  // start() may take it out
    if (conn.phase != Conn::Phase::waiting || conn.retry_at > now_ || !conn.prelude_done || conn.route->connecting >= kConnectingAtOnce) continue;
    pace_ -= 1;
    start(conn);
  }
}

void Gate::start(Conn& conn) {
  if (at_ == GateState::held || at_ == GateState::sealed || !conn.prelude_done) return;
  bool peer = at_ == GateState::open_peer;
  if (peer && conn.marked) {
    return end_gently(conn, "B");  // its own gate kept the client's bytes, and serves it
  }
  const Address& where = peer ? conn.route->config.peer : conn.route->config.local;
  if (!is_set(where)) return try_later(conn);
  int error = 0;
  try {
    conn.server = begin_connect(where, error, peer ? 0 : conn.route->config.mark);
    if (error != 0 && error != EINPROGRESS) {
      conn.server.reset();
      return try_later(conn);
    }
    watch(conn.server.get(), &conn.server_slot, true);
  } catch (const Error& e) {
    note_often(e.what());
    conn.server.reset();
    return try_later(conn);
  }
  conn.to_peer = peer;
  conn.phase = Conn::Phase::connecting;
  conn.route->connecting++;
  if (error == 0) connected(conn);
}

// The connection behind it stands.
void Gate::connected(Conn& conn) {
  conn.route->connecting--;
  conn.server_writable = true;
  int one = 1;
  ::setsockopt(conn.server.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  if (conn.to_peer) {
    const std::string& line = conn.client_name;
    conn.phase = Conn::Phase::greeting;
    if (::send(conn.server.get(), line.data(), line.size(), MSG_NOSIGNAL | MSG_DONTWAIT) !=
        static_cast<ssize_t>(line.size()))
      try_later(conn);
    return;
  }
  if (int version = conn.route->config.proxy_protocol) conn.up = version == 2 ? proxy_version_2(conn.client_name) : conn.client_name;
  conn.phase = Conn::Phase::attached;
  work(conn);
}

void Gate::try_later(Conn& conn) {
  if (conn.phase == Conn::Phase::connecting) conn.route->connecting--;
  if (conn.phase == Conn::Phase::attached) {
    // A client waits since it asked. What is kept was held up by the other gate; one that has said nothing was waiting for nobody.
    if (!conn.kept.empty()) {
      conn.wait_since = std::max(conn.wait_since, conn.last_move);
    } else if (now_ - conn.attached_at > 1000 * kMs) {
      conn.tries = 0;
      conn.wait_since = now_;
    }
  }
  conn.detach();
  conn.tries++;
  wait(conn, now_ + std::min(200, 10 * conn.tries) * kMs);
}

void Gate::refuse(Conn& conn) {
  if (conn.phase == Conn::Phase::connecting) conn.route->connecting--;
  unqueue(conn);
  conn.server.reset();
  if (conn.marked) {
    return end_gently(conn, "B");  // its own gate has its own limits
  }
  ledger_.dropped++;
  conn.route->refused++;
  end_gently(conn, conn.route->config.refuse_with_503 ? kSorry : "");
}

// Says the last word and reads on until the client ends: closing with unread bytes would be a reset, which could overtake it.
void Gate::end_gently(Conn& conn, std::string_view last) {
  unqueue(conn);
  ::send(conn.client.get(), last.data(), last.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(conn.client.get(), SHUT_WR);
  conn.phase = Conn::Phase::lingering;
  conn.last_move = now_;
  conn.client_readable = true;
  lingering_.insert(&conn);
  on_client(conn, 0);
}

void Gate::drop(Conn& conn) {
  if (conn.phase == Conn::Phase::connecting) conn.route->connecting--;
  unqueue(conn);
  busy_.erase(&conn);
  lingering_.erase(&conn);
  spent_.erase(&conn);
  conn.phase = Conn::Phase::dead;
  conn.client.reset();
  conn.server.reset();
  auto it = conns_.find(&conn);
  if (it == conns_.end()) return;
  graves_.push_back(std::move(it->second));
  conns_.erase(it);
}

// On hold: a connection of which neither side has seen a byte of the other goes back to the queue.
void Gate::pull_back(Conn& conn) {
  if (conn.phase == Conn::Phase::connecting) conn.route->connecting--;
  busy_.erase(&conn);
  conn.detach();
  conn.tries = 0;
  wait(conn, 0);
}

void Gate::on_client(Conn& conn, std::uint32_t events) {
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) conn.client_readable = true;
  if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) conn.client_writable = true;
  switch (conn.phase) {
    case Conn::Phase::attached:
      return work(conn);
    case Conn::Phase::lingering: {
      char buf[16384];
      // Not all that comes: who sends as fast as this reads would have the thread for itself.
      for (int round = 0; round < kLingerRounds; round++) {
        ssize_t n = ::recv(conn.client.get(), buf, sizeof buf, MSG_DONTWAIT);
        if (n > 0 || (n < 0 && errno == EINTR)) continue;
        if (n == 0 || errno != EAGAIN) return drop(conn);
        busy_.erase(&conn);
        return;
      }
      busy_.insert(&conn);
      return;
    }
    case Conn::Phase::waiting:
    case Conn::Phase::connecting:
    case Conn::Phase::greeting:
      // The client gave up (both ways: a half-closed one still waits for its answer).
      if (events & (EPOLLHUP | EPOLLERR)) return drop(conn);
      if (!conn.prelude_done && conn.client_readable) {
        bool ready = conn.read_prelude();
        if (conn.phase == Conn::Phase::dead) {
          if (!conn.marked) note_often("route " + conn.route->config.name + ": a connection began without a PROXY header");
          return drop(conn);
        }
        if (ready && conn.route->waiting == 1) start(conn);
      }
      return;
    case Conn::Phase::dead:
      return;
  }
}

void Gate::on_server(Conn& conn, std::uint32_t events) {
  if (!conn.server) return;
  if (conn.phase == Conn::Phase::connecting) {
    // An event of an earlier connection may come here: only the socket itself tells.
    pollfd p{conn.server.get(), POLLOUT, 0};
    if (::poll(&p, 1, 0) <= 0) return;
    int err = 0;
    socklen_t size = sizeof err;
    ::getsockopt(conn.server.get(), SOL_SOCKET, SO_ERROR, &err, &size);
    if (err != 0) return try_later(conn);
    if (events & EPOLLIN) conn.server_readable = true;
    connected(conn);
    if (conn.phase != Conn::Phase::greeting) return;
  }
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) conn.server_readable = true;
  if (events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) conn.server_writable = true;
  if (conn.phase == Conn::Phase::greeting && conn.server_readable) {
    if (conn.read_greeting() == Conn::After::reroute) return try_later(conn);
    if (conn.phase == Conn::Phase::attached) work(conn);
    return;
  }
  if (conn.phase == Conn::Phase::attached) work(conn);
}

void Gate::work(Conn& conn) {
  if (conn.waiting_key) {
    unqueue(conn);
    conn.attached_at = now_;
    if (conn.to_peer) {
      conn.route->to_peer++;
      std::int64_t second = now_ / (1000 * kMs);
      Route::Second& cell = conn.route->to_peer_seconds[static_cast<std::size_t>(second % 60)];
      if (cell.second != second) cell = {second, 0};
      cell.count++;
    }
  }
  bool more = false;
  switch (conn.pump(now_, more)) {
    case Conn::After::go_on:
      if (more) busy_.insert(&conn);
      else busy_.erase(&conn);
      if (conn.spent()) spent_.insert(&conn);
      return;
    case Conn::After::reroute:
      busy_.erase(&conn);
      return try_later(conn);
    case Conn::After::end:
      if (!conn.up_broken) return drop(conn);
      // Answered before its client had sent all: what still comes must not become a reset, which could overtake the answer.
      busy_.erase(&conn);
      spent_.erase(&conn);
      conn.server.reset();
      return end_gently(conn, "");
    case Conn::After::broken:
      // Of a marked connection too: through a unix socket the other gate sees only an end.
      if (!conn.client_broke) {
        ledger_.resets++;
        conn.route->resets++;
        (conn.to_peer ? ledger_.reset_by_peer : ledger_.reset_by_application)++;
      }
      conn.reset_both();
      return drop(conn);
  }
}

bool Gate::in_flight(const Conn& conn) const {
  if (conn.phase != Conn::Phase::attached) return false;
  // Answered and ended by the application; the client's own end changes nothing any more.
  return !(conn.spent() && now_ - conn.last_move >= 20 * kMs);
}

// ---- time

void Gate::tick() {
  if (at_ == GateState::held && now_ >= alive_until_)
    enter(before_hold_, "the agent was not heard for " + std::to_string(timer_.count()) + " ms");
  if (now_ < next_tick_) return;
  next_tick_ = now_ + 20 * kMs;
  std::vector<Conn*> over;
  for (auto& [key, conn] : waiting_)
    if (now_ - conn->wait_since >= conn->route->config.max_wait.count() * kMs) over.push_back(conn);
  for (Conn* conn : over) refuse(*conn);
  over.clear();
  for (Conn* conn : lingering_)
    if (now_ - conn->last_move >= kLinger) over.push_back(conn);
  // A client that never closes what its application closed is not kept for ever.
  for (Conn* conn : spent_)
    if (now_ - conn->last_move >= kSpent) over.push_back(conn);
  for (Conn* conn : over) drop(*conn);
  if (now_ >= next_reload_) {
    next_reload_ = now_ + (have_routes_ ? 1000 : 50) * kMs;
    if (!have_routes_ && exists(state_dir_ + "/gate.json")) {
      try {
        reload();
      } catch (const Error& e) {
        log(e.what());
        next_reload_ = now_ + 1000 * kMs;
      }
    }
    for (auto& [name, route] : routes_)
      if (!route->trouble.empty()) open_listeners(*route);
  }
}

// Milliseconds that epoll_wait may sleep.
int Gate::patience() const {
  if (!busy_.empty()) return 0;
  bool open = at_ == GateState::open_local || at_ == GateState::open_peer;
  if (open && !waiting_.empty()) return 1;
  if (!have_routes_) return 50;
  if (at_ == GateState::held || !waiting_.empty()) return 10;
  if (!lingering_.empty() || !spent_.empty()) return 100;
  return 1000;
}

void Gate::run() {
  epoll_event events[512];
  now_ = entered_at_ = system_clock().now();
  while (running_) {
    tick();
    serve_waiting();
    graves_.clear();
    asking_graves_.clear();
    route_graves_.clear();
    int n = ::epoll_wait(epoll_.get(), events, 512, patience());
    if (n < 0 && errno != EINTR) throw errno_error(errno, "epoll_wait", "the gate");
    now_ = system_clock().now();
    for (int i = 0; i < n; i++) {
      Slot* slot = static_cast<Slot*>(events[i].data.ptr);
      std::uint32_t e = events[i].events;
      switch (slot->kind) {
        case Slot::Kind::listener: accept_all(*static_cast<Route*>(slot->owner), false); break;
        case Slot::Kind::marked_listener: accept_all(*static_cast<Route*>(slot->owner), true); break;
        case Slot::Kind::control: answer_all(); break;
        case Slot::Kind::asking: on_asking(*static_cast<Asking*>(slot->owner)); break;
        case Slot::Kind::client: on_client(*static_cast<Conn*>(slot->owner), e); break;
        case Slot::Kind::server: on_server(*static_cast<Conn*>(slot->owner), e); break;
        case Slot::Kind::wake: running_ = false; break;
        case Slot::Kind::signals: {
          signalfd_siginfo info{};
          if (::read(signals_, &info, sizeof info) != sizeof info) break;
          if (info.ssi_signo != SIGHUP) {
            running_ = false;
            break;
          }
          try {
            reload();
          } catch (const Error& err) {
            log(err.what());
          }
          break;
        }
      }
    }
    std::vector<Conn*> again(busy_.begin(), busy_.end());
    for (Conn* conn : again) {
      if (conn->phase == Conn::Phase::attached) work(*conn);
      else if (conn->phase == Conn::Phase::lingering) on_client(*conn, 0);
    }
  }
}

}  // namespace rehome
