// The gate: a proxy of byte streams in front of an application, which can make clients wait, and then send them to the
// application here or to the other site's gate, without any of them seeing it. One thread, epoll.
#pragma once

#include <sys/types.h>

#include <array>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/json.h"
#include "gate/conn.h"
#include "gate/routes.h"

namespace rehome {

enum class GateState { open_local, open_peer, held, sealed };
std::string_view gate_state_name(GateState s);  // "OPEN_LOCAL", …

struct Route {
  RouteConfig config;
  Slot listen_slot, marked_slot;
  Fd listen, marked;
  std::string trouble;  // why it does not listen; tried again every second
  std::size_t waiting = 0, connecting = 0;
  std::int64_t accepted = 0, from_peer = 0, to_peer = 0, refused = 0, resets = 0;
  bool removed = false;
  // Connections sent to the peer, a cell a second: what still comes to the old address.
  struct Second {
    std::int64_t second = -1, count = 0;
  };
  std::array<Second, 60> to_peer_seconds{};
};

class Gate {
 public:
  // Opens STATE/run/gate.sock and waits, as run() does its work, for STATE/gate.json. `inherited`: listening sockets by
  // name, ROUTE and ROUTE.marked; the others are opened when the file names them. `signals` (borrowed, or -1) is a
  // signalfd: SIGHUP reads gate.json again, any other signal ends run(). Throws Error(io) when the control socket cannot
  // be had.
  //
  // A gate starts SEALED: what it guards may have been yielded before the host went down, and only its agent knows.
  explicit Gate(std::string state, std::map<std::string, Fd> inherited = {}, int signals = -1);
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void run();
  void stop();  // from any thread: run() returns; connections are closed with the gate

 private:
  struct Asking {  // one connection to the control socket
    Slot slot;
    Fd fd;
    std::string line;
  };

  // routes and listeners
  void reload();
  bool open_listeners(Route& route);
  void watch(int fd, Slot* slot, bool edge);
  void accept_all(Route& route, bool marked);

  // connections
  void on_client(Conn& conn, std::uint32_t events);
  void on_server(Conn& conn, std::uint32_t events);
  void work(Conn& conn);
  void wait(Conn& conn, Ticks retry_at);
  void unqueue(Conn& conn);
  void serve_waiting();
  void start(Conn& conn);
  void connected(Conn& conn);
  void try_later(Conn& conn);
  void refuse(Conn& conn);
  void end_gently(Conn& conn, std::string_view last);
  void drop(Conn& conn);
  void pull_back(Conn& conn);
  void tick();
  int patience() const;
  bool in_flight(const Conn& conn) const;

  // control (control.cc)
  void open_control();
  void answer_all();
  void on_asking(Asking& asking);
  Json handle(const Json& request);
  Json status(std::int64_t older_than_ms);
  std::int64_t cut(std::int64_t idle_ms);
  void enter(GateState state, const std::string& why);
  void log(const std::string& line);
  void note_often(const std::string& line);  // for what clients can cause: at most one line a second

  std::string state_dir_;
  std::map<std::string, Fd> inherited_;
  Fd epoll_, wake_, control_, log_;
  int signals_;
  bool running_ = true, have_routes_ = false;
  Slot wake_slot_{Slot::Kind::wake}, control_slot_{Slot::Kind::control}, signal_slot_{Slot::Kind::signals};

  std::map<std::string, std::shared_ptr<Route>> routes_;
  std::unordered_map<Conn*, std::unique_ptr<Conn>> conns_;
  std::vector<std::unique_ptr<Conn>> graves_;  // ended in this turn; an event of theirs may still be in our hands
  std::unordered_map<Asking*, std::unique_ptr<Asking>> askings_;
  std::vector<std::unique_ptr<Asking>> asking_graves_;
  std::vector<std::shared_ptr<Route>> route_graves_;
  std::map<std::uint64_t, Conn*> waiting_;  // without a connection behind them, or on the way to one; oldest first
  std::set<Conn*> busy_, lingering_, spent_;
  std::uint64_t next_key_ = 1;

  GateState at_ = GateState::sealed, before_hold_ = GateState::sealed;
  std::int64_t attempt_ = 0;   // of the hold or seal; 0: sealed since the start
  Millis timer_{0};
  Ticks alive_until_ = 0, entered_at_ = 0;
  Ticks now_ = 0, next_reload_ = 0, next_tick_ = 0, pace_at_ = 0, note_again_ = 0;
  double pace_ = 0;            // connections that may be started now

  struct {
    std::int64_t held = 0, dropped = 0, cut = 0;
    // Clients' connections that were reset because what was behind them broke in the middle. Not those that were cut.
    std::int64_t resets = 0, reset_by_application = 0, reset_by_peer = 0;
    double longest_wait_ms = 0;  // of those that wait no more
  } ledger_;
};

}  // namespace rehome
