// What every driver asks of the gates and their agents.
#pragma once

#include <string>

#include "traffic/traffic.h"

namespace rehome {

// One side's part of a route; addresses as Address::parse takes them.
struct GateSide {
  std::string listen;  // where clients, or their proxy, arrive
  std::string local;   // where the gate finds the application
  std::uint32_t mark = 0;    // SO_MARK of the gate's connections to it
  bool transparent = false;  // `listen` takes connections that were made to other ports
};

// Makes both gates and the way between them: each gate's route `traffic.name`, and a service and a listener of the
// link, so that a gate whose side does not serve reaches the other one. Returns when both gates are open, whichever
// way. Other routes stay. Idempotent. Throws Error(timeout) naming the gate that does not open, with what it says, and
// Error(state) before anything is made where require_application() does of the source, unless its gate has the route already: the
// other side may serve by now.
void raise_gates(TrafficContext&, const TrafficConfig& traffic, const BySide<GateSide>& sides);

// A finding where nobody answers at the application's address of that site.
void find_application(Site&, const TrafficConfig& traffic, std::vector<Finding>& found);

// What the gate says about itself. Throws Error(unreachable) or what the agent answered.
Json gate_status(Site&);
// The route `name` in a status; throws Error(state) when there is none.
Json gate_route(const Json& status, const std::string& name, const Site&);

// Connections of clients that used this side's gate although the other serves: those of the last minute and those still
// open. A client that asks once in 20 s must not be missed, so 0 is answered only after the gate has led to the other side
// for `watch`; until then this waits, and says so in the log. Throws Error(interrupted), and what the gate's agent answers.
std::int64_t clients_at(TrafficContext&, Side, const std::string& route, Millis watch = Millis(60000));

// Asks again for a few seconds: what a kept program of the agent puts back by itself.
bool comes_back(const std::function<bool()>& right);

// After nobody new comes: waits until nobody is served through this side's gate any more, or is about to be, at most
// drain_deadline. Who is left then is logged, and is cut when the gate ends; so is a gate that does not answer.
void let_finish(TrafficContext&, const TrafficConfig& traffic, Side);

// Text of a file at a site. Throws Error(io) when it is missing or is not UTF-8.
std::string get_text(Site&, const std::string& path);
bool there(Site&, const std::string& path);
void put_text(Site&, const std::string& path, const std::string& content, unsigned mode = 0600);

// Throws Error(interrupted) once the person wants to stop.
void stop_if_cancelled(const TrafficContext&);

// Does `work` at both sites, and throws the first error only after the other site had its turn: what a driver can
// take back, it takes back.
void at_both(TrafficContext&, const std::function<void(Side)>& work);

// What happens to whom at a switch, for every kind of client: one sentence each.
enum class Front { nginx, none };
std::vector<std::string> common_notes(const Deployment&, const TrafficConfig&, Front);

// The drivers.
std::unique_ptr<Traffic> make_listen(const Deployment&, const TrafficConfig&);
std::unique_ptr<Traffic> make_redirect(const Deployment&, const TrafficConfig&);
std::unique_ptr<Traffic> make_unix_socket(const Deployment&, const TrafficConfig&);
std::unique_ptr<Traffic> make_nginx(const Deployment&, const TrafficConfig&);

}  // namespace rehome
