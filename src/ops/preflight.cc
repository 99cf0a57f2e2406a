#include <algorithm>
#include <map>
#include <optional>

#include "base/text.h"
#include "ops/life.h"
#include "site/sockets.h"

namespace rehome::ops {
namespace {

void add(std::vector<Finding>& to, std::vector<Finding> more) {
  for (auto& f : more) to.push_back(std::move(f));
}

Finding from_error(const Error& e, const std::string& id, const std::string& object) {
  return {Finding::Level::error, id, object, e.what(), e.hint};
}

// The link must come up at three in the morning without anybody: the key is tried from the host that will use it.
void check_link(Run& run, std::vector<Finding>& found) {
  const LinkConfig& link = run.deployment().link;
  if (link.ssh.host.empty()) return;
  std::string object = "link: " + std::string(side_name(link.initiator)) + " to " + link.ssh.host;
  auto argv = ssh_argv(link.ssh);
  argv.push_back("true");
  Outcome o = run.site(link.initiator).exec({.argv = argv}, Deadline::in(Millis(25000)));
  if (o.ok()) return;
  Error e = ssh_error(link.ssh, o.err);
  found.push_back(from_error(e, "link.ssh", object));
}

void check_supervisor(Run& run, Side side, std::vector<Finding>& found) {
  const SiteConfig& config = run.deployment().site[side];
  std::string how = config.boot.empty() ? run.site(side).has_systemd() ? "systemd" : "none" : config.boot;
  std::string object = std::string(side_name(side)) + ": supervisor";
  if (how != "none") {
    // What begin will do, tried as far as nothing is changed.
    const std::string place = how == "systemd" ? "/etc/systemd/system" : how == "cron" ? "crontab" : how.substr(how.find(':') + 1);
    if (how.starts_with("directory:") && !run.site(side).exec({.argv = {"test", "-d", place}}).ok())
      found.push_back({Finding::Level::error, "agent.supervisor", object, "there is no directory " + place + ", from where the agent shall be started again after a reboot",
                       "name the directory whose programs that host runs at boot, or set boot: to cron"});
    else if (!run.site(side).exec({.argv = {"sh", "-c", how == "cron" ? "command -v crontab >/dev/null" : "[ -d \"$1\" ] && [ -w \"$1\" ]", "sh", place}}).ok())
      found.push_back({Finding::Level::error, "agent.supervisor", object,
                       how == "cron" ? "there is no crontab, which shall start the agent again after a reboot" : "this account cannot write into " + place + ", from where the agent shall be started again after a reboot",
                       "use root for that site, or set boot: to cron, or to directory:/a/directory whose programs the host runs at boot"});
    const auto& services = run.deployment().services;
    // A directory's programs run in the order of their names, and units at the same time as these.
    if (std::any_of(services.begin(), services.end(), [&](const ServiceConfig& s) { return how == "cron" || (how != "systemd" && s.runtime == ServiceConfig::Runtime::systemd); }))
      found.push_back({Finding::Level::warning, "agent.order", object,
                       "after a reboot nothing starts the agent before the services, which may write on a host that does not serve, or had lost its power in the moment of a switch",
                       "set boot: to systemd, or, where no unit starts them, to directory:/a/directory whose programs the host runs at boot, in the order of their names"});
    return;
  }
  if (run.deployment().traffic.empty())
    found.push_back({Finding::Level::warning, "agent.supervisor", object, "nothing starts the agent again after a reboot",
                     "set boot: to cron, or to directory:/a/directory whose programs the host runs at boot"});
  else
    found.push_back({Finding::Level::error, "agent.supervisor", object,
                     "nothing starts the agent and the gate again after a reboot, and clients come through the gate",
                     "set boot: to cron, or to directory:/a/directory whose programs the host runs at boot"});
}

// Where a run begins, nothing but what an ended one left may lie: its end removes rehome's names from there.
constexpr char kForeign[] = R"sh(cd "$1" 2>/dev/null && [ ! -e agent.json ] && [ ! -e run/remove ] || exit 0
for f in * .[!.]* bin/*; do
  [ -e "$f" ] || [ -L "$f" ] || continue
  case "$f" in not-serving|not-serving.*|bin|bin/rehome-*|lost+found) ;; *) printf '%s\n' "$f" ;; esac
done
)sh";

void check_state(Run& run, Side side, std::vector<Finding>& found) {
  const std::string state = run.site(side).resident_state();
  const auto foreign = split(std::string(trim(run.site(side).exec_ok({.argv = {"sh", "-c", kForeign, "sh", state}}).out)), '\n');
  if (foreign.empty() || foreign[0].empty()) return;
  found.push_back({Finding::Level::error, "site.state", std::string(side_name(side)) + ": state " + state, "the directory is there and holds what is not rehome's: " + first_few(foreign),
                   "name one with `state` that is empty, or not there"});
}

void check_run_there(Run& run, Side side, std::vector<Finding>& found) {
  Json hello = run.site(side).call("hello");
  (void)hello;
  for (const char* tool : {"rsync"}) {
    bool needed = false;
    for (const auto& s : run.deployment().stores) needed = needed || s.kind == StoreConfig::Kind::files;
    if (needed && !run.site(side).exec({.argv = {"sh", "-c", std::string("command -v ") + tool + " >/dev/null"}}).ok())
      found.push_back({Finding::Level::error, std::string("site.") + tool, std::string(side_name(side)), std::string(tool) + " is not installed",
                       std::string("install it on that host: apt-get install ") + tool});
  }
}

// The gate's own address must be free on both hosts, now and not when the first client is sent to it.
void check_ports(Run& run, Side side, std::vector<Finding>& found) {
  std::optional<std::vector<TcpSocket>> all;
  for (const auto& t : run.deployment().traffic) {
    if (t.kind != TrafficConfig::Kind::nginx && t.take != TrafficConfig::Take::listen) continue;
    Address listen = Address::parse(t.on[side].listen);
    if (listen.is_unix()) continue;
    bool too_low = false;
    if (!run.site(side).exec({.argv = {"sh", "-c", "[ \"$(id -u)\" = 0 ] || [ \"$1\" -ge \"$(cat /proc/sys/net/ipv4/ip_unprivileged_port_start)\" ]", "sh", std::to_string(listen.port)}}).ok()) {
      too_low = true;
      found.push_back({Finding::Level::error, "traffic.port_rights", std::string(side_name(side)) + ": traffic " + t.name, "the gate shall listen at " + listen.text() + ", and only root may listen at so low a port",
                       "use root for that site, or give the gate a port from 1024 on"});
    }
    if (!all) all = tcp_sockets(run.site(side));
    std::vector<TcpSocket> there;
    for (const auto& s : *all)
      if (same_listener(s, listen.host, listen.port)) there.push_back(s);
    if (there.empty() && !too_low) {
      try {
        run.site(side).call("listen.try", {{"at", listen.text()}});
      } catch (const Error& e) {
        found.push_back({Finding::Level::error, "traffic.port", std::string(side_name(side)) + ": traffic " + t.name, "the gate cannot listen there: " + e.message,
                         e.hint.empty() ? "give the gate an address of that host" : e.hint});
      }
    }
    name_owners(run.site(side), there);
    const std::string& given = run.deployment().site[side].state;
    std::string ours = given.empty() ? "/rehome/" + run.deployment().name + "/" + std::string(side_name(side)) : given;
    for (const auto& s : there) {
      // The sockets of a gate belong to its supervisor, so that they outlive it.
      if (s.program.starts_with("rehome-") && s.arguments.find(ours) != std::string::npos) continue;
      found.push_back({Finding::Level::error, "traffic.port_in_use", std::string(side_name(side)) + ": traffic " + t.name,
                       "the gate shall listen at " + listen.text() + ", and " + s.owner() + " does",
                       "stop that process, or give the gate another port"});
      break;
    }
  }
}

// Each may fit into what is free, and all of them not.
void check_room(Run& run, std::vector<Finding>& found) {
  std::map<std::int64_t, std::vector<std::pair<std::string, Room>>> by_device;
  for (auto& store : run.stores())
    if (auto room = store->room()) by_device[room->device].emplace_back(store->name(), *room);
  for (const auto& [device, rooms] : by_device) {
    std::int64_t needed = 0, free = rooms[0].second.free;
    std::vector<std::string> each;
    bool one = false;   // which has said so itself
    for (const auto& [name, room] : rooms) {
      needed += room.needed;
      free = std::min(free, room.free);
      one = one || room.free < room.needed;
      each.push_back(name + " " + human_bytes(room.needed) + " in " + room.path);
    }
    if (needed > free && !one)
      found.push_back({Finding::Level::error, "site.space", "target: the file system of " + rooms[0].second.path,
                       "it has " + human_bytes(free) + " free, and needs " + human_bytes(needed) + " for the stores that share it: " + join(each, ", "), "make room, or choose another path for one of them"});
  }
}

}  // namespace

std::vector<Finding> preflight(Run& run) {
  std::vector<Finding> found;
  auto guarded = [&](const std::string& id, const std::string& object, const std::function<void()>& work) {
    try {
      work();
    } catch (const Error& e) {
      found.push_back(from_error(e, id, object));
    }
  };
  guarded("link", "link", [&] { check_link(run, found); });
  for (Side side : {Side::source, Side::target}) {
    std::string object(side_name(side));
    guarded("site", object, [&] { check_state(run, side, found); });
    guarded("supervisor", object, [&] { check_supervisor(run, side, found); });
    guarded("site", object, [&] { check_run_there(run, side, found); });
    guarded("traffic", object, [&] { check_ports(run, side, found); });
    for (auto& service : run.services())
      guarded("service", object + ": service " + service->config().name, [&] { add(found, service->preflight(run.stores_context(), side)); });
  }
  for (auto& store : run.stores())
    guarded("store", "store " + store->name(), [&] { add(found, store->preflight(run.stores_context())); });
  check_room(run, found);
  for (auto& traffic : run.traffic())
    guarded("traffic", "traffic " + traffic->name(), [&] { add(found, traffic->preflight(run.traffic_context())); });
  return found;
}

void require_clean(const std::vector<Finding>& findings, bool shown) {
  std::string text;
  int errors = 0;
  for (const auto& f : findings) {
    if (f.level != Finding::Level::error) continue;
    errors++;
    text += "\n  " + f.object + ": " + f.message + (f.mend.empty() ? "" : "\n      " + f.mend);
  }
  if (errors)
    throw Error(Code::preflight, std::to_string(errors) + (errors == 1 ? " finding" : " findings") + " would break the migration" + (shown ? "" : ":" + text),
                "mend them and run rehome check again");
}

}  // namespace rehome::ops
