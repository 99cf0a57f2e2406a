// Messages of an attempt: the controller's, a person's, and the other agent's.
#include <signal.h>
#include <sys/socket.h>

#include <cerrno>

#include "agent/agent.h"
#include "agent/wire.h"
#include "base/text.h"
#include "sys/process.h"

namespace rehome {
namespace {

Json answer_of(const PeerAnswer& a) {
  Json j{{"opened", a.what == PeerAnswer::What::opened}, {"refused", a.what == PeerAnswer::What::refused},
         {"pending", a.what == PeerAnswer::What::pending}, {"times", a.times}};
  if (!a.reason.empty()) j["reason"] = a.reason;
  return j;
}

}  // namespace

Json Agent::op_attempt_open(const Json& request, AgentConnection&) {
  Millis lease(get_int(request, "lease_ms", 3000));
  if (lease < Millis(200) || lease > Millis(60'000))
    throw Error(Code::usage, "a lease of " + std::to_string(lease.count()) + " ms is not possible", "between 200 and 60000");
  reserve_.keep();
  return {{"attempt", attempt_.open(lease, Deadline::in(Millis(3000)))}, {"lease_ms", lease.count()}};
}

Json Agent::op_lease_renew(const Json& request, AgentConnection&) {
  return {{"left_ms", attempt_.renew(get_int(request, "attempt")).count()}};
}

Json Agent::op_attempt_seal(const Json& request, AgentConnection&) {
  attempt_.seal(get_int(request, "attempt"), Deadline::in(Millis(get_int(request, "wait_ms", 2000))));
  return Json::object();
}

Json Agent::op_attempt_commit(const Json& request, AgentConnection&) {
  Json answer = answer_of(attempt_.commit(get_int(request, "attempt"), Deadline::in(Millis(get_int(request, "wait_ms", 5000)))));
  if (auto r = attempt_.record()) answer["epoch"] = r->epoch;
  return answer;
}

Json Agent::op_attempt_abort(const Json& request, AgentConnection&) {
  std::int64_t n = get_int(request, "attempt");
  attempt_.abort(n, get_string(request, "reason", ""));
  attempt_.wake();
  return {{"undone", attempt_.wait_undone(n, Deadline::in(Millis(get_int(request, "wait_ms", 5000))))}};
}

Json Agent::op_attempt_cancel(const Json& request, AgentConnection&) {
  attempt_.cancel(Deadline::in(Millis(get_int(request, "wait_ms", 10'000))));
  return Json::object();
}

Json Agent::op_attempt_status(const Json&, AgentConnection&) { return attempt_.status(); }

// A person says that the other host is off; an agent that answers there says otherwise.
void Agent::check_alone(const Json& request) const {
  if (!get_bool(request, "confirm", false))
    throw Error(Code::usage, "opening this site without the other one must be confirmed",
                "make sure that the other host is off, then confirm");
  Ticks heard = link_.last_heard();
  if (link_.up() || (heard != 0 && ms_between(heard, system_clock().now()) < 5000))
    throw Error(Code::state, "the other agent answers: its host is not gone", "switch or reverse in the normal way; see status");
}

Json Agent::op_force_open(const Json& request, AgentConnection&) {
  check_alone(request);
  Record before = attempt_.force_open();
  attempt_.wake();
  return {{"held", name_of(before.decision)}, {"since_us", before.wall_us}};
}

Json Agent::op_force_reopen(const Json& request, AgentConnection&) {
  check_alone(request);
  attempt_.force_reopen();
  attempt_.wake();
  return Json::object();
}

Json Agent::op_peer_hello(const Json& request, AgentConnection&) {
  if (get_bool(request, "brief", false)) return Json::object();
  if (get_string(request, "side", "") == side())
    throw Error(Code::config, "both agents call themselves " + side(), "the link leads to the wrong state directory");
  link_.peer_came(request);
  return peer_hello();
}

Json Agent::op_peer_ready(const Json& request, AgentConnection&) {
  reserve_.keep();
  attempt_.peer_ready(get_int(request, "attempt"), get_int(request, "epoch"));
  return Json::object();
}

Json Agent::op_peer_prepared(const Json& request, AgentConnection&) {
  attempt_.peer_prepared(get_int(request, "attempt"), get_int(request, "epoch"));
  return Json::object();
}

Json Agent::op_peer_commit(const Json& request, AgentConnection&) {
  PeerAnswer a = attempt_.peer_commit(get_int(request, "attempt"), get_int(request, "epoch"),
                                      Deadline::in(Millis(get_int(request, "wait_ms", 5000))));
  return answer_of(a);
}

Json Agent::op_peer_tails(const Json& request, AgentConnection&) {
  bool done = attempt_.peer_tails(get_int(request, "attempt"), get_int(request, "epoch"),
                                  Deadline::in(Millis(get_int(request, "wait_ms", 2000))));
  Json j{{"done", done}};
  Json status = attempt_.status();
  if (!done && status.contains("waiting_for")) j["reason"] = status["waiting_for"];
  return j;
}

Json Agent::op_peer_service(const Json& request, AgentConnection& c) {
  listeners_.run_service(get_string(request, "name"), c);
  return Json();
}

}  // namespace rehome
