#include "track/module.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include "agent/module.h"
#include "base/error.h"
#include "sys/fs.h"
#include "track/compare.h"
#include "track/follow.h"
#include "track/mounts.h"
#include "track/probe.h"
#include "track/receiving.h"
#include "track/root.h"
#include "track/writers.h"

namespace rehome {
namespace track {
namespace {

// How often what could not be taken up is tried again.
constexpr Millis restore_every{3000};

struct Kept {
  std::shared_ptr<Follower> follower;
  std::shared_ptr<Receiving> receiving;
  Json saved = Json::object();  // as in files.json
};

class TrackModule : public AgentModule {
 public:
  explicit TrackModule(AgentHost& host) : host_(host) {}
  ~TrackModule() override { stop(); }

  bool owns(const std::string& op) const override { return op.starts_with("files."); }

  void start() override {
    if (exists(file())) {
      Json all = parse_json(read_file(file()), file());
      std::lock_guard lock(mutex_);
      for (const auto& [name, saved] : all.items()) stores_[name].saved = saved;
    }
    restore_all();
    minder_ = std::thread([this] {
      std::unique_lock lock(mutex_);
      while (!wake_.wait_for(lock, restore_every, [&] { return ending_; })) {
        lock.unlock();
        restore_all();
        lock.lock();
      }
    });
  }

  void stop() override {
    std::map<std::string, Kept> gone;
    {
      std::lock_guard lock(mutex_);
      ending_ = true;
      wake_.notify_all();
    }
    if (minder_.joinable()) minder_.join();
    std::lock_guard lock(mutex_);
    gone.swap(stores_);
  }

  Json handle(const std::string& op, const Json& request, AgentConnection& c) override {
    using Handler = Json (TrackModule::*)(const Json&, AgentConnection&);
    static const std::map<std::string, Handler> table{
        {"files.track", &TrackModule::on_track},       {"files.untrack", &TrackModule::on_untrack},
        {"files.receive", &TrackModule::on_receive},   {"files.copy", &TrackModule::on_copy},
        {"files.follow", &TrackModule::on_follow},     {"files.flush", &TrackModule::on_flush},
        {"files.arm", &TrackModule::on_arm},           {"files.rescan", &TrackModule::on_rescan},
        {"files.status", &TrackModule::on_status},     {"files.writers", &TrackModule::on_writers},
        {"files.close", &TrackModule::on_close},       {"files.open", &TrackModule::on_open},
        {"files.compare", &TrackModule::on_compare},   {"files.manifest", &TrackModule::on_manifest},
        {"files.apply", &TrackModule::on_apply},
        {"files.sync", &TrackModule::on_sync},         {"files.rsync", &TrackModule::on_rsync},
        {"files.rsync_server", &TrackModule::on_rsync_server}, {"files.forget", &TrackModule::on_forget},
        {"files.probe", &TrackModule::on_probe},       {"files.mounts", &TrackModule::on_mounts}};
    auto it = table.find(op);
    if (it == table.end()) throw Error(Code::usage, "this agent knows no '" + op + "'", "use the same version at both ends");
    return (this->*it->second)(request, c);
  }

 private:
  std::string private_place(const std::string& store) const { return resolve_path(host_.state()) + "/run/tree-" + store; }
  std::string file() const { return host_.state() + "/files.json"; }

  // With mutex_ held.
  void save() {
    Json all = Json::object();
    for (const auto& [name, kept] : stores_)
      if (!kept.saved.empty()) all[name] = kept.saved;
    write_durably(file(), all.dump(1) + "\n");
  }
  void remember(const std::string& store, const char* key, const Json& value) {
    std::lock_guard lock(mutex_);
    Json& saved = stores_[store].saved;
    Json before = saved;
    if (value.is_null()) saved.erase(key);
    else saved[key] = value;
    if (saved == before) return;
    try {
      save();
    } catch (...) {
      // Asked again it must not be taken for done.
      stores_[store].saved = std::move(before);
      throw;
    }
  }

