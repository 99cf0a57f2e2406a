#include "stores/postgres/clients.h"

#include <algorithm>
#include <set>

#include "base/text.h"
#include "site/sockets.h"

namespace rehome {
namespace {

// Prints "unit<TAB>file<TAB>word" for each systemd unit whose Environment, EnvironmentFile's content or ExecStart holds one of
// the words given as arguments, as a whole word. Files are read here and nothing else of them is printed.
constexpr char kUnits[] = R"sh(for d in /etc/systemd/system /run/systemd/system /usr/local/lib/systemd/system /usr/lib/systemd/system /lib/systemd/system; do
  [ -d "$d" ] || continue
  find "$d" -maxdepth 2 \( -path '*.service' -o -path '*.service.d/*.conf' \) -type f 2>/dev/null
done | while read -r file; do
  unit=${file##*/}
  case $file in *.service.d/*) unit=${file%/*}; unit=${unit##*/}; unit=${unit%.d} ;; esac
  for word; do
    # A dash or dot beside it makes another name of it.
    pattern="(^|[^A-Za-z0-9.-])$(printf '%s' "$word" | sed 's/[.[\*^$]/\\&/g')([^A-Za-z0-9.-]|\$)"
    if grep -E '^(Environment|Exec[A-Za-z]*)=' "$file" 2>/dev/null | grep -qE "$pattern"; then
      printf '%s\t%s\t%s\n' "$unit" "$file" "$word"
    fi
    sed -n 's/^EnvironmentFile=-\{0,1\}//p' "$file" 2>/dev/null | while read -r env; do
      for e in $env; do
        [ -f "$e" ] && grep -vE '^[[:space:]]*[#;]' "$e" 2>/dev/null | grep -qE "$pattern" && printf '%s\t%s\t%s\n' "$unit" "$e" "$word"
      done
    done
  done
done
)sh";

bool loopback(const std::string& address) { return address == "::1" || address.starts_with("127."); }

std::string host_of(const std::string& ssh) { return ssh.substr(ssh.rfind('@') + 1); }

}  // namespace

std::vector<Finding> clients_of_source(StoreContext& c, const std::string& store, const PostgresServer& source) {
  std::vector<Finding> found;
  const auto& sites = c.deployment.site;
  if (sites.source.local && sites.target.local) return found;
  // Where the server listens for others: its host's addresses, and the names by which a person calls it.
  std::set<std::string> addresses, words;
  for (const auto& word : split(std::string(trim(c.source.exec({.argv = {"hostname", "-I"}}).out)), ' '))
    if (!word.empty() && !loopback(word)) addresses.insert(word);
  words = addresses;
  for (const std::string& name : {std::string(trim(c.source.exec({.argv = {"hostname"}}).out)), sites.source.local ? std::string() : host_of(sites.source.ssh.host),
                                  source.host.starts_with('/') ? std::string() : source.host})
    if (!name.empty() && name != "localhost" && !loopback(name)) words.insert(name);
  if (!source.host.starts_with('/') && !loopback(source.host) && source.host != "localhost") addresses.insert(source.host);

  std::vector<TcpSocket> talking;
  for (auto& s : tcp_sockets(c.target))
    if (!s.listening && s.remote_port == source.port && addresses.contains(s.remote)) talking.push_back(std::move(s));
  name_owners(c.target, talking);
  std::set<std::string> owners;
  for (const auto& s : talking)
    if (!s.program.starts_with("rehome")) owners.insert(s.owner());
  for (const auto& owner : owners)
    found.push_back({Finding::Level::warning, "postgres.client_on_target", store + ": target", owner + " is connected to the source's server from there",
                     "after a switch the source refuses its writes: point it at the target's own server, or stop it"});

  std::vector<std::string> argv{"sh", "-c", kUnits, "sh"};
  argv.insert(argv.end(), words.begin(), words.end());
  std::set<std::string> units;
  for (const auto& line : split(c.target.exec({.argv = argv}).out, '\n')) {
    auto f = split(line, '\t');
    if (f.size() < 3 || f[0].starts_with("rehome-") || !units.insert(f[0]).second) continue;
    found.push_back({Finding::Level::warning, "postgres.unit_on_target", store + ": target: unit " + f[0], f[1] + " names the source (" + f[2] + ")",
                     "let it use the target's own server before the switch (if this is about another thing than the database, nothing is to be done)"});
  }
  return found;
}

}  // namespace rehome
