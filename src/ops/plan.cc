#include "ops/plan.h"

#include "base/text.h"
#include "config/config.h"
#include "ops/life.h"
#include "ops/ops.h"
#include "sys/fs.h"

namespace rehome::ops {
namespace {

// What Switchover does, in its order: only what applies to this deployment.
std::vector<std::string> cut_titles(Run& run, Direction d) {
  const Deployment& deployment = run.deployment();
  const std::string yields(side_name(d.yields)), takes(side_name(d.takes()));
  std::vector<std::string> titles, fenced, frozen, cold;
  auto add = [&](std::string title) { titles.push_back(std::move(title)); };
  for (auto& store : run.stores()) {
    if (store->capabilities().soft_fence) fenced.push_back(store->name());
    add("prepare the way back of " + store->name() + ": " +
        (store->capabilities().soft_fence ? "a slot on the " + takes + ", a subscription, not yet enabled, on the " + yields : "changes on the " + takes + " are tracked"));
  }
  for (const auto& service : deployment.services) {
    frozen.push_back(service.name);
    if (service.warm) add("start " + service.name + " on the " + takes + ", warm, where it does not run");
    else cold.push_back(service.name);
  }
  add("store with both agents what they must be able to do alone, and try it");
  for (const auto& check : deployment.checks)
    if (!check.write_canary && meant_for(check, d.takes())) add("check " + check.name + " on the " + takes);
  if (!fenced.empty()) add("micro-fence of " + join(fenced, ", ") + ": writers wait for milliseconds, which measures the pause before it begins");
  for (const auto& check : deployment.checks)
    if (check.canary && meant_for(check, d.takes())) add("warm up the " + takes + ": what " + check.name + " asks, asked by up to " + std::to_string(clients_at_once) + " at once");
  const bool gated = !deployment.traffic.empty();
  if (gated) {
    add("hold new requests at the " + yields + "'s gate");
    add("let requests in flight finish" + std::string(cuts_longer(deployment) ? ", and cut those that last longer than " + human_duration(drain_time(deployment)) : ""));
  }
  if (!fenced.empty()) add("soft fence on " + join(fenced, ", "));
  if (!frozen.empty()) add("freeze " + join(frozen, ", ") + " on the " + yields);
  if (!fenced.empty()) add("marker in " + join(fenced, ", "));
  add("see every last change on the " + takes);
  add("compare");
  add("position the followers of the way back");
  for (const auto& check : deployment.checks)
    if (check.canary && meant_for(check, d.takes())) add("read canary " + check.name);
  add("seal, hard fence, record: from here on the " + takes + " serves");
  add("open the " + takes + (cold.empty() ? "" : ", start " + join(cold, ", ") + " there") + (gated ? ", release the gate" : ""));
  if (!fenced.empty()) add("end old sessions of " + join(fenced, ", ") + " on the " + yields);
  if (!frozen.empty()) add("end " + join(frozen, ", ") + " on the " + yields + ", frozen as they are");
  add("the " + yields + " follows the " + takes);
  for (const auto& check : deployment.checks)
    if (check.write_canary && meant_for(check, d.takes())) add("write canary " + check.name + " on the " + takes + (d.yields == Side::source ? "; if it fails, the run goes back" : ""));
  return titles;
}

std::vector<std::string> complete_titles(Run& run) {
  std::vector<std::string> titles;
  for (auto& traffic : run.traffic()) titles.push_back("refuse while clients still come to the old address, and take the gates of " + traffic->name() + " out of their way");
  for (auto& store : run.stores())
    titles.push_back("take away what follows " + store->name() + (store->capabilities().hard_fence ? "; the fence stays on the side that does not serve" : ""));
  for (const auto& service : run.deployment().services)
    if (service.runtime == ServiceConfig::Runtime::systemd) titles.push_back("take the start condition of " + service.name + " from the side that serves");
  titles.push_back("take away both agents, and keep the journal for the report");
  return titles;
}

}  // namespace

Json observe_facts(Run& run) {
  Json facts{{"rehome.yaml", run.deployment().hash}};
  for (Side side : {Side::source, Side::target}) {
    Json hello = run.site(side).call("hello");
    facts[std::string(side_name(side)) + ".user"] = hello.value("user", "");
    // The kernel's own id of the installation, so that a reinstalled host is another one.
    Outcome id = run.site(side).exec({.argv = {"sh", "-c", "cat /etc/machine-id 2>/dev/null; hostname"}});
    facts[std::string(side_name(side)) + ".host"] = std::string(trim(id.out));
  }
  for (auto& store : run.stores()) {
    Estimate e = store->estimate(run.stores_context());
    for (auto& [key, value] : e.facts.items()) facts[store->name() + "." + key] = value;
  }
  return facts;
}

Json make_plan(Run& run) {
  Json plan{{"kind", "plan"}, {"name", run.deployment().name}, {"hash", run.deployment().hash}};
  Json steps = Json::array();
  const std::string phase = run.phase();
  const bool begun = phase != "none";
  auto add = [&](const char* command, const std::vector<std::string>& titles) {
    for (const auto& title : titles) steps.push_back({{"id", title}, {"title", title}, {"command", command}});
  };
  // What is still to come; of a begin that is at work, also what of it is done.
  if (phase == "switched") {
    add("reverse", cut_titles(run, {Side::target}));
  } else if (phase != "completing" && phase != "completed") {
    for (const auto& step : begin_steps(run)) {
      steps.push_back({{"id", step.id}, {"title", step.title}, {"command", "begin"}});
      if (begun) steps.back()["done"] = run.journal().step(step.id) == StepState::done;
    }
    add("switch", cut_titles(run, {Side::source}));
  }
  add("complete", complete_titles(run));
  plan["steps"] = steps;
  Json stores = Json::object(), reasons = Json::array(), facts = Json{{"rehome.yaml", run.deployment().hash}};
  std::int64_t pause = 40, copy = 0;
  reasons.push_back("hold, record, open and release: about 40 ms on hosts near each other");
  for (auto& store : run.stores()) {
    Estimate e = store->estimate(run.stores_context());
    stores[store->name()] = {{"kind", store->kind()}, {"bytes", e.bytes}, {"objects", e.objects}, {"copy_ms", e.copy.count()}, {"pause_ms", e.pause.count()}, {"reasons", e.reasons}, {"again", e.again}};
    pause += e.pause.count();
    copy = std::max<std::int64_t>(copy, e.copy.count());
    for (const auto& r : e.reasons) reasons.push_back(store->name() + ": " + r);
  }
  pause += cold_start_time(run.deployment()).count();
  for (const auto& why : cold_starts(run.deployment())) reasons.push_back(why);
  if (begun && !run.traffic().empty())
    if (PastGate past = past_gate(run.deployment(), run.site(run.serves())); !past.text.empty()) reasons.push_back(past.text);
  Json traffic = Json::object();
  for (auto& t : run.traffic()) traffic[t->name()] = t->plan_notes();
  plan["stores"] = stores;
  plan["traffic"] = traffic;
  plan["copy_ms"] = copy;
  plan["pause"] = {{"ms", pause}, {"max_ms", run.deployment().max_pause.count()}, {"reasons", reasons}};
  plan["facts"] = observe_facts(run);
  return plan;
}

void refuse_stale_plan(Run& run, const std::string& path) {
  if (!exists(path)) throw Error(Code::usage, "there is no plan " + path, "rehome plan --out " + shell_quote(path) + " makes one");
  Json saved = parse_json(read_file(path), "the plan " + path);
  if (!saved.is_object() || !saved.contains("facts") || !saved["facts"].is_object())
    throw Error(Code::usage, path + " is not a plan", "name a file that rehome plan --out wrote");
  Json now = observe_facts(run);
  std::string changed;
  const Json& then = saved.at("facts");
  for (auto& [key, value] : then.items()) {
    Json current = now.contains(key) ? now[key] : Json();
    if (current != value) changed += "\n  " + key + ": was " + dump_line(value) + ", is " + dump_line(current);
  }
  for (auto& [key, value] : now.items())
    if (!then.contains(key)) changed += "\n  " + key + ": was not there, is " + dump_line(value);
  if (!changed.empty()) throw Error(Code::stale_plan, "the plan " + path + " is stale:" + changed, "make a new plan and read what changed");
}

int plan(const PlanOptions& o) {
  Deployment deployment = load_deployment(o.file);
  std::unique_ptr<Run> run = existing_run(deployment);
  if (!run) run = std::make_unique<Run>(deployment, Run::Mode::look);
  Json made = make_plan(*run);
  if (!o.out.empty()) write_durably(o.out, made.dump(2) + "\n", 0644);
  o.emit(made);
  return 0;
}

}  // namespace rehome::ops
