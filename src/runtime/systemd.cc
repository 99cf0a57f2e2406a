#include "base/text.h"
#include "runtime/runtime.h"

namespace rehome {
namespace {

// Status 9: skipped by a condition, which systemctl itself takes for success. It waits in the background, since a shell that is told
// to end puts off its trap until what it runs has ended.
constexpr char kStart[] = R"sh(if [ -e "$1" ]; then
  trap 'mv -f "$1.lifted" "$1"' EXIT
  trap 'exit 1' HUP INT TERM
  mv "$1" "$1.lifted"
fi
systemctl start "$2" &
wait $! || exit 1
[ "$(systemctl show -p ConditionResult --value "$2")" != no ] || systemctl is-active -q "$2" || exit 9
)sh";

// Whether $1 is a cgroup of the second version, which alone has a freezer for units.
constexpr char kFreezes[] = R"sh(while read -r _ at type _; do
  [ "$type" != cgroup2 ] || [ ! -e "$at$1/cgroup.freeze" ] || exit 0
done </proc/self/mounts
exit 1
)sh";

class SystemdService : public Service {
 public:
  explicit SystemdService(const ServiceConfig& config) : config_(config) {}
  const ServiceConfig& config() const override { return config_; }

  std::vector<Finding> preflight(StoreContext& context, Side side) override {
    std::vector<Finding> found;
    const std::string& unit = config_.on[side].unit;
    std::string where = std::string(side_name(side)) + ": unit " + unit;
    Outcome o = context.at(side).exec({.argv = {"systemctl", "show", "-p", "LoadState,ActiveState,ControlGroup", unit}});
    if (!o.ok()) {
      found.push_back({Finding::Level::error, "service.systemd", where, "systemctl does not answer: " + std::string(trim(o.err)),
                       "is systemd the first process of that host? otherwise use runtime command"});
    } else if (o.out.find("LoadState=loaded") == std::string::npos) {
      found.push_back({Finding::Level::error, "service.missing", where, "the unit is not there",
                       "install the service on the " + std::string(side_name(side)) + ", or correct its name"});
    } else if (side == Side::source && o.out.find("ActiveState=active") == std::string::npos) {
      found.push_back({Finding::Level::error, "service.down", where, "the service does not run, so it cannot be tried whether it can be frozen", "start it: systemctl start " + unit});
    } else if (side == Side::source) {
      auto at = o.out.find("ControlGroup=");
      std::string group = at == std::string::npos ? "" : o.out.substr(at + 13, o.out.find('\n', at) - at - 13);
      if (group.empty())
        found.push_back({Finding::Level::error, "service.freeze", where, "the unit is active and has no processes, so there is nothing to freeze",
                         "name the unit whose processes write to the stores"});
      else if (!context.at(side).exec({.argv = {"sh", "-c", kFreezes, "sh", group}}).ok())
        found.push_back({Finding::Level::error, "service.freeze", where, "its cgroup " + group + " cannot be frozen: there is no cgroup.freeze",
                         "run the service with command: and a pid_file, which need no cgroup of the unit"});
    }
    if (!context.at(side).exec({.argv = {"sh", "-c", "[ ! -d /etc/systemd/system ] || [ -w /etc/systemd/system ]"}}).ok())
      found.push_back({Finding::Level::error, "service.rights", where, "this account cannot write into /etc/systemd/system, where its start condition is to be, nor start and freeze system units",
                       "use root for that site, or run the service with command: and a pid_file"});
    if (std::string why = keeps_closed_view(context, side); config_.warm && !why.empty())
      found.push_back({Finding::Level::error, "service.sandbox", where, why + ": started warm, while the tree is closed, it would go on seeing it closed after the switch",
                       "set warm: false for " + config_.name + ", so that it starts when the tree is open"});
    return found;
  }

  bool running(Site& site) override {
    return site.exec({.argv = {"systemctl", "is-active", "-q", config_.on[site.side()].unit}}).ok();
  }
  // Asked for before a pause, of the side that shall take over: where the start condition stands it is lifted for the start alone.
  // Should the host die in between, its agent sets the condition again before any unit starts.
  void start(Site& site) override {
    const std::string& unit = config_.on[site.side()].unit;
    Outcome o = site.exec({.argv = {"sh", "-c", kStart, "sh", site.state() + "/not-serving", unit}}, Deadline::in(config_.start_timeout));
    if (o.ok()) return;
    throw Error(Code::store, "systemctl start " + unit + ": " + (o.status == 9 ? "systemd skipped it, since a condition of the unit does not hold" : std::string(trim(o.err))),
                o.status == 9 ? "systemctl status " + unit + " on that host says which" : "look at journalctl -u " + unit + " on that host")
        .in(site.label());
  }
  void stop(Site& site) override { act(site, "stop"); }
  Json freeze_item(Side side) const override { return {{"name", config_.name}, {"unit", config_.on[side].unit}}; }

