#include "support/http.h"

#include <algorithm>
#include <charconv>
#include <cctype>

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

}  // namespace rehome::testing