  std::shared_ptr<Follower> follower(const Json& request) {
    std::string store = get_string(request, "store");
    std::lock_guard lock(mutex_);
    auto it = stores_.find(store);
    if (it != stores_.end() && !it->second.follower && it->second.saved.contains("track"))
      throw Error(Code::store, "store " + store + " cannot be tracked on the " + host_.side() + " now: " + trouble(store), "", true);
    if (it == stores_.end() || !it->second.follower)
      throw Error(Code::state, "store " + store + " is not tracked on the " + host_.side(), "send files.track first");
    return it->second.follower;
  }
  std::shared_ptr<Receiving> receiving(const Json& request) {
    std::string store = get_string(request, "store");
    std::lock_guard lock(mutex_);
    auto it = stores_.find(store);
    if (it != stores_.end() && !it->second.receiving && it->second.saved.contains("receive"))
      throw Error(Code::store, "store " + store + " cannot be written on the " + host_.side() + " now: " + trouble(store), "", true);
    if (it == stores_.end() || !it->second.receiving)
      throw Error(Code::denied, "store " + store + " is not to be written on the " + host_.side(), "send files.receive first");
    return it->second.receiving;
  }
  void set_receiving(const std::string& store, StoreSettings settings, const RootId& id, bool active) {
    std::shared_ptr<Receiving> old;
    {
      std::lock_guard lock(mutex_);
      old = std::move(stores_[store].receiving);
    }
    if (old) {
      // Who holds it still must not unmount what takes its place.
      old->revoke();
      old->root.unmount();
    }
    auto r = std::make_shared<Receiving>(std::move(settings), id, private_place(store));
    r->revoked = !active;
    std::lock_guard lock(mutex_);
    stores_[store].receiving = std::move(r);
  }

  bool knows_root(const std::string& store, const std::string& path) {
    std::lock_guard lock(mutex_);
    auto it = stores_.find(store);
    return it != stores_.end() && it->second.saved.contains("roots") && it->second.saved["roots"].contains(path);
  }
  // The directory that the run has at `path`: noted the first time, required afterwards.
  RootId claim_root(const std::string& store, const std::string& path) {
    Json roots = Json::object();
    {
      std::lock_guard lock(mutex_);
      Json& saved = stores_[store].saved;
      if (saved.contains("roots")) roots = saved["roots"];
    }
    if (roots.contains(path)) return require_root(path, root_from(roots[path]));
    RootId root = root_at(path);
    roots[path] = to_json(root);
    remember(store, "roots", roots);
    return root;
  }

  // Of one of "close", "receive" and "track"; empty: it went well.
  void set_trouble(const std::string& store, const std::string& what, const std::string& why) {
    bool news;
    {
      std::lock_guard lock(mutex_);
      if (!stores_.contains(store)) return;  // forgotten meanwhile
      auto& all = troubles_[store];
      news = !why.empty() && all[what] != why;
      if (why.empty()) all.erase(what);
      else all[what] = why;
      if (all.empty()) troubles_.erase(store);
    }
    if (news) host_.log("files " + store + ": " + what + ": " + why);
  }
  // With mutex_ held.
  std::string trouble(const std::string& store) const {
    std::string out;
    if (auto it = troubles_.find(store); it != troubles_.end())
      for (const auto& [what, why] : it->second) out += (out.empty() ? "" : "; ") + what + ": " + why;
    return out;
  }

  // What files.json says is taken up: when the agent starts, and again every few seconds while something is missing, such as
  // the volume that the tree is on.
  void restore_all() {
    std::vector<std::string> names;
    {
      std::lock_guard lock(mutex_);
      for (const auto& [name, kept] : stores_) names.push_back(name);
    }
    for (const auto& name : names) restore(name);
  }

