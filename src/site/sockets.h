// TCP sockets of a site's host, as its kernel lists them: who listens where, and who talks to whom. Reads only.
#pragma once

#include <string>
#include <vector>

#include "site/site.h"

namespace rehome {

struct TcpSocket {
  bool listening = false;
  std::string local, remote;   // numeric addresses; "::ffff:" in front of a v4 address is left out
  int local_port = 0, remote_port = 0;
  std::string inode;
  // Filled in by name_owners(); empty or 0 where the process belongs to somebody whom the agent may not look at.
  std::int64_t pid = 0;
  std::string program, arguments, unit;

  // "python3 (process 17, unit web.service)", or "a process that this account cannot see"
  std::string owner() const;
};

// The lines of /proc/net/tcp and tcp6, which are little-endian words in hexadecimal (proc(5)). Listening and established
// sockets only; a line that cannot be read is left out.
std::vector<TcpSocket> parse_proc_net_tcp(const std::string& text);
std::vector<TcpSocket> tcp_sockets(Site& site);
// Finds the processes that hold these sockets.
void name_owners(Site& site, std::vector<TcpSocket>& sockets);

// Would a listener on `address` ("host:port") meet one on this socket's address?
bool same_listener(const TcpSocket& socket, const std::string& host, int port);

}  // namespace rehome
