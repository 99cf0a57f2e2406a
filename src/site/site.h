// site: one end of a migration as the controller sees it: its agent's socket, local or through ssh, and what can be
// asked of it. It knows no store. Messages are in docs/PROTOCOL.md.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/json.h"
#include "config/deployment.h"
#include "sys/net.h"
#include "sys/process.h"

namespace rehome {

// One site's agent, for one controller. Thread-safe: every call uses a connection of its own, from a small pool.
class Site {
 public:
  virtual ~Site() = default;
  virtual Side side() const = 0;
  virtual std::string label() const = 0;   // "source (root@old)": for messages
  virtual std::string state() const = 0;   // the agent's STATE directory on that host
  virtual std::int64_t generation() const = 0;

  // Sends {"op": op, "gen": generation(), ...args} and returns the answer. An error answer is thrown as the Error it is,
  // with label() as context; a broken connection is Error(unreachable), and whether the agent acted is then unknown.
  virtual Json call(const std::string& op, Json args = Json::object(), Deadline deadline = Deadline::in(Millis(30000))) = 0;

  // A raw stream to an address as seen from that host (op "relay"). `keep` as in docs/PROTOCOL.md.
  virtual Fd open_relay(const std::string& address, const std::string& as_user = {}, const std::string& keep = {}) = 0;

  // Runs a program there (op "exec").
  Outcome exec(const Command& command, Deadline deadline = Deadline::in(Millis(60000)));
  Outcome exec_ok(const Command& command, Deadline deadline = Deadline::in(Millis(60000)), const char* what = nullptr);

  // A directory of this machine with a socket `.s.PGSQL.5432` through which libpq reaches the server behind
  // (address, as_user) at that site: conninfo "host=DIR port=5432". The listener lives as long as the Site. Every connection
  // goes through the agent, so that the agent can cut it. `keep`: see open_relay; one connection only.
  virtual std::string local_socket_for(const std::string& address, const std::string& as_user = {},
                                       const std::string& keep = {}) = 0;
};

}  // namespace rehome