  struct Missing {
    Json saved;
    bool close = false, receive = false, track = false;
  };
  Missing missing(const std::string& name) {
    Missing m;
    std::shared_ptr<Receiving> receiving;
    std::shared_ptr<Follower> follower;
    bool not_closed;
    {
      std::lock_guard lock(mutex_);
      auto it = stores_.find(name);
      if (it == stores_.end()) return m;
      m.saved = it->second.saved;
      receiving = it->second.receiving;
      follower = it->second.follower;
      auto t = troubles_.find(name);
      not_closed = t != troubles_.end() && t->second.contains("close");
    }
    // Outside the lock, for which every store's requests wait: a server that is gone may hold whoever looks at its directory.
    m.receive = m.saved.contains("receive") && (!receiving || receiving->stale());
    // The bind mount did not outlive a reboot.
    m.close = get_bool(m.saved, "closed", false) && (m.receive || not_closed);
    m.track = m.saved.contains("track") && (!follower || follower->stale());
    return m;
  }

  void restore(const std::string& name) {
    Missing m = missing(name);
    auto attempt = [&](const char* what, auto act) {
      try {
        act();
        set_trouble(name, what, "");
        return true;
      } catch (const Error& e) {
        set_trouble(name, what, e.message + (e.hint.empty() ? "" : " (" + e.hint + ")"));
      } catch (const std::exception& e) {
        set_trouble(name, what, e.what());
      }
      return false;
    };
    // A server that is gone may hold whoever looks at its directory: before the lock that requests wait for.
    auto there = [&](const char* what) {
      return attempt(what, [&] {
        const std::string path = settings_from(m.saved[what]).path;
        if (m.saved.contains("roots") && m.saved["roots"].contains(path)) require_root(path, root_from(m.saved["roots"][path]));
        else root_at(path);
      });
    };
    if ((m.close || m.receive) && !there("receive")) return;
    if (m.track && !there("track")) return;
    if (!m.close && !m.receive && !m.track) return;
    std::lock_guard changing(changing_);
    m = missing(name);
    // Closed first.
    if (m.close)
      attempt("close", [&] {
        StoreSettings s = settings_from(m.saved["receive"]);
        claim_root(name, s.path);
        close_tree(s.path);
      });
    if (m.receive)
      attempt("receive", [&] {
        StoreSettings s = settings_from(m.saved["receive"]);
        RootId root = claim_root(name, s.path);
        set_receiving(name, std::move(s), root, get_bool(m.saved, "active", false));
      });
    if (m.track)
      attempt("track", [&] {
        StoreSettings s = settings_from(m.saved["track"]);
        RootId root = claim_root(name, s.path);
        std::shared_ptr<Follower> old;
        {
          std::lock_guard lock(mutex_);
          old = std::move(stores_[name].follower);
        }
        const char* why = old ? "its file system was mounted again; changes may have been missed"
                              : "the agent was started again; changes may have been missed";
        old.reset();
        auto f = std::make_shared<Follower>(host_, accounts_, name, std::move(s), root, why);
        {
          std::lock_guard lock(mutex_);
          stores_[name].follower = f;
        }
        if (m.saved.contains("copy")) f->start_copy(get_int(m.saved["copy"], "bwlimit", 0));
        if (m.saved.contains("follow"))
          f->follow(Millis(get_int(m.saved["follow"], "interval_ms")), get_int(m.saved["follow"], "bwlimit", 0));
      });
  }

  Json on_track(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store");
    std::lock_guard changing(changing_);
    StoreSettings settings = settings_from(request);
    RootId root = claim_root(store, settings.path);
    std::shared_ptr<Follower> old;
    {
      std::lock_guard lock(mutex_);
      auto& f = stores_[store].follower;
      if (f && to_json(f->settings()) == to_json(settings)) {
        std::string reason = f->rescan_reason();
        return {{"state", reason.empty() ? "tracking" : "rescan"}, {"reason", reason}, {"again", true}};
      }
      old = std::move(f);
    }
    old.reset();
    remember(store, "track", to_json(settings));
    std::shared_ptr<Follower> f;
    try {
      f = std::make_shared<Follower>(host_, accounts_, store, settings, root, "");
    } catch (...) {
      remember(store, "track", Json());
      throw;
    }
    set_trouble(store, "track", "");
    {
      std::lock_guard lock(mutex_);
      stores_[store].follower = f;
    }
    std::string reason = f->rescan_reason();
    return {{"state", reason.empty() ? "tracking" : "rescan"}, {"reason", reason}};
  }

