#include "gate/proxy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <charconv>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/text.h"

namespace rehome {
namespace {

constexpr std::string_view kSignature("\r\n\r\n\0\r\nQUIT\n", 12);
constexpr std::string_view kUnknown = "PROXY UNKNOWN\r\n";
// The longest version 1 line, with its end.
constexpr std::size_t kLine = 107;

std::string line_of(int family, const void* from, const void* to, std::uint16_t from_port, std::uint16_t to_port) {
  char a[INET6_ADDRSTRLEN], b[INET6_ADDRSTRLEN];
  ::inet_ntop(family, from, a, sizeof a);
  ::inet_ntop(family, to, b, sizeof b);
  return std::string("PROXY ") + (family == AF_INET ? "TCP4 " : "TCP6 ") + a + " " + b + " " + std::to_string(from_port) + " " +
         std::to_string(to_port) + "\r\n";
}

std::optional<std::uint16_t> port(const std::string& text) {
  std::uint16_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

struct Ends {
  int family = AF_UNSPEC;
  unsigned char from[16] = {}, to[16] = {};
  std::uint16_t from_port = 0, to_port = 0;
  std::size_t size() const { return family == AF_INET ? 4 : 16; }
};

// A version 1 line; family AF_UNSPEC is UNKNOWN.
std::optional<Ends> read_line(std::string_view line) {
  auto words = split(line.substr(0, line.size() - 2), ' ');
  Ends e;
  if (words.size() < 2 || words[0] != "PROXY") return std::nullopt;
  if (words[1] == "UNKNOWN") return e;
  if (words.size() != 6 || (words[1] != "TCP4" && words[1] != "TCP6")) return std::nullopt;
  e.family = words[1] == "TCP4" ? AF_INET : AF_INET6;
  auto from = port(words[4]), to = port(words[5]);
  if (!from || !to || ::inet_pton(e.family, words[2].c_str(), e.from) != 1 || ::inet_pton(e.family, words[3].c_str(), e.to) != 1)
    return std::nullopt;
  e.from_port = *from;
  e.to_port = *to;
  return e;
}

}  // namespace

std::string proxy_line(int fd) {
  sockaddr_storage from{}, to{};
  socklen_t from_size = sizeof from, to_size = sizeof to;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&from), &from_size) != 0 ||
      ::getsockname(fd, reinterpret_cast<sockaddr*>(&to), &to_size) != 0 || from.ss_family != to.ss_family)
    return std::string(kUnknown);
  if (from.ss_family == AF_INET) {
    auto *f = reinterpret_cast<sockaddr_in*>(&from), *t = reinterpret_cast<sockaddr_in*>(&to);
    return line_of(AF_INET, &f->sin_addr, &t->sin_addr, ntohs(f->sin_port), ntohs(t->sin_port));
  }
  if (from.ss_family == AF_INET6) {
    auto *f = reinterpret_cast<sockaddr_in6*>(&from), *t = reinterpret_cast<sockaddr_in6*>(&to);
    // A client of IPv4 at a listener of both.
    if (IN6_IS_ADDR_V4MAPPED(&f->sin6_addr) && IN6_IS_ADDR_V4MAPPED(&t->sin6_addr))
      return line_of(AF_INET, &f->sin6_addr.s6_addr[12], &t->sin6_addr.s6_addr[12], ntohs(f->sin6_port), ntohs(t->sin6_port));
    return line_of(AF_INET6, &f->sin6_addr, &t->sin6_addr, ntohs(f->sin6_port), ntohs(t->sin6_port));
  }
  return std::string(kUnknown);
}

std::optional<ProxyHeader> parse_proxy(std::string_view received) {
  ProxyHeader h;
  std::string_view signature = kSignature.substr(0, received.size());
  if (received.substr(0, signature.size()) == signature) {
    if (received.size() < 16) return h;
    auto byte = [&](std::size_t i) { return static_cast<unsigned char>(received[i]); };
    std::size_t body = static_cast<std::size_t>(byte(14)) << 8 | byte(15);
    if (byte(12) >> 4 != 2 || (byte(12) & 15) > 1 || 16 + body > kProxyMost) return std::nullopt;
    if (received.size() < 16 + body) return h;
    h.size = 16 + body;
    h.line = kUnknown;
    bool proxied = (byte(12) & 15) == 1, tcp4 = byte(13) == 0x11, tcp6 = byte(13) == 0x21;
    if (!proxied || (!tcp4 && !tcp6)) return h;
    std::size_t address = tcp4 ? 4 : 16;
    if (body < 2 * address + 4) return std::nullopt;
    auto at = [&](std::size_t i) { return static_cast<std::uint16_t>(byte(i) << 8 | byte(i + 1)); };
    h.line = line_of(tcp4 ? AF_INET : AF_INET6, &received[16], &received[16 + address], at(16 + 2 * address), at(18 + 2 * address));
    return h;
  }
  std::string_view start = std::string_view("PROXY ").substr(0, received.size());
  if (received.substr(0, start.size()) != start) return std::nullopt;
  std::size_t end = received.substr(0, kLine).find("\r\n");
  if (end == std::string_view::npos) return received.size() >= kLine ? std::nullopt : std::optional(h);
  h.size = end + 2;
  h.line = std::string(received.substr(0, h.size));
  auto ends = read_line(h.line);
  if (!ends) return std::nullopt;
  if (ends->family == AF_UNSPEC) h.line = kUnknown;
  return h;
}

std::string proxy_version_2(std::string_view line) {
  std::string out(kSignature);
  auto ends = read_line(line);
  if (!ends || ends->family == AF_UNSPEC) return out + std::string("\x21\x00\x00\x00", 4);
  std::size_t body = 2 * ends->size() + 4;
  out += '\x21';
  out += ends->family == AF_INET ? '\x11' : '\x21';
  auto two = [&](std::size_t v) {
    out += static_cast<char>(v >> 8 & 255);
    out += static_cast<char>(v & 255);
  };
  two(body);
  out.append(reinterpret_cast<const char*>(ends->from), ends->size());
  out.append(reinterpret_cast<const char*>(ends->to), ends->size());
  two(ends->from_port);
  two(ends->to_port);
  return out;
}

}  // namespace rehome
