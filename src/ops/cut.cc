#include "ops/cut.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "base/text.h"
#include "ops/life.h"

namespace rehome::ops {

// Renews the lease every 500 ms on a connection of its own; the pool's connections may all be busy. It stops at `until`: a controller
// whose work is stuck, and whose threads live, must not hold a service for ever.
class Switchover::Lease {
 public:
  Lease(AgentSite& site, std::int64_t attempt, Deadline until)
      : fd_(site.connect(Deadline::in(Millis(5000)))), generation_(site.generation()), attempt_(attempt), until_(until),
        thread_([this](std::stop_token stop) { renew(stop); }) {}
  // Why the lease is over; empty while it holds.
  std::string lost() {
    std::lock_guard lock(mutex_);
    return lost_;
  }

 private:
  void renew(std::stop_token stop) {
    Reader reader(fd_);
    std::string request = dump_line({{"op", "lease.renew"}, {"gen", generation_}, {"attempt", attempt_}}) + "\n";
    while (!stop.stop_requested()) {
      try {
        if (until_.passed()) throw Error(Code::timeout, "the pause is longer than max_pause");
        send_all(fd_, request, Deadline::in(Millis(2000)));
        auto line = reader.line(Deadline::in(Millis(2000)));
        Json answer = line ? parse_json(*line, "the answer to lease.renew") : Json::object();
        if (answer.contains("error")) throw error_from_json(answer["error"]);
        if (!line) throw Error(Code::unreachable, "the agent closed the lease's connection");
      } catch (const Error& e) {
        std::lock_guard lock(mutex_);
        lost_ = e.what();
        return;
      }
      for (int i = 0; i < 50 && !stop.stop_requested(); i++) system_clock().sleep(Millis(10));
    }
  }
  Fd fd_;
  std::int64_t generation_, attempt_;
  Deadline until_;
  std::mutex mutex_;
  std::string lost_;
  std::jthread thread_;
};

Switchover::Switchover(Run& run, Direction direction) : run_(run), direction_(direction) {}
Switchover::~Switchover() = default;

namespace {

Json action_json(Site& site, const Action& a) {
  for (const auto& [file, content] : a.credentials)
    site.call("put", {{"path", site.state() + "/credentials/" + file}, {"content", content}, {"mode", 0600}});
  Json env = Json::object();
  for (const auto& [k, v] : a.env) env[k] = v;
  Json j{{"name", a.name}, {"argv", a.argv}, {"env", env}, {"warm", a.warm}, {"timeout_ms", a.timeout.count()}};
  if (!a.input.empty()) j["input"] = a.input;
  if (!a.try_input.empty()) j["try_input"] = a.try_input;
  if (!a.user.empty()) j["user"] = a.user;
  return j;
}

// For tests only: a program that is told where the pause stands, and breaks something there.
void fault_hook(const char* when, const char* phase) {
  if (const char* hook = std::getenv("REHOME_FAULT_HOOK")) run({.argv = {hook, when, phase}});
}

void set_actions(Site& site, const char* set, const std::vector<Action>& actions) {
  Json items = Json::array();
  for (const auto& a : actions) items.push_back(action_json(site, a));
  site.call("action.set", {{"set", set}, {"items", items}});
}

}  // namespace

void require_copied(Store& store, StoreContext& context, Side serving, const std::string& before) {
  const auto again = store.needs_recopy(context);
  if (again.empty()) return;
  throw serving == Side::source ? Error(Code::state, store.name() + " must be copied again before " + before + ": " + join(again, "; "), "rehome resume --recopy does it")
                                : Error(Code::state, store.name() + " was changed on the target since the switch: " + join(again, "; "),
                                        "rehome resume --recopy says what the source needs for the way back, and brings new tables there");
}

void Switchover::store_actions() {
  ActionSets all;
  auto add = [](std::vector<Action>& to, const std::vector<Action>& from) { to.insert(to.end(), from.begin(), from.end()); };
  for (auto& store : run_.stores()) {
    ActionSets sets = store->actions(run_.stores_context(), direction_);
    add(all.undo, sets.undo);
    add(all.open, sets.open);
    add(all.tail_takes, sets.tail_takes);
    add(all.tail_yields, sets.tail_yields);
    for (Side side : {Side::source, Side::target}) add(all.close[side], sets.close[side]);
  }
  Json freeze = Json::array();
  for (auto& service : run_.services()) {
    freeze.push_back(service->freeze_item(direction_.yields));
    // A unit is started by the agent behind the undo, without waiting: one that cannot start must not keep the others frozen.
    if (service->config().runtime != ServiceConfig::Runtime::systemd) all.undo.push_back(service->start_action(direction_.yields));
    // A warm one runs already, and nothing inside the pause is spawned for it; a host that rebooted gets it afterwards.
    (service->config().warm ? all.tail_takes : all.open).push_back(service->start_action(direction_.takes()));
  }
  set_actions(yields(), "undo", all.undo);
  set_actions(takes(), "open", all.open);
  set_actions(takes(), "tail_takes", all.tail_takes);
  set_actions(yields(), "tail_yields", all.tail_yields);
  set_actions(yields(), "close", all.close[direction_.yields]);
  set_actions(takes(), "close", all.close[direction_.takes()]);
  yields().call("freeze.set", {{"items", freeze}});
  yields().call("action.try", {{"set", "undo"}}, Deadline::in(Millis(60000)));
  takes().call("action.try", {{"set", "open"}}, Deadline::in(Millis(60000)));
}

void Switchover::start_services() {
  for (auto& service : run_.services()) {
    if (!service->config().warm) continue;
    if (!service->running(takes())) {
      run_.stores_context().note("service " + service->config().name + " started on the side that takes over",
                                 {{"where", takes().label()}});
      service->start(takes());
    }
  }
}

// Where no check asks, a wrong address on that side would show after the decision, to everybody.
void Switchover::require_applications() {
  const auto& services = run_.deployment().services;
  if (services.empty()) return;   // a person starts it, and may do so after the switch
  Millis patience(5000);
  for (const auto& s : services) {
    if (!s.warm) return;   // it may be the one that listens there, and starts after the decision
    patience = std::max(patience, s.start_timeout);
  }
  for (const auto& t : run_.deployment().traffic) require_application(takes(), t, patience);
}

void Switchover::require_services() {
  start_services();
  require_applications();
}

void Switchover::prepare(Deadline deadline, bool when_ready) {
  for (auto& store : run_.stores()) require_copied(*store, run_.stores_context(), direction_.yields, "a switch");
  // Clients who pass the gate by would not wait, and find nobody after the decision.
  for (auto& traffic : run_.traffic())
    if (auto all = astray(run_, *traffic); !all.empty()) throw Error(Code::state, join(all, "; "), "rehome resume leads it through the gate again");
  // Before anything is prepared: a slot for the way back keeps WAL from then on.
  await_following(deadline, when_ready);
  for (auto& store : run_.stores()) store->prepare_reverse(run_.stores_context(), direction_);
  require_services();
  store_actions();
  yields().call("action.warm", {{"set", "undo"}}, Deadline::in(Millis(60000)));
  takes().call("action.warm", {{"set", "open"}}, Deadline::in(Millis(60000)));
}

void Switchover::renew() {
  for (auto& store : run_.stores()) store->renew_reverse(run_.stores_context(), direction_);
}

Prediction Switchover::predict(MicroFences* measure) {
  Prediction p;
  double ms = 0;
  for (auto& store : run_.stores()) {
    FollowStatus status = store->follow_status(run_.stores_context());
    if (!status.trouble.empty()) p.obstacles.push_back(store->name() + ": " + status.trouble);
    if (status.open_write_age_ms > 1000)
      p.obstacles.push_back(store->name() + ": a writing transaction is open since " +
                            human_duration(Millis(status.open_write_age_ms)) + "; its changes arrive only with its commit");
    double catch_up = static_cast<double>(status.lag.count());
    ms = std::max(ms, catch_up);
    if (catch_up >= 1) p.reasons.push_back(store->name() + ": behind by " + human_duration(status.lag));
  }
  if (measure)
    for (auto& traffic : run_.traffic())
      for (auto& what : astray(run_, *traffic)) p.obstacles.push_back(what + "; rehome resume leads it through the gate again");
  if (measure && p.obstacles.empty()) {
    // Before anything can throw: a switch that waits is not to lock once a second.
    bool counted = false;
    auto count = [&] {
      if (!counted) measure->count();
      counted = true;
    };
    for (auto& store : run_.stores()) {
      if (!store->capabilities().soft_fence) continue;
      Millis took{0};
      try {
        took = store->micro_fence(run_.stores_context(), direction_, Deadline::in(Millis(1000)));
        count();
      } catch (const Error& e) {
        if (e.code != Code::state) count();   // else nothing was locked
        if (!e.retryable) throw;
        // What is in the way of the small fence is in the way of the real one; it may be gone in a second.
        p.obstacles.push_back(store->name() + ": the micro-fence did not get through: " + e.what());
        continue;
      }
      p.reasons.push_back(store->name() + ": micro-fence (lock, marker, proof, let go) took " + human_duration(took));
      ms += static_cast<double>(took.count());
    }
  }
  // After the commit, so that max_pause cannot back out of it: it must be counted before.
  ms += static_cast<double>(cold_start_time(run_.deployment()).count());
  for (auto& why : cold_starts(run_.deployment())) p.reasons.push_back(std::move(why));
  if (gated()) {
    const Deployment& d = run_.deployment();
    Json status = yields().call("gate", {{"request", {{"op", "status"}, {"older_than_ms", drain_time(d).count()}}}});
    p.reasons.push_back(std::to_string(get_int(status, "in_flight")) + " connections in flight: they have " + human_duration(drain_time(d)) + " to finish first");
    // What has been open for so long will not end now; finding that out would cost everybody else a pause.
    if (std::int64_t longer = get_int(status, "older"); longer > 0)
      (cuts_longer(d) ? p.reasons : p.obstacles).push_back(long_connections(d, longer));
    if (measure) {
      PastGate past = past_gate(d, yields());
      past_gate_ = past.count;
      if (!past.text.empty()) p.reasons.push_back(std::move(past.text));
    }
  }
  // Round trips and durable writes of the protocol itself, from this very path.
  Ticks from = system_clock().now();
  yields().call("hello");
  takes().call("hello");
  double trip = ms_between(from, system_clock().now());
  ms += 12 * trip + 20;
  char text[120];
  std::snprintf(text, sizeof text, "a round trip to both sites takes %.1f ms; the protocol needs about 12", trip);
  p.reasons.push_back(text);
  p.pause = Millis(std::lround(ms));
  p.within = p.pause <= run_.deployment().max_pause;
  if (!p.within)
    p.obstacles.push_back("the predicted pause of " + human_duration(p.pause) + " is above max_pause (" +
                          human_duration(run_.deployment().max_pause) + ")");
  predicted_ms_ = ms;
  return p;
}

void Switchover::phase(const char* name, const std::function<void()>& work) {
  if (std::string lost = lease_->lost(); !lost.empty()) throw Error(Code::timeout, "the lease is over: " + lost);
  fault_hook("before", name);
  Ticks from = system_clock().now();
  std::int64_t wall = system_clock().wall_us();
  auto record = [&](const Error* error) {
    double ms = ms_between(from, system_clock().now());
    Json j{{"attempt", attempt_}, {"name", name}, {"ms", ms}, {"from_us", wall}, {"to_us", wall + std::llround(ms * 1000)}};
    if (error) j["error"] = error_to_json(*error);
    result_.phases.push_back(j);
    run_.journal().append("phase", j);
  };
  try {
    work();
  } catch (const Error& e) {
    record(&e);
    throw e.in(name);
  }
  record(nullptr);
  fault_hook("after", name);
  // It is decided: nothing can be backed out of any more.
  if (std::string(name) == "open") return;
  // Until the seal everything is revocable, and an overrun is; after it the attempt finishes or the lease decides.
  if (pause_deadline_.passed())
    throw Error(Code::timeout, std::string("the pause is longer than max_pause (") + human_duration(run_.deployment().max_pause) + ") after " + name,
                "raise max_pause, or wait for less load");
  if (cancel_flag()) throw Error(Code::interrupted, std::string("stopped during the pause, after ") + name);
}

void Switchover::each_cut(void (Cut::*what)(Deadline)) {
  std::vector<std::optional<Error>> failures(cuts_.size());
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 1; i < cuts_.size(); i++)
      threads.emplace_back([&, i] {
        try {
          (cuts_[i].get()->*what)(pause_deadline_);
        } catch (const Error& e) {
          failures[i] = e.in(run_.stores()[i]->name());
        } catch (const std::exception& e) {
          failures[i] = Error(Code::internal, e.what()).in(run_.stores()[i]->name());
        }
      });
    try {
      if (!cuts_.empty()) (cuts_[0].get()->*what)(pause_deadline_);
    } catch (const Error& e) {
      failures[0] = e.in(run_.stores()[0]->name());
    }
  }
  for (auto& f : failures)
    if (f) throw *f;
}

