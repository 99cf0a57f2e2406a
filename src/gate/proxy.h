// PROXY protocol: who a client is, told by whoever passes its connection on. Versions 1 and 2 of the specification
// (haproxy.org, proxy-protocol.txt). Inside the gate a client is always its version 1 line; nothing here reads a socket.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace rehome {

// The version 1 line, with its end, for a connected socket: the client's address and the one that it came to.
// "PROXY UNKNOWN\r\n" for unix sockets.
std::string proxy_line(int fd);

struct ProxyHeader {
  std::size_t size = 0;  // bytes that it takes; 0: more must be read
  std::string line;      // version 1; UNKNOWN where the header names no client (a health check of the proxy itself)
};

// The header, of either version, at the beginning of what was received. nullopt when this is none: the specification
// wants such a connection ended. A header of version 2 is taken with at most kProxyMost bytes.
std::optional<ProxyHeader> parse_proxy(std::string_view received);
inline constexpr std::size_t kProxyMost = 1024;

// The same client in version 2. `line` is one of ours or of parse_proxy.
std::string proxy_version_2(std::string_view line);

}  // namespace rehome
