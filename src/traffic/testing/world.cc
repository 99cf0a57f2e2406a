#include "traffic/testing/world.h"

#include <csignal>

#include "base/bytes.h"

namespace rehome::testing {

LocalSite::~LocalSite() {
  children_.clear();
  gate_.reset();
  for (auto& [name, door] : listeners_) {
    door->stop = true;
    door->thread.join();
  }
}

Json LocalSite::gate(const Json& request) {
  Fd fd = connect_to({.path = state() + "/run/gate.sock"}, Deadline::in(Millis(2000)));
  send_all(fd, dump_line(request) + "\n", Deadline::in(Millis(2000)));
  Reader in(fd);
  auto line = in.line(Deadline::in(Millis(5000)));
  if (!line) throw Error(Code::unreachable, "the gate closed its control socket");
  Json answer = parse_json(*line, "gate");
  if (answer.contains("error")) throw error_from_json(answer["error"]);
  return answer;
}

Fd LocalSite::open_relay(const std::string& address, const std::string&, const std::string&) {
  return connect_to(Address::parse(address), Deadline::in(Millis(5000)));
}

std::string LocalSite::local_socket_for(const std::string&, const std::string&, const std::string&) {
  throw Error(Code::internal, "no database here");
}

Json LocalSite::call(const std::string& op, Json args, Deadline deadline) {
  if (op == "exec") {
    Command command{.argv = args.at("argv").get<std::vector<std::string>>()};
    if (!failing.empty() && command.argv[0].starts_with(failing)) return {{"status", 1}, {"out", ""}, {"err", "made to fail"}};
    command.input = args.contains("input_base64") ? from_base64(get_string(args, "input_base64")) : get_string(args, "input", "");
    return outcome_to_json(run(command, Deadline::in(std::min(deadline.left(), Millis(get_int(args, "timeout_ms", 60000))))));
  }
  if (op == "put") {
    std::string path = get_string(args, "path");
    make_directories(parent_path(path));
    write_durably(path, get_string(args, "content"), static_cast<unsigned>(get_int(args, "mode", 0600)));
    return Json::object();
  }
  if (op == "get") {
    std::string path = get_string(args, "path");
    if (!exists(path)) return {{"missing", true}};
    return {{"content", read_file(path)}};
  }
  if (op == "service.set") {
    std::lock_guard lock(mutex_);
    services_[get_string(args, "name")] = get_string(args, "to");
    return Json::object();
  }
  if (op == "listen.set") {
    std::string name = get_string(args, "name"), service = get_string(args, "service");
    std::lock_guard lock(mutex_);
    auto& door = listeners_[name];
    if (door) return Json::object();
    door = std::make_unique<Door>();
    Address at = Address::parse(get_string(args, "at"));
    make_directories(parent_path(at.path));
    door->listener = listen_on(at);
    Door* d = door.get();
    d->thread = std::thread([this, d, service] {
      while (auto client = accept_from(d->listener, {}, &d->stop)) {
        d->sessions.add([this, d, service, client = std::make_shared<Fd>(std::move(*client))] {
          try {
            std::string to;
            {
              std::lock_guard peer(peer_->mutex_);
              to = peer_->services_.at(service);
            }
            Fd upstream = connect_to(Address::parse(to), Deadline::in(Millis(5000)));
            relay(*client, upstream, d->stop);
          } catch (const Error&) {
          }
        });
      }
    });
    return Json::object();
  }
  if (op == "gate.set") {
    write_durably(state() + "/gate.json", Json{{"routes", args.at("routes")}}.dump());
    if (gate_) return gate({{"op", "reload"}});
    make_directories(state() + "/run");
    gate_ = std::make_unique<Child>(Command{.argv = {REHOME_GATE, "--state", state()}}, Child::Pipes{});
    Deadline start = Deadline::in(Millis(5000));
    while (true) {
      try {
        gate({{"op", "alive"}});
        gate({{"op", "release"}, {"to", opens_to}});
        return {{"reloaded", false}};
      } catch (const Error&) {
        if (start.passed()) throw;
        system_clock().sleep(Millis(10));
      }
    }
  }
  if (op == "gate") return gate(args.at("request"));
  if (op == "child.set") {
    std::lock_guard lock(mutex_);
    auto& child = children_[get_string(args, "name")];
    child.reset();
    child = std::make_unique<Child>(Command{.argv = args.at("argv").get<std::vector<std::string>>()}, Child::Pipes{.die_with_parent = false});
    return Json::object();
  }
  if (op == "child.drop") {
    std::lock_guard lock(mutex_);
    children_.erase(get_string(args, "name"));
    return Json::object();
  }
  throw Error(Code::internal, "LocalSite knows no " + op);
}

World::World(Deployment d) : deployment(std::move(d)) {
  source.set_peer(&target);
  target.set_peer(&source);
  target.opens_to = "peer";
  context_.reset(new TrafficContext{
      .deployment = deployment,
      .source = source,
      .target = target,
      .note = [this](const std::string& what, const Json&) { notes.push_back(what); },
      .recall = [this](const std::string& key) { return facts.contains(key) ? facts[key] : Json(); },
      .remember = [this](const std::string& key, const Json& value) { facts[key] = value; },
      .log = [this](const std::string& line) { lines.push_back(line); },
      .cancelled = cancelled});
}

void World::hold() {
  attempt_++;
  for (LocalSite* s : {&source, &target}) {
    s->gate({{"op", "ledger.reset"}});
    s->gate({{"op", "hold"}, {"attempt", attempt_}, {"timer_ms", 5000}});
  }
}

void World::release(Side serves) {
  LocalSite& at = serves == Side::source ? source : target;
  LocalSite& other = serves == Side::source ? target : source;
  at.gate({{"op", "release"}, {"to", "local"}});
  other.gate({{"op", "release"}, {"to", "peer"}});
}

bool World::switch_to(Side takes, Millis pause) {
  Side yields = takes == Side::source ? Side::target : Side::source;
  LocalSite& gate = yields == Side::source ? source : target;
  hold();
  Deadline deadline = Deadline::in(drain_time(deployment));
  while (get_int(gate.gate({{"op", "status"}}), "in_flight") > 0) {
    if (deadline.passed()) {
      if (!cuts_longer(deployment)) {
        release(yields);
        return false;
      }
      gate.gate({{"op", "cut"}});
      break;
    }
    system_clock().sleep(Millis(2));
  }
  system_clock().sleep(pause);
  release(takes);
  return true;
}

}  // namespace rehome::testing