void Switchover::hold() {
  if (!gated()) return;
  takes().call("gate", {{"request", {{"op", "ledger.reset"}}}});
  yields().call("gate", {{"request", {{"op", "ledger.reset"}}}});
  // The yielding site's gate holds everybody: the other site's clients come to it through the link.
  yields().call("gate", {{"request", {{"op", "hold"}, {"attempt", attempt_}, {"timer_ms", 5000}}}});
}

void Switchover::drain() {
  if (!gated()) return;
  Deadline deadline = Deadline::in(drain_time(run_.deployment()));
  while (true) {
    Json y = yields().call("gate", {{"request", {{"op", "status"}}}});
    std::int64_t in_flight = get_int(y, "in_flight");
    if (in_flight == 0) return;
    if (deadline.passed()) {
      if (!cuts_longer(run_.deployment()))
        throw Error(Code::timeout, std::to_string(in_flight) + " requests were still in flight after " + human_duration(drain_time(run_.deployment())),
                    "they are long requests, or idle keep-alive clients, whose connection counts as one: wait for them to end, raise drain_deadline and max_pause, or set longer_requests: cut");
      yields().call("gate", {{"request", {{"op", "cut"}, {"attempt", attempt_}}}});
      return;
    }
    system_clock().sleep(Millis(1));
  }
}

