#include "sys/net.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/fsuid.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "base/text.h"
#include "sys/account.h"
#include "sys/process.h"

namespace rehome {
namespace {

struct RawAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

std::string resolve(const std::string& host) {
  if (host == "localhost") return "127.0.0.1";
  if (host == "*" || host.empty()) return "0.0.0.0";
  in_addr v4;
  in6_addr v6;
  if (::inet_pton(AF_INET, host.c_str(), &v4) == 1 || ::inet_pton(AF_INET6, host.c_str(), &v6) == 1) return host;
  Outcome o = run({.argv = {"getent", "ahosts", host}}, Deadline::in(Millis(5000)));
  auto end = o.out.find_first_of(" \t\n");
  if (!o.ok() || end == std::string::npos)
    throw Error(Code::unreachable, "host name " + host + " cannot be resolved", "correct the name, or use its address");
  return o.out.substr(0, end);
}

RawAddress raw(const Address& a) {
  RawAddress r;
  if (a.is_unix()) {
    auto* un = reinterpret_cast<sockaddr_un*>(&r.storage);
    un->sun_family = AF_UNIX;
    if (a.path.size() >= sizeof un->sun_path)
      throw Error(Code::config, "socket path " + a.path + " is longer than 107 bytes", "use a shorter state directory");
    std::memcpy(un->sun_path, a.path.c_str(), a.path.size() + 1);
    r.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + a.path.size() + 1);
    return r;
  }
  std::string host = resolve(a.host);
  auto* v4 = reinterpret_cast<sockaddr_in*>(&r.storage);
  if (::inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(a.port);
    r.size = sizeof *v4;
    return r;
  }
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&r.storage);
  *v6 = {};
  if (::inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) != 1)
    throw Error(Code::config, "'" + host + "' is not an address");
  v6->sin6_family = AF_INET6;
  v6->sin6_port = htons(a.port);
  r.size = sizeof *v6;
  return r;
}

// Effective uid of this thread only: the raw call does not change the other threads, as the C library's would.
class ThreadUser {
 public:
  explicit ThreadUser(const std::string& name) {
    if (name.empty()) return;
    uid_t uid = account_named(name).uid;
    if (uid == ::geteuid()) return;
    if (::syscall(SYS_setresuid, -1, uid, -1) != 0)
      throw errno_error(errno, "become account", name, "run the agent as root, or use a password");
    changed_ = true;
  }
  ~ThreadUser() {
    if (changed_) REHOME_CHECK(::syscall(SYS_setresuid, -1, 0, -1) == 0);
  }

 private:
  bool changed_ = false;
};

