// Who talks to an application and did not come through its gate: connections that were made before the gate stood in the way, and
// whoever knows the application's own port.
#include <cstdio>
#include <set>

#include "base/text.h"
#include "site/sockets.h"
#include "traffic/gates.h"

namespace rehome {
namespace {

// $1 the gate's process, $2 what lines with one of the ports look like. The gate's sockets between two looks at all: one that is in both
// was there when its owner was asked for.
constexpr char kLook[] = R"sh(look() { cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -E "$2" || [ $? = 1 ]; }
look "$@" && echo gate && [ -r "/proc/$1/fd" ] || exit 1
# Sockets that close meanwhile are an error to find.
find "/proc/$1/fd" -lname 'socket:*' -printf '%l\n' 2>/dev/null
[ -d "/proc/$1" ] && echo again && look "$@"
)sh";

using Ends = std::pair<std::string, std::string>;

std::string end(const std::string& host, int port) { return host + " " + std::to_string(port); }

bool is_at(const TcpSocket& s, const Address& application) {
  if (s.listening || s.local_port != application.port) return false;
  const std::string& host = application.host;
  if (host.empty() || host == "*" || host == "0.0.0.0" || host == "::") return true;
  return host == "localhost" ? s.local == "127.0.0.1" || s.local == "::1" : s.local == host;
}

std::int64_t counted(const Deployment& d, Site& site) {
  std::vector<Address> applications;
  std::string ports;
  for (const auto& t : d.traffic) {
    Address a = Address::parse(t.on[site.side()].application);
    if (a.is_unix()) continue;
    applications.push_back(a);
    char hex[8];
    std::snprintf(hex, sizeof hex, "%04X", a.port);
    ports += (ports.empty() ? "" : "|") + std::string(hex);
  }
  if (applications.empty()) return 0;
  std::int64_t gate = get_int(gate_status(site), "pid", 0);
  if (gate <= 0) throw Error(Code::state, "the gate does not say which process it is", "it is older than this program").in(site.label());
  Outcome o = site.exec_ok({.argv = {"sh", "-c", kLook, "sh", std::to_string(gate), ":(" + ports + ") "}}, Deadline::in(Millis(20000)), "listing connections");
  auto first = o.out.find("gate\n"), second = o.out.find("again\n");
  if (first == std::string::npos || second == std::string::npos) throw Error(Code::unknown, "connections cannot be listed").in(site.label());
  std::set<std::string> owned;
  for (const auto& line : split(o.out.substr(first, second - first), '\n'))
    if (line.starts_with("socket:[")) owned.insert(line.substr(8, line.size() - 9));
  std::set<std::pair<std::string, Ends>> before;
  // What the gate has connected, as the application sees it. By both looks: one of its ends may have closed while the second was read.
  // Number 0: closed by whoever had it, and the application has not closed its own end yet.
  std::set<Ends> through;
  auto note_gates = [&](const TcpSocket& s) {
    if (owned.contains(s.inode) || s.inode == "0") through.insert({end(s.remote, s.remote_port), end(s.local, s.local_port)});
  };
  for (const auto& s : parse_proc_net_tcp(o.out.substr(0, first))) {
    before.insert({s.inode, {end(s.local, s.local_port), end(s.remote, s.remote_port)}});
    note_gates(s);
  }
  std::vector<TcpSocket> sockets = parse_proc_net_tcp(o.out.substr(second));
  for (const auto& s : sockets) note_gates(s);
  std::int64_t count = 0;
  for (const auto& s : sockets) {
    Ends ends{end(s.local, s.local_port), end(s.remote, s.remote_port)};
    // Number 0: nobody has accepted it yet, and it may be the gate's.
    if (s.inode == "0" || owned.contains(s.inode) || through.contains(ends) || !before.contains({s.inode, ends})) continue;
    for (const auto& a : applications)
      if (is_at(s, a)) {
        count++;
        break;
      }
  }
  return count;
}

std::string what_becomes_of(std::int64_t count) {
  return (count == 1 ? "1 connection to the application does" : std::to_string(count) + " connections to the application do") +
         " not come through the gate (made before begin, or at the application's own port): " + (count == 1 ? "it is" : "they are") +
         " not held, and a switch ends " + (count == 1 ? "it" : "them") + " with the application, and counts " + (count == 1 ? "it" : "them");
}

}  // namespace

PastGate past_gate(const Deployment& d, Site& site) {
  try {
    std::int64_t count = counted(d, site);
    return {count, count > 0 ? what_becomes_of(count) : std::string()};
  } catch (const Error& e) {
    return {std::nullopt, "connections past the gate are not counted: " + std::string(e.what())};
  }
}

}  // namespace rehome
