// Stream sockets, unix and TCP, with deadlines; newline-delimited messages; a relay between two sockets.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "sys/fd.h"

namespace rehome {

// Where to connect or listen: "unix:/path" or "host:port" / "[v6]:port" with a numeric host (or localhost; other names
// are resolved by running getent, since a static binary cannot load NSS modules).
struct Address {
  std::string path;  // set for unix
  std::string host;
  std::uint16_t port = 0;
  static Address parse(std::string_view text);  // throws Error(config)
  std::string text() const;
  bool is_unix() const { return !path.empty(); }
};

// Whether a program of one host that connects to either comes to the same listener: any address and the loopback's are one.
bool reach_the_same(const Address& a, const Address& b);

// Whether a program of this account could listen at that TCP address: takes it and lets it go, and no client sees it. Throws Error(io).
void try_bind(const Address& where);

// A listening socket, non-blocking accept not set. A unix path is made anew (a stale socket file is replaced by rename,
// so that there is no moment without one) with `mode`. Port 0 picks a free one; see local_port().
Fd listen_on(const Address& where, unsigned mode = 0600, int backlog = 1024);
std::uint16_t local_port(const Fd& listener);

// A connected socket. `as_user`: connect with this account's effective uid, which is what PostgreSQL's peer
// authentication sees (SO_PEERCRED takes the credentials at connect); needs root. Throws Error(unreachable).
Fd connect_to(const Address& where, Deadline deadline, const std::string& as_user = {});

// The same address with a numeric host; a name is looked up (see Address), which may take seconds.
Address resolved(const Address& where);
// Starts to connect without ever blocking, to a resolved() address. `error` is 0 when connected, EINPROGRESS when a
// writable socket will tell (SO_ERROR), otherwise what connect(2) said: EAGAIN is a unix socket with a full backlog. `mark`
// (0: none) is set on the socket for the packet filter; it needs CAP_NET_ADMIN. Throws Error(io) without a socket to use.
Fd begin_connect(const Address& where, int& error, std::uint32_t mark = 0);

// Waits for a connection; nullopt at the deadline or when `stop` becomes true (looked at every 100 ms).
std::optional<Fd> accept_from(const Fd& listener, Deadline deadline, const std::atomic<bool>* stop = nullptr);

// Sends all; throws Error(unreachable) when the peer is gone, Error(timeout) at the deadline.
void send_all(const Fd& fd, std::string_view bytes, Deadline deadline = {});

// Reads lines and exact counts from one socket; keeps what was read beyond.
class Reader {
 public:
  explicit Reader(const Fd& fd) : fd_(fd) {}
  // One line without its newline; nullopt at a clean end of stream. Error(io) for a line longer than `most`,
  // Error(unreachable) for an end in the middle, Error(timeout) at the deadline.
  std::optional<std::string> line(Deadline deadline = {}, std::size_t most = 64u << 20);
  std::string exactly(std::size_t count, Deadline deadline = {});
  bool has_buffered() const { return at_ < buffer_.size(); }
  std::string take_buffered();  // what was read ahead, for handing the stream on

 private:
  bool fill(Deadline deadline);
  const Fd& fd_;
  std::string buffer_;
  std::size_t at_ = 0;
};

// Copies both ways until both directions have ended or `stop` is set; a half-close is passed on. `a_gone_ends`: when a
// ends or breaks, return at once and leave b open and unread, for whoever keeps it.
void relay(const Fd& a, const Fd& b, const std::atomic<bool>& stop, bool a_gone_ends = false);

}  // namespace rehome