bool wait_for(int fd, short events, Deadline deadline) {
  while (true) {
    pollfd p{fd, events, 0};
    int r = ::poll(&p, 1, static_cast<int>(deadline.left(Millis(60'000)).count()));
    if (r > 0) return true;
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", "a socket");
    if (deadline.passed()) return false;
  }
}

}  // namespace

Address Address::parse(std::string_view text) {
  Address a;
  if (text.starts_with("unix:")) {
    a.path = text.substr(5);
    if (a.path.empty() || a.path[0] != '/')
      throw Error(Code::config, "'" + std::string(text) + "' is not an address", "write unix:/an/absolute/path");
    return a;
  }
  auto colon = text.rfind(':');
  Error bad(Code::config, "'" + std::string(text) + "' is not an address", "write host:port or unix:/path");
  if (colon == std::string_view::npos) throw bad;
  std::string_view host = text.substr(0, colon), port = text.substr(colon + 1);
  if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
  auto [end, err] = std::from_chars(port.data(), port.data() + port.size(), a.port);
  if (err != std::errc() || end != port.data() + port.size()) throw bad;
  a.host = host;
  return a;
}

std::string Address::text() const {
  if (is_unix()) return "unix:" + path;
  return (host.find(':') == std::string::npos ? host : "[" + host + "]") + ":" + std::to_string(port);
}

bool reach_the_same(const Address& a, const Address& b) {
  if (a.is_unix() || b.is_unix()) return a.path == b.path;
  auto here = [](const std::string& host) {
    return host == "localhost" || host == "0.0.0.0" || host == "*" || host == "::" || host == "::1" || host.empty() ? std::string("127.0.0.1") : host;
  };
  return a.port == b.port && here(a.host) == here(b.host);
}

namespace {
Error not_bound(int err, const Address& where) {
  return errno_error(err, "listen on", where.text(), err == EADDRINUSE ? "another program has it: see ss -ltnp" : err == EADDRNOTAVAIL ? "no interface of this host has that address: see ip address" : "");
}
}  // namespace

void try_bind(const Address& where) {
  RawAddress r = raw(where);
  Fd fd(::socket(r.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) throw errno_error(errno, "make a socket for", where.text());
  int one = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (::bind(fd.get(), r.get(), r.size) != 0) throw not_bound(errno, where);
}

Fd listen_on(const Address& where, unsigned mode, int backlog) {
  Address bind_to = where;
  if (where.is_unix()) bind_to.path = where.path + ".new";
  RawAddress r = raw(bind_to);
  Fd fd(::socket(r.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) throw errno_error(errno, "make a socket for", where.text());
  if (where.is_unix()) {
    ::unlink(bind_to.path.c_str());
  } else {
    int one = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  }
  if (::bind(fd.get(), r.get(), r.size) != 0) throw not_bound(errno, where);
  if (::listen(fd.get(), backlog) != 0) throw errno_error(errno, "listen on", where.text());
  if (where.is_unix()) {
    if (::chmod(bind_to.path.c_str(), mode) != 0) throw errno_error(errno, "chmod", bind_to.path);
    if (::rename(bind_to.path.c_str(), where.path.c_str()) != 0) throw errno_error(errno, "rename to", where.path);
  }
  return fd;
}

std::uint16_t local_port(const Fd& listener) {
  RawAddress r;
  r.size = sizeof r.storage;
  if (::getsockname(listener.get(), r.get(), &r.size) != 0) throw errno_error(errno, "getsockname", "a listener");
  if (r.get()->sa_family == AF_INET6) return ntohs(reinterpret_cast<sockaddr_in6*>(r.get())->sin6_port);
  return ntohs(reinterpret_cast<sockaddr_in*>(r.get())->sin_port);
}

Fd connect_to(const Address& where, Deadline deadline, const std::string& as_user) {
  RawAddress r = raw(where);
  Fd fd(::socket(r.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw errno_error(errno, "make a socket for", where.text());
  auto unreachable = [&](int err) {
    return Error(Code::unreachable, "cannot connect to " + where.text() + ": " + std::strerror(err),
                 "is it running, and is this its address?", true);
  };
  while (true) {
    int rc;
    {
      ThreadUser user(as_user);
      rc = ::connect(fd.get(), r.get(), r.size);
    }
    if (rc == 0) break;
    if (errno == EINTR) continue;
    if (errno == EAGAIN && where.is_unix()) {
      // A full backlog of a unix socket has nothing to poll for.
      if (deadline.passed()) throw unreachable(EAGAIN);
      system_clock().sleep(Millis(5));
      continue;
    }
    if (errno != EINPROGRESS) throw unreachable(errno);
    if (!wait_for(fd.get(), POLLOUT, deadline)) throw unreachable(ETIMEDOUT);
    int err = 0;
    socklen_t size = sizeof err;
    ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &err, &size);
    if (err) throw unreachable(err);
    break;
  }
  int flags = ::fcntl(fd.get(), F_GETFL);
  ::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK);
  if (!where.is_unix()) {
    int one = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  }
  return fd;
}

Address resolved(const Address& where) {
  Address a = where;
  if (!a.is_unix()) a.host = resolve(a.host);
  return a;
}

Fd begin_connect(const Address& where, int& error, std::uint32_t mark) {
  RawAddress r = raw(where);
  Fd fd(::socket(r.get()->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw errno_error(errno, "make a socket for", where.text());
  if (!where.is_unix()) {
    int one = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (mark && ::setsockopt(fd.get(), SOL_SOCKET, SO_MARK, &mark, sizeof mark) != 0)
      throw errno_error(errno, "mark a connection to", where.text(), "run the gate as root");
  }
  error = ::connect(fd.get(), r.get(), r.size) == 0 ? 0 : errno;
  return fd;
}

std::optional<Fd> accept_from(const Fd& listener, Deadline deadline, const std::atomic<bool>* stop) {
  while (true) {
    if (stop && *stop) return std::nullopt;
    pollfd p{listener.get(), POLLIN, 0};
    int r = ::poll(&p, 1, static_cast<int>(deadline.left(Millis(100)).count()));
    if (r > 0) {
      Fd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (fd) return fd;
      // Out of descriptors: waiting a moment is better than ending the service.
      if (errno == EMFILE || errno == ENFILE || errno == ENOMEM) system_clock().sleep(Millis(20));
      else if (errno != EINTR && errno != ECONNABORTED && errno != EAGAIN) throw errno_error(errno, "accept", "a connection");
    }
    if (deadline.passed()) return std::nullopt;
  }
}

void send_all(const Fd& fd, std::string_view bytes, Deadline deadline) {
  while (!bytes.empty()) {
    ssize_t n = ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      bytes.remove_prefix(static_cast<std::size_t>(n));
    } else if (errno == EAGAIN) {
      if (!wait_for(fd.get(), POLLOUT, deadline)) throw Error(Code::timeout, "sending took too long", "", true);
    } else if (errno != EINTR) {
      throw Error(Code::unreachable, std::string("the other end is gone: ") + std::strerror(errno), "", true);
    }
  }
}

bool Reader::fill(Deadline deadline) {
  if (at_ > 0 && at_ == buffer_.size()) buffer_.clear(), at_ = 0;
  while (true) {
    if (!wait_for(fd_.get(), POLLIN, deadline)) throw Error(Code::timeout, "no answer in time", "", true);
    char buf[65536];
    ssize_t n = ::recv(fd_.get(), buf, sizeof buf, MSG_DONTWAIT);
    if (n > 0) {
      buffer_.append(buf, static_cast<std::size_t>(n));
      return true;
    }
    if (n == 0) return false;
    if (errno != EINTR && errno != EAGAIN)
      throw Error(Code::unreachable, std::string("the other end is gone: ") + std::strerror(errno), "", true);
  }
}

std::optional<std::string> Reader::line(Deadline deadline, std::size_t most) {
  std::size_t searched = at_;
  while (true) {
    auto nl = buffer_.find('\n', searched);
    if (nl != std::string::npos) {
      std::string out = buffer_.substr(at_, nl - at_);
      at_ = nl + 1;
      return out;
    }
    if (buffer_.size() - at_ > most) throw Error(Code::io, "a message is longer than " + std::to_string(most) + " bytes");
    std::size_t pending = buffer_.size() - at_;
    if (!fill(deadline)) {
      if (pending == 0) return std::nullopt;
      throw Error(Code::unreachable, "the other end closed in the middle of a message", "", true);
    }
    searched = at_ + pending;
  }
}

std::string Reader::exactly(std::size_t count, Deadline deadline) {
  while (buffer_.size() - at_ < count)
    if (!fill(deadline)) throw Error(Code::unreachable, "the other end closed in the middle of a message", "", true);
  std::string out = buffer_.substr(at_, count);
  at_ += count;
  return out;
}

std::string Reader::take_buffered() {
  std::string out = buffer_.substr(at_);
  buffer_.clear();
  at_ = 0;
  return out;
}

void relay(const Fd& a, const Fd& b, const std::atomic<bool>& stop, bool a_gone_ends) {
  struct Way {
    int from, to;
    std::string data;
    std::size_t at = 0;
    bool ended = false;
  };
  Way ways[2] = {{a.get(), b.get(), {}, 0, false}, {b.get(), a.get(), {}, 0, false}};
  std::string chunk(128 * 1024, '\0');
  auto end_way = [](Way& w) {
    w.ended = true;
    w.data.clear();
    w.at = 0;
    ::shutdown(w.to, SHUT_WR);
  };
  while (!stop && !(ways[0].ended && ways[1].ended)) {
    // a's socket: readable when nothing waits to go to b, writable when something waits to go to a.
    pollfd p[2] = {{a.get(), 0, 0}, {b.get(), 0, 0}};
    for (int i = 0; i < 2; i++) {
      if (ways[i].ended) continue;
      if (ways[i].at == ways[i].data.size())
        p[i].events = static_cast<short>(p[i].events | POLLIN);
      else
        p[1 - i].events = static_cast<short>(p[1 - i].events | POLLOUT);
    }
    for (auto& one : p)
      if (one.events == 0) one.fd = ~one.fd;  // a hangup there would wake us for ever
    int r = ::poll(p, 2, 100);
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", "a relay");
    if (r <= 0) continue;
    for (int i = 0; i < 2; i++) {
      Way& w = ways[i];
      if (!w.ended && w.at == w.data.size() && p[i].fd >= 0 && (p[i].revents & (POLLIN | POLLHUP | POLLERR))) {
        ssize_t n = ::recv(w.from, chunk.data(), chunk.size(), MSG_DONTWAIT);
        if (n > 0) {
          w.data.assign(chunk, 0, static_cast<std::size_t>(n));
          w.at = 0;
        } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
          if (i == 0 && a_gone_ends) return;
          if (n < 0) return;  // broken, not closed: nothing more can pass either way
          end_way(w);
          continue;
        }
      }
      if (!w.ended && w.at < w.data.size()) {
        ssize_t n = ::send(w.to, w.data.data() + w.at, w.data.size() - w.at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
          w.at += static_cast<std::size_t>(n);
        } else if (errno != EAGAIN && errno != EINTR) {
          return;
        }
      }
    }
  }
}

}  // namespace rehome
