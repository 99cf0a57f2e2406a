// New connections to the application's port go to the gate's, by a rule of the packet filter; the application keeps its
// port and knows nothing.
//
// Two rules a chain. The permanent one comes first and goes last: it leads the gate's own connections (to an address of
// the loopback network that nobody else uses) to the application, and keeps connection tracking on, without which
// removing the other one would break every connection that was redirected. The other one redirects, and only what
// starts a connection: a packet of a connection that is older than the tracking must not be taken for a new one.
//
// A limit: on a host where nothing else keeps connection tracking on, the kernel remembers redirected connections for
// two minutes after withdraw(). A prepare() within that time can lose a connection that has the address and port of
// such a one.
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
        Outcome o = site.exec({.argv = {"iptables", "-w", "5", "-t", "nat", "-S"}}, Deadline::in(Millis(10000)));
        if (!o.ok())
          add(Finding::Level::error, "redirect.iptables", "iptables cannot be used: " + std::string(trim(o.err)),
              "install iptables and let the agent run as root, or use take: listen");
        Address app = Address::parse(t_.on[s].application), gate = Address::parse(t_.on[s].listen);
        if (app.host.find(':') != std::string::npos && app.host != "::")
          add(Finding::Level::error, "redirect.ipv6", "the application's address " + app.text() + " is IPv6 only", "use take: listen, or a proxy in front");
        if (!everywhere(gate) && !on_loopback(app))
          add(Finding::Level::error, "redirect.listen", "the gate listens at " + gate.text() + ": redirected connections from outside do not arrive there",
              "let it listen at 0.0.0.0:" + std::to_string(gate.port));
        if (gate.host != "::" && listens_on_ipv6(site, app.port))
          add(Finding::Level::error, "redirect.ipv6", "port " + std::to_string(app.port) + " is served over IPv6 too, and that would pass the gate by",
              "let the gate listen at [::]:" + std::to_string(gate.port) + ", which takes both");
        if (Outcome input = site.exec({.argv = {"iptables", "-w", "5", "-S", "INPUT"}}, Deadline::in(Millis(10000)));
            input.ok() && trim(input.out) != "-P INPUT ACCEPT" && !on_loopback(app))
          add(Finding::Level::warning, "redirect.firewall",
              "this host filters incoming packets, and sees redirected ones at port " + std::to_string(gate.port) + ", not " + std::to_string(app.port),
              "allow port " + std::to_string(gate.port) + " from where port " + std::to_string(app.port) + " is allowed");
      } catch (const Error& e) {
        add(Finding::Level::error, "redirect", e.what(), e.hint);
      }
    }
    return found;
  }

  std::vector<std::string> plan_notes() override {
    auto notes = common_notes(deployment_, t_);
    notes.push_back("connections of before begin stay with the application, and are in nobody's count; they end when it is frozen for good");
    notes.push_back("a connection that clients keep open between requests counts as in flight: behind a proxy that keeps connections, use traffic of kind nginx");
    if (!t_.proxy_protocol) notes.push_back("through the gate, the application sees connections from its own host");
    notes.push_back("after a reboot, or when a firewall loads its rules anew, the redirect is back within two seconds");
    return notes;
  }

  void prepare(TrafficContext& ctx) override {
    BySide<GateSide> sides;
    for (Side s : {Side::source, Side::target})
      sides[s] = {t_.on[s].listen, Address{.host = kOwnWay, .port = Address::parse(t_.on[s].application).port}.text()};
    for (Side s : {Side::target, Side::source}) {
      stop_if_cancelled(ctx);
      Site& site = ctx.at(s);
      ctx.note("packet filter: port " + std::to_string(Address::parse(t_.on[s].application).port) + " goes to the gate",
               {{"where", site.label()}, {"undone_by", "removing the rules with the comment " + tag()}});
      shell(site, permanent(s, Put::add));
    }
    raise_gates(ctx, t_, sides);
    for (Side s : {Side::target, Side::source}) {
      stop_if_cancelled(ctx);
      Site& site = ctx.at(s);
      shell(site, redirecting(s, Put::add));
      // Rules live in the kernel's memory; whoever loads others throws them away.
      std::string keep = "while sleep 2; do {\n" + permanent(s, Put::add) + redirecting(s, Put::add) + "} >/dev/null 2>&1; done\n";
      site.call("child.set", {{"name", "take-" + t_.name}, {"argv", {"sh", "-c", keep}}, {"restart_ms", 1000}});
    }
  }

  void withdraw(TrafficContext& ctx) override {
    at_both(ctx, [&](Side s) {
      Site& site = ctx.at(s);
      site.call("child.drop", {{"name", "take-" + t_.name}});
      if (rules(site).empty()) return;
      shell(site, redirecting(s, Put::remove));
      Deadline deadline = Deadline::in(deployment_.drain_deadline);
      std::uint16_t gate = Address::parse(t_.on[s].listen).port;
      std::int64_t left = 0;
      // Twice nobody: a connection may be between two of the kernel's lists.
      for (int quiet = 0; quiet < 2 && !deadline.passed(); system_clock().sleep(Millis(50))) {
        left = connected(site, gate);
        quiet = left == 0 ? quiet + 1 : 0;
      }
      if (left > 0) ctx.log(site.label() + ": " + std::to_string(left) + " redirected connections did not end in " + human_duration(deployment_.drain_deadline) + "; they are lost now");
      shell(site, permanent(s, Put::remove));
    });
  }

  std::int64_t from_old_address(TrafficContext& ctx, Side old_side) override { return clients_at(ctx.at(old_side), t_.name); }

  std::vector<std::string> leftovers(TrafficContext& ctx) override {
    std::vector<std::string> left;
    for (Side s : {Side::source, Side::target})
      for (const auto& rule : rules(ctx.at(s))) left.push_back(ctx.at(s).label() + ": packet filter: " + rule);
    return left;
  }

 private:
  enum class Put { add, remove };
  static constexpr const char* kListening = "0A";
  static constexpr const char* kOwnWay = "127.77.82.72";

  static bool everywhere(const Address& a) { return a.host.empty() || a.host == "*" || a.host == "0.0.0.0" || a.host == "::"; }
  static bool on_loopback(const Address& a) { return a.host == "localhost" || a.host.starts_with("127."); }
  std::string tag() const { return "rehome:" + deployment_.name + ":" + t_.name; }

  // Present once, or gone: both safe to repeat.
  std::string rule(Put put, const std::string& program, const std::string& chain, const std::string& rest) const {
    std::string table = program + " -w 5 -t nat ", what = chain + " " + rest + " -m comment --comment " + shell_quote(tag());
    // The rule's target comes after its matches.
    auto jump = what.find(" -j ");
    auto comment = what.rfind(" -m comment");
    std::string matches = what.substr(0, jump) + what.substr(comment) + what.substr(jump, comment - jump);
    if (put == Put::add) return table + "-C " + matches + " 2>/dev/null || " + table + "-I " + matches + "\n";
    return "while " + table + "-C " + matches + " 2>/dev/null; do " + table + "-D " + matches + "; done\n";
  }

  std::string permanent(Side s, Put put) const {
    Address app = Address::parse(t_.on[s].application), gate = Address::parse(t_.on[s].listen);
    std::string port = std::to_string(app.port), to = (everywhere(app) || app.host == "localhost" ? "127.0.0.1" : app.host) + ":" + port, script;
    for (const char* chain : {"OUTPUT", "PREROUTING"})
      script += rule(put, "iptables", chain, "-p tcp -d " + std::string(kOwnWay) + " --dport " + port + " -j DNAT --to-destination " + to);
    if (gate.host == "::")
      for (const char* chain : {"OUTPUT", "PREROUTING"})
        // 100::/64 is the network for packets to be thrown away.
        script += rule(put, "ip6tables", chain, "-p tcp -d 100::5248 --dport " + port + " -j DNAT --to-destination [::1]:" + port);
    return script;
  }

  std::string redirecting(Side s, Put put) const {
    Address app = Address::parse(t_.on[s].application), gate = Address::parse(t_.on[s].listen);
    std::string port = std::to_string(app.port), to = " -j REDIRECT --to-ports " + std::to_string(gate.port), script;
    std::string where = everywhere(app) ? "-m addrtype --dst-type LOCAL" : "-d " + (app.host == "localhost" ? std::string("127.0.0.1") : app.host);
    if (everywhere(app)) {
      script += rule(put, "iptables", "OUTPUT", "-p tcp ! -d " + std::string(kOwnWay) + " --dport " + port + " --syn " + where + to);
    } else {
      script += rule(put, "iptables", "OUTPUT", "-p tcp " + where + " --dport " + port + " --syn" + to);
    }
    if (!on_loopback(app)) script += rule(put, "iptables", "PREROUTING", "-p tcp " + where + " --dport " + port + " --syn" + to);
    if (gate.host == "::")
      for (const char* chain : {"OUTPUT", "PREROUTING"})
        script += rule(put, "ip6tables", chain, "-p tcp --dport " + port + " --syn -m addrtype --dst-type LOCAL" + to);
    return script;
  }

  void shell(Site& site, const std::string& script) {
    site.exec_ok({.argv = {"sh", "-ec", script}}, Deadline::in(Millis(30000)), "changing the packet filter");
  }

  std::vector<std::string> rules(Site& site) {
    std::vector<std::string> ours;
    for (const char* program : {"iptables", "ip6tables"}) {
      Outcome o = site.exec({.argv = {program, "-w", "5", "-t", "nat", "-S"}}, Deadline::in(Millis(10000)));
      if (!o.ok()) {
        // Without IPv6 there is nothing of ours in it.
        if (program == std::string("ip6tables")) continue;
        throw Error(Code::unknown, "the packet filter cannot be read: " + std::string(trim(o.err)), "iptables -t nat -S must work").in(site.label());
      }
      for (const auto& line : split(o.out, '\n'))
        if (line.find(tag() + " ") != std::string::npos || line.find(tag() + "\"") != std::string::npos) ours.push_back(line);
    }
    return ours;
  }

  // How many TCP sockets of this host at a local port are in one of these states (hexadecimal, as /proc has them).
  // Counted there: a busy host has tens of thousands in TIME_WAIT.
  std::int64_t sockets(Site& site, std::uint16_t port, const std::string& in_states, const std::string& tables) {
    char hex[8];
    std::snprintf(hex, sizeof hex, "%04X", port);
    std::string line = "^ *[0-9]+: [0-9A-F]+:" + std::string(hex) + " [0-9A-F]+:[0-9A-F]+ (" + in_states + ") ";
    // ss asks the kernel for what it wants; /proc, where there is no ss, takes seconds on a busy host.
    if (in_states != kListening) {
      std::string ss = "ss -Htan state connected exclude time-wait 'sport = :" + std::to_string(port) + "'";
      Outcome o = site.exec({.argv = {"sh", "-c", ss}}, Deadline::in(Millis(10000)));
      if (o.ok()) return trim(o.out).empty() ? 0 : static_cast<std::int64_t>(split(trim(o.out), '\n').size());
    }
    Outcome o = site.exec_ok({.argv = {"sh", "-c", "cat " + tables + " 2>/dev/null | grep -cE '" + line + "' || [ $? = 1 ]"}}, Deadline::in(Millis(10000)), "counting connections");
    return std::stoll("0" + std::string(trim(o.out)));
  }

  // Connections that still need their translation: all but listeners and TIME_WAIT. The gate's own count is not enough: a
  // client may be in the listener's queue, or have yet to be sent what the gate has written.
  std::int64_t connected(Site& site, std::uint16_t port) {
    return sockets(site, port, "01|02|03|04|05|07|08|09|0B|0C", "/proc/net/tcp /proc/net/tcp6");
  }

  bool listens_on_ipv6(Site& site, std::uint16_t port) { return sockets(site, port, kListening, "/proc/net/tcp6") > 0; }

  const Deployment& deployment_;
  TrafficConfig t_;
};

}  // namespace

std::unique_ptr<Traffic> make_redirect(const Deployment& d, const TrafficConfig& t) { return std::make_unique<RedirectTraffic>(d, t); }

}  // namespace rehome
