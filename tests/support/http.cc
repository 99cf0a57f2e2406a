#include "support/http.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cctype>
#include <cstdint>

#include "base/error.h"
#include "base/text.h"

namespace rehome::testing {
namespace {

std::string lower(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return out;
}

std::string line_of(Reader& in, Deadline deadline) {
  auto line = in.line(deadline, 64u << 10);
  if (!line) throw Error(Code::unreachable, "the peer closed in the middle of a message");
  if (line->ends_with('\r')) line->pop_back();
  return *line;
}

std::size_t number(std::string_view text, int base) {
  std::size_t value = 0;
  auto [end, failed] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (failed != std::errc() || end == text.data()) throw Error(Code::io, "not a length: " + std::string(text));
  return value;
}

std::array<std::uint8_t, 20> sha1(std::string text) {
  const std::uint64_t bits = text.size() * 8;
  text.push_back('\x80');
  while (text.size() % 64 != 56) text.push_back('\0');
  for (int shift = 56; shift >= 0; shift -= 8) text.push_back(static_cast<char>(bits >> shift));
  std::uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
  for (std::size_t block = 0; block < text.size(); block += 64) {
    std::uint32_t w[80];
    for (std::size_t i = 0; i < 80; ++i) {
      if (i >= 16) {
        w[i] = std::rotl(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
        continue;
      }
      w[i] = 0;
      for (std::size_t b = 0; b < 4; ++b) w[i] = w[i] << 8 | static_cast<std::uint8_t>(text[block + i * 4 + b]);
    }
    std::uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int i = 0; i < 80; ++i) {
      std::uint32_t f = b ^ c ^ d, k = i < 40 ? 0x6ed9eba1 : 0xca62c1d6;
      if (i < 20) f = (b & c) | (~b & d), k = 0x5a827999;
      else if (i >= 40 && i < 60) f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
      const std::uint32_t next = std::rotl(a, 5) + f + e + k + w[i];
      e = d, d = c, c = std::rotl(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
  }
  std::array<std::uint8_t, 20> out;
  for (std::size_t i = 0; i < 20; ++i) out[i] = static_cast<std::uint8_t>(h[i / 4] >> (24 - i % 4 * 8));
  return out;
}

}  // namespace

std::string Message::header(const std::string& name) const {
  auto it = headers.find(name);
  return it == headers.end() ? std::string() : it->second;
}

bool Message::keeps_alive() const {
  const std::string connection = lower(header("connection"));
  if (connection.find("close") != std::string::npos) return false;
  const bool old = first[0] == "HTTP/1.0" || first[2] == "HTTP/1.0";
  return !old || connection.find("keep-alive") != std::string::npos;
}

std::optional<Message> read_head(Reader& in, Deadline deadline) {
  auto start = in.line(deadline, 64u << 10);
  if (!start) return std::nullopt;
  if (start->ends_with('\r')) start->pop_back();
  Message m;
  std::size_t one = start->find(' ');
  if (one == std::string::npos) throw Error(Code::io, "not HTTP: " + start->substr(0, 80));
  std::size_t two = start->find(' ', one + 1);
  m.first[0] = start->substr(0, one);
  m.first[1] = start->substr(one + 1, two == std::string::npos ? two : two - one - 1);
  if (two != std::string::npos) m.first[2] = start->substr(two + 1);
  for (;;) {
    std::string line = line_of(in, deadline);
    if (line.empty()) return m;
    if (m.headers.size() > 200) throw Error(Code::io, "too many headers");
    std::size_t colon = line.find(':');
    if (colon == std::string::npos) throw Error(Code::io, "not a header: " + line.substr(0, 80));
    m.headers[lower(line.substr(0, colon))] = std::string(trim(std::string_view(line).substr(colon + 1)));
  }
}

void read_body(const Message& head, Reader& in, Deadline deadline, const std::function<void(std::string_view)>& to) {
  auto pass = [&](std::size_t count) {
    while (count > 0) {
      const std::size_t now = std::min<std::size_t>(count, 64u << 10);
      to(in.exactly(now, deadline));
      count -= now;
    }
  };
  if (lower(head.header("transfer-encoding")).find("chunked") != std::string::npos) {
    while (std::size_t size = number(line_of(in, deadline), 16)) {
      pass(size);
      line_of(in, deadline);
    }
    while (!line_of(in, deadline).empty()) {
    }
  } else if (auto length = head.header("content-length"); !length.empty()) {
    pass(number(length, 10));
  }
}

std::string read_body(const Message& head, Reader& in, Deadline deadline) {
  std::string body;
  read_body(head, in, deadline, [&](std::string_view part) {
    if (body.size() + part.size() > (16u << 20)) throw Error(Code::io, "the body is too large");
    body += part;
  });
  return body;
}

std::string answer(int status, std::string_view body, bool keep_alive, std::string_view type) {
  const char* reason = status < 300 ? "OK" : status < 500 ? "Bad Request" : "Unavailable";
  std::string out = "HTTP/1.1 " + std::to_string(status) + " " + reason + "\r\nContent-Type: ";
  out.append(type).append("\r\nContent-Length: ").append(std::to_string(body.size()));
  out.append(keep_alive ? "\r\nConnection: keep-alive\r\n\r\n" : "\r\nConnection: close\r\n\r\n").append(body);
  return out;
}

std::string query_value(std::string_view target, std::string_view name, std::string_view fallback) {
  const std::size_t mark = target.find('?');
  if (mark == std::string_view::npos) return std::string(fallback);
  for (auto& pair : split(target.substr(mark + 1), '&'))
    if (pair.size() > name.size() && pair[name.size()] == '=' && pair.rfind(name, 0) == 0)
      return pair.substr(name.size() + 1);
  return std::string(fallback);
}

std::string websocket_accept(std::string_view key) {
  const auto digest = sha1(std::string(key) + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
  static const char* letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < 21; i += 3) {
    // 20 bytes: the last group lacks its third byte, which base64 writes as one '='.
    const std::uint32_t group = static_cast<std::uint32_t>(digest[i] << 16 | digest[i + 1] << 8) |
                                (i + 2 < 20 ? digest[i + 2] : 0u);
    for (int shift = 18; shift >= 0; shift -= 6) out.push_back(letters[group >> shift & 63]);
  }
  out.back() = '=';
  return out;
}

}  // namespace rehome::testing