  Json on_untrack(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store");
    std::lock_guard changing(changing_);
    std::shared_ptr<Follower> old;
    bool receives;
    {
      std::lock_guard lock(mutex_);
      old = std::move(stores_[store].follower);
      receives = stores_[store].saved.contains("receive");
    }
    old.reset();
    for (const char* key : {"track", "copy", "follow"}) remember(store, key, Json());
    if (!receives) remember(store, "roots", Json());
    set_trouble(store, "track", "");
    return Json::object();
  }

  Json on_receive(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store");
    std::lock_guard changing(changing_);
    StoreSettings settings = settings_from(request);
    // Made only where the run has had none: in place of one that is missing it would be filled in vain.
    bool active = get_bool(request, "active", false), made = !knows_root(store, settings.path) && !exists(settings.path);
    if (made) {
      make_directories(settings.path, 0755);
      fsync_directory(parent_path(settings.path));
    }
    RootId root = claim_root(store, settings.path);
    {
      std::lock_guard lock(mutex_);
      auto& kept = stores_[store];
      // Asked again: what is active or not stays so, and is changed by close and open only.
      if (kept.receiving && to_json(kept.receiving->settings) == to_json(settings) && !made) return {{"made", false}};
      if (get_bool(kept.saved, "closed", false))
        throw Error(Code::state, "store " + store + " is closed on the " + host_.side(), "send files.open first");
    }
    set_receiving(store, settings, root, active);
    remember(store, "receive", to_json(settings));
    remember(store, "active", active);
    set_trouble(store, "receive", "");
    return {{"made", made}};
  }

  Json on_forget(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store");
    Kept old;
    std::lock_guard changing(changing_);
    {
      std::lock_guard lock(mutex_);
      auto it = stores_.find(store);
      if (it == stores_.end()) return Json::object();
      if (get_bool(it->second.saved, "closed", false))
        throw Error(Code::state, "store " + store + " is closed on the " + host_.side(), "send files.open first");
      old = it->second;
    }
    if (old.receiving) {
      old.receiving->revoke();
      old.receiving->root.unmount();
    }
    // Also where it could not be registered again. Before it is forgotten: nobody would look for the mount afterwards, and
    // through it whoever removes STATE would remove the tree.
    unmount_all(private_place(store));
    std::lock_guard lock(mutex_);
    stores_.erase(store);
    troubles_.erase(store);
    save();
    return Json::object();
  }

  Json on_copy(const Json& request, AgentConnection&) {
    auto f = follower(request);
    std::int64_t bandwidth = get_int(request, "bwlimit", 0);
    remember(get_string(request, "store"), "copy", {{"bwlimit", bandwidth}});
    f->start_copy(bandwidth);
    return f->status();
  }

  Json on_follow(const Json& request, AgentConnection&) {
    auto f = follower(request);
    Json wish{{"interval_ms", get_int(request, "interval_ms", 1000)}, {"bwlimit", get_int(request, "bwlimit", 0)}};
    remember(get_string(request, "store"), "follow", wish["interval_ms"] == 0 ? Json() : wish);
    f->follow(Millis(wish["interval_ms"].get<std::int64_t>()), wish["bwlimit"].get<std::int64_t>());
    return f->status();
  }

