#include "agent/wire.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

namespace rehome {
namespace {

// Reads one line without reading beyond it, so that the rest of the stream stays in the socket: a peek shows how much.
std::string line_exactly(const Fd& fd, Deadline deadline) {
  std::string line;
  char buf[4096];
  while (true) {
    pollfd p{fd.get(), POLLIN, 0};
    int r = ::poll(&p, 1, static_cast<int>(deadline.left(Millis(60'000)).count()));
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", "the agent's connection");
    if (r <= 0) {
      if (deadline.passed()) throw Error(Code::timeout, "the agent did not answer in time", "", true);
      continue;
    }
    ssize_t n = ::recv(fd.get(), buf, sizeof buf, MSG_PEEK | MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
    if (n <= 0) throw Error(Code::unreachable, "the agent closed the connection", "see its log/agent.log", true);
    std::string_view seen(buf, static_cast<std::size_t>(n));
    auto nl = seen.find('\n');
    std::size_t take = nl == std::string_view::npos ? seen.size() : nl + 1;
    if (::recv(fd.get(), buf, take, 0) != static_cast<ssize_t>(take))
      throw Error(Code::unreachable, "the agent's connection broke", "", true);
    line.append(buf, take);
    if (line.ends_with('\n')) return line;
    if (line.size() > kLongestMessage) throw Error(Code::io, "the agent's answer is too long");
  }
}

}  // namespace

void send_json(const Fd& fd, const Json& message, Deadline deadline) {
  send_all(fd, dump_line(message) + "\n", deadline);
}

Json parse_answer(std::string_view line) {
  Json answer = parse_json(line, "the agent's answer");
  if (answer.is_object() && answer.contains("error")) throw error_from_json(answer["error"]);
  if (!answer.is_object() || !get_bool(answer, "ok", false))
    throw Error(Code::io, "the agent's answer has neither 'ok' nor 'error'", "are both sides of the same version?");
  return answer;
}

Json read_answer(Reader& in, Deadline deadline) {
  auto line = in.line(deadline, kLongestMessage);
  if (!line) throw Error(Code::unreachable, "the agent closed the connection", "see its log/agent.log", true);
  return parse_answer(*line);
}

Json read_answer_exactly(const Fd& fd, Deadline deadline) { return parse_answer(line_exactly(fd, deadline)); }

}  // namespace rehome
