#include <algorithm>

#include "base/text.h"
#include "ops/life.h"

namespace rehome::ops {
namespace {

// The ssh program and arguments that bring the initiator's agent to the other site; null where both are one host.
Json link_request(Run& run) {
  const LinkConfig& link = run.deployment().link;
  Side to = other(link.initiator);
  if (link.ssh.host.empty()) return {{"socket", run.site(to).state() + "/run/agent.sock"}};
  auto argv = ssh_argv(link.ssh);
  return {{"argv", argv}, {"peer_state", run.site(to).state()}};
}

void raise_link(Run& run) {
  const LinkConfig& link = run.deployment().link;
  AgentSite& from = run.site(link.initiator);
  Json request = link_request(run);
  run.stores_context().note("link between the agents", {{"where", from.label()}});
  from.call("link.set", request);
  if (request.contains("socket")) {
    // Two agents of one host reach each other directly, both ways.
    run.site(other(link.initiator)).call("link.set", {{"socket", from.state() + "/run/agent.sock"}});
  }
  Deadline deadline = Deadline::in(Millis(20000));
  while (true) {
    Json up = from.call("hello").value("link", Json::object());
    if (get_bool(up, "up", false)) {
      Json back = run.site(other(link.initiator)).call("hello").value("link", Json::object());
      if (get_bool(back, "up", false)) return;
      up = back;
    }
    if (deadline.passed())
      throw Error(Code::unreachable, "the link from " + from.label() + " does not come up: " + get_string(up, "error", "no answer"),
                  "on that host, as the agent's account, this must work without a person: ssh " + link.ssh.host + " true");
    system_clock().sleep(Millis(50));
  }
}

}  // namespace

std::vector<std::string> astray(Run& run, Traffic& traffic) {
  std::vector<std::string> all;
  for (Side side : {Side::source, Side::target}) {
    if (!run.has(side)) continue;
    auto more = traffic.astray(run.traffic_context(), side);
    all.insert(all.end(), more.begin(), more.end());
  }
  return all;
}

std::vector<Step> begin_steps(Run& run) {
  std::vector<Step> steps;
  auto add = [&](Step s) { steps.push_back(std::move(s)); };
  StoreContext& context = run.stores_context();

  add({.id = "record", .title = "write down on both sites that the source serves", .run = [&run] {
         for (Side side : {Side::source, Side::target}) run.site(side).call("record.init", {{"side", side_name(side)}, {"name", run.deployment().name}, {"serves", "source"}});
       }});
  add({.id = "link", .title = "connect the two agents", .run = [&run] { raise_link(run); },
       .still_done = [&run] {
         return get_bool(run.site(Side::source).call("hello").value("link", Json::object()), "up", false) &&
                get_bool(run.site(Side::target).call("hello").value("link", Json::object()), "up", false);
       }});
  for (auto& service : run.services())
    for (Side side : {Side::source, Side::target})
      add({.id = "guard " + service->config().name + " " + std::string(side_name(side)),
           .title = "start condition for " + service->config().name + " on the " + std::string(side_name(side)),
           .run = [&run, &context, &service, side] { service->guard(context, run.site(side)); },
           .undo = [&run, &service, side] { service->unguard(run.site(side)); }});
  for (auto& store : run.stores())
    add({.id = "prepare " + store->name(), .title = "prepare " + store->name(),
         .run = [&context, &store] { store->prepare(context); }, .undo = [&context, &store] { store->abandon(context); }});
  for (auto& store : run.stores())
    add({.id = "copy " + store->name(), .title = "copy " + store->name(), .group = "copy",
         .run = [&context, &store] { store->copy(context); }, .still_done = [&context, &store] { return store->copied(context); }});
  for (auto& store : run.stores())
    add({.id = "follow " + store->name(), .title = "follow " + store->name(),
         .run = [&context, &store] { store->follow(context); },
         .still_done = [&context, &store] { return store->follow_status(context).following; }});
  for (auto& service : run.services())
    if (service->config().warm)
      add({.id = "warm " + service->config().name, .title = "start " + service->config().name + " on the target, warm",
           .run = [&run, &context, &service] {
             if (service->running(run.site(Side::target))) return;
             context.note("service " + service->config().name + " started", {{"where", run.site(Side::target).label()}});
             service->start(run.site(Side::target));
           },
           .undo = [&run, &service] {
             if (service->running(run.site(Side::target))) service->stop(run.site(Side::target));
           }});
  for (auto& traffic : run.traffic())
    add({.id = "traffic " + traffic->name(), .title = "lead " + traffic->name() + " through the gates",
         .run = [&run, &traffic] { traffic->prepare(run.traffic_context()); },
         .undo = [&run, &traffic] { traffic->withdraw(run.traffic_context()); },
         .still_done = [&run, &traffic] { return astray(run, *traffic).empty(); }});
  add({.id = "actions", .title = "store with both agents what they must be able to do alone", .run = [&run] { Switchover(run, {Side::source}).store_actions(); }});
  add({.id = "following", .title = "everything follows", .run = [&run] { run.set_phase("following"); }});
  return steps;
}

std::vector<std::string> take_down(Run& run, Side serves, bool cancel) {
  std::vector<std::string> left;
  StoreContext& context = run.stores_context();
  // Traffic first: nothing may go through a gate that is about to end.
  withdraw_all(run.traffic(), run.traffic_context());
  if (cancel) {
    for (auto& service : run.services()) {
      if (!context.has(Side::target)) break;
      // Only what this run started, and that is written down before it is: a service may have run there before.
      const auto changes = run.journal().of_kind("change");
      if (std::any_of(changes.begin(), changes.end(), [&](const Json& c) {
            return get_string(c, "what").starts_with("service " + service->config().name + " started") && get_string(c, "where", "").starts_with("target");
          }) && service->running(run.site(Side::target)))
        service->stop(run.site(Side::target));
    }
  }
  for (auto& store : run.stores()) {
    auto kept = cancel ? store->abandon(context) : store->finish(context, serves);
    left.insert(left.end(), kept.begin(), kept.end());
  }
  for (auto& service : run.services()) {
    service->unguard(run.site(serves));
    if (!context.has(other(serves))) continue;
    if (cancel) {
      service->unguard(run.site(other(serves)));
    } else {
      auto kept = service->leftovers(run.site(other(serves)));
      left.insert(left.end(), kept.begin(), kept.end());
    }
  }
  if (context.gone)
    left.push_back(std::string(side_name(*context.gone)) + ": all that rehome made there, since that host is gone: should it come back, take it away by hand before it meets a client");
  return left;
}

std::vector<std::string> leftovers(Run& run, std::optional<Side> fenced) {
  std::vector<std::string> all;
  auto add = [&](std::vector<std::string> more) { all.insert(all.end(), more.begin(), more.end()); };
  for (auto& traffic : run.traffic()) add(traffic->leftovers(run.traffic_context()));
  for (auto& store : run.stores()) add(store->leftovers(run.stores_context()));
  for (auto& service : run.services())
    for (Side side : {Side::source, Side::target})
      if (run.stores_context().has(side) && side != fenced) add(service->leftovers(run.site(side)));
  return all;
}

}  // namespace rehome::ops
