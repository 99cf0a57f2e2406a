#include "base/text.h"
#include "runtime/runtime.h"

namespace rehome {
namespace {

// The agent is the last that the kernel ends when memory is short; what it starts shall not be that, too.
constexpr char kAsOthers[] = "{ echo 0 >/proc/self/oom_score_adj; } 2>/dev/null; ";

// Sets p to the pid file's process and succeeds where that lives: one that has ended, and that nobody has waited for yet, still
// takes signals.
constexpr char kLives[] = "p=$(cat \"$f\" 2>/dev/null) && [ -n \"$p\" ] && kill -0 $p 2>/dev/null && ! grep -q '^State:[[:space:]]*[ZX]' /proc/$p/status 2>/dev/null";

// Succeeds where it lives and takes no signal of ours.
constexpr char kOthers[] = "p=$(cat \"$f\" 2>/dev/null) && [ -n \"$p\" ] && [ -d /proc/$p ] && ! kill -0 $p 2>/dev/null && [ -d /proc/$p ]";

class CommandService : public Service {
 public:
  explicit CommandService(const ServiceConfig& config) : config_(config) {}
  const ServiceConfig& config() const override { return config_; }

  std::vector<Finding> preflight(StoreContext& context, Side side) override {
    std::vector<Finding> found;
    const auto& on = config_.on[side];
    std::string where = std::string(side_name(side)) + ": service " + config_.name;
    for (const auto* argv : {&on.start, &on.stop}) {
      if (argv->empty()) continue;
      // command -v finds programs and absolute paths alike.
      if (!context.at(side).exec({.argv = {"sh", "-c", "command -v \"$1\" >/dev/null", "sh", argv->front()}}).ok())
        found.push_back({Finding::Level::error, "service.missing", where, argv->front() + " is not a program of that host",
                         "install it there, or correct the command"});
    }
    const Json hello = context.at(side).call("hello");
    if (!get_bool(hello.at("capabilities"), "freeze", false))
      found.push_back({Finding::Level::warning, "service.freeze", where, "its processes cannot be frozen as a whole there: in the pause they are stopped by a signal, one by one",
                       "fine for a service that starts no processes of its own; otherwise use an account on that host that is root"});
    const bool others = context.at(side).exec({.argv = {"sh", "-c", std::string("f=$1; ") + kOthers, "sh", on.pid_file}}).ok();
    if (others)
      found.push_back({Finding::Level::error, "service.rights", where, "the process of " + on.pid_file + " belongs to another account, and this one may not stop it",
                       "use root, or that account, for that site"});
    if (side == Side::source && !others && !running(context.at(side)))
      found.push_back({Finding::Level::error, "service.down", where,
                       "no process of " + on.pid_file + " runs, so there is none to freeze", "start the service, or correct pid_file"});
    return found;
  }

  bool running(Site& site) override {
    const std::string& file = config_.on[site.side()].pid_file;
    return site.exec({.argv = {"sh", "-c", std::string("f=$1; ") + kLives, "sh", file}}).ok();
  }

  void start(Site& site) override {
    if (running(site)) return;
    const auto& argv = config_.on[site.side()].start;
    if (argv.empty())
      throw Error(Code::config, "service " + config_.name + " has no start command on the " + std::string(side_name(site.side())),
                  "add one, or start it by hand and resume");
    // The service must outlive this request: its own session, outputs away from ours.
    std::vector<std::string> line{"sh", "-c", std::string(kAsOthers) + "cd /; setsid \"$@\" </dev/null >/dev/null 2>&1 &", "sh"};
    line.insert(line.end(), argv.begin(), argv.end());
    site.exec_ok({.argv = line});
    Deadline deadline = Deadline::in(config_.start_timeout);
    while (!running(site)) {
      if (deadline.passed())
        throw Error(Code::store, "service " + config_.name + " did not write a live pid to " + config_.on[site.side()].pid_file,
                    "run its start command by hand on that host and read what it says")
            .in(site.label());
      system_clock().sleep(Millis(50));
    }
  }

  void stop(Site& site) override {
    const auto& argv = config_.on[site.side()].stop;
    if (!argv.empty()) {
      site.exec_ok({.argv = argv}, Deadline::in(config_.start_timeout));
      return;
    }
    site.exec_ok({.argv = {"sh", "-c",
                           "p=$(cat \"$1\" 2>/dev/null) || exit 0; kill $p 2>/dev/null || exit 0; i=0; "
                           "while kill -0 $p 2>/dev/null && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done; "
                           "kill -0 $p 2>/dev/null && kill -9 $p; exit 0",
                           "sh", config_.on[site.side()].pid_file}},
                 Deadline::in(Millis(20000)));
  }

  Json freeze_item(Side side) const override { return {{"name", config_.name}, {"pid_file", config_.on[side].pid_file}}; }

  // Nothing can stop a person's own command: the hard fences refuse what it writes, and the plan says so.
  void guard(StoreContext&, Site&) override {}
  void unguard(Site&) override {}
  std::vector<std::string> leftovers(Site&) override { return {}; }

  Action start_action(Side side) const override {
    const auto& on = config_.on[side];
    Action a;
    a.name = "start " + config_.name;
    // Idempotent: nothing when it runs.
    a.argv = {"sh", "-c",
              std::string("f=$1; shift; ") + kLives + " && exit 0; [ $# -gt 0 ] || exit 0; " + kAsOthers + "cd /; setsid \"$@\" </dev/null >/dev/null 2>&1 &",
              "sh", on.pid_file};
    a.argv.insert(a.argv.end(), on.start.begin(), on.start.end());
    a.timeout = config_.start_timeout;
    return a;
  }

 private:
  ServiceConfig config_;
};

}  // namespace

std::unique_ptr<Service> make_command_service(const ServiceConfig& config) { return std::make_unique<CommandService>(config); }

std::vector<std::unique_ptr<Service>> make_services(const Deployment& deployment) {
  std::vector<std::unique_ptr<Service>> services;
  for (const auto& s : deployment.services)
    services.push_back(s.runtime == ServiceConfig::Runtime::systemd ? make_systemd_service(s) : make_command_service(s));
  return services;
}

}  // namespace rehome