void Switchover::freeze() {
  down_.clear();
  if (run_.services().empty()) return;
  const Json frozen = yields().call("freeze", {{"attempt", attempt_}});
  for (const auto& item : frozen.at("items")) {
    if (get_int(item, "processes") > 0) continue;
    down_.insert(get_string(item, "name"));
    run_.journal().append("message", {{"text", "service " + get_string(item, "name") + " does not run on the " + std::string(side_name(direction_.yields)) + ": nothing to freeze"}});
  }
}

// What did not run then and does now may have written before the hard fences stood.
void Switchover::require_still_down() {
  if (down_.empty()) return;
  const Json frozen = yields().call("freeze", {{"attempt", attempt_}});
  for (const auto& item : frozen.at("items"))
    if (get_int(item, "processes") > 0 && down_.contains(get_string(item, "name")))
      throw Error(Code::state, "service " + get_string(item, "name") + " was started on the " + std::string(side_name(direction_.yields)) + " during the pause", "try again: it is frozen with the others then");
}

// The clients that waited come all at once. What a service does at a worker's first request (connecting to its database, filling the
// caches of that session) is done before anybody waits for it: what the read canaries ask is asked by more and more at once, up to what
// the service answers within half a second, so that nothing of it is still queued there in the pause.
void Switchover::warm_up() {
  for (const auto& check : run_.deployment().checks) {
    if (!check.canary || !meant_for(check, direction_.takes())) continue;
    auto ask = [&](int n) {
      const auto results = ask_at_once(run_.deployment(), takes(), check, n, Deadline::in(check.timeout));
      auto failed = std::find_if(results.begin(), results.end(), [](const CheckResult& r) { return !r.ok; });
      return failed == results.end() ? std::string() : failed->said;
    };
    auto require = [&](const std::string& failed) {
      if (!failed.empty()) throw Error(Code::check_failed, "the read canary " + check.name + " failed on the side that takes over, before the pause: " + failed);
    };
    auto wait = [] {
      require_not_stopped();
      system_clock().sleep(Millis(100));
    };
    for (int n = 1; n <= clients_at_once; n *= 2) {
      // A worker whose connection ended with a restart of its server finds out by the first request that it takes: until all went well.
      Deadline deadline = Deadline::in(check.timeout);
      Ticks from = system_clock().now();
      std::string failed = ask(n);
      // Which of them answers is the service's own choice: of the most at once, three rounds must go well in a row.
      for (int good = failed.empty(); (!failed.empty() || (n == clients_at_once && good < 3)) && !deadline.passed(); good = failed.empty() ? good + 1 : 0) {
        if (!failed.empty()) wait();
        from = system_clock().now();
        failed = ask(n);
      }
      require_not_stopped();
      if (n == 1) require(failed);
      if (!failed.empty()) {
        // It does not take that many at once.
        run_.journal().append("message", {{"text", check.name + ", asked by " + std::to_string(n) + " at once, failed: " + failed}});
        for (deadline = Deadline::in(check.timeout); !(failed = ask(1)).empty() && !deadline.passed();) wait();
        require(failed);
        break;
      }
      if (ms_between(from, system_clock().now()) > 500) break;
    }
  }
}

