#include "agent/client.h"

namespace rehome {

AgentClient::AgentClient(const std::string& socket_path, Deadline deadline)
    : fd_(connect_to({.path = socket_path}, deadline)), in_(fd_) {}

Json AgentClient::ask(const Json& request, Deadline deadline) {
  if (!usable_) throw Error(Code::unreachable, "the connection to the agent broke earlier", "", true);
  // Until a whole line has come back, a failure leaves half a message in one direction or the other.
  usable_ = false;
  send_json(fd_, request, deadline);
  auto line = in_.line(deadline, kLongestMessage);
  if (!line) throw Error(Code::unreachable, "the agent closed the connection", "see its log/agent.log", true);
  usable_ = true;
  return parse_answer(*line);
}

Json AgentClient::call(const std::string& op, Json args, Deadline deadline) {
  args["op"] = op;
  return ask(args, deadline);
}

Fd open_agent_stream(const std::string& socket_path, const Json& request, Deadline deadline, Json* answer) {
  Fd fd = connect_to({.path = socket_path}, deadline);
  send_json(fd, request, deadline);
  Json got = read_answer_exactly(fd, deadline);
  if (answer) *answer = std::move(got);
  return fd;
}

}  // namespace rehome
