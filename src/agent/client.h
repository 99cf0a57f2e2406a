// Talking to an agent: what a controller, a test or another agent uses. It links base and sys only.
#pragma once

#include <string>

#include "agent/wire.h"
#include "base/json.h"
#include "sys/net.h"

namespace rehome {

// One connection to an agent's socket. Not thread-safe: one request at a time.
class AgentClient {
 public:
  // Connects to `socket_path` (STATE/run/agent.sock, or a forward of it). Throws Error(unreachable).
  explicit AgentClient(const std::string& socket_path, Deadline deadline = Deadline::in(Millis(5000)));
  // Takes over a connected socket, say the one of a `dial` process.
  explicit AgentClient(Fd fd) : fd_(std::move(fd)), in_(fd_) {}
  AgentClient(const AgentClient&) = delete;
  AgentClient& operator=(const AgentClient&) = delete;

  // Sends `request` (with its "op") and returns the answer. An error answer is thrown as the Error it is, and the
  // connection stays usable; Error(unreachable) or Error(timeout) leave it unusable, and whether the agent acted unknown.
  Json ask(const Json& request, Deadline deadline = Deadline::in(Millis(30000)));
  Json call(const std::string& op, Json args = Json::object(), Deadline deadline = Deadline::in(Millis(30000)));

  // False once a call broke the connection.
  bool usable() const { return usable_; }
  const Fd& fd() const { return fd_; }

 private:
  Fd fd_;
  Reader in_;
  bool usable_ = true;
};

// Connects, sends a stream request and returns the raw stream that follows its answer line, which goes to *answer.
// Throws the error that the agent answers, or Error(unreachable), Error(timeout).
Fd open_agent_stream(const std::string& socket_path, const Json& request, Deadline deadline, Json* answer = nullptr);

}  // namespace rehome
