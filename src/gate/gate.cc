#include "gate/gate.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "sys/fs.h"

namespace rehome {
namespace {

constexpr std::size_t kBuffer = 64 * 1024;
constexpr std::size_t kConnectingAtOnce = 64;   // a release must not fill the application's backlog
constexpr char kRefusal[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n";

void make_nonblocking(const Fd& fd) { ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK); }

// "PROXY TCP4 source destination sport dport\r\n", or UNKNOWN for what is not TCP.
std::string proxy_line(int fd) {
  sockaddr_storage from{}, to{};
  socklen_t a = sizeof from, b = sizeof to;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&from), &a) != 0 || ::getsockname(fd, reinterpret_cast<sockaddr*>(&to), &b) != 0)
    return "PROXY UNKNOWN\r\n";
  char f[INET6_ADDRSTRLEN], t[INET6_ADDRSTRLEN];
  if (from.ss_family == AF_INET) {
    auto *x = reinterpret_cast<sockaddr_in*>(&from), *y = reinterpret_cast<sockaddr_in*>(&to);
    ::inet_ntop(AF_INET, &x->sin_addr, f, sizeof f);
    ::inet_ntop(AF_INET, &y->sin_addr, t, sizeof t);
    return std::string("PROXY TCP4 ") + f + " " + t + " " + std::to_string(ntohs(x->sin_port)) + " " + std::to_string(ntohs(y->sin_port)) + "\r\n";
  }
  if (from.ss_family == AF_INET6) {
    auto *x = reinterpret_cast<sockaddr_in6*>(&from), *y = reinterpret_cast<sockaddr_in6*>(&to);
    ::inet_ntop(AF_INET6, &x->sin6_addr, f, sizeof f);
    ::inet_ntop(AF_INET6, &y->sin6_addr, t, sizeof t);
    return std::string("PROXY TCP6 ") + f + " " + t + " " + std::to_string(ntohs(x->sin6_port)) + " " + std::to_string(ntohs(y->sin6_port)) + "\r\n";
  }
  return "PROXY UNKNOWN\r\n";
}

}  // namespace

const char* gate_state_name(GateState s) {
  switch (s) {
    case GateState::OPEN_LOCAL: return "OPEN_LOCAL";
    case GateState::OPEN_PEER: return "OPEN_PEER";
    case GateState::HELD: return "HELD";
    case GateState::SEALED: return "SEALED";
  }
  return "?";
}

std::vector<GateRoute> read_gate_routes(const Json& j) {
  std::vector<GateRoute> routes;
  for (const auto& r : j.at("routes")) {
    GateRoute route;
    route.name = get_string(r, "name");
    route.listen = Address::parse(get_string(r, "listen"));
    route.local = Address::parse(get_string(r, "local"));
    route.peer = Address::parse(get_string(r, "peer"));
    if (r.contains("marked")) route.marked = Address::parse(get_string(r, "marked"));
    route.proxy_protocol = get_bool(r, "proxy_protocol", false);
    route.max_waiting = static_cast<std::size_t>(get_int(r, "max_waiting", 10000));
    route.max_wait_ms = get_int(r, "max_wait_ms", 30000);
    routes.push_back(route);
  }
  return routes;
}

// What an epoll event points to.
struct Gate::Watched {
  enum class Kind { control_listener, listener, marked_listener, client, backend, control } kind;
  Route* route = nullptr;
  Connection* connection = nullptr;
  Control* control = nullptr;
  std::uint32_t events = 0;
  bool added = false;
};

struct Gate::Route {
  GateRoute config;
  Fd listener, marked;
  Watched listener_watch{.kind = Watched::Kind::listener}, marked_watch{.kind = Watched::Kind::marked_listener};
  std::int64_t accepted = 0, from_peer = 0, to_peer = 0, refused = 0;
  std::size_t waiting = 0;
};