void Switchover::ask_canaries() {
  for (auto& canary : canaries_) {
    // Not for as long as outside the pause, where clients do not wait: what stands between the application and its store is tried thrice.
    CheckResult r = canary->ask(pause_deadline_);
    for (int again = 0; !r.ok && again < 2 && !pause_deadline_.passed(); again++) r = canary->ask(pause_deadline_);
    run_.journal().append("canary", {{"name", r.name}, {"ok", r.ok}, {"ms", r.ms}, {"said", r.said}, {"when", "read"}});
    if (!r.ok) throw Error(Code::check_failed, "the read canary " + r.name + " failed on the side that takes over: " + r.said);
  }
}

// What Y's agent has durably decided of this attempt, asked until it answers.
Json Switchover::decided(Deadline deadline) {
  while (true) {
    try {
      Json status = yields().call("attempt.status", Json::object(), Deadline::in(Millis(2000)));
      std::string decision = get_string(status, "decision");
      if (decision != "ATTEMPT") return status;
    } catch (const Error& e) {
      if (deadline.passed()) throw;
    }
    if (deadline.passed())
      throw Error(Code::unknown, "the yielding side's agent has not decided attempt " + std::to_string(attempt_), "see status");
    system_clock().sleep(Millis(50));
  }
}

// The outcome of an attempt is known, or the agents' alone: that the journal's disk is full, or its site lost, must not hide it.
void Switchover::flush_journal() {
  try {
    run_.journal().flush();
  } catch (const Error& e) {
    // Held back again, and tried with the next flush; resume writes down what the records say.
    run_.journal().hold_back();
    run_.journal().append("message", {{"text", std::string("the journal could not be written at once: what this command did last was written later, or is missing: ") + e.what()}});
  }
}

