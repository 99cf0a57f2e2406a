#include "config/config.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <map>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// The least that is a deployment, and what follows it.
const std::string kHead =
    "name: shop\n"
    "source: {ssh: root@old}\n"
    "target: local\n";
const std::string kStores =
    "stores:\n"
    "  - name: f\n"
    "    files: {path: /srv/f}\n";
const std::string kDb =
    "stores:\n"
    "  - name: db\n"
    "    postgres: {databases: [shop, shop2]}\n";

std::vector<std::string> problems_of(const std::string& text) {
  std::vector<ConfigProblem> problems;
  read_deployment("t.yaml", text, problems);
  std::vector<std::string> out;
  for (const auto& p : problems)
    out.push_back(std::to_string(p.line) + ":" + std::to_string(p.column) + ": " + p.message + (p.meant.empty() ? "" : " -> " + p.meant));
  return out;
}

Deployment good(const std::string& text) {
  std::vector<ConfigProblem> problems;
  Deployment d = read_deployment("t.yaml", text, problems);
  for (const auto& p : problems) ADD_FAILURE() << p.line << ":" << p.column << ": " << p.message << " -> " << p.meant << "\n" << text;
  return d;
}

// The address, host and path of a check, and the PROXY header's version.
std::string asked(const Deployment& d, const CheckConfig& check, Side side, bool past_gate = false) {
  HttpPlace p = http_place(d, check, side, past_gate);
  return p.address + " " + p.host + p.path + (p.proxy_protocol ? " v" + std::to_string(p.proxy_protocol) : "");
}