  Json on_flush(const Json& request, AgentConnection&) {
    auto f = follower(request);
    bool final = get_bool(request, "final", false);
    Flushed r = f->flush(final, Deadline::in(Millis(get_int(request, "timeout_ms", 30'000))));
    return {{"files", r.sent.files}, {"bytes", r.sent.bytes}, {"ms", r.ms}, {"passes", r.passes}, {"rescanned", r.rescanned},
            {"scan_ms", r.scan_ms}, {"paths", hex(r.sent.paths)}, {"writers", to_json(r.writers)}};
  }

  Json on_arm(const Json& request, AgentConnection&) {
    auto f = follower(request);
    f->arm();
    // What was a bulk copy is equal now: a restart must not begin one again.
    remember(get_string(request, "store"), "copy", Json());
    return f->status();
  }

  Json on_rescan(const Json& request, AgentConnection&) {
    follower(request)->rescan(get_string(request, "reason", "asked for"));
    return Json::object();
  }

  Json on_status(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store");
    std::shared_ptr<Follower> f;
    Json out{{"state", "none"}};
    {
      std::lock_guard lock(mutex_);
      auto it = stores_.find(store);
      if (it != stores_.end()) {
        f = it->second.follower;
        if (it->second.receiving) {
          out["receives"] = it->second.receiving->settings.path;
          out["receiving"] = !it->second.receiving->revoked;
        }
        out["closed"] = get_bool(it->second.saved, "closed", false);
      }
      if (std::string why = trouble(store); !why.empty()) out["trouble"] = why;
      if (it != stores_.end() && !f && it->second.saved.contains("track")) {
        const Json& saved = it->second.saved;
        out["state"] = "waiting";
        out["reason"] = trouble(store);
        out["path"] = get_string(saved["track"], "path");
        out["following"] = saved.contains("follow");
        out["tracking"] = out["copied"] = false;
        out["dirty"] = 0;
        out["copy"] = {{"running", false}, {"bytes", 0}, {"percent", 0}};
      }
    }
    if (f) {
      if (get_bool(request, "settle", false)) f->drop_outside();
      Json s = f->status();
      for (auto& [k, v] : s.items()) out[k] = v;
    }
    return out;
  }

  Json on_writers(const Json& request, AgentConnection&) {
    // With a path also before anything is tracked: check asks.
    const std::string path = request.contains("path") ? settings_from(request).path : follower(request)->settings().path;
    return writers_answer(request, path);
  }

  Json on_probe(const Json& request, AgentConnection&) {
    return probe(request, accounts_, [this] { return host_.stopping().load(); });
  }

  // What must be gone before STATE is removed.
  Json on_mounts(const Json&, AgentConnection&) {
    Json below = Json::array();
    for (const auto& m : mounts_below(resolve_path(host_.state()))) below.push_back(shown(m.point));
    return {{"below_state", below}};
  }

  Json on_close(const Json& request, AgentConnection&) {
    std::lock_guard changing(changing_);
    auto r = receiving(request);
    std::string store = get_string(request, "store");
    Json answer{{"closed", true}};
    r->require_place();
    // Written down first: a crash in between leaves a tree that is closed at the next start, not one that nobody opens.
    remember(store, "closed", true);
    try {
      close_tree(r->settings.path);
    } catch (const Error& e) {
      remember(store, "closed", Json());
      if (e.code != Code::denied || !get_bool(request, "best_effort", false)) throw;
      answer = {{"closed", false}, {"reason", e.message}};
    }
    remember(store, "active", true);
    r->revoked = false;
    return answer;
  }

  Json on_open(const Json& request, AgentConnection&) {
    std::string store = get_string(request, "store"), path;
    std::shared_ptr<Receiving> r;
    std::lock_guard changing(changing_);
    {
      std::lock_guard lock(mutex_);
      auto it = stores_.find(store);
      if (it == stores_.end()) return {{"open", true}};
      r = it->second.receiving;
      if (it->second.saved.contains("receive")) path = get_string(it->second.saved["receive"], "path");
    }
    // From here the application owns the tree: a peer that still follows, or reads everything again after a restart,
    // would overwrite what it writes. Durable, and every stream ended, before the first write is let in.
    remember(store, "active", Json());
    if (r) r->revoke();
    if (!path.empty()) open_tree(path);
    remember(store, "closed", Json());
    set_trouble(store, "close", "");
    return {{"open", true}};
  }

  Json on_apply(const Json& request, AgentConnection& c) {
    auto r = receiving(request);
    Stream stream(*r, c.fd.get(), get_string(request, "store"));
    r->require_place();
    send_all(c.fd, "{\"ok\":true}\n", Deadline::in(Millis(5000)));
    Channel channel(c.fd.get(), c.in.take_buffered());
    Receiver(*r->tree, r->filter, accounts_, {.owner_by_name = r->settings.owner_by_name, .check = [&] { r->require_place(); }})
        .serve(channel, host_.stopping());
    return Json();
  }

  Json on_sync(const Json& request, AgentConnection&) {
    auto r = receiving(request);
    await_rsync(host_, *r);
    r->require_place();
    if (::syncfs(r->root.dir()) != 0) throw errno_error(errno, "sync the file system of", r->settings.path);
    return Json::object();
  }

  Json on_manifest(const Json& request, AgentConnection& c) {
    const Tree* tree;
    const Filter* filter;
    std::shared_ptr<Receiving> r;
    std::shared_ptr<Follower> f;
    {
      std::lock_guard lock(mutex_);
      auto it = stores_.find(get_string(request, "store"));
      if (it != stores_.end()) r = it->second.receiving, f = it->second.follower;
    }
    if (r) tree = &*r->tree, filter = &r->filter;
    else if (f) tree = &f->tree(), filter = &f->filter();
    else throw Error(Code::state, "store " + get_string(request, "store") + " is not known on the " + host_.side());
    send_all(c.fd, "{\"ok\":true}\n", Deadline::in(Millis(5000)));
    Channel channel(c.fd.get(), c.in.take_buffered());
    serve_manifest(*tree, *filter, accounts_, channel, host_.stopping());
    return Json();
  }

  Json on_compare(const Json& request, AgentConnection&) {
    auto f = follower(request);
    Compared r = compare_trees(host_, accounts_, get_string(request, "store"), *f,
                               {.most = static_cast<std::size_t>(get_int(request, "most", 1000)),
                                .jobs = static_cast<int>(get_int(request, "jobs", 2)), .stop = &host_.stopping()});
    return to_json(r);
  }

  Json on_rsync(const Json& request, AgentConnection& c) {
    follower(request);
    Json to_peer{{"op", "files.rsync_server"}, {"store", get_string(request, "store")}, {"argv", request.at("argv")}};
    Fd peer = host_.open_peer(to_peer, Deadline::in(Millis(30'000)));
    send_all(c.fd, "{\"ok\":true}\n", Deadline::in(Millis(5000)));
    std::string ahead = c.in.take_buffered();
    if (!ahead.empty()) send_all(peer, ahead, Deadline::in(Millis(30'000)));
    relay(c.fd, peer, host_.stopping());
    return Json();
  }

  Json on_rsync_server(const Json& request, AgentConnection& c) {
    auto r = receiving(request);
    Stream stream(*r, c.fd.get(), get_string(request, "store"));
    r->require_place();
    serve_rsync(host_, *r, request, c);
    return Json();
  }

  AgentHost& host_;
  Accounts accounts_;
  std::mutex changing_;  // of requests and restore(): what is tracked, received and closed changes in one of them at a time
  std::mutex mutex_;     // of what is below; taken after changing_
  std::map<std::string, Kept> stores_;
  std::map<std::string, std::map<std::string, std::string>> troubles_;  // store, what -> why
  std::condition_variable wake_;
  bool ending_ = false;
  std::thread minder_;
};

}  // namespace
}  // namespace track

std::unique_ptr<AgentModule> make_track_module(AgentHost& host) { return std::make_unique<track::TrackModule>(host); }

}  // namespace rehome