void Switchover::back_out(const Error& reason) {
  // Sessions that hold soft fences go first: the agent's undo must not wait for their locks.
  for (auto& cut : cuts_) {
    try {
      cut->release();
    } catch (const Error&) {
      // The agent cuts the session's relay, which has the same effect.
    }
  }
  cuts_.clear();
  try {
    yields().call("attempt.abort", {{"attempt", attempt_}, {"reason", std::string(reason.what())}}, Deadline::in(Millis(15000)));
  } catch (const Error&) {
    // Refused because it is decided, or out of reach: what is durable there tells.
  }
  lease_.reset();
  Json status;
  try {
    status = decided(Deadline::in(Millis(20000)));
  } catch (const Error& e) {
    flush_journal();
    throw Error(Code::unknown, std::string("the attempt failed (") + reason.what() + "), and its outcome is not known: " + e.what(),
                "the agents decide it by themselves; see status");
  }
  if (get_string(status, "decision") == "COMMIT" ||
      (get_string(status, "decision") == "SERVING" && get_string(status, "serves", "") == side_name(direction_.takes()))) {
    flush_journal();
    throw Error(Code::unknown, std::string("the controller failed after the commit (") + reason.what() + "); the agents finish it",
                "rehome resume follows them to the end");
  }
  // An abort is decided at once, and the side serves when it is undone.
  Deadline undone = Deadline::in(Millis(10000));
  while (!get_bool(status, "settled", false) && !undone.passed()) {
    system_clock().sleep(Millis(20));
    try {
      status = yields().call("attempt.status", Json::object(), Deadline::in(Millis(2000)));
    } catch (const Error&) {
      // The agent is coming back; asked again until then.
    }
  }
  const bool serves = get_bool(status, "settled", false);
  double ms = ms_between(pause_from_, system_clock().now());
  write_ledger(false);
  run_.journal().append("pause", {{"attempt", attempt_}, {"direction", direction_.yields == Side::source ? "switch" : "reverse"},
                                  {"total_ms", ms}, {"predicted_ms", predicted_ms_}, {"result", "backed out"}, {"undone", serves},
                                  {"error", error_to_json(reason)}});
  flush_journal();
  if (!serves)
    throw Error(Code::unknown, std::string("backed out: ") + reason.what() + "; and the " + std::string(side_name(direction_.yields)) + " does not serve again yet: " + get_string(status, "waiting_for", "its agent is at work"),
                "mend that: its agent tries until everything is undone, and rehome status shows what it waits for");
  throw Error(Code::backed_out, std::string("backed out: ") + reason.what() + "; " + std::string(side_name(direction_.yields)) +
                                    " serves as before, nothing is lost",
              reason.hint.empty() ? "try again, or see rehome report" : reason.hint);
}

