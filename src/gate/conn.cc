#include "gate/conn.h"

#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "gate/proxy.h"

namespace rehome {
namespace {

// One buffer for all connections of a gate, which is one thread: what cannot be written at once is kept in the connection, and then nothing more is
// read for that direction, so that a slow reader slows its writer.
thread_local char scratch[65536];
constexpr int kRounds = 16;

bool flush(const Fd& to, std::string& data, std::size_t& at, bool& writable, bool& broken) {
  while (at < data.size() && writable) {
    ssize_t n = ::send(to.get(), data.data() + at, data.size() - at, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      at += static_cast<std::size_t>(n);
    } else if (errno == EAGAIN) {
      writable = false;
    } else if (errno != EINTR) {
      broken = true;
      return false;
    }
  }
  if (at < data.size()) return false;
  data.clear();
  at = 0;
  if (data.capacity() > 4096) data.shrink_to_fit();  // an idle connection holds no buffers
  return true;
}

// Sends from the scratch buffer, and puts the rest into `data`.
void pass(const Fd& to, std::size_t count, std::string& data, bool& writable, bool& broken) {
  std::size_t at = 0;
  while (at < count && writable) {
    ssize_t n = ::send(to.get(), scratch + at, count - at, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      at += static_cast<std::size_t>(n);
    } else if (errno == EAGAIN) {
      writable = false;
    } else if (errno != EINTR) {
      broken = true;
      return;
    }
  }
  data.append(scratch + at, count - at);
}

}  // namespace

Conn::Conn(Fd client_fd, std::shared_ptr<Route> r, bool is_marked, std::string name, Ticks now)
    : client_slot{Slot::Kind::client, this},
      server_slot{Slot::Kind::server, this},
      route(std::move(r)),
      marked(is_marked),
      client(std::move(client_fd)),
      prelude_done(!is_marked),
      client_name(std::move(name)),
      accepted_at(now),
      wait_since(now),
      last_move(now) {}

bool Conn::read_prelude() {
  // Peeked, so that what follows the header stays unread.
  char head[kProxyMost];
  ssize_t n = ::recv(client.get(), head, sizeof head, MSG_PEEK | MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  auto header = n > 0 ? parse_proxy({head, static_cast<std::size_t>(n)}) : std::nullopt;
  if (header && header->size == 0) return false;
  if (!header || ::recv(client.get(), head, header->size, MSG_DONTWAIT) != static_cast<ssize_t>(header->size) ||
      (marked && ::send(client.get(), "T", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)) {
    phase = Phase::dead;
    return false;
  }
  client_name = header->line;
  prelude_done = true;
  return true;
}

Conn::After Conn::read_greeting() {
  char c;
  ssize_t n = ::recv(server.get(), &c, 1, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return After::go_on;
  if (n != 1 || c != 'T') return After::reroute;
  phase = Phase::attached;
  return After::go_on;
}

void Conn::say_go() {
  passed = true;
  if (!marked || go_said) return;
  go_said = true;
  down.push_back('G');
}

Conn::After Conn::pump_down(Ticks now, bool& more) {
  for (int round = 0;; round++) {
    bool broken = false;
    if (!flush(client, down, down_at, client_writable, broken)) {
      client_broke = broken;
      return broken ? After::broken : After::go_on;
    }
    if (server_eof) {
      if (!down_shut) ::shutdown(client.get(), SHUT_WR);
      down_shut = true;
      return After::go_on;
    }
    if (!server_readable) return After::go_on;
    if (round == kRounds) {
      more = true;
      return After::go_on;
    }
    bool framed = to_peer && !go_heard;
    ssize_t n = ::recv(server.get(), scratch, framed ? 1 : sizeof scratch, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {
      server_readable = false;
      return After::go_on;
    }
    if (framed) {
      if (n == 1 && scratch[0] == 'G') {
        go_heard = true;
        std::string().swap(kept);
        continue;
      }
      // Back; or the way to the peer broke while nothing of the client's was under way.
      if ((n == 1 && scratch[0] == 'B') || !passed) return After::reroute;
      return After::broken;
    }
    if (n <= 0) {
      // An application that went away under a request which it never saw: another try sees it.
      if (!passed && (client_readable || !kept.empty())) return After::reroute;
      if (n < 0) return After::broken;
      say_go();
      server_eof = true;
      continue;
    }
    say_go();
    last_move = now;
    server_last = true;
    if (!down.empty()) {
      down.append(scratch, static_cast<std::size_t>(n));
    } else {
      pass(client, static_cast<std::size_t>(n), down, client_writable, broken);
      if ((client_broke = broken)) return After::broken;
    }
  }
}

Conn::After Conn::pump_up(Ticks now, bool& more) {
  for (int round = 0; !up_broken; round++) {
    if (!flush(server, up, up_at, server_writable, up_broken)) break;
    if (client_eof) {
      if (!up_shut) ::shutdown(server.get(), SHUT_WR);
      up_shut = true;
      break;
    }
    if (!client_readable) break;
    if (round == kRounds) {
      more = true;
      break;
    }
    std::size_t most = sizeof scratch;
    if (to_peer && !go_heard) most = kKeptBytes - std::min(kKeptBytes, kept.size());
    if (most == 0) break;  // the peer's 'G' wakes us
    ssize_t n = ::recv(client.get(), scratch, most, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {
      client_readable = false;
      break;
    }
    if (n < 0) {
      client_broke = true;
      return After::broken;
    }
    say_go();
    if (n == 0) {
      client_eof = true;
      continue;
    }
    last_move = now;
    server_last = false;
    if (to_peer && !go_heard) kept.append(scratch, static_cast<std::size_t>(n));
    pass(server, static_cast<std::size_t>(n), up, server_writable, up_broken);
  }
  // A server that takes no more may still have an answer under way (a refused upload): reading tells.
  if (up_broken) {
    up.clear();
    up_at = 0;
    server_readable = true;
  }
  return After::go_on;
}

Conn::After Conn::pump(Ticks now, bool& more) {
  more = false;
  // Bytes that were sent to a peer, and handed back, are as good as read now.
  if (!to_peer && !kept.empty()) {
    say_go();
    last_move = now;
    server_last = false;
    up += kept;
    std::string().swap(kept);
  }
  if (to_peer && up.empty() && !passed && !kept.empty()) {
    up = kept;
    passed = true;
  }
  if (After a = pump_down(now, more); a != After::go_on) return a;
  if (After a = pump_up(now, more); a != After::go_on) return a;
  // What the way up made possible: the 'G' of a marked connection, or the reason for a broken way up.
  if (After a = pump_down(now, more); a != After::go_on) return a;
  if (down_shut && (up_shut || up_broken)) return After::end;
  return After::go_on;
}

void Conn::detach() {
  server.reset();
  server_readable = server_writable = false;
  to_peer = false;
  up.clear();
  up_at = 0;
  up_shut = up_broken = false;
  passed = false;
  phase = Phase::waiting;
}

bool Conn::idle() const {
  return phase == Phase::attached && server_last && up_at == up.size() && down_at == down.size() && !client_eof;
}

void Conn::reset_both() {
  linger now{1, 0};
  for (Fd* fd : {&client, &server}) {
    if (*fd) ::setsockopt(fd->get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
    fd->reset();
  }
}

}  // namespace rehome
