// What gate.json says. Nothing here opens a socket.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "sys/fd.h"
#include "sys/net.h"

namespace rehome {

struct RouteConfig {
  std::string name;
  Address listen;             // where clients arrive
  Address marked;             // where the other site's gate arrives; no path and no port: nowhere
  Address local, peer;        // resolved; peer may be empty as well
  int proxy_protocol = 0;       // tell the local application the client's address by a PROXY header of this version
  bool accept_proxy = false;    // clients' connections begin with a PROXY header, of either version
  bool refuse_with_503 = true;  // what is refused gets an HTTP answer; else its connection is closed
  std::size_t max_waiting = 10000;
  Millis max_wait{30000};
  bool transparent = false;     // IP_TRANSPARENT on `listen`: a packet filter's TPROXY leads connections to other ports here
  std::uint32_t mark = 0;     // SO_MARK of connections to `local`: how a packet filter tells them from clients'
  unsigned listen_mode = 0666;  // of a unix `listen`; its directory says who may come near
};

inline bool is_set(const Address& a) { return a.is_unix() || a.port != 0; }

// Reads the content of gate.json. Throws Error(config) naming the route and key. Host names are looked up.
std::vector<RouteConfig> parse_routes(std::string_view json);

// The listening sockets that a supervisor handed on (LISTEN_FDS and LISTEN_FDNAMES), by name, and forgotten in the
// environment. Empty when there are none, or when LISTEN_PID names another process.
std::map<std::string, Fd> inherited_listeners();

}  // namespace rehome