// What the gates did to connections in this pause: written once nobody who was held waits any more, or after two seconds
// with what is known then. A gate that does not answer, or is older than this program, leaves its part out.
void Switchover::write_ledger(bool switched) {
  if (!gated()) return;
  Deadline deadline = Deadline::in(Millis(2000));
  Json total;
  while (true) {
    total = {{"held", 0}, {"longest_wait_ms", 0.0}, {"dropped", 0}, {"cut", 0}, {"resets", 0}};
    std::int64_t still = 0;
    for (Site* site : {&yields(), &takes()}) {
      try {
        Json l = site->call("gate", {{"request", {{"op", "status"}}}}, Deadline::in(Millis(2000))).value("ledger", Json::object());
        still += get_int(l, "still_held", 0);
        for (const char* key : {"held", "dropped", "cut", "resets"}) total[key] = get_int(total, key) + get_int(l, key, 0);
        total["longest_wait_ms"] = std::max(total["longest_wait_ms"].get<double>(), l.value("longest_wait_ms", 0.0));
      } catch (const Error& e) {
        run_.journal().append("message", {{"text", site->label() + ": its gate's ledger is not known: " + e.what()}});
      }
    }
    if (still == 0 || deadline.passed()) break;
    system_clock().sleep(Millis(10));
  }
  if (past_gate_) total["past_gate"] = switched ? *past_gate_ : 0;
  result_.ledger = total;
  run_.journal().append("ledger", total);
}

void Switchover::commit() {
  Json answer;
  auto remember_times = [&] {
    if (answer.contains("times")) run_.journal().append("times", {{"attempt", attempt_}, {"ms", answer["times"]}});
  };
  try {
    answer = yields().call("attempt.commit", {{"attempt", attempt_}, {"wait_ms", 10000}}, Deadline::in(Millis(15000)));
  } catch (const Error& e) {
    // Refused, or the connection broke: what is durable decides, not what we heard.
    Json status = decided(Deadline::in(Millis(20000)));
    std::string decision = get_string(status, "decision");
    if (decision != "COMMIT" && decision != "SERVING") throw;
    answer = status;
    if (decision == "SERVING" && get_string(status, "serves", "") != side_name(direction_.takes())) throw;
  }
  if (get_bool(answer, "refused", false))
    throw Error(Code::store, "the side that takes over refused to open: " + get_string(answer, "reason", "see its agent's log"));
  Deadline deadline = Deadline::in(Millis(30000));
  while (!get_bool(answer, "opened", false)) {
    if (deadline.passed())
      throw Error(Code::unknown, "committed, and the side that takes over has not yet said that it is open",
                  "the agents finish it by themselves when the link is up; see status");
    system_clock().sleep(Millis(5));
    try {
      answer = yields().call("attempt.status", Json::object(), Deadline::in(Millis(2000)));
    } catch (const Error&) {
      // The agent is restarting; asked again until the deadline.
    }
    // From its COMMIT on the record names the other side: this one again when that has refused, which it may long after it was asked.
    if (get_string(answer, "serves", "") == side_name(direction_.yields))
      throw Error(Code::store, get_string(answer, "reason", "the side that takes over refused to open"));
  }
  remember_times();
  epoch_ = get_int(answer, "epoch");
}