struct Gate::Connection {
  enum class Phase { waiting, connecting, open } phase = Phase::waiting;
  std::uint64_t id = 0;
  Route* route = nullptr;
  Fd client, backend;
  Watched client_watch{.kind = Watched::Kind::client}, backend_watch{.kind = Watched::Kind::backend};
  bool from_peer = false, to_peer = false, counted_held = false, closing = false;
  std::string up, down;              // towards the backend, towards the client
  std::size_t up_at = 0, down_at = 0;
  bool client_ended = false, backend_ended = false, up_shut = false, down_shut = false;
  bool client_spoke = false, backend_spoke = false;
  std::string kept;                  // what the client said before the peer's first answer: for another try elsewhere
  bool kept_whole = true;
  Ticks since = 0, opened = 0, retry_at = 0;
};

struct Gate::Control {
  std::uint64_t id = 0;
  Fd fd;
  Watched watch{.kind = Watched::Kind::control};
  std::string in, out;
};

Gate::Gate(std::string state_directory, std::map<std::string, Fd> inherited)
    : state_directory_(std::move(state_directory)), inherited_(std::move(inherited)), epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) throw errno_error(errno, "make", "an epoll");
  make_directories(state_directory_ + "/run");
  control_listener_ = listen_on({.path = state_directory_ + "/run/gate.sock"}, 0600);
  make_nonblocking(control_listener_);
  control_watch_ = std::make_unique<Watched>();
  control_watch_->kind = Watched::Kind::control_listener;
  watch(control_listener_.get(), control_watch_.get(), EPOLLIN);
  alive_ = system_clock().now();
}

Gate::~Gate() = default;

void Gate::watch(int fd, Watched* what, std::uint32_t events) {
  if (what->added && what->events == events) return;
  epoll_event e{};
  e.events = events;
  e.data.ptr = what;
  if (::epoll_ctl(epoll_.get(), what->added ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &e) != 0) throw errno_error(errno, "watch", "a socket");
  what->added = true;
  what->events = events;
}

void Gate::load() {
  std::string path = state_directory_ + "/gate.json";
  if (!exists(path)) return;
  auto wanted = read_gate_routes(parse_json(read_file(path), path));
  for (auto it = routes_.begin(); it != routes_.end();) {
    bool keep = std::any_of(wanted.begin(), wanted.end(), [&](const GateRoute& r) { return r.name == it->first; });
    if (!keep) {
      // Its connections live on; nobody new comes.
      for (auto& [id, c] : connections_)
        if (c->route == it->second.get()) close_connection(*c);
      it = routes_.erase(it);
    } else {
      ++it;
    }
  }
  for (const auto& r : wanted) {
    auto& route = routes_[r.name];
    if (route) {
      route->config = r;
      continue;
    }
    route = std::make_unique<Route>();
    route->config = r;
    auto open = [&](const std::string& name, const Address& at, unsigned mode) {
      if (auto it = inherited_.find(name); it != inherited_.end()) {
        Fd fd = std::move(it->second);
        inherited_.erase(it);
        return fd;
      }
      return listen_on(at, mode, 4096);
    };
    // The proxy in front runs as another account.
    route->listener = open(r.name, r.listen, 0666);
    make_nonblocking(route->listener);
    route->listener_watch.route = route.get();
    watch(route->listener.get(), &route->listener_watch, EPOLLIN);
    if (r.marked) {
      route->marked = open(r.name + ".marked", *r.marked, 0600);
      make_nonblocking(route->marked);
      route->marked_watch.route = route.get();
      watch(route->marked.get(), &route->marked_watch, EPOLLIN);
    }
  }
}

bool Gate::in_flight(const Connection& c) const { return c.phase != Connection::Phase::waiting && !c.closing; }

std::int64_t Gate::count_in_flight() const {
  std::int64_t n = 0;
  for (const auto& [id, c] : connections_) n += in_flight(*c);
  return n;
}

void Gate::accept_all(Route& route, bool marked) {
  for (int i = 0; i < 256; i++) {
    Fd fd(::accept4((marked ? route.marked : route.listener).get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) return;   // nobody more, or out of descriptors: level-triggered, asked again
    int one = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);   // fails on unix sockets, which need none
    auto c = std::make_unique<Connection>();
    c->id = next_id_++;
    c->route = &route;
    c->client = std::move(fd);
    c->from_peer = marked;
    c->client_watch.connection = c->backend_watch.connection = c.get();
    route.accepted++;
    if (marked) route.from_peer++;
    Connection& ref = *c;
    connections_[ref.id] = std::move(c);
    start_waiting(ref, system_clock().now());
  }
}

