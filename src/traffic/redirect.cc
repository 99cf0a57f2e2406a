// New connections to the application's port go to the gate's listener, by one rule of the packet filter; the application
// keeps its port and knows nothing.
//
// The rule is TPROXY, not a translation of addresses. It only chooses, for the first packet of a connection, which
// listening socket takes it; nothing about the connection is written down anywhere but in the two ends' own sockets,
// which carry the port that the client connected to. So a rule that comes or goes changes nothing for a connection that
// exists, and none can meet a stale entry of the connection tracker: with REDIRECT, an entry that outlives its connection
// (tracking ends with the last rule that translates, its entries do not) leads the next connection of the same address and
// port where that one went, past the gate or to one that is gone. See Documentation/networking/tproxy.rst in Linux.
//
// The gate's own connections carry a mark, which the rule lets pass. While the rule stands and no gate listens, what
// arrives is dropped, and the client sends it again: nobody slips past a gate that is being started anew.
#include <cstdio>

#include "base/text.h"
#include "traffic/gates.h"

namespace rehome {
namespace {

class RedirectTraffic : public Traffic {
 public:
  RedirectTraffic(const Deployment& d, const TrafficConfig& t) : deployment_(d), t_(t) {}
  const std::string& name() const override { return t_.name; }

  std::vector<Finding> preflight(TrafficContext& ctx) override {
    std::vector<Finding> found;
    for (Side s : {Side::source, Side::target}) {
      Site& site = ctx.at(s);
      std::string object = site.label() + ": traffic " + t_.name;
      auto add = [&](Finding::Level level, const char* id, std::string message, std::string mend) {
        found.push_back({level, id, object, std::move(message), std::move(mend)});
      };
      try {
        Address app = Address::parse(t_.on[s].application), gate = Address::parse(t_.on[s].listen);
        bool over_ipv6 = is_ipv6(app) || (everywhere(app) && listens_on_ipv6(site, app.port));
        if (over_ipv6 && !is_ipv6(gate))
          add(Finding::Level::error, "redirect.ipv6", "port " + std::to_string(app.port) + " is served over IPv6 too, and that would pass the gate by",
              "let the gate listen at [::]:" + std::to_string(gate.port) + ", which takes both");
        // The rules themselves, in a network that ends with the command: what the kernel or the agent's rights lack shows there.
        Outcome o = site.exec({.argv = {"unshare", "-n", "sh", "-ec", script(s, Put::add)}}, Deadline::in(Millis(20000)));
        if (!o.ok())
          add(Finding::Level::error, "redirect.iptables", "the packet filter cannot choose a listener (TPROXY): " + std::string(trim(o.err)),
              "install iptables and let the agent run as root, or use take: listen");
        Outcome nat = site.exec({.argv = {"iptables", "-w", "5", "-t", "nat", "-S"}}, Deadline::in(Millis(10000)));
        for (const auto& line : split(nat.out, '\n'))
          if ((line + " ").find("--dport " + std::to_string(app.port) + " ") != std::string::npos && line.find("-j DNAT") != std::string::npos)
            add(Finding::Level::error, "redirect.dnat", "this host passes port " + std::to_string(app.port) + " on to another address (a published port of a container?): " + line,
                "lead a proxy through the gate with traffic of kind nginx, or publish the port elsewhere and use take: listen");
      } catch (const Error& e) {
        add(Finding::Level::error, "redirect", e.what(), e.hint);
      }
    }
    find_application(ctx.source, t_, found);
    return found;
  }

  std::vector<std::string> plan_notes() override {
    auto notes = common_notes(deployment_, t_, Front::none);
    notes.push_back("connections of before begin stay with the application and are not held; those that are still open at a switch are ended by it with the application, counted, and reported");
    if (!t_.proxy_protocol) notes.push_back("through the gate, the application sees connections from its own host");
    notes.push_back("after a reboot, or when a firewall loads its rules anew, the rule is back within two seconds of the agent's start; until then clients reach the application's port itself");
    return notes;
  }

  void prepare(TrafficContext& ctx) override {
    BySide<GateSide> sides;
    for (Side s : {Side::source, Side::target}) {
      Address app = Address::parse(t_.on[s].application);
      if (everywhere(app)) app.host = is_ipv6(app) ? "::1" : "127.0.0.1";
      sides[s] = {.listen = t_.on[s].listen, .local = app.text(), .mark = kMark, .transparent = true};
    }
    raise_gates(ctx, t_, sides);
    for (Side s : {Side::target, Side::source}) {
      stop_if_cancelled(ctx);
      Site& site = ctx.at(s);
      ctx.note("packet filter: new connections to port " + std::to_string(Address::parse(t_.on[s].application).port) + " go to the gate",
               {{"where", site.label()}, {"undone_by", "removing the rules with the comment " + tag()}});
      shell(site, script(s, Put::add));
      // Rules live in the kernel's memory: a reboot, or whoever loads others, throws them away.
      std::string keep = "while true; do {\n" + script(s, Put::add) + "} >/dev/null 2>&1; sleep 2; done\n";
      site.call("child.set", {{"name", "take-" + t_.name}, {"argv", {"sh", "-c", keep}}, {"restart_ms", 1000}});
    }
  }

