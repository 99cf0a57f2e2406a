// A part of the agent that answers some of its messages: the core asks each module in turn. Modules link base and sys
// only, since the agent is one static binary.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "sys/net.h"

namespace rehome {

// What the core offers its modules. Thread-safe.
class AgentHost {
 public:
  virtual ~AgentHost() = default;
  virtual const std::string& state() const = 0;  // the STATE directory
  virtual std::string side() const = 0;          // "source" or "target"
  virtual void log(const std::string& line) = 0;
  // A connection to the other agent on which `request` was answered {"ok": true}: a raw stream from there, or more
  // request lines. Throws Error(unreachable) while the link is down.
  virtual Fd open_peer(const Json& request, Deadline deadline) = 0;
  // How far behind a store is, for the report; see agent/lag.h.
  virtual void sample_lag(const std::string& store, std::int64_t bytes, std::int64_t ms) = 0;
  virtual const std::atomic<bool>& stopping() const = 0;
};

// One connection as a module sees it: what was read ahead, and the socket.
struct AgentConnection {
  const Fd& fd;
  Reader& in;
  bool from_peer;   // it came through the link
};

class AgentModule {
 public:
  virtual ~AgentModule() = default;
  // True when `op` is this module's.
  virtual bool owns(const std::string& op) const = 0;
  // Answers one request, in the connection's own thread. The returned object is sent with "ok": true; a thrown Error is
  // sent as one. A stream op sends its own answer line, takes over the connection and returns Json() (null): the
  // connection is closed afterwards.
  virtual Json handle(const std::string& op, const Json& request, AgentConnection& connection) = 0;
  virtual void start() {}   // after the core has read its state; may start threads
  virtual void stop() {}    // joins them
};

}  // namespace rehome