TEST(Config, TheExampleOfTheManualIsRead) {
  Deployment d;
  try {
    d = load_deployment(REHOME_DOCS "/example.yaml");
  } catch (const Error& e) {
    FAIL() << e.what();
  }
  EXPECT_EQ(d.name, "shop");
  EXPECT_FALSE(d.site.source.local);
  EXPECT_TRUE(d.site.target.local);
  EXPECT_EQ(d.link.initiator, Side::target);
  EXPECT_EQ(d.link.ssh.host, "root@old.example.net");
  EXPECT_EQ(d.link.ssh.key, "/root/.ssh/rehome_ed25519");
  ASSERT_EQ(d.stores.size(), 2u);
  EXPECT_EQ(d.stores[0].postgres.server.target.port, 5433);
  EXPECT_EQ(d.stores[0].postgres.server.source.os_user, "postgres");
  EXPECT_EQ(d.stores[1].files.exclude, (std::vector<std::string>{"/cache/", "*.tmp"}));
  EXPECT_EQ(asked(d, d.checks[0], Side::target), "127.0.0.1:80 127.0.0.1/health");
  EXPECT_EQ(asked(d, d.checks[0], Side::target, true), "127.0.0.1:8000 127.0.0.1/health");
  EXPECT_TRUE(d.checks[0].canary);
  EXPECT_TRUE(d.checks[1].write_canary);
  EXPECT_EQ(d.max_pause, Millis(500));
  EXPECT_EQ(d.limits.wal_kept, 20'000'000'000);
}

// Each of them is put where its section says, into a file that has what it refers to.
TEST(Config, EveryExampleOfTheManualIsRead) {
  const std::map<std::string, std::string> rest{
      {"stores", "stores:\n- {name: db, postgres: {databases: [shop]}}\n"},
      {"traffic", "traffic:\n- {name: web, gate: {application: \"127.0.0.1:80\", listen: \"127.0.0.1:81\", front: \"http://127.0.0.1/\"}}\n"}};
  std::string section, block;
  bool inside = false;
  int read = 0;
  for (const auto& line : split(read_file(REHOME_DOCS "/CONFIG.md"), '\n')) {
    if (line.starts_with("## ")) section = line.substr(3);
    if (line.starts_with("```")) {
      EXPECT_EQ(line, inside ? "```" : "```yaml");
      inside = !inside;
      if (inside) continue;
      std::string list(trim(section));
      std::erase(list, '`');
      if (block.starts_with("postgres:")) {
        std::string indented;
        for (const auto& l : split(block, '\n')) indented += "  " + l + "\n";
        block = "stores:\n- name: d\n" + indented;
      } else if (block.starts_with("- ")) {
        block = list + ":\n" + block;
      }
      std::string text = block;
      for (const auto& [key, value] : rest)
        if (!("\n" + block).starts_with("\n" + key + ":") && !block.starts_with("name:")) text += value;
      if (!text.starts_with("name:")) text = (block.starts_with("source:") ? "name: shop\n" : kHead) + text;
      good(text);
      read++;
      block.clear();
    } else if (inside) {
      block += line + "\n";
    }
  }
  EXPECT_GE(read, 10);
}

TEST(Config, TheHashIsSha256OfTheFile) {
  std::vector<ConfigProblem> problems;
  EXPECT_EQ(read_deployment("t.yaml", "abc", problems).hash, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

// Every member of Deployment, from a file.
TEST(Config, EverythingCanBeSaid) {
  Deployment d = good(read_file(REHOME_CONFIG_TESTDATA "/everything.yaml"));
  EXPECT_EQ(d.site.source.ssh.port, 2222);
  EXPECT_EQ(d.site.source.ssh.key, "/k/id");
  EXPECT_EQ(d.site.source.ssh.options, std::vector<std::string>{"Compression=no"});
  EXPECT_EQ(d.site.source.state, "/var/s");
  EXPECT_EQ(d.site.source.boot, "cron");
  EXPECT_EQ(d.site.source.psql, "/opt/pg/bin/psql");
  EXPECT_EQ(d.site.target.boot, "directory:/etc/boot.d");
  EXPECT_EQ(d.link.initiator, Side::source);
  EXPECT_EQ(d.link.ssh.host, "admin@new");
  EXPECT_EQ(d.link.ssh.port, 2022);
  EXPECT_EQ(d.link.ssh.options.size(), 1u);
  const PostgresConfig& p = d.stores[0].postgres;
  EXPECT_TRUE(p.databases.empty());
  EXPECT_EQ(p.server.source.host, "10.0.0.1");
  EXPECT_EQ(p.server.source.port, 6000);
  EXPECT_EQ(p.server.source.password.from, SecretRef::From::environment);
  EXPECT_EQ(p.server.source.password.name, "OLD");
  EXPECT_EQ(p.server.source.admin_database, "adm");
  EXPECT_EQ(p.server.target.host, "/run/pg");
  EXPECT_EQ(p.server.target.os_user, "pg");
  EXPECT_EQ(p.server.target.user, "v");
  EXPECT_EQ(p.server.target.password.from, SecretRef::From::pgpass);
  EXPECT_EQ(p.server.target.admin_database, "adm2");
  EXPECT_EQ(p.ddl, PostgresConfig::Ddl::block);
  EXPECT_FALSE(p.roles);
  const FilesConfig& f = d.stores[1].files;
  EXPECT_EQ(f.path.source, "/srv/a");
  EXPECT_EQ(f.path.target, "/srv/b");
  EXPECT_EQ(f.exclude.size(), 2u);
  EXPECT_FALSE(f.owner_by_name);
  EXPECT_EQ(d.services[0].runtime, ServiceConfig::Runtime::systemd);
  EXPECT_EQ(d.services[0].on.source.unit, "w.service");
  EXPECT_EQ(d.services[0].on.target.unit, "w2.service");
  EXPECT_FALSE(d.services[0].warm);
  EXPECT_EQ(d.services[0].start_timeout, Millis(60000));
  EXPECT_EQ(d.services[1].runtime, ServiceConfig::Runtime::command);
  EXPECT_EQ(d.services[1].on.source.start, (std::vector<std::string>{"/bin/s", "-x"}));
  EXPECT_EQ(d.services[1].on.target.pid_file, "/run/c2.pid");
  const TrafficConfig& g = d.traffic[0];
  EXPECT_EQ(g.on.source.application, "unix:/run/app.sock");
  EXPECT_EQ(g.on.target.application, "[::1]:90");
  EXPECT_EQ(g.on.target.listen, "0.0.0.0:80");
  EXPECT_EQ(g.proxy_protocol, 1);
  EXPECT_FALSE(g.accept_proxy);
  EXPECT_TRUE(g.refuse_with_503);
  EXPECT_EQ(g.max_waiting, 5);
  EXPECT_EQ(g.max_wait, Millis(2000));
  EXPECT_EQ(g.longer_requests, TrafficConfig::Longer::cut);
  EXPECT_EQ(d.traffic[1].take, TrafficConfig::Take::redirect);
  EXPECT_EQ(d.traffic[1].proxy_protocol, 2);
  EXPECT_TRUE(d.traffic[1].accept_proxy);
  EXPECT_FALSE(d.traffic[1].refuse_with_503);
  EXPECT_EQ(d.traffic[2].take, TrafficConfig::Take::unix_socket);
  EXPECT_EQ(d.traffic[3].kind, TrafficConfig::Kind::nginx);
  EXPECT_EQ(d.traffic[3].on.source.files.size(), 2u);
  EXPECT_EQ(d.traffic[3].on.target.nginx, "/opt/nginx");
  EXPECT_EQ(d.traffic[3].on.target.nginx_conf, "/n/nginx.conf");
  EXPECT_EQ(d.traffic[3].on.target.listen, "127.0.0.1:2");
  EXPECT_EQ(d.checks[0].status, 204);
  EXPECT_TRUE(d.checks[0].canary && d.checks[0].write_canary);
  EXPECT_EQ(d.checks[0].where, CheckConfig::Where::target);
  EXPECT_EQ(d.checks[0].timeout, Millis(1000));
  EXPECT_EQ(asked(d, d.checks[1], Side::source), "a:80 a/ping");
  EXPECT_EQ(asked(d, d.checks[1], Side::target), "b:8 b:8/ping");
  EXPECT_EQ(d.checks[2].kind, CheckConfig::Kind::sql);
  EXPECT_EQ(d.checks[2].expect, "1");
  EXPECT_EQ(d.checks[3].command.size(), 2u);
  EXPECT_EQ(d.limits.wal_kept, 1073741824);
  EXPECT_EQ(d.limits.bandwidth, 1000000);
  EXPECT_EQ(d.store_bandwidth(), 1000000 / static_cast<std::int64_t>(d.stores.size()));
  EXPECT_EQ(d.limits.jobs, 2);
}

TEST(Config, DefaultsAreThoseOfADistribution) {
  Deployment d = good(kHead + kDb);
  const PostgresServer& s = d.stores[0].postgres.server.source;
  EXPECT_EQ(s.host, "/run/postgresql");
  EXPECT_EQ(s.os_user, "postgres");
  EXPECT_EQ(d.link.initiator, Side::target);
  EXPECT_EQ(d.link.ssh.host, "root@old");
  Deployment other_way = good("name: a\nsource: local\ntarget: {ssh: new}\n" + kStores);
  EXPECT_EQ(other_way.link.initiator, Side::source);
  EXPECT_EQ(other_way.link.ssh.host, "new");
  Deployment with_password = good(kHead + "stores: [{name: d, postgres: {databases: all, password: {env: P}}}]\n");
  EXPECT_EQ(with_password.stores[0].postgres.server.target.os_user, "");
}

TEST(Config, AnIpv6AddressOfAServerMayStandInBrackets) {
  auto host = [](const std::string& text) { return good(kHead + "stores: [{name: d, postgres: {databases: all, host: \"" + text + "\", password: {env: P}}}]\n").stores[0].postgres.server.source.host; };
  EXPECT_EQ(host("::1"), "::1");
  EXPECT_EQ(host("[::1]"), "::1");
  EXPECT_EQ(host("[2001:db8::7]"), "2001:db8::7");
}

TEST(Config, ACanaryGoesToTheApplicationThatItsUrlNames) {
  Deployment d = good(kHead + kStores + R"(traffic:
  - {name: shop, nginx: {files: [/n], application: "127.0.0.1:8000", gate: "127.0.0.1:8001", front: "http://shop.example/health"}, proxy_protocol: true}
  - {name: api, gate: {listen: "0.0.0.0:9000", application: "[::1]:9001", target: {application: "127.0.0.1:9101"}}, proxy_protocol: v2}
  - {name: bare, gate: {listen: "127.0.0.1:7001", application: "0.0.0.0:7000", take: redirect}, proxy_protocol: v1}
checks:
  - {name: path, http: "/ready?x=1", canary: read}
  - {name: front, http: "http://shop.example/a#b", canary: read}
  - {name: application, http: "http://localhost:8000", canary: read}
  - {name: second, http: "http://127.0.0.1:9000/a", canary: read}
  - {name: second-itself, http: "http://127.0.0.1:9101?q"}
  - {name: other, http: "http://127.0.0.1:5000/a", canary: read}
  - {name: redirected, http: "http://127.0.0.1:7000/"}
  - {name: v6, http: "http://[::1]/", canary: read}
)");
  auto at = [&](std::size_t i, bool past_gate, Side side = Side::target) { return asked(d, d.checks[i], side, past_gate); };
  EXPECT_EQ(at(0, true), "127.0.0.1:8000 shop.example/ready?x=1 v1");
  EXPECT_EQ(at(0, false), "shop.example:80 shop.example/ready?x=1");
  EXPECT_EQ(at(1, true), "127.0.0.1:8000 shop.example/a v1");
  EXPECT_EQ(at(2, true), "127.0.0.1:8000 localhost:8000/ v1");
  EXPECT_EQ(at(2, false), "localhost:8000 localhost:8000/ v1");
  EXPECT_EQ(at(3, true), "127.0.0.1:9101 127.0.0.1:9000/a v2");
  EXPECT_EQ(at(3, true, Side::source), "[::1]:9001 127.0.0.1:9000/a v2");
  EXPECT_EQ(at(3, false), "127.0.0.1:9000 127.0.0.1:9000/a");
  EXPECT_EQ(at(4, false), "127.0.0.1:9101 127.0.0.1:9101/?q v2");
  EXPECT_EQ(at(5, true), "127.0.0.1:5000 127.0.0.1:5000/a");
  EXPECT_EQ(at(6, false), "127.0.0.1:7000 127.0.0.1:7000/");
  EXPECT_EQ(at(7, true), "[::1]:80 [::1]/");
}

TEST(Config, AnAnswerNeedNotBeExpected) {
  Deployment d = good(kHead + kDb + "checks:\n  - {name: a, sql: select 1, store: db, database: shop}\n  - {name: b, sql: select 1, store: db, database: shop, expect: \"\"}\n");
  EXPECT_FALSE(d.checks[0].expect);
  EXPECT_EQ(d.checks[1].expect, "");
}

TEST(Config, ColdServicesHaveATimeThatIsAdded) {
  const std::string services = "services:\n  - {name: a, systemd: a.service, warm: false}\n  - {name: b, systemd: b.service}\n  - {name: c, systemd: c.service, warm: false, start_time: 300ms}\n";
  Deployment d = good(kHead + kStores + services + "max_pause: 3s\n");
  EXPECT_EQ(cold_start_time(d), Millis(2300));
  ASSERT_EQ(cold_starts(d).size(), 2u);
  EXPECT_EQ(cold_starts(d)[1], "c is not warm: it starts inside the pause, after the decision, for about 300 ms (start_time)");
  EXPECT_EQ(problems_of(kHead + kStores + services),
            std::vector<std::string>{"7:1: the services that are not warm take 2.3 s (start_time) to start inside the pause, and max_pause is 1.0 s: no switch would be tried"});
  EXPECT_EQ(problems_of(kHead + kStores + "services:\n  - {name: a, systemd: a.service, start_time: 1s}\n"),
            std::vector<std::string>{"8:35: 'start_time' has no effect: a warm service starts before the pause; it belongs to warm: false"});
}

struct Broken {
  std::string text;
  std::vector<std::string> problems;
};

TEST(Config, EveryMistakeIsToldWithItsPlace) {
  const std::vector<Broken> all = {
      {"", {"1:1: the file is empty"}},
      {"- a\n", {"1:1: the file must be a mapping (key: value), not a list"}},
      {"{}\n", {"1:1: the file needs 'name'", "1:1: the file needs 'source'", "1:1: the file needs 'target'", "1:1: the file needs 'stores'"}},
      {kHead + kStores + "services:\n  - {name: t, systemd: shop.target}\n",
       {"8:24: systemd must be a unit that has processes, a .service, .slice or .scope: 'shop.target' has none that could be frozen"}},
      {"name: a\nsource: {ssh: a, state: \"/var/my state\"}\ntarget: {local: true, state: /var/100%}\n" + kStores,
       {"2:25: state must be a path without blanks, quotes, \\, % and $: units and crontabs name it", "3:30: state must be a path without blanks, quotes, \\, % and $: units and crontabs name it"}},
      {kHead + kStores + "traffic:\n  - {name: a, gate: {application: \"127.0.0.1:80\", listen: \"127.0.0.1:81\"}}\n  - {name: b, gate: {application: \"127.0.0.1:82\", listen: \"localhost:81\", target: {listen: \"[::1]:81\"}}}\n",
       {"9:15: the gates of 'a' and 'b' both listen at localhost:81 on the source; each needs an address of its own"}},
      {kHead + "stores:\n  - name: f\n\tfiles: {path: /srv}\n", {"6:1: a tab in the indentation; YAML wants spaces"}},
      {kHead + "stores: [\n", {"5:1: not YAML: end of sequence flow not found"}},
      {kHead + kStores + "max_pause: \"500ms\n", {"7:12: not YAML: this quote is never closed"}},
      {kHead + "stores:\n  - name: 'it\n    files: {path: /a}\n", {"5:11: not YAML: this quote is never closed"}},
      {kHead + kStores + "a: b: c\n", {"7:5: not YAML: illegal map value"}},
      {kHead + kStores + "---\nname: b\n", {"8:1: a second document; one file describes one deployment"}},
      {kHead + "stores:\n  - {name: \xff}\n", {"5:12: this is not text: a byte that is not UTF-8, or a control character"}},
      {kHead + kStores + "trafic: []\nmax_pase: 1s\n", {"7:1: unknown key 'trafic' in the file -> traffic", "8:1: unknown key 'max_pase' in the file -> max_pause"}},
      {kHead + kStores + "zebra: 1\n",
       {"7:1: unknown key 'zebra' in the file; known: checks, drain_deadline, limits, link, max_pause, name, services, source, stores, target, traffic"}},
      {kHead + kStores + "target: local\n", {"7:1: 'target' is written twice in the file; the first is in line 3"}},
      {kHead + "stores:\n  - name: f\n    files: {path: /a}\n  - name: f\n    files: {path: /b}\n", {"7:11: two stores are called 'f'; the first is in line 5"}},
      {kHead + "stores: []\n", {"4:9: stores is an empty list; there would be nothing to move"}},
      {kHead + "stores:\n", {"4:1: 'stores' has no value"}},
      {"name: My Shop\nsource: {ssh: a}\ntarget: local\n" + kStores,
       {"1:7: name must be 1 to 32 of a-z, 0-9, _ and -, and start with a letter or digit, not 'My Shop' -> my-shop"}},
      {"name: 2026\nsource: {ssh: a}\ntarget: local\n" + kStores, {"1:7: name must be text, not the number 2026 -> \"2026\""}},
      {"name: a\nsource: root@old\ntarget: locl\n" + kStores,
       {"2:9: source must be local or {ssh: user@host}, not 'root@old' -> {ssh: root@old}", "3:9: target must be local or {ssh: user@host}, not 'locl' -> local"}},
      {"name: a\nsource: {ssh: \"old:2222\", port: 70000, key: id, options: [Compression]}\ntarget: {key: /k, local: true}\n" + kStores,
       {"2:15: ssh takes no port; write it as a key of its own -> old, port: 2222", "2:33: port must be a whole number from 1 to 65535, not the number 70000",
        "2:45: key must be an absolute path, not 'id' -> /id", "2:59: each of options must be Name=value, as after ssh -o, not 'Compression'",
        "3:10: 'key' belongs to a site with 'ssh'"}},
      {"name: a\nsource: {ssh: -oProxyCommand=x}\ntarget: {local: true, boot: sysvinit, state: rel/ative}\n" + kStores,
       {"2:15: ssh must be a host or user@host, as ssh takes it, not '-oProxyCommand=x'", "3:29: boot must be systemd, cron, none or directory:/path, not 'sysvinit'",
        "3:46: state must be an absolute path, not 'rel/ative' -> /rel/ative"}},
      {"name: a\nsource: {ssh: a}\ntarget: {ssh: b}\n" + kStores,
       {"1:1: both sites are remote, so 'link' must say which one reaches the other, and how -> link: {from: target, to: a, key: /root/.ssh/id_ed25519}"}},
      {kHead + "link: {from: source}\n" + kStores, {"4:7: link needs 'to': the target is local here, so how the other site reaches it is not known"}},
      {kHead + "stores:\n  - name: f\n    files: {path: srv/f, exclude: \"*.tmp\", owner: nam}\n",
       {"6:19: path must be an absolute path, not 'srv/f' -> /srv/f", "6:35: exclude must be a list, not '*.tmp' -> [*.tmp]", "6:51: owner must be name or number, not 'nam' -> name"}},
      {kHead + "stores:\n  - name: f\n    files: {source: /a}\n  - name: g\n    files: {path: /a/../b, merge: true}\n  - name: h\n    file: {path: /}\n",
       {"6:12: files needs 'target' or 'path' too", "8:19: path must not contain '..' as a part of the path",
        "8:35: merging into a directory that has files is not supported; the target must be empty", "10:5: unknown key 'file' in a store -> files"}},
      {kHead + "stores:\n  - {name: a, files: {path: /srv}}\n  - {name: b, files: {path: /srv/b}}\n", {"4:1: stores 'a' and 'b' overlap on the source: '/srv' and '/srv/b'"}},
      {kHead + "stores:\n  - {name: a, files: {path: /a}, postgres: {databases: all}}\n  - {name: b}\n",
       {"5:34: a store has both 'files' and 'postgres'; one of them is one too many", "6:5: a store needs one of files or postgres"}},
      {kHead + "stores:\n  - name: db\n    postgres:\n      databases: shop\n      password: hunter2\n      source: {password: \"hunter3\"}\n      target: {password: {evn: X}}\n",
       {"7:18: databases must be all or a list, not 'shop' -> [shop]", "8:17: a password must not stand in this file -> {env: NAME}, {file: /path} or pgpass",
        "9:26: a password must not stand in this file -> {env: NAME}, {file: /path} or pgpass", "10:27: unknown key 'evn' in password -> env"}},
      {kHead + "stores:\n  - name: db\n    postgres: {databases: [shop, shop, template1], host: \"db:5432\", port: \"5432\", ddl: allow, roles: yes}\n",
       {"6:34: database 'shop' is listed twice", "6:40: 'template1' belongs to the server and is not moved", "6:58: host takes no port; write it as a key of its own -> db, port: 5432",
        "6:75: port must be a whole number from 1 to 65535, without quotes -> 5432", "6:88: ddl must be refuse or block, not 'allow'", "6:102: roles must be true or false, not 'yes' -> true"}},
      {kHead + "stores:\n  - name: db\n    postgres: {databases: all, host: \"[::1]:5433\"}\n", {"6:38: host takes no port; write it as a key of its own -> ::1, port: 5433"}},
      {kHead + "stores:\n  - name: db\n    postgres: {databases: all, host: \"postgres://u:p@h/d\", os_user: x}\n",
       {"6:38: host must be a host name, an address or a socket directory, no connection string -> the keys host, port, user and password"}},
      {kHead + "stores:\n  - name: db\n    postgres: {databases: all, host: h, os_user: x}\n",
       {"6:15: os_user needs a socket directory as host on the source: peer authentication works through a unix socket only",
        "6:15: os_user needs a socket directory as host on the target: peer authentication works through a unix socket only"}},
      {kHead + kStores + "services:\n  - {name: w, systemd: shop}\n  - {name: c, command: {start: run it, stop: [x], pid_file: c.pid}}\n  - {name: n, warm: 1}\n",
       {"8:24: systemd must be the full name of a unit, not 'shop' -> shop.service", "9:32: start must be a list of words: no shell reads it -> [run, it]",
        "9:61: pid_file must be an absolute path, not 'c.pid' -> /c.pid", "10:5: a service needs one of systemd or command", "10:21: warm must be true or false, not the number 1 -> true"}},
      {kHead + kStores + "services:\n  - {name: c, command: {start: [a, --password=x], stop: [b], pid_file: /p}, start_timeout: 30}\n  - {name: d, systemd: d.service, target: {command: {start: [a], stop: [b], pid_file: /p}}}\n",
       {"8:36: a word of start carries a secret; anybody could read it here and in the list of processes -> a file with mode 0600 that the program reads",
        "8:92: start_timeout is a duration and needs a unit (ms, s, min, h) -> 30s or 30ms", "9:44: a service is run by systemd on both sites or by commands on both"}},
      {kHead + kStores + "traffic:\n  - name: w\n    nginx: {files: [a.conf], application: 8000, gate: \"127.0.0.1:8001\", front: 127.0.0.1/health}\n",
       {"9:21: each of files must be an absolute path, not 'a.conf' -> /a.conf", "9:43: application must be host:port or unix:/path, not the number 8000 -> 127.0.0.1:8000",
        "9:80: front must be a URL that starts with http://, not '127.0.0.1/health' -> http://127.0.0.1/health"}},
      {kHead + kStores + "traffic:\n  - {name: w, nginx: {gate: \"a:1\", application: \"a:1\"}, max_waiting: 0, longer_requests: cutt, proxy_protocol: v3, accept_proxy: true, refuse_with: 404}\n  - {name: g, gate: {listen: \"a:2\", take: unix_socket}}\n",
       {"8:22: nginx needs 'files' on the source: the configuration files that name the application", "8:22: 'gate' and 'application' are one address on the source: a:1",
        "8:22: nginx needs 'files' on the target: the configuration files that name the application", "8:22: 'gate' and 'application' are one address on the target: a:1",
        "8:70: max_waiting must be a whole number from 1 to 1000000, not the number 0", "8:90: longer_requests must be back_out or cut, not 'cutt' -> cut",
        "8:112: proxy_protocol must be true, false, v1 or v2, not 'v3' -> v1",
        "8:116: 'accept_proxy' belongs to traffic of kind gate; nginx does not send a PROXY header to an application",
        "8:149: refuse_with must be http_503 or close, not the number 404",
        "9:21: gate needs 'application' on the source: where the application listens", "9:21: take: unix_socket needs unix: addresses as 'listen' and 'application' on the source",
        "9:21: gate needs 'application' on the target: where the application listens", "9:21: take: unix_socket needs unix: addresses as 'listen' and 'application' on the target"}},
      {kHead + kDb + "checks:\n  - {name: a, http: /x}\n  - {name: b, http: \"http://u:p@h/\"}\n  - {name: c, sql: select 1, store: bd, database: shop}\n  - {name: d, sql: select 1, store: db}\n"
                     "  - {name: e, sql: select 1, store: db, database: shp}\n  - {name: f, command: [x], status: 200, canary: writes}\n  - {name: f, http: \"http://h\", canary: read, where: source}\n",
       {"8:21: http is only a path, and no traffic entry has a 'front' to ask it at -> http://127.0.0.1/x", "9:21: http carries a user or a password in the URL; this file is no place for a secret",
        "10:37: no store is called 'bd' -> db", "11:5: the check needs 'database': store 'db' has more than one", "12:51: store 'db' does not move database 'shp' -> shop",
        "13:29: 'status' belongs to a check with 'http'", "13:50: canary must be read or write, not 'writes' -> write", "14:12: two checks are called 'f'; the first is in line 13",
        "14:41: a canary runs at the site that takes over, so 'where: source' would never run it -> where: both"}},
      {kHead + kDb + "traffic:\n  - {name: w, gate: {listen: \"127.0.0.1:81\", application: \"0.0.0.0:80\", take: redirect, front: \"https://127.0.0.1/\"}}\n"
                     "checks:\n  - {name: a, http: \"https://h/\"}\n  - {name: b, http: \"http://h:x/\"}\n  - {name: big, http: \"http://127.0.0.1:70000/\", canary: read}\n  - {name: c, http: \"http://127.0.0.1/\", canary: [write, read]}\n"
                     "  - {name: d, command: [x], canary: read}\n  - {name: e, sql: select 1, store: db, database: shop, canary: read, timeout: 31s}\n",
       {"8:96: front must start with http://: rehome speaks no TLS; for https use a check with 'command' that runs curl",
        "10:21: http must start with http://: rehome speaks no TLS; for https use a check with 'command' that runs curl", "11:21: http must be a URL whose port is a number up to 65535, not 'http://h:x/'",
        "12:23: http must be a URL whose port is a number up to 65535, not 'http://127.0.0.1:70000/'",
        "13:58: canary: read cannot be asked of 'w': the application's own address leads to the gate there, and that waits in the pause; canary: write asks right after it",
        "14:37: canary: read is for http only: inside the pause nothing else is asked, since programs and sessions start too slowly; without it the check runs before the switch, with canary: write right after it",
        "15:65: canary: read is for http only: inside the pause nothing else is asked, since programs and sessions start too slowly; without it the check runs before the switch, with canary: write right after it"}},
      {kHead + kStores + "checks:\n  - {name: c, sql: select 1, store: f}\n", {"8:37: store 'f' is no database; sql asks a postgres store"}},
      {kHead + kStores + "max_pause: 500\ndrain_deadline: soon\nlimits: {wal_kept: 10XB, bandwidth: 1kB, jobs: 0.5, job: 1}\n",
       {"7:12: max_pause is a duration and needs a unit (ms, s, min, h) -> 500s or 500ms", "8:17: drain_deadline must be a duration like 500ms, 10s or 5min, not 'soon'",
        "9:20: wal_kept must be a size like 10GB, 512MiB or 4096, not '10XB'", "9:37: bandwidth must be at least 10.0 kB, not 1.0 kB",
        "9:48: jobs must be a whole number from 1 to 64, not the number 0.5", "9:53: unknown key 'job' in limits; known: bandwidth, jobs, wal_kept"}},
      {"name: a\nsource: local\ntarget: local\n" + kStores,
       {"6:19: source and target are one place: both sites are the same machine, and '/srv/f' and '/srv/f' are the same or one inside the other"}},
      {"name: a\nsource: {ssh: h, state: /s}\ntarget: {ssh: h, state: /s}\nstores:\n  - {name: f, files: {source: /a, target: /a/b}}\n  - {name: d, postgres: {databases: all}}\n"
       "services:\n  - {name: w, systemd: w.service}\ntraffic:\n  - {name: g, gate: {listen: \"a:1\", application: \"a:2\"}}\n",
       {"3:1: source and target are one place: both sites are the same machine and use the state directory '/s'",
        "5:43: source and target are one place: both sites are the same machine, and '/a' and '/a/b' are the same or one inside the other",
        "6:25: source and target are one server: both sites are the same machine, and both are /run/postgresql port 5432",
        "8:15: source and target are one service: both sites are the same machine, and both units are 'w.service'",
        "10:21: source and target are one gate: both sites are the same machine, and both listen at a:1",
        "10:21: source and target are one application: both sites are the same machine, and both listen at a:2"}},
      {"name: a\nsource: {ssh: a}\ntarget: local\nstores:\n  - name: \u00e4\u00f6\n    files: {path: /\u00e4, \u00fcber: 1}\n",
       {"5:11: name must be 1 to 32 of a-z, 0-9, _ and -, and start with a letter or digit, not '\u00e4\u00f6'", "6:23: unknown key '\u00fcber' in files; known: exclude, include, merge, owner, path, source, target"}},
      {"x: &x {path: /a}\n" + kHead + "stores:\n  - name: f\n    files:\n      <<: *x\n",
       {"1:1: unknown key 'x' in the file; known: checks, drain_deadline, limits, link, max_pause, name, services, source, stores, target, traffic",
        "8:7: files needs 'path', or 'source' and 'target' where the two differ", "8:7: merge keys (<<) are not read; write the keys out"}},
  };
  for (const auto& b : all) EXPECT_EQ(problems_of(b.text), b.problems) << b.text;
}

TEST(Config, TabsInsideABlockScalarAreText) {
  Deployment d = good(kHead + kDb + "checks:\n  - name: a\n    store: db\n    database: shop\n    sql: |\n      select 1\n      \t+ 1\n");
  EXPECT_EQ(d.checks[0].sql, "select 1\n\t+ 1\n");
}

TEST(Config, NoMessageRepeatsASecret) {
  for (const char* text : {"password: hunter2", "password: [hunter2]", "password: {value: hunter2}", "password: {env: \"hunter2 x\"}", "pasword: hunter2", "source: {password: hunter2}",
                           "host: \"postgres://u:hunter2@h\""}) {
    auto problems = problems_of(kHead + "stores:\n  - name: db\n    postgres: {databases: all, " + text + "}\n");
    EXPECT_FALSE(problems.empty()) << text;
    for (const auto& p : problems) EXPECT_EQ(p.find("hunter2"), std::string::npos) << p;
  }
  for (const char* text : {"http: \"http://u:hunter2@h/\"", "http: \"http://u:hun@hunter2@h/\"", "http: \"http://u:hunter2@h:99999/\"", "http: \"u:hunter2@h/\"", "http: \"http://u:/hunter2@h/\"", "command: [a, --password=hunter2]", "command: [env, PGPASSWORD=hunter2]", "command: [\"postgres://u:hunter2@h\"]"}) {
    auto problems = problems_of(kHead + kStores + "checks:\n  - {name: a, " + text + "}\n");
    EXPECT_FALSE(problems.empty()) << text;
    for (const auto& p : problems) EXPECT_EQ(p.find("hunter2"), std::string::npos) << p;
  }
}

TEST(Config, NoTextBreaksTheReader) {
  std::string whole = read_file(REHOME_DOCS "/example.yaml");
  for (std::size_t n = 0; n < whole.size(); n += 31) problems_of(whole.substr(0, n));
  for (std::size_t i = 0; i < whole.size(); i += 23)
    for (char c : {'\0', '\t', '[', '}', ':', '&', '*', '\'', '\n', '-'}) {
      std::string broken = whole;
      broken[i] = c;
      problems_of(broken);
    }
}

TEST(Config, LoadingNamesFilePlaceAndMeaning) {
  TempDir dir;
  std::string file = dir.path() + "/rehome.yaml";
  write_durably(file, kHead + kStores + "max_pase: 1s\nlimits: {jobs: none}\n");
  try {
    load_deployment(file);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::config);
    EXPECT_EQ(e.message, file + ":7:1: unknown key 'max_pase' in the file; did you mean max_pause?\n" + file + ":8:16: jobs must be a whole number from 1 to 64, not 'none'");
  }
  try {
    load_deployment(dir.path() + "/absent.yaml");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::config);
    EXPECT_NE(e.message.find("absent.yaml"), std::string::npos);
  }
}

}  // namespace
}  // namespace rehome