void Gate::start_waiting(Connection& c, Ticks since) {
  c.phase = Connection::Phase::waiting;
  c.since = since;
  c.counted_held = false;
  c.route->waiting++;
  if (c.route->waiting > c.route->config.max_waiting) {
    refuse(c);
    return;
  }
  waiting_.push_back(c.id);
  interest(c);
}

void Gate::refuse(Connection& c) {
  dropped_++;
  c.route->refused++;
  ::send(c.client.get(), kRefusal, sizeof kRefusal - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
  ::shutdown(c.client.get(), SHUT_WR);
  close_connection(c);
}

void Gate::close_connection(Connection& c) {
  if (c.closing) return;
  c.closing = true;
  if (c.phase == Connection::Phase::waiting) c.route->waiting--;
  if (c.phase == Connection::Phase::connecting) connecting_--;
  doomed_.push_back(c.id);   // events of this round may still point to it
}

void Gate::feed_waiting() {
  Ticks now = system_clock().now();
  std::size_t n = waiting_.size();
  for (std::size_t i = 0; i < n; i++) {
    std::uint64_t id = waiting_.front();
    waiting_.pop_front();
    auto it = connections_.find(id);
    if (it == connections_.end() || it->second->closing || it->second->phase != Connection::Phase::waiting) continue;
    Connection& c = *it->second;
    if (gate_state_ == GateState::OPEN_PEER && c.from_peer) {
      // Never back through the link: nothing of it was read, so its own gate can send it elsewhere.
      close_connection(c);
      continue;
    }
    if (ms_between(c.since, now) > static_cast<double>(c.route->config.max_wait_ms)) {
      refuse(c);
      continue;
    }
    bool open = gate_state_ == GateState::OPEN_LOCAL || gate_state_ == GateState::OPEN_PEER;
    if (!open) {
      if (!c.counted_held) held_++, c.counted_held = true;
      waiting_.push_back(id);
      continue;
    }
    if (connecting_ >= kConnectingAtOnce || now < c.retry_at) {
      waiting_.push_back(id);
      continue;
    }
    connect_backend(c);
  }
}

void Gate::connect_backend(Connection& c) {
  c.to_peer = gate_state_ == GateState::OPEN_PEER;
  const Address& to = c.to_peer ? c.route->config.peer : c.route->config.local;
  sockaddr_storage storage{};
  socklen_t size = 0;
  if (to.is_unix()) {
    auto* un = reinterpret_cast<sockaddr_un*>(&storage);
    un->sun_family = AF_UNIX;
    std::strncpy(un->sun_path, to.path.c_str(), sizeof un->sun_path - 1);
    size = sizeof *un;
  } else if (auto* v4 = reinterpret_cast<sockaddr_in*>(&storage); ::inet_pton(AF_INET, to.host == "localhost" ? "127.0.0.1" : to.host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(to.port);
    size = sizeof *v4;
  } else {
    auto* v6 = reinterpret_cast<sockaddr_in6*>(&storage);
    *v6 = {};
    ::inet_pton(AF_INET6, to.host.c_str(), &v6->sin6_addr);
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(to.port);
    size = sizeof *v6;
  }
  c.backend = Fd(::socket(storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  c.backend_watch.added = false;
  int rc = c.backend ? ::connect(c.backend.get(), reinterpret_cast<sockaddr*>(&storage), size) : -1;
  if (rc != 0 && errno != EINPROGRESS) {
    // The application is restarting, or its backlog is full: again in a moment, until the client's patience ends.
    c.backend.reset();
    c.retry_at = after(system_clock(), Millis(20));
    waiting_.push_back(c.id);
    return;
  }
  c.route->waiting--;
  c.phase = Connection::Phase::connecting;
  connecting_++;
  if (rc == 0)
    backend_ready(c);
  else
    interest(c);
}

void Gate::backend_ready(Connection& c) {
  int err = 0;
  socklen_t size = sizeof err;
  ::getsockopt(c.backend.get(), SOL_SOCKET, SO_ERROR, &err, &size);
  connecting_--;
  if (err) {
    c.backend.reset();
    c.backend_watch.added = false;
    c.phase = Connection::Phase::waiting;
    c.route->waiting++;
    c.retry_at = after(system_clock(), Millis(20));
    waiting_.push_back(c.id);
    interest(c);
    return;
  }
  int one = 1;
  ::setsockopt(c.backend.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  c.phase = Connection::Phase::open;
  c.opened = system_clock().now();
  if (c.counted_held) longest_wait_ms_ = std::max(longest_wait_ms_, ms_between(c.since, c.opened));
  if (c.to_peer) c.route->to_peer++;
  if (!c.to_peer && c.route->config.proxy_protocol && c.kept.empty()) c.up = proxy_line(c.client.get());
  c.up += c.kept;
  if (!c.to_peer) c.kept.clear();
  pump(c);
}

// The backend is gone. A peer that closed before its first answer byte gave the connection back.
void Gate::backend_lost(Connection& c) {
  if (c.to_peer && !c.backend_spoke && c.kept_whole && !c.client_ended) {
    c.backend.reset();
    c.backend_watch.added = false;
    c.backend_ended = c.up_shut = false;
    c.up.clear();
    c.up_at = 0;
    c.down.clear();
    c.down_at = 0;
    c.retry_at = after(system_clock(), Millis(5));
    start_waiting(c, c.since);
    return;
  }
  close_connection(c);
}

void Gate::pump(Connection& c) {
  if (c.phase != Connection::Phase::open || c.closing) return;
  char chunk[kBuffer];
  for (int round = 0; round < 8; round++) {
    bool moved = false;
    if (!c.client_ended && c.up_at == c.up.size()) {
      ssize_t n = ::recv(c.client.get(), chunk, sizeof chunk, MSG_DONTWAIT);
      if (n > 0) {
        c.up.assign(chunk, static_cast<std::size_t>(n));
        c.up_at = 0;
        c.client_spoke = moved = true;
        if (c.to_peer && !c.backend_spoke && c.kept_whole) {
          c.kept.append(chunk, static_cast<std::size_t>(n));
          if (c.kept.size() > kBuffer) c.kept_whole = false, c.kept.clear();
        }
      } else if (n == 0) {
        c.client_ended = true;
      } else if (errno != EAGAIN && errno != EINTR) {
        close_connection(c);
        return;
      }
    }
    if (!c.backend_ended && c.down_at == c.down.size()) {
      ssize_t n = ::recv(c.backend.get(), chunk, sizeof chunk, MSG_DONTWAIT);
      if (n > 0) {
        c.down.assign(chunk, static_cast<std::size_t>(n));
        c.down_at = 0;
        c.backend_spoke = moved = true;
        c.kept.clear();
      } else if (n == 0) {
        c.backend_ended = true;
        if (!c.backend_spoke) return backend_lost(c);
      } else if (errno != EAGAIN && errno != EINTR) {
        return backend_lost(c);
      }
    }
    auto push = [&](const Fd& to, std::string& data, std::size_t& at) {
      while (at < data.size()) {
        ssize_t n = ::send(to.get(), data.data() + at, data.size() - at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n <= 0) return n < 0 && (errno == EAGAIN || errno == EINTR);
        at += static_cast<std::size_t>(n);
        moved = true;
      }
      data.clear();
      at = 0;
      return true;
    };
    if (!push(c.backend, c.up, c.up_at)) {
      // A backend may answer and close before it has read all of an upload: its answer still counts.
      if (!c.backend_spoke) return backend_lost(c);
      c.up.clear();
      c.up_at = 0;
      c.client_ended = true;
    }
    if (!push(c.client, c.down, c.down_at)) {
      close_connection(c);
      return;
    }
    if (!moved) break;
  }
  if (c.client_ended && c.up.empty() && !c.up_shut) {
    c.up_shut = true;
    ::shutdown(c.backend.get(), SHUT_WR);
  }
  if (c.backend_ended && c.down.empty() && !c.down_shut) {
    c.down_shut = true;
    ::shutdown(c.client.get(), SHUT_WR);
  }
  // The backend's end is the end: what the client still says has nobody to hear it.
  if (c.backend_ended && c.down.empty()) {
    close_connection(c);
    return;
  }
  interest(c);
}

void Gate::interest(Connection& c) {
  std::uint32_t client = 0, backend = 0;
  if (c.phase == Connection::Phase::open) {
    if (!c.client_ended && c.up_at == c.up.size()) client |= EPOLLIN;
    if (c.down_at < c.down.size()) client |= EPOLLOUT;
    if (!c.backend_ended && c.down_at == c.down.size()) backend |= EPOLLIN;
    if (c.up_at < c.up.size()) backend |= EPOLLOUT;
  } else if (c.phase == Connection::Phase::connecting) {
    backend = EPOLLOUT;
  }
  watch(c.client.get(), &c.client_watch, client);
  if (c.backend) watch(c.backend.get(), &c.backend_watch, backend);
}

void Gate::set_state(GateState state) {
  gate_state_ = state;
  if (state != GateState::HELD && state != GateState::SEALED) return;
  // Connections on which nobody has said anything yet lose nothing by waiting for the other side.
  Ticks now = system_clock().now();
  for (auto& [id, c] : connections_) {
    if (c->closing || c->client_spoke || c->backend_spoke || c->phase == Connection::Phase::waiting) continue;
    if (c->phase == Connection::Phase::connecting) connecting_--;
    c->backend.reset();
    c->backend_watch.added = false;
    c->up.clear();
    c->up_at = 0;
    start_waiting(*c, now);
  }
}

Json Gate::status() {
  Json routes = Json::array();
  std::map<Route*, std::int64_t> flying;
  Ticks oldest = 0, now = system_clock().now();
  for (const auto& [id, c] : connections_)
    if (in_flight(*c)) {
      flying[c->route]++;
      if (c->opened && (!oldest || c->opened < oldest)) oldest = c->opened;
    }
  std::int64_t waiting = 0;
  for (const auto& [name, r] : routes_) {
    waiting += static_cast<std::int64_t>(r->waiting);
    routes.push_back({{"name", name}, {"accepted", r->accepted}, {"in_flight", flying[r.get()]}, {"waiting", r->waiting},
                      {"from_peer", r->from_peer}, {"to_peer", r->to_peer}, {"refused", r->refused}});
  }
  return {{"state", gate_state_name(gate_state_)}, {"attempt", attempt_}, {"in_flight", count_in_flight()}, {"waiting", waiting},
          {"oldest_ms", oldest ? static_cast<std::int64_t>(ms_between(oldest, now)) : 0}, {"routes", routes},
          {"ledger", {{"held", held_}, {"longest_wait_ms", longest_wait_ms_}, {"dropped", dropped_}, {"cut", cut_}}}};
}

Json Gate::answer(const Json& request) {
  std::string op = get_string(request, "op");
  if (op == "alive") {
    alive_ = system_clock().now();
    return {{"state", gate_state_name(gate_state_)}};
  }
  if (op == "status" || op == "hello") return status();
  if (op == "hold") {
    std::int64_t attempt = get_int(request, "attempt");
    if (gate_state_ == GateState::SEALED && before_hold_ != GateState::SEALED && attempt != attempt_)
      throw Error(Code::state, "the gate is sealed for attempt " + std::to_string(attempt_), "only its agent unseals it");
    if (gate_state_ != GateState::HELD && gate_state_ != GateState::SEALED) before_hold_ = gate_state_;
    attempt_ = attempt;
    timer_ms_ = get_int(request, "timer_ms");
    alive_ = system_clock().now();
    if (gate_state_ != GateState::SEALED) set_state(GateState::HELD);
    return status();
  }
  if (op == "seal") {
    std::int64_t attempt = get_int(request, "attempt");
    if (gate_state_ == GateState::SEALED && attempt == attempt_) return status();
    if (gate_state_ != GateState::HELD)
      throw Error(Code::state, std::string("the gate is ") + gate_state_name(gate_state_) + ", not HELD: it cannot be sealed", "the attempt is over");
    attempt_ = attempt;
    set_state(GateState::SEALED);
    return status();
  }
  if (op == "release") {
    std::string to = get_string(request, "to");
    if (to != "local" && to != "peer") throw Error(Code::usage, "release takes to: local or peer");
    set_state(to == "local" ? GateState::OPEN_LOCAL : GateState::OPEN_PEER);
    feed_waiting();
    return {{"state", gate_state_name(gate_state_)}};
  }
  if (op == "cut") {
    std::int64_t n = 0;
    for (auto& [id, c] : connections_)
      if (in_flight(*c)) close_connection(*c), n++;
    cut_ += n;
    return {{"cut", n}};
  }
  if (op == "ledger.reset") {
    held_ = dropped_ = cut_ = 0;
    longest_wait_ms_ = 0;
    return Json::object();
  }
  if (op == "reload") {
    load();
    return status();
  }
  throw Error(Code::usage, "the gate has no op '" + op + "'");
}

void Gate::serve_control(Control& control) {
  char chunk[4096];
  ssize_t n = ::recv(control.fd.get(), chunk, sizeof chunk, MSG_DONTWAIT);
  if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
    controls_.erase(control.id);
    return;
  }
  if (n > 0) control.in.append(chunk, static_cast<std::size_t>(n));
  for (auto nl = control.in.find('\n'); nl != std::string::npos; nl = control.in.find('\n')) {
    std::string line = control.in.substr(0, nl);
    control.in.erase(0, nl + 1);
    Json reply;
    try {
      reply = answer(parse_json(line, "a request to the gate"));
      reply["ok"] = true;
    } catch (const Error& e) {
      reply = {{"error", error_to_json(e)}};
    }
    control.out += dump_line(reply) + "\n";
  }
  // Answers are small and the agent reads them: one that does not is let go.
  if (!control.out.empty()) {
    ssize_t sent = ::send(control.fd.get(), control.out.data(), control.out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent != static_cast<ssize_t>(control.out.size())) {
      controls_.erase(control.id);
      return;
    }
    control.out.clear();
  }
}

void Gate::loop_once() {
  epoll_event events[256];
  bool pending = !waiting_.empty() && (gate_state_ == GateState::OPEN_LOCAL || gate_state_ == GateState::OPEN_PEER);
  int n = ::epoll_wait(epoll_.get(), events, 256, pending ? 5 : 50);
  if (n < 0 && errno != EINTR) throw errno_error(errno, "wait for", "events");
  for (int i = 0; i < n; i++) {
    auto* w = static_cast<Watched*>(events[i].data.ptr);
    switch (w->kind) {
      case Watched::Kind::control_listener: {
        Fd fd(::accept4(control_listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
        if (!fd) break;
        auto control = std::make_unique<Control>();
        control->id = next_id_++;
        control->fd = std::move(fd);
        control->watch.control = control.get();
        watch(control->fd.get(), &control->watch, EPOLLIN);
        controls_[control->id] = std::move(control);
        break;
      }
      case Watched::Kind::listener: accept_all(*w->route, false); break;
      case Watched::Kind::marked_listener: accept_all(*w->route, true); break;
      case Watched::Kind::control: serve_control(*w->control); break;
      case Watched::Kind::client:
        if (w->connection->closing) break;
        if (w->connection->phase == Connection::Phase::open) {
          pump(*w->connection);
        } else if (events[i].events & (EPOLLHUP | EPOLLERR)) {
          close_connection(*w->connection);   // gave up waiting
        }
        break;
      case Watched::Kind::backend:
        if (w->connection->closing) break;
        if (w->connection->phase == Connection::Phase::connecting)
          backend_ready(*w->connection);
        else
          pump(*w->connection);
        break;
    }
  }
  Ticks now = system_clock().now();
  if (gate_state_ == GateState::HELD && ms_between(alive_, now) > static_cast<double>(timer_ms_)) set_state(before_hold_);
  feed_waiting();
  for (std::uint64_t id : doomed_) connections_.erase(id);
  doomed_.clear();
}

void Gate::run(const std::atomic<bool>& stop, std::atomic<bool>& reload) {
  load();
  while (!stop) {
    if (reload) {
      reload = false;
      load();
    }
    loop_once();
  }
}

}  // namespace rehome
