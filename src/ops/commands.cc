#include <algorithm>
#include <ctime>
#include <map>
#include <mutex>
#include <thread>

#include "base/text.h"
#include "config/config.h"
#include "ops/life.h"
#include "ops/ops.h"
#include "ops/plan.h"
#include "sys/fs.h"

namespace rehome::ops {
namespace {

// Wires a run's news to the caller's emit, one at a time.
void listen(Run& run, const Emit& emit) {
  auto mutex = std::make_shared<std::mutex>();
  run.journal().listen([emit, mutex](const Json& entry) {
    std::lock_guard lock(*mutex);
    emit(entry);
  });
  run.stores_context().progress = [emit, mutex](const Progress& p) {
    std::lock_guard lock(*mutex);
    emit({{"kind", "progress"}, {"store", p.store}, {"phase", p.phase}, {"detail", p.detail}, {"done", p.done}, {"total", p.total}, {"unit", p.unit}});
  };
}

void emit_findings(const Emit& emit, const std::vector<Finding>& findings) {
  static constexpr const char* levels[] = {"error", "warning", "note"};
  for (const auto& f : findings)
    emit({{"kind", "finding"}, {"level", levels[static_cast<int>(f.level)]}, {"id", f.id}, {"object", f.object}, {"message", f.message}, {"mend", f.mend}});
}

// What a person does with a run that stands there.
std::string way_on(const std::string& phase) {
  if (phase == "none") return "start with rehome begin";
  if (phase == "begun") return "rehome resume finishes begin; rehome cancel takes it back";
  if (phase == "following") return "rehome switch, or rehome cancel takes it back";
  if (phase == "switched") return "the target serves: reverse or complete";
  if (phase == "cancelling" || phase == "cancelled") return "rehome cancel goes on with taking it back";
  if (phase == "completing" || phase == "completed") return "rehome complete goes on with ending it";
  return "see rehome status";
}

// Where the run stands by what the agents have decided: the records win over a journal that a controller has left behind. As the journal
// says where they tell nothing yet.
std::string phase_by_records(Run& run) {
  const std::string phase = run.phase();
  if (phase != "following" && phase != "switched") return phase;
  try {
    return run.serves() == Side::target ? "switched" : "following";
  } catch (const Error& e) {
    if (e.code != Code::unknown) throw;
    return phase;
  }
}

void require_phase(Run& run, const std::vector<std::string>& allowed, const std::string& command) {
  const std::string phase = phase_by_records(run);
  if (std::find(allowed.begin(), allowed.end(), phase) == allowed.end())
    throw Error(Code::state, command + " is not possible now: the run is '" + phase + "'", way_on(phase));
}

// A difference that a verify has found does not go away by itself.
void require_not_unequal(Run& run) {
  std::map<std::string, bool> equal;
  for (const auto& v : run.journal().of_kind("verify")) equal[get_string(v, "store")] = get_bool(v, "equal", false);
  for (const auto& [store, same] : equal)
    if (!same)
      throw Error(Code::verify, "the last verify of " + store + " found the sites different", "rehome report names what differs; make the target equal and verify again, or cancel and begin again, which copies everything");
}

// Work of one controller. When a second one takes the run over, the first sees its connections cut: it says why.
template <class Work>
auto controlled(Run& run, Work work) -> decltype(work()) {
  try {
    return work();
  } catch (const Error& e) {
    if (e.code == Code::conflict || e.code == Code::backed_out || !run.superseded()) throw;
    throw Error(Code::conflict, "another controller took over this run meanwhile (here it ended with: " + std::string(e.what()) + ")",
                "one at a time: rehome status shows what the other one did");
  }
}

// The newest sample of each store's lag that this side has.
std::map<std::string, Json> newest_lag(Run& run, Side side) {
  std::map<std::string, Json> newest;
  const Json seen = run.site(side).call("lag.read");
  for (const auto& s : seen.at("samples")) newest[get_string(s, "store")] = s;
  return newest;
}

// A switch is the person's to ask for, also where it was once asked for together with begin.
std::string left_of_migrate(Run& run) {
  const auto runs = run.journal().of_kind("run");
  if (runs.empty() || get_string(runs.back(), "command") != "migrate" || run.phase() != "following" || !run.journal().of_kind("serves").empty()) return {};
  return "; of migrate are left: rehome verify, rehome switch --when-ready";
}

// What may be lost with the target, in words.
std::string last_lag(Run& run) {
  std::vector<std::string> parts;
  for (const auto& [store, e] : newest_lag(run, Side::source))
    parts.push_back(store + " was " + human_bytes(get_int(e, "bytes", 0)) + " (" + human_duration(Millis(get_int(e, "ms", 0))) + ") behind at " + format_wall(get_int(e, "at")));
  Json link = run.site(Side::source).call("hello").value("link", Json::object());
  return "what the target acknowledged and the source had not yet followed is lost: the link has been down for " + human_duration(Millis(get_int(link, "since_ms", 0))) +
         (parts.empty() ? ", and no lag was seen before" : "; the last lag seen: " + join(parts, ", "));
}

// What the target held when it was opened by a person's word, from PROTOCOL.md.
std::string held_in_words(const std::string& held) {
  if (held == "STORED") return "the target had the source's decision: nothing acknowledged is missing";
  if (held == "PREPARED") return "the target had everything up to the attempt: nothing is missing, unless the source backed out of it and served again";
  return "the target had followed until the link went down: what the source acknowledged after that is missing";
}

// The person's word that a host is off: its name, so that no habit gives it.
void require_confirmed(Run& run, Side gone, const std::string& confirm) {
  const SiteConfig& site = run.deployment().site[gone];
  std::string full = site.local ? "this machine" : site.ssh.host, host = full.substr(full.rfind('@') + 1);
  if (!confirm.empty() && (confirm == host || confirm == full)) return;
  throw Error(Code::usage, confirm.empty() ? "that " + host + " is off must be confirmed" : "'" + confirm + "' is not the " + std::string(side_name(gone)) + ", which is " + host,
              "make sure that it is off and stays off, then repeat with --confirm " + shell_quote(host));
}

void begin_run(Run& run, const std::string& command) {
  if (run.phase() == "none") {
    Json hello_s = run.site(Side::source).call("hello"), hello_t = run.site(Side::target).call("hello");
    run.journal().append("run", {{"name", run.deployment().name}, {"command", command}, {"hash", run.deployment().hash},
                                 {"max_pause_ms", run.deployment().max_pause.count()},
                                 {"sites", {{"source", run.site(Side::source).label()}, {"target", run.site(Side::target).label()}}},
                                 {"agents", {{"source", hello_s.value("version", "")}, {"target", hello_t.value("version", "")}}}});
    run.set_phase("begun");
  }
  run.remember_parts();
  controlled(run, [&] {
    require_clean(preflight(run));
    run_steps(begin_steps(run), run.journal(), cancel_flag());
  });
}

// A controller that died after the commit left the journal behind what the records say: the records win. Who serves.
Side heed_records(Run& run) {
  std::optional<Side> known;
  for (Deadline deadline = Deadline::in(Millis(30000)); !known; system_clock().sleep(Millis(50))) {
    try {
      known = run.serves();
    } catch (const Error& e) {
      // Decided, and not carried out: the agents are at it.
      if (e.code != Code::unknown || !e.retryable || deadline.passed() || cancel_flag()) throw;
    }
  }
  const Side serving = *known;
  const std::string phase = run.phase();
  const std::string now = phase == "following" && serving == Side::target ? "switched" : phase == "switched" && serving == Side::source ? "following" : phase;
  // An attempt of which nobody wrote down the end has ended too.
  bool unended = false;
  for (const auto& e : run.journal().entries()) {
    const std::string kind = get_string(e, "kind");
    if (kind == "phase" || kind == "pause" || kind == "serves") unended = kind == "phase";
  }
  if (now != phase || unended) run.journal().append("serves", {{"side", side_name(serving)}, {"found", true}});
  if (now != phase) run.set_phase(now);
  return serving;
}

// The way of the last switch or reverse that no controller has followed to its end, with the agents' tails done and the write canaries asked.
std::optional<Direction> unsettled(Run& run) {
  std::optional<Direction> last;
  Side serves = Side::source;
  for (const auto& e : run.journal().entries()) {
    const std::string kind = get_string(e, "kind");
    if (kind == "settled") last.reset();
    if (kind != "serves") continue;
    const Side now = get_string(e, "side") == "target" ? Side::target : Side::source;
    // After a person's word the other side is gone, and nothing of it is waited for.
    if (get_bool(e, "forced", false)) last.reset();
    else if (now != serves) last = Direction{serves};
    serves = now;
  }
  return last;
}

// What a person's word, or an attempt of somebody else, has left to the agents to do is done before it is taken away under them.
void await_settled(Run& run) {
  std::string why;
  for (Deadline deadline = Deadline::in(Millis(60000)); !deadline.passed(); system_clock().sleep(Millis(50))) {
    if (cancel_flag()) throw Error(Code::interrupted, "stopped while waiting for the agents", "repeat the command");
    why.clear();
    for (Side side : {Side::source, Side::target}) {
      if (!run.stores_context().has(side)) continue;
      const Json status = run.site(side).call("attempt.status");
      if (!get_bool(status, "settled", true)) why += (why.empty() ? "" : "; ") + std::string(side_name(side)) + ": " + get_string(status, "waiting_for", "at work");
    }
    if (why.empty()) return;
  }
  throw Error(Code::timeout, "the agents have not finished what was decided before: " + why, "mend that, they try again by themselves; then repeat the command");
}

// A person's word is written down at once; it is true when the stores are open.
void await_opened(Run& run, Side side) {
  Json status;
  for (Deadline deadline = Deadline::in(Millis(30000)); !deadline.passed(); system_clock().sleep(Millis(50))) {
    status = run.site(side).call("attempt.status");
    const std::string decision = get_string(status, "decision");
    if (decision == "OPENED" || decision == "SERVING" || (decision == "REFUSED" && get_bool(status, "settled", true))) return;
    if (cancel_flag()) break;
  }
  throw Error(Code::unknown, "it is decided that the " + std::string(side_name(side)) + " serves, and it does not yet: " + get_string(status, "waiting_for", "its agent is at work"),
              "mend that: its agent tries until everything is open, and rehome status shows what it waits for");
}

CutResult switch_run(Run& run, Direction direction, bool when_ready, Millis patience) {
  return controlled(run, [&] {
    // Checked now and not in the pause: a target that cannot serve must not be found out there.
    Switchover switchover(run, direction);
    // What passes by itself is no reason to send a person away: an agent tries again after 5 s at most.
    if (!when_ready) patience = Millis(8000);
    Prediction p = wait_until_ready(run, switchover, patience, when_ready);
    run.journal().append("message", {{"text", "the pause is predicted to be " + human_duration(p.pause) + ": " + join(p.reasons, "; ")}});
    CutResult result = switchover.cut();
    switchover.settle();
    return result;
  });
}

void emit_result(const Emit& emit, const std::string& what, const CutResult& r) {
  emit({{"kind", "result"}, {"what", what}, {"attempt", r.attempt}, {"pause_ms", r.pause_ms}, {"phases", r.phases}, {"ledger", r.ledger}});
}

// A write canary failed after the commit: the way back is the same cut. What stopped the switch does not stop it; a new Ctrl-C does.
[[noreturn]] void reverse_failed(Run& run, const Emit& emit, const Error& failed) {
  auto note = [&](const Error& e) {
    try {
      run.journal().append("error", {{"error", error_to_json(e)}});
    } catch (const Error&) {
      // It hides nothing: both are in what is thrown.
    }
  };
  note(failed);
  cancel_flag() = false;
  std::string also;
  for (int tries = 1;; tries++) try {
    emit_result(emit, "reverse", switch_run(run, {Side::target}, true, Millis(60000)));
    break;
  } catch (const Error& back) {
    note(back);
    // Clients are on a target that does not do its work: what stood in the way once may be gone.
    if (back.code == Code::backed_out && tries < 3 && !cancel_flag()) continue;
    std::optional<Side> serves;
    try {
      serves = run.serves();
    } catch (const Error&) {
      // Said below as not known.
    }
    if (serves != Side::source)
      throw Error(serves ? Code::check_failed : Code::unknown,
                  failed.message + ", and the way back failed too: " + back.what() + (serves ? "; the target serves" : "; who serves is not known, see status"),
                  "rehome reverse goes back; or mend the target, and rehome resume asks the canary again");
    // The same canary may fail at the source too: it serves all the same.
    also = "; there: " + std::string(back.what());
    break;
  }
  throw Error(Code::backed_out, failed.message + "; reversed: the source serves, nothing is lost" + also, "mend the target, then switch again");
}

// What a controller left undone that died after the decision. Returns the canary's failure where the source serves, and follows no other
// way: to be said when the rest is done.
std::optional<Error> settle_last(Run& run, const Emit& emit, Side serving) {
  auto last = unsettled(run);
  if (!last) return {};
  try {
    controlled(run, [&] { Switchover(run, *last).settle(); });
  } catch (const Error& e) {
    if (e.code != Code::check_failed) throw;
    if (serving == Side::target) reverse_failed(run, emit, e);
    return e;
  }
  return {};
}

// Until then. Whoever takes the run over meanwhile is told of now, and not when the time comes.
void wait_for_time(Run& run, std::int64_t at_us) {
  const std::time_t at = at_us / 1'000'000;
  std::tm local{};
  localtime_r(&at, &local);
  char when[64];
  std::strftime(when, sizeof when, "%Y-%m-%d %H:%M %Z", &local);
  if (system_clock().wall_us() < at_us) run.journal().append("message", {{"text", std::string("waiting until ") + when}});
  for (int n = 1; system_clock().wall_us() < at_us; n++) {
    if (cancel_flag()) throw Error(Code::interrupted, "stopped while waiting for the time to switch", "switch again when you like");
    if (n % 60 == 0 && run.superseded())
      throw Error(Code::conflict, std::string("another controller took over this run while this one waited until ") + when, "one at a time: rehome status shows what the other one did");
    system_clock().sleep(Millis(50));
  }
}

// The run of a command that ends it. A host that a person says is gone is left out; and when the last part of such a command, which
// takes away one agent after the other, was interrupted, the one that is left is enough; so it is when begin got no further than the
// first of them.
std::unique_ptr<Run> open_to_end(const Common& o, Side may_be_gone, bool is_gone, const std::string& confirm, const std::string& ended, const std::vector<std::string>& phases) {
  auto run = std::make_unique<Run>(load_deployment(o.file), Run::Mode::control, true, [&](Run& r) {
    for (Side side : {Side::source, Side::target}) {
      if (r.has(side) || (is_gone && side == may_be_gone)) continue;
      const bool over = r.phase() == ended, not_begun = ended == "cancelled" && r.phase() == "none";
      if (r.missing(side)->code != Code::state || (!over && !not_begun)) throw *r.missing(side);
    }
    if (is_gone && r.has(may_be_gone)) throw Error(Code::state, "the " + std::string(side_name(may_be_gone)) + "'s agent answers: it is not gone", "repeat without saying so");
    if (is_gone) require_confirmed(r, may_be_gone, confirm);
    require_phase(r, phases, ended == "cancelled" ? "cancel" : "complete");
  });
  for (Side side : {Side::source, Side::target})
    if (!run->has(side)) run->give_up(side);
  run->collect_lag();
  listen(*run, o.emit);
  return run;
}

// After complete, when no agent is there any more.
int lift_fence(const CompleteOptions& o) {
  Run run(load_deployment(o.file), Run::Mode::look);
  for (auto& store : run.stores()) store->unfence_source(run.stores_context());
  for (auto& service : run.services())
    for (Side side : {Side::source, Side::target}) service->unguard(run.site(side));
  for (Side side : {Side::source, Side::target})
    run.site(side).exec_ok({.argv = {"sh", "-c", std::string("rm -f -- \"$1/not-serving\"; rmdir -- \"$1\"") + (run.deployment().site[side].state.empty() ? " \"${1%/*}\"" : "") + " 2>/dev/null; true", "sh", run.site(side).resident_state()}});
  o.emit({{"kind", "result"}, {"what", "unfence"}, {"text", "the old side's fence is lifted"}});
  return 0;
}

// The journal goes to the archive, and the agents from their hosts. Repeated, it goes on where it was.
void end_run(Run& run, const char* command, const Emit& emit, const std::function<bool(Side)>& keeps_start_condition) {
  const auto said = run.journal().of_kind("left");
  // A begin that asked nothing of its agents has nothing to tell.
  std::string archived = run.phase() == "none" ? "" : run.archive();
  // The source's journal is the one that surely has the end: whoever repeats this after an interruption needs it.
  for (Side side : {Side::target, Side::source})
    if (run.has(side)) run.site(side).uninstall(keeps_start_condition(side));
  emit({{"kind", "result"}, {"what", command}, {"left", said.empty() ? Json::array() : said.back().at("what")}, {"journal", archived}});
}

}  // namespace

int check(const CheckOptions& o) {
  Run run(load_deployment(o.file), Run::Mode::look);
  auto findings = preflight(run);
  emit_findings(o.emit, findings);
  require_clean(findings, true);
  if (std::none_of(findings.begin(), findings.end(), [](const Finding& f) { return f.level == Finding::Level::warning; }))
    o.emit({{"kind", "result"}, {"what", "check"}, {"text", "nothing in the way"}});
  return 0;
}

int begin(const BeginOptions& o) {
  Deployment deployment = load_deployment(o.file);
  {
    // Before anything is installed: what would break the migration leaves both sites untouched.
    Run look(deployment, Run::Mode::look);
    if (auto there = existing_run(deployment); there && there->phase() != "none")
      throw Error(Code::conflict, "a run of '" + deployment.name + "' is there already: it is '" + there->phase() + "'",
                  there->phase() == "begun" || there->phase() == "following" ? "rehome resume continues it, rehome cancel takes it back, rehome status shows it" : way_on(there->phase()));
    auto findings = preflight(look);
    emit_findings(o.emit, findings);
    require_clean(findings, true);
    if (!o.plan.empty()) refuse_stale_plan(look, o.plan);
  }
  Run run(deployment, Run::Mode::begin);
  listen(run, o.emit);
  begin_run(run, o.command);
  o.emit({{"kind", "result"}, {"what", "begin"}, {"text", "both sites are connected, everything is copied and follows"}});
  return 0;
}

int verify(const VerifyOptions& o) {
  const Deployment deployment = load_deployment(o.file);
  if (!o.store.empty() && std::none_of(deployment.stores.begin(), deployment.stores.end(), [&](const auto& s) { return s.name == o.store; }))
    throw Error(Code::usage, "no store of " + o.file + " is named '" + o.store + "'", "rehome plan shows their names");
  Run run(deployment, Run::Mode::control, false, [](Run& r) { require_phase(r, {"following", "switched"}, "verify"); });
  run.collect_lag();
  listen(run, o.emit);
  bool equal = true;
  const Side serving = run.phase() == "switched" ? Side::target : Side::source;
  for (auto& store : run.stores()) {
    if (!o.store.empty() && store->name() != o.store) continue;
    // Its follower may stand still until then, and no comparison begins before it has caught up.
    require_copied(*store, run.stores_context(), serving, "a comparison");
    Verdict v = controlled(run, [&] { return store->verify(run.stores_context()); });
    Json differences = Json::array();
    for (const auto& d : v.differences) differences.push_back({{"object", d.object}, {"what", d.what}});
    run.journal().append("verify", {{"store", store->name()}, {"equal", v.equal}, {"compared", v.compared}, {"differences", differences}, {"more", v.more}, {"detail", v.detail}});
    equal = equal && v.equal;
  }
  if (!equal) throw Error(Code::verify, "the sites differ; every difference is in the report",
                         "rehome report names them; make the side that follows equal and verify again, or cancel and begin again, which copies everything");
  return 0;
}

int switch_over(const SwitchOptions& o) {
  Run run(load_deployment(o.file), Run::Mode::control, false, [](Run& r) {
    require_phase(r, {"following"}, "switch");
    require_not_unequal(r);
  });
  run.collect_lag();
  listen(run, o.emit);
  heed_records(run);
  require_phase(run, {"following"}, "switch");
  if (o.recopy)
    for (auto& store : run.stores())
      if (!store->needs_recopy(run.stores_context()).empty()) store->recopy(run.stores_context());
  if (!o.plan.empty()) refuse_stale_plan(run, o.plan);
  if (o.at_us) {
    wait_for_time(run, *o.at_us);
    // What was so when the wait began need not be so any more.
    if (!o.plan.empty()) refuse_stale_plan(run, o.plan);
  }
  CutResult result;
  try {
    result = switch_run(run, {Side::source}, o.when_ready, o.patience);
  } catch (const Error& e) {
    if (e.code != Code::check_failed) throw;
    std::optional<Side> serves;
    try {
      serves = run.serves();
    } catch (const Error& lost) {
      throw Error(Code::unknown, e.message + ", and who serves is not known now: " + lost.what(), "see status; rehome resume follows it to the end, or, where the target's host is off for good, rehome reverse --target-is-gone");
    }
    if (serves != Side::target) throw;
    reverse_failed(run, o.emit, e);
  }
  emit_result(o.emit, "switch", result);
  return 0;
}

int reverse(const ReverseOptions& o) {
  if (o.target_is_gone) {
    Run run(load_deployment(o.file), Run::Mode::control, true, [&](Run& r) {
      if (r.has(Side::target)) throw Error(Code::state, "the target's agent answers: it is not gone", "use rehome reverse");
      require_confirmed(r, Side::target, o.confirm);
      require_phase(r, {"following", "switched", "completing"}, "reverse --target-is-gone");
    });
    listen(run, o.emit);
    // From then on nothing was followed, whatever lag was seen before.
    std::string lag = run.phase() == "completing" ? "complete had begun to end the way back: everything that the target acknowledged since then is lost" : last_lag(run);
    // In a reverse that the target did not end, or that the source refused, the source has yielded nothing: it takes over.
    const std::string decision = get_string(run.site(Side::source).call("attempt.status"), "decision");
    const bool taking = decision == "PREPARED" || decision == "REFUSED";
    if (taking)
      for (auto& store : run.stores()) store->make_up_for_cut(run.stores_context(), {Side::target});
    Json answer = run.site(Side::source).call(taking ? "force.open" : "force.reopen", {{"confirm", true}}, Deadline::in(Millis(120000)));
    run.journal().append("serves", {{"side", "source"}, {"forced", true}, {"answer", answer}});
    run.set_phase("following");
    await_opened(run, Side::source);
    o.emit({{"kind", "result"}, {"what", "reverse"}, {"forced", true}, {"answer", answer}, {"text", lag}});
    return 0;
  }
  Run run(load_deployment(o.file), Run::Mode::control, false, [](Run& r) {
    require_phase(r, {"switched", "following"}, "reverse");
    if (r.phase() == "following" && phase_by_records(r) == "following") throw Error(Code::state, "the source serves: there is nothing to reverse", "rehome switch");
  });
  run.collect_lag();
  listen(run, o.emit);
  if (heed_records(run) == Side::source) {
    // Its answer was lost, and a person who asks again means the same.
    auto canary = settle_last(run, o.emit, Side::source);
    o.emit({{"kind", "result"}, {"what", "reverse"}, {"text", "the source serves already: an earlier reverse was carried out"}});
    if (canary) throw *canary;
    return 0;
  }
  emit_result(o.emit, "reverse", switch_run(run, {Side::target}, true, Millis(60000)));
  return 0;
}

namespace {

int complete_run(const CompleteOptions& o) {
  if (o.unfence_source && o.source_is_gone)
    throw Error(Code::usage, "--unfence-source lifts the fence of a source that --source-is-gone says is not there",
                "repeat with --source-is-gone alone; should that host come back, rehome complete --unfence-source lifts its fence");
  // One agent that is still there is a run that is still to be ended: an earlier complete was interrupted between the two.
  if (o.unfence_source && !existing_run(load_deployment(o.file), true)) return lift_fence(o);
  auto opened = open_to_end(o, Side::source, o.source_is_gone, o.confirm, "completed", {"switched", "completing", "completed"});
  Run& run = *opened;
  Side serving = heed_records(run);
  const bool ended_before = run.phase() == "completed";
  if (!ended_before) {
    require_phase(run, {"switched", "completing"}, "complete");
    std::vector<std::string> ended;
    if (o.source_is_gone && serving != Side::target) throw Error(Code::state, "the source served last", "rehome resume --source-is-gone opens the target first");
    if (auto last = unsettled(run); last && !o.source_is_gone && run.phase() == "switched") try {
      controlled(run, [&] { Switchover(run, *last).settle(); });
    } catch (const Error& e) {
      // The last moment at which it can still go back.
      if (e.code != Code::check_failed) throw;
      if (!o.anyway) throw Error(e.code, e.message, "rehome reverse goes back; or mend the target and repeat; or --anyway ends the way back all the same");
      run.journal().append("error", {{"error", error_to_json(e)}});
    }
    await_settled(run);
    for (auto& traffic : run.traffic()) {
      if (o.anyway || o.source_is_gone) break;
      std::int64_t clients = traffic->from_old_address(run.traffic_context(), other(serving));
      if (clients > 0)
        throw Error(Code::state, std::to_string(clients) + " connections came to the " + std::string(side_name(other(serving))) + "'s address in the last minute, or are open there",
                    "move the clients (DNS, addresses) to the " + std::string(side_name(serving)) + ", or repeat with --anyway to let them fail");
    }
    run.set_phase("completing");
    auto left = take_down(run, serving, false);
    for (const auto& t : run.deployment().traffic)
      if (t.kind == TrafficConfig::Kind::gate && t.take == TrafficConfig::Take::listen)
        ended.push_back("traffic " + t.name + ": nobody listens at the gates' " + t.on.source.listen + " (source) and " + t.on.target.listen + " (target) any more: clients use the application at " + t.on[serving].application);
    if (o.unfence_source) {
      for (auto& store : run.stores()) store->unfence_source(run.stores_context());
      for (auto& service : run.services()) service->unguard(run.site(other(serving)));
      left.clear();
    } else if (!left.empty()) {
      left.push_back("rehome complete --unfence-source lifts what keeps the " + std::string(side_name(other(serving))) + " from taking writes");
    }
    left.insert(left.end(), ended.begin(), ended.end());
    // Nothing but the fence of the side that serves no more may be there.
    std::optional<Side> fenced;
    if (!o.unfence_source) fenced = other(serving);
    Json unexpected = Json::array();
    for (const auto& s : leftovers(run, fenced))
      if (!fenced || !s.starts_with(std::string(side_name(*fenced)) + ": ") || !s.ends_with("(the fence)")) unexpected.push_back(s);
    run.journal().append("left", {{"what", left}, {"unexpected", unexpected}});
    if (!unexpected.empty())
      throw Error(Code::store, "complete left behind: " + unexpected.dump(), "repeat rehome complete; it takes away what is still there");
    run.set_phase("completed");
  }
  end_run(run, "complete", o.emit, [&](Side side) { return side != serving && !o.unfence_source; });
  // The command that was interrupted may have been one that keeps the fence.
  return ended_before && o.unfence_source ? lift_fence(o) : 0;
}

}  // namespace

int complete(const CompleteOptions& o) {
  try {
    return complete_run(o);
  } catch (const Error& e) {
    // Whatever was at work has said what a begin goes on with.
    if (e.code != Code::interrupted) throw;
    throw Error(Code::interrupted, e.message, "rehome complete goes on");
  }
}

int cancel(const CancelOptions& o) {
  auto opened = open_to_end(o, Side::target, o.target_is_gone, o.confirm, "cancelled", {"none", "begun", "following", "cancelling", "cancelled"});
  Run& run = *opened;
  // Without a phase begin has brought agents there, and asked nothing of them.
  if (run.phase() != "cancelled" && run.phase() != "none") {
    if (run.phase() == "following" || run.phase() == "switched") heed_records(run);
    if (run.phase() == "switched") throw Error(Code::state, "the target serves: cancel would lose its writes", "rehome reverse first");
    run.site(Side::source).call("attempt.cancel", Json::object(), Deadline::in(Millis(60000)));
    run.set_phase("cancelling");
    auto left = take_down(run, Side::source, true);
    auto still = leftovers(run, {});
    if (!still.empty()) throw Error(Code::store, "cancel left behind: " + join(still, "; "), "repeat rehome cancel; it takes away what is still there");
    run.journal().append("left", {{"what", left}});
    run.set_phase("cancelled");
  }
  end_run(run, "cancel", o.emit, [](Side) { return false; });
  return 0;
}

int migrate(const MigrateOptions& o) {
  BeginOptions b;
  b.file = o.file;
  b.emit = o.emit;
  b.plan = o.plan;
  b.command = "migrate";
  begin(b);
  VerifyOptions v;
  v.file = o.file;
  v.emit = o.emit;
  verify(v);
  SwitchOptions s;
  s.file = o.file;
  s.emit = o.emit;
  s.when_ready = true;
  return switch_over(s);
}

int resume(const ResumeOptions& o) {
  if (o.source_is_gone) {
    Run run(load_deployment(o.file), Run::Mode::control, true, [&](Run& r) {
      if (r.has(Side::source)) throw Error(Code::state, "the source's agent answers: it is not gone", "use rehome resume");
      require_confirmed(r, Side::source, o.confirm);
      if (r.phase() == "none" || r.phase() == "begun")
        throw Error(Code::state, "the target does not have everything: its first copy was never finished", "bring the source back, then rehome resume");
      require_phase(r, {"following", "switched", "completing"}, "resume --source-is-gone");
    });
    listen(run, o.emit);
    // After a cut's seal the target has all of it. Without one, what a cut would have carried over is made up for.
    const std::string held = get_string(run.site(Side::target).call("attempt.status"), "decision");
    if (held != "STORED" && held != "OPENED")
      for (auto& store : run.stores()) store->make_up_for_cut(run.stores_context(), {Side::source});
    Json answer = run.site(Side::target).call("force.open", {{"confirm", true}}, Deadline::in(Millis(120000)));
    run.journal().append("serves", {{"side", "target"}, {"forced", true}, {"answer", answer}});
    run.set_phase("switched");
    await_opened(run, Side::target);
    o.emit({{"kind", "result"}, {"what", "resume"}, {"forced", true}, {"answer", answer}, {"text", held_in_words(get_string(answer, "held", ""))}});
    return 0;
  }
  Run run(load_deployment(o.file), Run::Mode::control, false, [](Run& r) { require_phase(r, {"none", "begun", "following", "switched"}, "resume"); });
  run.collect_lag();
  listen(run, o.emit);
  if (std::string phase = run.phase(); phase == "none" || phase == "begun") {
    begin_run(run, "resume");
    o.emit({{"kind", "result"}, {"what", "resume"}, {"text", "begin is finished: everything is copied and follows" + left_of_migrate(run)}});
    return 0;
  }
  Side serving = heed_records(run);
  auto canary = settle_last(run, o.emit, serving);
  bool recopied = false;
  if (o.recopy)
    for (auto& store : run.stores())
      if (!store->needs_recopy(run.stores_context()).empty()) store->recopy(run.stores_context()), recopied = true;
  if (run.phase() == "following") {
    run.remember_parts();
    run_steps(begin_steps(run), run.journal(), cancel_flag());
    // A database that was taken in is opened and closed by the agents too.
    if (recopied) Switchover(run, {Side::source}).store_actions();
  } else {
    for (auto& traffic : run.traffic())
      if (!astray(run, *traffic).empty()) traffic->prepare(run.traffic_context());
  }
  o.emit({{"kind", "result"}, {"what", "resume"}, {"text", std::string(side_name(serving)) + " serves; the run is '" + run.phase() + "'" + left_of_migrate(run)}});
  if (canary) throw *canary;
  return 0;
}

int status(const StatusOptions& o) {
  Deployment deployment = load_deployment(o.file);
  Json out{{"kind", "status"}, {"name", deployment.name}};
  std::unique_ptr<Run> run = existing_run(deployment, true);
  if (!run) {
    std::string archive = newest_archive(deployment.name);
    out["phase"] = "none";
    if (!archive.empty()) out["last_journal"] = archive;
    o.emit(out);
    return 0;
  }
  out["phase"] = run->phase();
  int exit_status = 0;
  for (Side side : {Side::source, Side::target}) {
    Json& at = out[std::string(side_name(side))];
    if (!run->has(side)) {
      at = {{"missing", error_to_json(*run->missing(side))}};
      continue;
    }
    at = run->site(side).call("hello");
    at["attempt"] = run->site(side).call("attempt.status");
    if (!deployment.traffic.empty()) {
      try {
        at["gate"] = run->site(side).call("gate", {{"request", {{"op", "status"}, {"older_than_ms", drain_time(deployment).count()}}}});
        if (std::int64_t longer = get_int(at["gate"], "older", 0); longer > 0 && get_string(at["gate"], "state") == "OPEN_LOCAL")
          at["gate"]["longer"] = long_connections(deployment, longer);
        if (get_string(at["gate"], "state") == "OPEN_LOCAL")
          if (PastGate past = past_gate(deployment, run->site(side)); !past.text.empty()) at["gate"]["past"] = past.text;
      } catch (const Error& e) {
        at["gate"] = e.code == Code::state && (out["phase"] == "none" || out["phase"] == "begun") ? Json{{"none", true}} : Json{{"error", error_to_json(e)}};
      }
    }
  }
  try {
    const Side serving = run->serves();
    out["serves"] = side_name(serving);
    if (run->has(serving))
      for (auto& service : run->services()) {
        Json& at = out["services"][service->config().name];
        try {
          at["running"] = service->running(run->site(serving));
        } catch (const Error& e) {
          at["error"] = error_to_json(e);
        }
      }
  } catch (const Error& e) {
    out["serves"] = e.code == Code::unknown && e.retryable ? "neither" : "unknown";
    out["why"] = error_to_json(e);
    exit_status = error_info(e.code).exit_status;
  }
  Json stores = Json::object();
  const bool follows = out["phase"] == "following" || out["phase"] == "switched";
  if (follows && run->has(Side::source) != run->has(Side::target)) {
    const Side here = run->has(Side::source) ? Side::source : Side::target;
    for (const auto& [store, e] : newest_lag(*run, here))
      stores[store] = {{"following", false}, {"lag_bytes", get_int(e, "bytes", 0)}, {"lag_ms", get_int(e, "ms", 0)}, {"seen_at_us", get_int(e, "at")},
                       {"trouble", "the " + std::string(side_name(other(here))) + " is not reached; seen last at " + format_wall(get_int(e, "at")) + ": " +
                                       human_bytes(get_int(e, "bytes", 0)) + " (" + human_duration(Millis(get_int(e, "ms", 0))) + ") behind"}};
  }
  if (follows && run->has(Side::source) && run->has(Side::target)) {
    for (auto& store : run->stores()) {
      try {
        FollowStatus s = store->follow_status(run->stores_context());
        stores[store->name()] = {{"following", s.following}, {"lag_bytes", s.lag_bytes}, {"lag_ms", s.lag.count()}, {"open_write_ms", s.open_write_age_ms},
                                 {"trouble", s.trouble}, {"detail", s.detail}, {"needs_recopy", store->needs_recopy(run->stores_context())}};
      } catch (const Error& e) {
        stores[store->name()] = {{"error", error_to_json(e)}};
      }
    }
  }
  out["stores"] = stores;
  Json steps = Json::array();
  std::map<std::string, Json> last;
  for (const auto& e : run->journal().of_kind("step")) last[get_string(e, "id")] = e;
  for (auto& [id, e] : last) steps.push_back(e);
  out["steps"] = steps;
  o.emit(out);
  return exit_status;
}

std::vector<Json> report_entries(const ReportOptions& o) {
  Deployment deployment = load_deployment(o.file);
  if (auto run = existing_run(deployment, true)) {
    std::vector<Json> entries = run->journal().entries();
    for (Json& s : run->lag_samples()) {
      s["kind"] = "lag";
      s["at"] = s["at_us"];
      entries.push_back(std::move(s));
    }
    return entries;
  }
  std::string archive = newest_archive(deployment.name);
  if (archive.empty()) throw Error(Code::state, "no run of '" + deployment.name + "' is there, and none is archived on this machine", "run it where the run was completed");
  std::vector<Json> entries;
  for (const auto& line : split(read_file(archive), '\n'))
    if (!line.empty()) entries.push_back(parse_json(line, archive));
  return entries;
}

}  // namespace rehome::ops
