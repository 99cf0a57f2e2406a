#include "traffic/gates.h"

#include <algorithm>

#include "base/text.h"

namespace rehome {
namespace {

std::string marked_address(const Site& site, const std::string& name) { return "unix:" + site.state() + "/run/gate-" + name + ".marked"; }
std::string peer_address(const Site& site, const std::string& name) { return "unix:" + site.state() + "/run/l/gate-" + name; }

Json routes_at(Site& site) {
  std::string path = site.state() + "/gate.json";
  return there(site, path) ? parse_json(get_text(site, path), path).at("routes") : Json::array();
}

void set_route(Site& site, const TrafficConfig& t, const GateSide& side) {
  Json route{{"name", t.name},
             {"listen", side.listen},
             {"marked", marked_address(site, t.name)},
             {"local", side.local},
             {"peer", peer_address(site, t.name)},
             {"proxy_protocol", t.proxy_protocol == 0 ? Json(false) : Json(t.proxy_protocol == 1 ? "v1" : "v2")},
             {"accept_proxy", t.accept_proxy},
             {"refuse_with", t.refuse_with_503 ? "http_503" : "close"},
             {"max_waiting", t.max_waiting},
             {"max_wait_ms", t.max_wait.count()},
             {"mark", side.mark},
             {"transparent", side.transparent}};
  Json routes = Json::array();
  for (const auto& r : routes_at(site))
    if (get_string(r, "name") != t.name) routes.push_back(r);
  routes.push_back(route);
  site.call("gate.set", {{"routes", routes}});
}

// Open, that is: a gate that holds would keep the clients that are about to be sent to it waiting.
void wait_for_gate(TrafficContext& ctx, Site& site, const std::string& name) {
  Deadline deadline = Deadline::in(Millis(15000));
  std::string last;
  while (true) {
    stop_if_cancelled(ctx);
    try {
      Json status = gate_status(site);
      std::string state = get_string(status, "state");
      std::string trouble = get_string(gate_route(status, name, site), "trouble", "");
      if ((state == "OPEN_LOCAL" || state == "OPEN_PEER") && trouble.empty()) return;
      last = trouble.empty() ? "it is " + state : trouble;
    } catch (const Error& e) {
      last = e.what();
    }
    if (deadline.passed())
      throw Error(Code::timeout, "the gate does not open for " + name + ": " + last,
                  "see log/gate.log and log/agent.log in " + site.state() + " on that host", true)
          .in(site.label());
    system_clock().sleep(Millis(20));
  }
}

}  // namespace

std::string why_no_application(Site& site, const TrafficConfig& traffic) {
  const std::string& at = traffic.on[site.side()].application;
  try {
    site.open_relay(at);
    return {};
  } catch (const Error& e) {
    return "nobody answers at " + at + ", where the application should listen: " + e.message;
  }
}

void find_application(Site& site, const TrafficConfig& traffic, std::vector<Finding>& found) {
  if (std::string why = why_no_application(site, traffic); !why.empty())
    found.push_back({Finding::Level::error, "traffic.application", site.label() + ": traffic " + traffic.name, why, "start the application, or correct `application`"});
}

void require_application(Site& site, const TrafficConfig& traffic, Millis patience) {
  if (traffic.take != TrafficConfig::Take::listen) return;
  for (Deadline deadline = Deadline::in(patience);;) {
    std::string why = why_no_application(site, traffic);
    if (why.empty()) return;
    if (deadline.passed()) throw Error(Code::state, "traffic " + traffic.name + ": " + why, "start the application there, or correct `application`").in(site.label());
    system_clock().sleep(Millis(100));
  }
}

void raise_gates(TrafficContext& ctx, const TrafficConfig& traffic, const BySide<GateSide>& sides) {
  // Behind a gate that leads nowhere all clients would wait.
  const Json raised = routes_at(ctx.at(Side::source));
  if (std::none_of(raised.begin(), raised.end(), [&](const Json& r) { return get_string(r, "name") == traffic.name; }))
    require_application(ctx.at(Side::source), traffic, Millis(1000));
  for (Side s : {Side::source, Side::target}) {
    Site& site = ctx.at(s);
    ctx.note("gate for " + traffic.name, {{"where", site.label()}, {"listens", sides[s].listen}, {"undone_by", "the end of the agents"}});
    site.call("service.set", {{"name", "gate-" + traffic.name}, {"to", marked_address(site, traffic.name)}});
    site.call("listen.set", {{"name", "gate-" + traffic.name},
                             {"at", peer_address(site, traffic.name)},
                             {"service", "gate-" + traffic.name},
                             {"mode", 0600}});
  }
  for (Side s : {Side::source, Side::target}) set_route(ctx.at(s), traffic, sides[s]);
  for (Side s : {Side::source, Side::target}) wait_for_gate(ctx, ctx.at(s), traffic.name);
}

Json gate_status(Site& site) { return site.call("gate", {{"request", {{"op", "status"}}}}); }

Json gate_route(const Json& status, const std::string& name, const Site& site) {
  Json routes = status.value("routes", Json::array());
  for (const auto& r : routes)
    if (get_string(r, "name") == name) return r;
  throw Error(Code::state, "the gate has no route " + name, "its gate.json names it? rehome resume sends it again").in(site.label());
}

bool comes_back(const std::function<bool()>& right) {
  for (Deadline deadline = Deadline::in(Millis(4000)); !right(); system_clock().sleep(Millis(200)))
    if (deadline.passed()) return false;
  return true;
}

std::int64_t clients_at(TrafficContext& ctx, Side side, const std::string& name, Millis watch) {
  Site& site = ctx.at(side);
  bool said = false;
  while (true) {
    stop_if_cancelled(ctx);
    Json status = gate_status(site);
    Json route = gate_route(status, name, site);
    // Who came in that minute and is still there is in both: so many at least.
    std::int64_t clients = std::max(get_int(route, "to_peer_last_minute"), get_int(route, "in_flight_to_peer"));
    // A gate that has not led to the other side yet has nobody's count, and says 0.
    Millis watched(get_string(status, "state") == "OPEN_PEER" ? get_int(status, "state_ms") : 0);
    if (clients > 0 || watched >= watch) return clients;
    if (!said) ctx.log(site.label() + ": nobody was seen at the old address of " + name + " in " + human_duration(watched) + "; watching it for " + human_duration(watch - watched) + " more");
    said = true;
    system_clock().sleep(Millis(50));
  }
}

void let_finish(TrafficContext& ctx, const TrafficConfig& traffic, Side side) {
  Site& site = ctx.at(side);
  Deadline deadline = Deadline::in(ctx.deployment.drain_deadline);
  // A client far away has had the gate's SYN-ACK, and its own answer is under way: the kernel knows of that connection, the
  // gate not yet. A second and a half is a long way, or one packet that was lost.
  Deadline arrived = Deadline::in(std::min(Millis(1500), ctx.deployment.drain_deadline));
  try {
    // Twice nobody: one may be in the listener's queue, between the kernel and the gate.
    for (int quiet = 0; quiet < 2; system_clock().sleep(Millis(20))) {
      Json route = gate_route(gate_status(site), traffic.name, site);
      std::int64_t left = get_int(route, "in_flight") + get_int(route, "waiting");
      quiet = left == 0 && arrived.passed() ? quiet + 1 : 0;
      if (left == 0 || !deadline.passed()) continue;
      ctx.log(site.label() + ": " + std::to_string(left) + " connections through the gate for " + traffic.name + " did not end in " +
              human_duration(ctx.deployment.drain_deadline) + "; they are cut when the gate ends");
      return;
    }
  } catch (const Error& e) {
    ctx.log(site.label() + ": " + e.what());
  }
}

bool there(Site& site, const std::string& path) {
  return !get_bool(site.call("get", {{"path", path}}), "missing", false);
}

std::string get_text(Site& site, const std::string& path) {
  Json answer = site.call("get", {{"path", path}});
  if (get_bool(answer, "missing", false)) throw Error(Code::io, path + " is not there").in(site.label());
  if (!answer.contains("content"))
    throw Error(Code::io, path + " is not UTF-8, so it cannot be edited without changing other bytes",
                "iconv -f latin1 -t utf-8 makes it so")
        .in(site.label());
  return get_string(answer, "content");
}

void put_text(Site& site, const std::string& path, const std::string& content, unsigned mode) {
  site.call("put", {{"path", path}, {"content", content}, {"mode", mode}});
}

void stop_if_cancelled(const TrafficContext& ctx) {
  if (ctx.cancelled) throw Error(Code::interrupted, "stopped", "rehome resume goes on, rehome cancel takes everything back");
}

void at_both(TrafficContext& ctx, const std::function<void(Side)>& work) {
  std::unique_ptr<Error> first;
  for (Side s : {Side::target, Side::source}) {
    if (!ctx.has(s)) continue;
    try {
      work(s);
    } catch (const Error& e) {
      if (!first) first = std::make_unique<Error>(e);
    }
  }
  if (first) throw *first;
}

std::vector<std::unique_ptr<Traffic>> make_traffic(const Deployment& deployment) {
  std::vector<std::unique_ptr<Traffic>> all;
  for (const auto& t : deployment.traffic) {
    if (t.kind == TrafficConfig::Kind::nginx)
      all.push_back(make_nginx(deployment, t));
    else if (t.take == TrafficConfig::Take::redirect)
      all.push_back(make_redirect(deployment, t));
    else if (t.take == TrafficConfig::Take::unix_socket)
      all.push_back(make_unix_socket(deployment, t));
    else
      all.push_back(make_listen(deployment, t));
  }
  return all;
}

void withdraw_all(std::vector<std::unique_ptr<Traffic>>& prepared, TrafficContext& ctx) {
  for (auto t = prepared.rbegin(); t != prepared.rend(); ++t) (*t)->withdraw(ctx);
}

}  // namespace rehome
