// gate: a process of its own that accepts connections, keeps them waiting while held, and joins each to the side that serves. Layer 4:
// it knows connections, not requests. Links base and sys only. Messages and gate.json: docs/PROTOCOL.md.
#pragma once

#include <cstdint>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/json.h"
#include "sys/net.h"

namespace rehome {

enum class GateState { OPEN_LOCAL, OPEN_PEER, HELD, SEALED };
const char* gate_state_name(GateState);

struct GateRoute {
  std::string name;
  Address listen, local, peer;
  std::optional<Address> marked;   // connections that come from the other site's gate
  bool proxy_protocol = false;     // PROXY protocol v1 towards local
  std::size_t max_waiting = 10000;
  std::int64_t max_wait_ms = 30000;
};

std::vector<GateRoute> read_gate_routes(const Json& gate_json);

// Single-threaded. Connections that wait are not read from: their bytes stay in the kernel, so a waiting connection can go to
// either side, or back to the gate that sent it.
class Gate {
 public:
  // `inherited`: listening sockets by name (route name, or NAME.marked); others are opened here.
  Gate(std::string state_directory, std::map<std::string, Fd> inherited);
  ~Gate();
  // Runs until `stop` becomes true; looks at it at least every 100 ms.
  void run(const std::atomic<bool>& stop, std::atomic<bool>& reload);

 private:
  struct Route;
  struct Connection;
  struct Control;
  struct Watched;
  void load();
  void loop_once();
  void accept_all(Route& route, bool marked);
  void connect_backend(Connection& c);
  void backend_ready(Connection& c);
  void pump(Connection& c);
  void interest(Connection& c);
  void close_connection(Connection& c);
  void refuse(Connection& c);
  void backend_lost(Connection& c);
  void start_waiting(Connection& c, Ticks since);
  void feed_waiting();
  void watch(int fd, Watched* what, std::uint32_t events);
  Json answer(const Json& request);
  Json status();
  void set_state(GateState state);
  void serve_control(Control& control);
  bool in_flight(const Connection& c) const;
  std::int64_t count_in_flight() const;

  std::string state_directory_;
  std::map<std::string, Fd> inherited_;
  Fd epoll_, control_listener_;
  std::unique_ptr<Watched> control_watch_;
  std::map<std::string, std::unique_ptr<Route>> routes_;
  std::map<std::uint64_t, std::unique_ptr<Connection>> connections_;
  std::map<std::uint64_t, std::unique_ptr<Control>> controls_;
  std::deque<std::uint64_t> waiting_;
  std::uint64_t next_id_ = 1;
  GateState gate_state_ = GateState::SEALED;   // until the agent says who serves
  GateState before_hold_ = GateState::SEALED;
  std::int64_t attempt_ = 0, timer_ms_ = 0;
  Ticks alive_ = 0;
  std::size_t connecting_ = 0;
  std::int64_t held_ = 0, dropped_ = 0, cut_ = 0;
  double longest_wait_ms_ = 0;
  std::vector<std::uint64_t> doomed_;
};

}  // namespace rehome
