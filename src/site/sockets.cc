#include "site/sockets.h"

#include <arpa/inet.h>

#include <charconv>
#include <cstring>
#include <map>

#include "base/text.h"

namespace rehome {
namespace {

// "0100007F" or 32 digits of a v6 address: words of four bytes, each in the host's order.
std::string address_of(const std::string& hex) {
  if (hex.size() != 8 && hex.size() != 32) return {};
  unsigned char bytes[16];
  for (std::size_t word = 0; word < hex.size() / 8; word++) {
    std::uint32_t value = 0;
    const char* from = hex.data() + word * 8;
    if (std::from_chars(from, from + 8, value, 16).ptr != from + 8) return {};
    std::memcpy(bytes + word * 4, &value, 4);
  }
  char text[INET6_ADDRSTRLEN];
  if (!::inet_ntop(hex.size() == 8 ? AF_INET : AF_INET6, bytes, text, sizeof text)) return {};
  std::string out = text;
  return out.starts_with("::ffff:") ? out.substr(7) : out;
}

bool address_and_port(const std::string& field, std::string& address, int& port) {
  auto colon = field.find(':');
  if (colon == std::string::npos) return false;
  address = address_of(field.substr(0, colon));
  const char* from = field.data() + colon + 1;
  return !address.empty() && std::from_chars(from, field.data() + field.size(), port, 16).ec == std::errc();
}

// Prints "inode<TAB>pid<TAB>unit<TAB>arguments" for each process that holds one of the sockets named as arguments.
constexpr char kOwners[] = R"sh(set -f
tests=
for i; do tests="$tests -o -lname socket:[[]$i[]]"; done
set +f
cd /proc || exit 1
find [0-9]*/fd -maxdepth 1 \( -name /none $tests \) -printf '%p %l\n' 2>/dev/null | while read -r path link; do
  pid=${path%%/*} inode=${link#socket:[}
  unit=$(sed -n 's#.*/\([^/]*\.\(service\|scope\)\).*#\1#p' "$pid/cgroup" 2>/dev/null | head -1)
  printf '%s\t%s\t%s\t%s\n' "${inode%]}" "$pid" "$unit" "$(tr '\0\t\n' '   ' <"$pid/cmdline" 2>/dev/null | cut -c1-300)"
done
)sh";

}  // namespace

std::string TcpSocket::owner() const {
  if (pid == 0) return "a process that this account cannot see";
  return program + " (process " + std::to_string(pid) + (unit.empty() ? "" : ", unit " + unit) + ")";
}

std::vector<TcpSocket> parse_proc_net_tcp(const std::string& text) {
  std::vector<TcpSocket> found;
  for (const auto& line : split(text, '\n')) {
    std::vector<std::string> fields;
    for (auto& f : split(line, ' '))
      if (!f.empty()) fields.push_back(std::move(f));
    if (fields.size() < 10 || (fields[3] != "0A" && fields[3] != "01")) continue;
    TcpSocket s;
    s.listening = fields[3] == "0A";
    s.inode = fields[9];
    if (address_and_port(fields[1], s.local, s.local_port) && address_and_port(fields[2], s.remote, s.remote_port)) found.push_back(std::move(s));
  }
  return found;
}

std::vector<TcpSocket> tcp_sockets(Site& site) {
  // tcp6 is missing where the kernel has no IPv6.
  return parse_proc_net_tcp(site.exec_ok({.argv = {"sh", "-c", "cat /proc/net/tcp && { [ ! -e /proc/net/tcp6 ] || cat /proc/net/tcp6; }"}}).out);
}

void name_owners(Site& site, std::vector<TcpSocket>& sockets) {
  if (sockets.empty()) return;
  std::vector<std::string> argv{"sh", "-c", kOwners, "sh"};
  std::map<std::string, std::vector<TcpSocket*>> by_inode;
  for (auto& s : sockets) {
    if (by_inode.size() >= 500 && !by_inode.contains(s.inode)) break;
    if (!by_inode.contains(s.inode)) argv.push_back(s.inode);
    by_inode[s.inode].push_back(&s);
  }
  for (const auto& line : split(site.exec({.argv = argv}).out, '\n')) {
    auto f = split(line, '\t');
    if (f.size() < 4 || !by_inode.contains(f[0])) continue;
    for (TcpSocket* s : by_inode[f[0]]) {
      if (s->pid != 0) continue;
      s->pid = std::atoll(f[1].c_str());
      s->unit = f[2];
      s->arguments = trim(f[3]);
      std::string program = s->arguments.substr(0, s->arguments.find(' '));
      s->program = program.substr(program.rfind('/') + 1);
    }
  }
}

bool same_listener(const TcpSocket& s, const std::string& host, int port) {
  if (!s.listening || s.local_port != port) return false;
  auto any = [](const std::string& a) { return a == "0.0.0.0" || a == "::" || a == "*" || a.empty(); };
  std::string wanted = host == "localhost" ? "127.0.0.1" : host;
  // Every address of IPv4 is no address of IPv6; the other way round it is, where the listener takes both.
  if (s.local == "0.0.0.0" && wanted.find(':') != std::string::npos && wanted != "::") return false;
  return any(s.local) || any(wanted) || s.local == wanted;
}

}  // namespace rehome
