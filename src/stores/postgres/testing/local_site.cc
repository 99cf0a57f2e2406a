#include "stores/postgres/testing/local_site.h"

#include <sys/socket.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/text.h"

namespace rehome::testing {

LocalSite::~LocalSite() {
  children_.clear();
  for (auto* map : {&doors_, &listeners_}) {
    for (auto& [name, door] : *map) {
      door->stop = true;
      door->cut = true;
      if (door->thread.joinable()) door->thread.join();
      for (auto& s : door->sessions) s.join();
    }
    map->clear();
  }
}

void LocalSite::serve(Door& door, Dial dial, bool keep, std::string keep_name) {
  while (auto client = accept_from(door.listener, {}, &door.stop)) {
    std::lock_guard lock(door.mutex);
    door.sessions.emplace_back([this, &door, dial, keep, keep_name, client = std::move(*client)]() mutable {
      try {
        Fd upstream = dial();
        relay(client, upstream, door.cut, keep);
        if (keep) {
          std::lock_guard kept(mutex_);
          kept_[keep_name] = std::move(upstream);
        }
      } catch (const Error&) {
      }
    });
  }
}

Fd LocalSite::open_relay(const std::string& address, const std::string& as_user, const std::string&) {
  return connect_to(Address::parse(address), Deadline::in(Millis(5000)), as_user);
}

std::string LocalSite::local_socket_for(const std::string& address, const std::string& as_user, const std::string& keep) {
  const std::string socket = "/.s.PGSQL.5432";
  if (direct && keep.empty() && as_user.empty() && address.starts_with("unix:") && address.ends_with(socket))
    return address.substr(5, address.size() - 5 - socket.size());
  std::lock_guard lock(mutex_);
  auto& door = doors_[address + "\n" + as_user + "\n" + keep];
  if (!door) {
    door = std::make_unique<Door>();
    door->dir = std::make_unique<TempDir>("rehome-door");
    door->listener = listen_on({.path = door->dir->path() + "/.s.PGSQL.5432"});
    Door* d = door.get();
    d->thread = std::thread([this, d, address, as_user, keep] {
      serve(*d, [this, address, as_user] { return open_relay(address, as_user, ""); }, !keep.empty(), keep);
    });
  }
  return door->dir->path();
}

void LocalSite::cut() {
  std::lock_guard lock(mutex_);
  for (auto& [name, door] : doors_) door->cut = true;
}

void LocalSite::link_down(bool down) {
  link_down_ = down;
  std::lock_guard lock(mutex_);
  for (auto& [name, door] : listeners_) door->cut = down;
}

Json LocalSite::call(const std::string& op, Json args, Deadline deadline) {
  if (op == "exec") {
    Command command{.argv = args.at("argv").get<std::vector<std::string>>()};
    Json env = args.value("env", Json::object());
    for (auto& [k, v] : env.items()) command.env.emplace_back(k, v.get<std::string>());
    command.input = args.contains("input_base64") ? from_base64(get_string(args, "input_base64")) : get_string(args, "input", "");
    command.user = get_string(args, "user", "");
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
  if (op == "keep.list") {
    std::lock_guard lock(mutex_);
    Json list = Json::array();
    for (auto& [name, fd] : kept_) {
      char c;
      bool alive = ::recv(fd.get(), &c, 1, MSG_PEEK | MSG_DONTWAIT) != 0;
      list.push_back({{"name", name}, {"alive", alive}});
    }
    return {{"kept", list}};
  }
  if (op == "keep.drop") {
    std::lock_guard lock(mutex_);
    kept_.erase(get_string(args, "name"));
    return Json::object();
  }
  if (op == "service.set") {
    std::lock_guard lock(mutex_);
    services_[get_string(args, "name")] = {get_string(args, "to"), get_string(args, "as_user", "")};
    return Json::object();
  }
  if (op == "listen.set") {
    std::string name = get_string(args, "name"), service = get_string(args, "service");
    std::lock_guard lock(mutex_);
    auto& door = listeners_[name];
    if (door) return Json::object();
    door = std::make_unique<Door>();
    Address at = Address::parse(get_string(args, "at"));
    make_directories(parent_path(at.path), 0755);
    door->listener = listen_on(at, static_cast<unsigned>(get_int(args, "mode", 0600)));
    Door* d = door.get();
    d->thread = std::thread([this, d, service] {
      serve(
          *d,
          [this, service] {
            if (link_down_) throw Error(Code::unreachable, "the link is down");
            std::pair<std::string, std::string> to;
            {
              std::lock_guard peer(peer_->mutex_);
              to = peer_->services_.at(service);
            }
            return connect_to(Address::parse(to.first), Deadline::in(Millis(5000)), to.second);
          },
          false, "");
    });
    return Json::object();
  }
  if (op == "service.drop" || op == "listen.drop") return Json::object();
  if (op == "child.set") {
    Command command{.argv = args.at("argv").get<std::vector<std::string>>()};
    Json env = args.value("env", Json::object());
    for (auto& [k, v] : env.items()) command.env.emplace_back(k, v.get<std::string>());
    command.user = get_string(args, "user", "");
    std::string input = get_string(args, "input", "");
    std::lock_guard lock(mutex_);
    Kept kept;
    kept.child = std::make_unique<Child>(command, Child::Pipes{.in = true, .die_with_parent = false});
    write_all(kept.child->in.get(), input, "child");
    kept.child->in.reset();
    children_.erase(get_string(args, "name"));
    children_.emplace(get_string(args, "name"), std::move(kept));
    return Json::object();
  }
  if (op == "child.drop") {
    std::lock_guard lock(mutex_);
    children_.erase(get_string(args, "name"));
    return Json::object();
  }
  if (op == "child.status") {
    std::lock_guard lock(mutex_);
    Json all = Json::array();
    for (auto& [name, kept] : children_) all.push_back({{"name", name}, {"running", !kept.child->poll()}});
    return {{"children", all}};
  }
  throw Error(Code::internal, "LocalSite knows no " + op);
}

void LocalSite::run_actions(const std::vector<Action>& actions, std::int64_t epoch) {
  for (const auto& a : actions) {
    std::string input = a.input;
    for (std::size_t at; (at = input.find("@rehome_epoch@")) != std::string::npos;) input.replace(at, 14, std::to_string(epoch));
    for (const auto& [file, content] : a.credentials)
      static_cast<Site&>(*this).call("put", {{"path", state() + "/credentials/" + file}, {"content", content}, {"mode", 0600}});
    Deadline deadline = Deadline::in(Millis(5000));
    while (true) {
      Outcome o = run({.argv = a.argv, .env = a.env, .input = input, .user = a.user}, Deadline::in(a.timeout));
      if (o.ok()) break;
      if (deadline.passed()) throw Error(Code::store, a.name + ": " + o.err);
      system_clock().sleep(Millis(100));
    }
  }
}

World::World(Deployment d) : deployment(std::move(d)) {
  source.set_peer(&target);
  target.set_peer(&source);
  context_.reset(new StoreContext{
      .deployment = deployment,
      .source = source,
      .target = target,
      .progress =
          [this](const Progress& p) {
            std::lock_guard lock(mutex);
            progress.push_back(p);
          },
      .note =
          [this](const std::string& what, const Json&) {
            std::lock_guard lock(mutex);
            notes.push_back(what);
          },
      .recall =
          [this](const std::string& key) {
            std::lock_guard lock(mutex);
            auto it = facts.find(key);
            return it == facts.end() ? Json() : it->second;
          },
      .remember =
          [this](const std::string& key, const Json& value) {
            {
              std::lock_guard lock(mutex);
              facts[key] = value;
            }
            if (remembered) remembered(key);
          },
      .log =
          [this](const std::string& line) {
            std::lock_guard lock(mutex);
            lines.push_back(line);
          },
      .cancelled = cancelled});
}

bool World::said(const std::string& what) {
  std::lock_guard lock(mutex);
  return std::any_of(lines.begin(), lines.end(), [&](const std::string& l) { return l.find(what) != std::string::npos; });
}

World::~World() {
  for (const auto& [key, value] : facts)
    if (key.find(".socket_directory.") != std::string::npos) remove_tree(value.get<std::string>());
}

Deployment deployment_between(const std::string& source_dir, const std::string& target_dir, std::vector<std::string> databases, int jobs) {
  Deployment d;
  d.name = "test";
  StoreConfig store;
  store.name = "db";
  store.kind = StoreConfig::Kind::postgres;
  store.postgres.server.source.host = source_dir;
  store.postgres.server.target.host = target_dir;
  store.postgres.databases = std::move(databases);
  d.stores.push_back(store);
  d.limits.jobs = jobs;
  return d;
}

}  // namespace rehome::testing