  // `systemctl mask` fails on a unit that lies in /etc/systemd/system, and a person lifts it without a thought; a
  // condition in a drop-in does neither.
  void guard(StoreContext& context, Site& site) override {
    context.note("start condition for " + config_.on[site.side()].unit, {{"where", site.label()}, {"file", drop_in(site)}});
    site.call("put", {{"path", drop_in(site)},
                      {"mode", 0644},
                      {"content", "[Unit]\nConditionPathExists=!" + site.state() + "/not-serving\n"}});
    site.exec_ok({.argv = {"systemctl", "daemon-reload"}});
  }
  void unguard(Site& site) override {
    site.exec_ok({.argv = {"rm", "-f", drop_in(site)}});
    site.exec_ok({.argv = {"sh", "-c", "rmdir \"$1\" 2>/dev/null; systemctl daemon-reload", "sh", drop_in_dir(site)}});
  }
  std::vector<std::string> leftovers(Site& site) override {
    if (site.exec({.argv = {"test", "-e", drop_in(site)}}).ok()) return {site.label() + ": " + drop_in(site)};
    return {};
  }
  Action start_action(Side side) const override {
    Action a;
    a.name = "start " + config_.name;
    a.argv = {"systemctl", "start", config_.on[side].unit};
    a.timeout = config_.start_timeout;
    return a;
  }

 private:
  // A unit with a mount namespace of its own keeps what it bound at its start: that a closed tree is opened again reaches it only
  // where it bound nothing there itself, and does not stand inside. Why it does; empty: it does not.
  std::string keeps_closed_view(StoreContext& context, Side side) const {
    Outcome o = context.at(side).exec({.argv = {"systemctl", "show", "-p",
                                                "ReadWritePaths,BindPaths,BindReadOnlyPaths,StateDirectory,WorkingDirectory,ProtectSystem,ProtectHome,PrivateTmp,PrivateDevices,PrivateMounts,DynamicUser",
                                                config_.on[side].unit}});
    bool own = false;
    std::vector<std::pair<std::string, std::string>> places;
    for (const auto& line : split(o.out, '\n')) {
      auto eq = line.find('=');
      if (eq == std::string::npos || eq + 1 == line.size()) continue;
      const std::string key = line.substr(0, eq), value = line.substr(eq + 1);
      if (key.starts_with("P") || key == "DynamicUser") {
        own = own || value != "no";
        continue;
      }
      own = own || (key != "WorkingDirectory" && key != "StateDirectory");
      for (std::string one : split(value, ' ')) {
        one.erase(0, one.find_first_not_of("-+!"));
        // BindPaths: source:destination:option.
        if (auto colon = one.find(':'); colon != std::string::npos) one = one.substr(colon + 1, one.find(':', colon + 1) - colon - 1);
        if (!one.empty()) places.emplace_back(key, one[0] == '/' ? one : "/var/lib/" + one);
      }
    }
    if (!own) return {};
    auto within = [](const std::string& path, const std::string& top) { return path == top || path.starts_with(top + "/"); };
    for (const auto& store : context.deployment.stores) {
      if (store.kind != StoreConfig::Kind::files) continue;
      const std::string& tree = store.files.path[side];
      for (const auto& [key, place] : places)
        if (within(place, tree) || (key != "WorkingDirectory" && within(tree, place))) return "it has a mount namespace of its own, and its " + key + " " + place + " meets " + tree;
    }
    return {};
  }
  std::string drop_in_dir(Site& site) const { return "/etc/systemd/system/" + config_.on[site.side()].unit + ".d"; }
  std::string drop_in(Site& site) const { return drop_in_dir(site) + "/50-rehome.conf"; }
  void act(Site& site, const char* verb) {
    const std::string& unit = config_.on[site.side()].unit;
    Outcome o = site.exec({.argv = {"systemctl", verb, unit}}, Deadline::in(config_.start_timeout));
    if (o.ok()) return;
    throw Error(Code::store, std::string("systemctl ") + verb + " " + unit + ": " + std::string(trim(o.err)),
                "look at journalctl -u " + unit + " on that host")
        .in(site.label());
  }

  ServiceConfig config_;
};

}  // namespace

std::unique_ptr<Service> make_systemd_service(const ServiceConfig& config) { return std::make_unique<SystemdService>(config); }

}  // namespace rehome