CutResult Switchover::cut() {
  result_ = {};
  cuts_.clear();
  canaries_.clear();
  for (auto& store : run_.stores()) cuts_.push_back(store->open_cut(run_.stores_context(), direction_));
  for (const auto& check : run_.deployment().checks) {
    if (!check.canary || !meant_for(check, direction_.takes())) continue;
    // To the application itself: the site's front door leads through its gate, which still forwards to the side that yields.
    canaries_.push_back(std::make_unique<HttpCanary>(run_.deployment(), takes(), check, true));
  }
  warm_up();
  for (auto& canary : canaries_) canary->open();
  attempt_ = get_int(yields().call("attempt.open"), "attempt");
  result_.attempt = attempt_;
  // Enough for the phase that is at work when max_pause ends; nothing is renewed for the sake of a later one.
  lease_ = std::make_unique<Lease>(run_.site(direction_.yields), attempt_, Deadline::in(run_.deployment().max_pause + Millis(1000)));
  run_.journal().hold_back();
  pause_from_ = system_clock().now();
  pause_deadline_ = Deadline::in(run_.deployment().max_pause);
  bool committing = false;
  try {
    phase("hold", [&] { hold(); });
    phase("drain", [&] { drain(); });
    phase("soft fence", [&] { each_cut(&Cut::soft_fence); });
    phase("freeze", [&] { freeze(); });
    phase("marker", [&] { each_cut(&Cut::marker); });
    phase("catch up", [&] { each_cut(&Cut::catch_up); });
    phase("compare", [&] { each_cut(&Cut::compare); });
    phase("arm reverse", [&] { each_cut(&Cut::arm_reverse); });
    phase("read canary", [&] { ask_canaries(); });
    phase("seal", [&] { yields().call("attempt.seal", {{"attempt", attempt_}}); });
    phase("hard fence", [&] {
      each_cut(&Cut::hard_fence);
      require_still_down();
    });
    committing = true;
    phase("open", [&] { commit(); });
  } catch (const Error& e) {
    if (committing && e.code == Code::unknown) {
      lease_.reset();
      flush_journal();
      throw;
    }
    back_out(e);
  }
  result_.pause_ms = ms_between(pause_from_, system_clock().now());
  lease_.reset();
  cuts_.clear();
  Side serves = direction_.takes();
  run_.journal().append("serves", {{"side", side_name(serves)}, {"epoch", epoch_}});
  run_.journal().append("fact", {{"key", "phase"}, {"value", serves == Side::target ? "switched" : "following"}});
  write_ledger(true);
  run_.journal().append("pause", {{"attempt", attempt_}, {"direction", direction_.yields == Side::source ? "switch" : "reverse"},
                                  {"total_ms", result_.pause_ms}, {"predicted_ms", predicted_ms_}, {"result", "switched"}});
  flush_journal();
  return result_;
}

void Switchover::settle() {
  Deadline deadline = Deadline::in(Millis(120000));
  std::string waiting;
  while (true) {
    Json status = Json::object();
    bool all = true;
    try {
      status = yields().call("attempt.status");
    } catch (const Error& e) {
      // The agent or the way to it is coming back; asked again until the deadline.
      if (!e.retryable) throw;
      all = false, waiting = e.what();
    }
    for (const auto& tail : status.value("tails", Json::array()))
      if (!get_bool(tail, "done", false)) all = false, waiting = get_string(tail, "name") + ": " + get_string(tail, "error", "running");
    // Whatever became of a later attempt.
    if (all && get_string(status, "serves") == side_name(direction_.takes()) && get_bool(status, "settled", true)) break;
    if (deadline.passed())
      throw Error(Code::unknown, "the new side serves, but the agents have not finished: " + waiting, "they try again by themselves; see status");
    system_clock().sleep(Millis(20));
  }
  // For the way back: workers are known by the cgroup that they are born in, should their master crash before it.
  Json freeze = Json::array();
  for (auto& service : run_.services()) freeze.push_back(service->freeze_item(direction_.takes()));
  try {
    if (!freeze.empty()) takes().call("freeze.set", {{"items", freeze}, {"early", true}});
  } catch (const Error& e) {
    run_.journal().append("message", {{"text", "the services of the new side cannot be frozen now, and a reverse will need that: " + std::string(e.what())}});
  }
  std::optional<Error> failed;
  run_.journal().hold_back();
  for (const auto& check : run_.deployment().checks) {
    if (failed || !check.write_canary || !meant_for(check, direction_.takes())) continue;
    CheckResult r = run_check(run_, check, direction_.takes(), false);
    run_.journal().append("canary", {{"name", r.name}, {"ok", r.ok}, {"ms", r.ms}, {"said", r.said}, {"when", "write"}});
    if (r.ok) continue;
    try {
      takes().call("hello");
    } catch (const Error& e) {
      // Not its failure, and no reason to go back: the way there is down.
      flush_journal();
      throw Error(Code::unknown, "the write canary " + r.name + " could not be asked after the commit: " + e.what(), "rehome resume asks it again");
    }
    failed.emplace(Code::check_failed, "the write canary " + r.name + " failed after the commit: " + r.said);
  }
  if (!failed) run_.journal().append("settled", {{"side", side_name(direction_.takes())}});
  flush_journal();
  if (failed) throw *failed;
}

}  // namespace rehome::ops
