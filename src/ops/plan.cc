#include "ops/plan.h"

#include "base/text.h"
#include "config/config.h"
#include "ops/life.h"
#include "ops/ops.h"
#include "sys/fs.h"

namespace rehome::ops {

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
  // Of a run that is there already: what of begin is done.
  const bool begun = run.phase() != "none";
  for (const auto& step : begin_steps(run)) {
    steps.push_back({{"id", step.id}, {"title", step.title}, {"command", "begin"}});
    if (begun) steps.back()["done"] = run.journal().step(step.id) == StepState::done;
  }
  for (const char* title : {"hold new requests at the source's gate", "let requests in flight finish", "soft fence on every store", "freeze the services",
                            "marker, seen on the target", "compare", "position the reverse followers", "read canary", "seal, hard fence, record",
                            "open the target, release the gate"})
    steps.push_back({{"id", title}, {"title", title}, {"command", "switch"}});
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