  std::vector<std::string> astray(TrafficContext& ctx, Side s) override {
    Site& site = ctx.at(s);
    if (comes_back([&] { return site.exec({.argv = {"sh", "-ec", script(s, Put::look)}}, Deadline::in(Millis(20000))).ok(); })) return {};
    return {site.label() + ": packet filter: the rule that leads port " + std::to_string(Address::parse(t_.on[s].application).port) + " to the gate is gone, and does not come back by itself"};
  }

  void withdraw(TrafficContext& ctx) override {
    at_both(ctx, [&](Side s) {
      Site& site = ctx.at(s);
      site.call("child.drop", {{"name", "take-" + t_.name}});
      bool ours = !rules(site).empty();
      // Also when there is none: a program of ours may have been adding one when it was ended.
      shell(site, script(s, Put::remove));
      if (ours) let_finish(ctx, t_, s);
    });
  }

  std::int64_t from_old_address(TrafficContext& ctx, Side old_side) override { return clients_at(ctx, old_side, t_.name); }

  std::vector<std::string> leftovers(TrafficContext& ctx) override {
    std::vector<std::string> left;
    for (Side s : {Side::source, Side::target}) {
      if (!ctx.has(s)) continue;
      for (const auto& rule : rules(ctx.at(s))) left.push_back(ctx.at(s).label() + ": packet filter: " + rule);
    }
    return left;
  }

 private:
  enum class Put { add, remove, look };
  // SO_MARK of the gate's own connections: "rhm".
  static constexpr std::uint32_t kMark = 0x72686d;

  static bool everywhere(const Address& a) { return a.host.empty() || a.host == "*" || a.host == "0.0.0.0" || a.host == "::"; }
  static bool is_ipv6(const Address& a) { return a.host.find(':') != std::string::npos; }
  std::string tag() const { return "rehome:" + deployment_.name + ":" + t_.name; }

  // Puts the rules in once, or takes them out however often they are there; both safe to repeat. Or fails where one is missing. At the end of the chain,
  // since a rule with this target is the last one that a packet meets: others may want to mark it before.
  std::string script(Side s, Put put) const {
    Address app = Address::parse(t_.on[s].application), gate = Address::parse(t_.on[s].listen);
    std::string all;
    auto rule = [&](const std::string& program, const std::string& on_ip) {
      std::string host = app.host == "localhost" ? (program == "iptables" ? "127.0.0.1" : "::1") : app.host;
      std::string to_whom = everywhere(app) ? "-m addrtype --dst-type LOCAL" : "-d " + host;
      std::string what = " PREROUTING -p tcp --dport " + std::to_string(app.port) + " --syn " + to_whom + " -m mark ! --mark " + std::to_string(kMark) +
                         " -m comment --comment " + shell_quote(tag()) + " -j TPROXY --on-ip " + on_ip + " --on-port " + std::to_string(gate.port);
      std::string table = program + " -w 5 -t mangle ";
      all += put == Put::look  ? table + "-C" + what + "\n"
             : put == Put::add ? table + "-C" + what + " 2>/dev/null || " + table + "-A" + what + "\n"
                               : "for i in 1 2 3 4 5 6; do " + table + "-C" + what + " 2>/dev/null || break; " + table + "-D" + what + "; done\n";
    };
    // A listener of any local address is found at the loopback's; no packet travels there.
    if (!is_ipv6(app) || everywhere(app)) rule("iptables", everywhere(gate) || is_ipv6(gate) ? "127.0.0.1" : gate.host == "localhost" ? "127.0.0.1" : gate.host);
    if (is_ipv6(gate) && (is_ipv6(app) || everywhere(app))) rule("ip6tables", everywhere(gate) ? "::1" : gate.host);
    return all;
  }

  void shell(Site& site, const std::string& script) {
    site.exec_ok({.argv = {"sh", "-ec", script}}, Deadline::in(Millis(60000)), "changing the packet filter");
  }

  std::vector<std::string> rules(Site& site) {
    std::vector<std::string> ours;
    for (const char* program : {"iptables", "ip6tables"}) {
      Outcome o = site.exec({.argv = {program, "-w", "5", "-t", "mangle", "-S", "PREROUTING"}}, Deadline::in(Millis(10000)));
      if (!o.ok()) {
        // Without IPv6 there is nothing of ours in it.
        if (program == std::string("ip6tables")) continue;
        throw Error(Code::unknown, "the packet filter cannot be read: " + std::string(trim(o.err)), "iptables -t mangle -S must work").in(site.label());
      }
      for (const auto& line : split(o.out, '\n'))
        if (line.find(tag() + " ") != std::string::npos || line.find(tag() + "\"") != std::string::npos) ours.push_back(line);
    }
    return ours;
  }

  // Whether a socket of this host listens at the port over IPv6 (state 0A in the kernel's table).
  bool listens_on_ipv6(Site& site, std::uint16_t port) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "%04X", port);
    std::string line = "^ *[0-9]+: [0-9A-F]+:" + std::string(hex) + " [0-9A-F]+:[0-9A-F]+ 0A ";
    Outcome o = site.exec_ok({.argv = {"sh", "-c", "cat /proc/net/tcp6 2>/dev/null | grep -cE '" + line + "' || [ $? = 1 ]"}}, Deadline::in(Millis(10000)), "listing listeners");
    return trim(o.out) != "0";
  }

  const Deployment& deployment_;
  TrafficConfig t_;
};

}  // namespace

std::unique_ptr<Traffic> make_redirect(const Deployment& d, const TrafficConfig& t) { return std::make_unique<RedirectTraffic>(d, t); }

}  // namespace rehome
