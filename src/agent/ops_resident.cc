// Messages that set up what stays when the controller has gone: link, listeners, programs, freezing, actions, gate.
#include "agent/agent.h"
#include "agent/boot.h"
#include "agent/exec.h"
#include "sys/fs.h"

namespace rehome {

Json Agent::op_link_set(const Json& request, AgentConnection&) {
  Json link;
  for (const char* key : {"argv", "peer_state", "socket"})
    if (request.contains(key) && !request[key].is_null()) link[key] = request[key];
  Link::check(link);
  set_config("link", link);
  link_.set(link);
  return Json::object();
}

Json Agent::op_service_set(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name");
  Service s{Address::parse(get_string(request, "to")), get_string(request, "as_user", "")};
  set_config("services", name, {{"to", s.to.text()}, {"as_user", s.as_user}});
  listeners_.serve(name, s);
  return Json::object();
}

Json Agent::op_service_drop(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name");
  set_config("services", name, Json());
  listeners_.drop_service(name);
  return Json::object();
}

Json Agent::op_listen_set(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name"), service = get_string(request, "service");
  Address at = Address::parse(get_string(request, "at"));
  auto mode = get_int(request, "mode", 0600), account = get_int(request, "account", -1);
  listeners_.listen(name, at, service, static_cast<unsigned>(mode), account, false);
  set_config("listeners", name, {{"at", at.text()}, {"service", service}, {"mode", mode}, {"account", account}});
  for (const auto& one : listeners_.status())
    if (one["name"] == name && one.contains("port")) return {{"port", one["port"]}};
  return Json::object();
}

Json Agent::op_listen_drop(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name");
  set_config("listeners", name, Json());
  listeners_.drop_listener(name);
  return Json::object();
}

Json Agent::op_listen_try(const Json& request, AgentConnection&) {
  try_bind(Address::parse(get_string(request, "at")));
  return Json::object();
}

Json Agent::op_listen_status(const Json&, AgentConnection&) { return {{"listeners", listeners_.status()}}; }

Json Agent::op_child_set(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name");
  Command command = command_from_json(request);
  Millis restart(get_int(request, "restart_ms", 1000));
  Json kept;
  for (const char* key : {"argv", "env", "input", "input_base64", "user", "directory", "restart_ms"})
    if (request.contains(key)) kept[key] = request[key];
  set_config("children", name, kept);
  children_.set(name, command, restart);
  return Json::object();
}

Json Agent::op_child_status(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name", "");
  Json s = children_.status(name);
  if (name.empty()) return {{"children", s}};
  return s;
}

Json Agent::op_child_drop(const Json& request, AgentConnection&) {
  std::string name = get_string(request, "name");
  set_config("children", name, Json());
  return {{"dropped", children_.drop(name)}};
}

Json Agent::op_freeze_set(const Json& request, AgentConnection&) {
  Json items = request.value("items", Json());
  freezer_.set(Freezer::parse(items), false, get_bool(request, "early", false));
  set_config("freeze", items);
  return Json::object();
}

// A request that a cut held up arrives when its attempt has long been undone: nobody would thaw again.
Json Agent::op_freeze(const Json& request, AgentConnection&) {
  std::int64_t n = get_int(request, "attempt");
  // One at a time: what a late one takes back must not be what a later attempt has frozen.
  std::lock_guard freezing(freeze_mutex_);
  require_open(n);
  try {
    // What is down, or is killed while it is frozen, stays down: its unit's restart, socket or timer would start a writer behind the freeze.
    if (freezer_.any()) forbid_in_attempt();
    Json items = freezer_.freeze();
    require_open(n);
    return {{"items", items}};
  } catch (const Error&) {
    unfreeze_late();
    throw;
  }
}

// The undo's own steps may have come before the last of what was done here. An attempt that is open has an undo before it.
void Agent::unfreeze_late() {
  auto r = attempt_.record();
  if (!r || name_of(r->serves) != side() || r->decision == Decision::attempt) return;
  or_log("thaw", [&] { freezer_.thaw(); });
  or_log("start condition", [&] { allow_services(); });
  freezer_.start_units();
}

void Agent::require_open(std::int64_t n) const {
  auto r = attempt_.record();
  if (!r) throw Error(Code::state, "the record cannot be read", "see status");
  if (r->decision != Decision::attempt || r->attempt != n || attempt_.lease_left().count() <= 0)
    throw Error(Code::state, "attempt " + std::to_string(n) + " is not open, so nobody would take this back", "send attempt.open first");
}

Json Agent::op_thaw(const Json&, AgentConnection&) {
  auto r = attempt_.record();
  if (r && name_of(r->serves) != side())
    throw Error(Code::state, "this site has yielded: a thawed service could still write a file", "its services are killed by the tails");
  return {{"items", freezer_.thaw()}};
}

Json Agent::op_kill_frozen(const Json&, AgentConnection&) {
  auto r = attempt_.record();
  if (r && name_of(r->serves) == side())
    throw Error(Code::state, "this site serves: its services are not killed", "thaw brings them back");
  return {{"items", freezer_.kill()}};
}

Json Agent::op_action_set(const Json& request, AgentConnection&) {
  ActionSet which = action_set_from(get_string(request, "set"));
  if (attempt_.busy())
    throw Error(Code::state, "the agent is at work with its actions: " + get_string(attempt_.status(), "phase"), "see status", true);
  actions_.set(which, request.value("items", Json()));
  return Json::object();
}

Json Agent::op_action_try(const Json& request, AgentConnection&) {
  actions_.try_out(action_set_from(get_string(request, "set")), get_string(request, "name", ""));
  return Json::object();
}

Json Agent::op_action_warm(const Json& request, AgentConnection&) {
  actions_.warm(action_set_from(get_string(request, "set")));
  return Json::object();
}

Json Agent::op_gate_set(const Json& request, AgentConnection&) {
  if (request.contains("program")) set_config("gate_program", get_string(request, "program"));
  Json gate = request.contains("gate") ? request["gate"] : Json{{"routes", request.value("routes", Json::array())}};
  if (!gate.is_object() || !gate.contains("routes") || !gate["routes"].is_array())
    throw Error(Code::usage, "'gate' has no 'routes'");
  bool running = gate_.exists();
  write_durably(options_.state + "/gate.json", gate.dump(1) + "\n");
  if (running) {
    try {
      gate_.ask({{"op", "reload"}}, Deadline::in(Millis(2000)));
    } catch (const Error& e) {
      return {{"reloaded", false}, {"reason", e.what()}};
    }
  }
  return {{"reloaded", running}};
}

Json Agent::op_gate(const Json& request, AgentConnection&) {
  Json inner = request.value("request", Json());
  std::string op = get_string(inner, "op");
  if (op != "status") check_generation(request, true);
  if (op == "seal") throw Error(Code::usage, "the gate is sealed by its agent only", "use attempt.seal");
  if (op == "release") {
    Json answer = gate_.release(get_string(inner, "to"), Deadline::in(Millis(5000)));
    answer.erase("ok");
    return answer;
  }
  if (op == "hold") {
    auto r = attempt_.record();
    if (!r) throw Error(Code::state, "the record cannot be read", "see status");
    std::int64_t n = get_int(inner, "attempt");
    bool yields = r->decision == Decision::attempt && r->attempt == n && attempt_.lease_left().count() > 0;
    // The side that takes over: its clients wait here, since a connection that came through the link is not sent back.
    bool takes = name_of(r->serves) != side() && r->settled && r->attempt < n;
    if (!yields && !takes)
      throw Error(Code::state, "attempt " + std::to_string(n) + " is not open, so nobody would release the gate again", "send attempt.open first");
  }
  if (op == "cut" && inner.contains("attempt")) require_open(get_int(inner, "attempt"));
  Json answer = gate_.ask(inner, Deadline::in(Millis(get_int(request, "timeout_ms", 5000))));
  answer.erase("ok");
  return answer;
}

Json Agent::op_boot_install(const Json& request, AgentConnection& c) {
  Boot boot{get_string(request, "how"), options_.name, side(), options_.state, {}};
  if (request.contains("before"))
    for (const auto& unit : request["before"]) boot.before.push_back(unit.get<std::string>());
  if (Json old = config("boot"); old.is_string() && old != get_string(request, "how")) op_boot_remove(request, c);
  // Recorded before it is made, so that boot.remove finds whatever a crash leaves.
  set_config("boot", get_string(request, "how"));
  return {{"made", install_boot(boot, get_string(request, "program", ""))}};
}

Json Agent::op_boot_remove(const Json&, AgentConnection&) {
  Json how = config("boot");
  if (how.is_string()) {
    remove_boot({how.get<std::string>(), options_.name, side(), options_.state, {}});
    set_config("boot", Json());
  }
  return Json::object();
}

}  // namespace rehome
