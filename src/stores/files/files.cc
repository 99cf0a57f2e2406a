#include "stores/files/files.h"

#include <algorithm>

#include "base/text.h"

namespace rehome {
namespace {

// How long a change waits at most before it is sent, outside the pause.
constexpr Millis follow_interval{500};
constexpr Millis hours{12L * 3600 * 1000};

class FilesCut : public Cut {
 public:
  FilesCut(FilesStore& store, StoreContext& context, Direction direction)
      : store_(store), yields_(context.at(direction.yields)), takes_(context.at(direction.takes())) {
    // As little as possible is left for the pause, and the agents' channel is open before it.
    Json args = store.named();
    args["timeout_ms"] = 60'000;
    yields_.call("files.flush", args, Deadline::in(Millis(65'000)));
  }

  // The services' freeze, which ops makes after every store's soft fence, is this store's fence.
  void soft_fence(Deadline) override {}
  void marker(Deadline) override {}

  void catch_up(Deadline deadline) override {
    Json args = store_.named();
    args["final"] = true;
    args["timeout_ms"] = deadline.left(Millis(600'000)).count();
    Json answer = yields_.call("files.flush", args, deadline);
    timings_["catch_up_ms"] = answer.value("ms", 0.0);
    timings_["scan_ms"] = answer.value("scan_ms", 0.0);
    timings_["files"] = get_int(answer, "files");
    timings_["bytes"] = get_int(answer, "bytes");
    timings_["rescanned"] = get_bool(answer, "rescanned");
    refuse_writers(answer.value("writers", Json::array()));
  }

  void compare(Deadline deadline) override { require_clean(deadline); }
  void arm_reverse(Deadline deadline) override {
    Ticks from = system_clock().now();
    takes_.call("files.arm", store_.named(), deadline);
    timings_["arm_ms"] = ms_between(from, system_clock().now());
  }
  // Frozen writers cannot have written; somebody else may have, and must not be lost.
  void hard_fence(Deadline deadline) override { require_clean(deadline); }
  void release() override {}
  Json timings() const override { return timings_; }

 private:
  void require_clean(Deadline deadline) {
    Json s = yields_.call("files.status", store_.named(), deadline);
    // It may be a file outside, of several names, that somebody else writes: whether one of them is here takes a look at all names.
    for (int again = 0; get_int(s, "dirty") > 0 && again < 5; again++) {
      Json settle = store_.named();
      settle["settle"] = true;
      s = yields_.call("files.status", settle, deadline);
    }
    if (get_string(s, "state") == "waiting" || get_string(s, "state") == "none")
      throw Error(Code::verify, "store " + store_.name() + " is not followed now: " + get_string(s, "trouble", "its agent does not know it"),
                  "see status, then switch again", true);
    std::int64_t dirty = get_int(s, "dirty");
    // Without a watch the pass that was just made read everything.
    bool watched = get_bool(s, "tracking", false);
    if (dirty > 0 || (watched && get_string(s, "state") != "tracking"))
      throw Error(Code::verify, "store " + store_.name() + ": " + std::to_string(dirty) +
                                    " paths changed after the services were frozen" +
                                    (s.contains("reason") ? " (" + get_string(s, "reason") + ")" : ""),
                  "something that is not among the services writes there; rehome check names it", true);
  }

  void refuse_writers(const Json& writers) {
    std::vector<std::string> names;
    for (const auto& w : writers) {
      if (get_bool(w, "frozen", false)) continue;
      names.push_back(get_string(w, "program") + " (process " + std::to_string(get_int(w, "pid")) + ", " + get_string(w, "path") + ")");
      if (names.size() == 5) break;
    }
    if (!names.empty())
      throw Error(Code::store, "files of store " + store_.name() + " are open for writing in processes that are not frozen: " + join(names, ", "),
                  "name what they belong to under services, or stop them, then switch again");
  }

  FilesStore& store_;
  Site& yields_;
  Site& takes_;
  Json timings_ = Json::object();
};

Action ask_agent(Site& site, const std::string& name, const Json& request, const Json& attempt = Json()) {
  Action a;
  a.name = name;
  // The agent's own program, which asks the agent's socket: it needs nothing that may be missing on the host.
  a.argv = {"/proc/self/exe", "ask", "--state", site.state()};
  a.input = dump_line(request) + "\n";
  if (!attempt.is_null()) a.try_input = dump_line(attempt) + "\n";
  a.timeout = Millis(30'000);
  return a;
}

}  // namespace

FilesStore::FilesStore(const StoreConfig& config, const Deployment& deployment) : config_(config), limits_(deployment.limits), bandwidth_(deployment.store_bandwidth()) {}

std::unique_ptr<Store> make_files_store(const StoreConfig& config, const Deployment& deployment) {
  return std::make_unique<FilesStore>(config, deployment);
}

Json FilesStore::settings(Side side) const {
  Json j = named();
  j["path"] = config_.files.path[side];
  j["include"] = config_.files.include;
  j["exclude"] = config_.files.exclude;
  j["owner_by_name"] = config_.files.owner_by_name;
  return j;
}

Json FilesStore::status(StoreContext& c, Side side) { return c.at(side).call("files.status", named()); }

// The side that sends: it serves. Before the first switch there is no other.
Side FilesStore::tracking_side(StoreContext& c) {
  Json target = status(c, Side::target);
  return get_bool(target, "following", false) ? Side::target : Side::source;
}

void FilesStore::prepare(StoreContext& c) {
  const std::string key = "files." + name() + ".prepared";
  if (c.recall(key).is_null()) {
    Json there = c.target.call("files.probe", {{"path", config_.files.path.target}});
    if (get_bool(there, "exists", false) && !get_bool(there, "empty", false))
      throw Error(Code::preflight, "target: " + config_.files.path.target + " is not empty", "move away what is in it, or correct the path");
    c.note("directory " + config_.files.path.target + ", its content and a read-only mount over it",
           {{"where", c.target.label()}, {"undo", "unmounted, and removed by cancel"}});
    c.remember(key, {{"made", !get_bool(there, "exists", false)}});
  }
  // Tracking first: whatever changes from here on is known to have changed.
  Json tracked = c.source.call("files.track", settings(Side::source));
  if (get_string(tracked, "state") != "tracking")
    c.log("store " + name() + ": the source reads everything: " + get_string(tracked, "reason", ""));
  // Nothing is written there: it is what can be closed, should the target be opened by a person's word before any switch.
  c.source.call("files.receive", settings(Side::source));
  Json receive = settings(Side::target);
  receive["active"] = true;
  c.target.call("files.receive", receive);
  Json close = named();
  close["best_effort"] = true;
  Json closed = c.target.call("files.close", close);
  if (!get_bool(closed, "closed", false))
    c.log("store " + name() + ": only the services' start condition keeps writers away on the target: " + get_string(closed, "reason", ""));
}

void FilesStore::copy(StoreContext& c) {
  Json args = named();
  args["bwlimit"] = bandwidth_;
  c.source.call("files.copy", args);
  while (true) {
    if (c.cancelled) throw Error(Code::interrupted, "the copy of " + name() + " goes on without us", "rehome resume waits for it");
    Json s = status(c, Side::source);
    if (get_bool(s, "copied", false)) break;
    const Json& copy = s.at("copy");
    Progress p{.store = name(), .phase = "copy", .detail = get_string(s, "trouble", ""), .done = get_int(copy, "bytes"), .total = bytes_};
    if (p.total < p.done) p.total = p.done;
    c.progress(p);
    // The agent tries again by itself while the link is down; anything else would stay as it is.
    std::string trouble = get_string(s, "trouble", "");
    if (!trouble.empty() && trouble.find("link") == std::string::npos && get_int(s, "copy_failures", 0) >= 5)
      throw Error(Code::store, "the copy of " + name() + " fails: " + trouble, "mend that, then rehome resume");
    system_clock().sleep(Millis(200));
  }
}

void FilesStore::follow(StoreContext& c) {
  Json args = named();
  args["interval_ms"] = follow_interval.count();
  args["bwlimit"] = bandwidth_;
  c.source.call("files.follow", args);
}

FollowStatus FilesStore::follow_status(StoreContext& c) {
  Json s = status(c, tracking_side(c));
  FollowStatus f;
  // After its agent was started again a tree is read as a whole before it follows as before.
  f.coming = get_bool(s, "following", false) && !get_bool(s, "copied", false);
  f.following = get_bool(s, "following", false) && !f.coming;
  f.detail = s;
  f.trouble = get_string(s, "trouble", "");
  if (f.coming && f.trouble.empty()) f.trouble = "its whole tree is read again since its agent was started again";
  if (f.trouble.empty() && get_string(s, "state") == "rescan" && get_bool(s, "tracking", false))
    f.trouble = "the whole tree is read again: " + get_string(s, "reason", "");
  // What the last pass took is what the next one will take; without a watch that is a reading of the whole tree.
  if (f.following && (get_int(s, "dirty") > 0 || !get_bool(s, "tracking", false)))
    f.lag = Millis(static_cast<std::int64_t>(s.value("last_pass_ms", 0.0)) + 1);
  return f;
}

std::vector<std::string> FilesStore::needs_recopy(StoreContext& c) {
  Json s = status(c, tracking_side(c));
  if (get_string(s, "state") == "none") return {"the agent of the serving side does not know the store"};
  return {};
}

void FilesStore::recopy(StoreContext& c) {
  Json s = status(c, tracking_side(c));
  if (get_string(s, "state") == "none") {
    prepare(c);
    copy(c);
    follow(c);
    return;
  }
  Json args = named();
  args["reason"] = "asked for";
  c.at(tracking_side(c)).call("files.rescan", args);
}

Verdict FilesStore::verify(StoreContext& c) {
  Side side = tracking_side(c);
  Json args = named();
  args["most"] = 1000;
  args["jobs"] = limits_.jobs;
  Json r = c.at(side).call("files.compare", args, Deadline::in(hours));
  Verdict v;
  v.equal = get_bool(r, "equal");
  v.compared = get_int(r, "entries");
  v.more = get_int(r, "more");
  for (const auto& d : r.at("differences")) {
    std::string what = get_string(d, "what");
    // In the words of the two sides.
    std::string there(side_name(other(side)));
    if (what == "missing on the other side") what = "missing on " + there;
    if (what == "extra on the other side") what = "extra on " + there;
    v.differences.push_back({get_string(d, "path"), what});
  }
  v.detail = {{"bytes", get_int(r, "bytes")}, {"ms", r.value("ms", 0.0)}, {"changing", r.value("changing", Json::array())}};
  return v;
}

void FilesStore::prepare_reverse(StoreContext& c, Direction d) {
  c.note("tracking of " + config_.files.path[d.takes()], {{"where", c.at(d.takes()).label()}, {"undo", "ends with the run"}});
  // At Y nobody may write yet: receiving begins when it is closed, after the commit.
  c.at(d.yields).call("files.receive", settings(d.yields));
  c.at(d.takes()).call("files.track", settings(d.takes()));
}

// The tails of an opened side follow its changes, where no switch has prepared that: others' tails wait for them.
void FilesStore::make_up_for_cut(StoreContext& c, Direction d) {
  c.note("tracking of " + config_.files.path[d.takes()], {{"where", c.at(d.takes()).label()}, {"undo", "ends with the run"}});
  c.at(d.takes()).call("files.track", settings(d.takes()));
}

ActionSets FilesStore::actions(StoreContext& c, Direction d) {
  Json open = named(), status = named(), follow = named(), untrack = named(), close = named();
  open["op"] = "files.open";
  status["op"] = "files.status";
  follow["op"] = "files.follow";
  follow["interval_ms"] = follow_interval.count();
  follow["bwlimit"] = bandwidth_;
  untrack["op"] = "files.untrack";
  close["op"] = "files.close";
  close["best_effort"] = true;
  ActionSets sets;
  Site &y = c.at(d.yields), &t = c.at(d.takes());
  // Closed only after the commit: what is opened again here is a side whose other one is gone, by a person's word.
  sets.undo.push_back(ask_agent(y, name() + ": open " + config_.files.path[d.yields], open, status));
  sets.open.push_back(ask_agent(t, name() + ": open " + config_.files.path[d.takes()], open, status));
  sets.tail_takes.push_back(ask_agent(t, name() + ": follow the new side's changes", follow));
  sets.tail_yields.push_back(ask_agent(y, name() + ": follow the old side's changes no more", untrack));
  sets.tail_yields.push_back(ask_agent(y, name() + ": close " + config_.files.path[d.yields], close));
  for (Side side : {Side::source, Side::target}) {
    sets.close[side].push_back(ask_agent(c.at(side), name() + ": follow no more", untrack));
    sets.close[side].push_back(ask_agent(c.at(side), name() + ": close " + config_.files.path[side], close));
  }
  return sets;
}

std::unique_ptr<Cut> FilesStore::open_cut(StoreContext& c, Direction d) { return std::make_unique<FilesCut>(*this, c, d); }

// Each part even where an earlier one failed before: it is asked again by whoever tries again.
void FilesStore::take_down(StoreContext& c, Side side) {
  Site& site = c.at(side);
  site.call("files.untrack", named());
  site.call("files.open", named());
  site.call("files.forget", named());
}

std::vector<std::string> FilesStore::finish(StoreContext& c, Side) {
  for (Side side : {Side::source, Side::target})
    if (c.has(side)) take_down(c, side);
  return {};
}

std::vector<std::string> FilesStore::abandon(StoreContext& c) {
  const std::string key = "files." + name() + ".prepared";
  Json prepared = c.recall(key);
  for (Side side : {Side::source, Side::target})
    if (c.has(side)) take_down(c, side);
  if (prepared.is_null() || !c.has(Side::target)) return {};
  // Everything there is ours: it was empty, or not there, when prepare() began.
  const std::string& path = config_.files.path.target;
  std::vector<std::string> argv{"find", "-H", path};  // the path itself may be a symbolic link
  if (!get_bool(prepared, "made", false)) argv.insert(argv.end(), {"-mindepth", "1"});
  argv.push_back("-delete");
  if (get_bool(c.target.call("files.probe", {{"path", path}}), "exists", false))
    c.target.exec_ok({.argv = argv}, Deadline::in(hours), "removing what was copied");
  c.remember(key, Json());
  return {};
}

std::vector<std::string> FilesStore::leftovers(StoreContext& c) {
  std::vector<std::string> left;
  for (Side side : {Side::source, Side::target}) {
    if (!c.has(side)) continue;
    Json s = status(c, side);
    std::string where(side_name(side));
    if (get_string(s, "state") != "none") left.push_back(where + ": " + config_.files.path[side] + " is tracked");
    if (get_bool(s, "closed", false)) left.push_back(where + ": read-only mount over " + config_.files.path[side]);
    if (s.contains("receives")) left.push_back(where + ": " + config_.files.path[side] + " is registered for the other side");
  }
  return left;
}

}  // namespace rehome
