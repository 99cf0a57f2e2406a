#include <openssl/evp.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>

#include "base/error.h"
#include "config/config.h"
#include "config/read_check.h"
#include "config/yaml.h"
#include "sys/fs.h"
#include "sys/net.h"

namespace rehome {
namespace {

constexpr Side kSides[] = {Side::source, Side::target};

std::string sha256_hex(std::string_view text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned size = 0;
  REHOME_CHECK(EVP_Digest(text.data(), text.size(), digest, &size, EVP_sha256(), nullptr) == 1);
  std::string hex;
  for (unsigned i = 0; i < size; i++) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

std::string expand_home(const std::string& path) {
  const char* home = std::getenv("HOME");
  return path.rfind("~/", 0) == 0 && home ? home + path.substr(1) : path;
}

// Whether one path is the other or lies inside it.
bool overlap(const std::string& a, const std::string& b) {
  auto inside = [](const std::string& x, const std::string& y) {
    return x == y || (x.size() > y.size() && x.compare(0, y.size(), y) == 0 && (y == "/" || x[y.size()] == '/'));
  };
  return !a.empty() && !b.empty() && (inside(a, b) || inside(b, a));
}

class DeploymentReader {
 public:
  DeploymentReader(Deployment& d, YamlText& y) : d_(d), y_(y) {}

  void read(const YAML::Node& root) {
    YamlMap m(y_, root, "the file");
    if (!m.valid()) return;
    set(d_.name, y_.name(m.need("name"), "name"));
    std::size_t before = mistakes();
    for (Side s : kSides) site(m.need(std::string(side_name(s))), s);
    // Two sites that are not understood are not said to be one place.
    sites_clear_ = mistakes() == before;
    one_machine_ = sites_clear_ && (d_.site.source.local ? d_.site.target.local
                                        : !d_.site.target.local && d_.site.source.ssh.host == d_.site.target.ssh.host &&
                                              d_.site.source.ssh.port == d_.site.target.ssh.port);
    link(m);
    list(m.need("stores"), "stores", [&](const YAML::Node& n) { store(n); });
    list(m.take("services"), "services", [&](const YAML::Node& n) { service(n); });
    list(m.take("traffic"), "traffic", [&](const YAML::Node& n) { traffic(n); });
    list(m.take("checks"), "checks", [&](const YAML::Node& n) {
      read_check(n, d_, y_, unclear_stores_, [&](YamlMap& check) { return unique_name(check, "checks"); });
    });
    set(d_.max_pause, y_.duration(m.take("max_pause"), "max_pause", Millis(10), Millis(3600'000)));
    set(d_.drain_deadline, y_.duration(m.take("drain_deadline"), "drain_deadline", Millis(0), Millis(3600'000)));
    limits(m.take("limits"));
    m.done();
    if (Millis cold = cold_start_time(d_); cold > d_.max_pause && mistakes() == 0)
      y_.problem(m.key_mark("services"), "the services that are not warm take " + human_duration(cold) + " (start_time) to start inside the pause, and max_pause is " +
                                             human_duration(d_.max_pause) + ": no switch would be tried");
    same_place(m);
  }

 private:
  void list(const YAML::Node& n, const std::string& what, const std::function<void(const YAML::Node&)>& each) {
    if (!n.IsDefined()) return;
    if (!n.IsSequence()) {
      y_.problem(n, what + " must be a list: each entry starts with '- '");
      return;
    }
    if (what == "stores" && n.size() == 0) y_.problem(n, "stores is an empty list; there would be nothing to move");
    for (const auto& item : n) each(item);
  }

  std::string unique_name(YamlMap& m, const std::string& kind) {
    YAML::Node n = m.need("name");
    auto name = y_.name(n, "name");
    if (!name) return {};
    auto [at, fresh] = names_[kind].emplace(*name, n.Mark().line + 1);
    if (!fresh) y_.problem(n, "two " + kind + " are called '" + *name + "'; the first is in line " + std::to_string(at->second));
    return *name;
  }

  std::optional<std::string> ssh_host(const YAML::Node& n, const std::string& what) {
    auto s = y_.text(n, what);
    if (!s) return s;
    if (s->front() == '-' || s->find_first_of(" \t'\"/") != std::string::npos) {
      auto scheme = s->rfind("ssh://", 0) == 0;
      y_.problem(n, what + " must be a host or user@host, as ssh takes it, not '" + *s + "'", scheme ? s->substr(6) : "");
      return std::nullopt;
    }
    auto colon = s->find(':');
    if (colon != std::string::npos && colon == s->rfind(':')) {
      y_.problem(n, what + " takes no port; write it as a key of its own", s->substr(0, colon) + ", port: " + s->substr(colon + 1));
      return std::nullopt;
    }
    return s;
  }

  // port, key and options of an ssh connection.
  void ssh_details(YamlMap& m, SshHost& ssh) {
    set(ssh.port, y_.integer(m.take("port"), "port", 1, 65535));
    set(ssh.key, y_.absolute_path(m.take("key"), "key", true));
    YAML::Node options = m.take("options");
    ssh.options = y_.texts(options, "options");
    if (options.IsDefined() && options.IsSequence())
      for (const auto& o : options)
        if (o.IsScalar() && o.Scalar().find('=') == std::string::npos)
          y_.problem(o, "each of options must be Name=value, as after ssh -o, not '" + o.Scalar() + "'",
                     o.Scalar().rfind("-o", 0) == 0 ? std::string(trim(std::string_view(o.Scalar()).substr(2))) : "");
  }

  void site(const YAML::Node& n, Side side) {
    std::string what(side_name(side));
    if (!n.IsDefined()) return;
    SiteConfig& c = d_.site[side];
    if (n.IsScalar()) {
      if (n.Scalar() == "local") return;
      y_.problem(n, what + " must be local or {ssh: user@host}, not '" + n.Scalar() + "'",
                 nearest(n.Scalar(), {"local"}).value_or("{ssh: " + n.Scalar() + "}"));
      return;
    }
    YamlMap m(y_, n, what);
    std::string kind = m.one_of({"local", "ssh"});
    if (kind == "ssh") {
      c.local = false;
      set(c.ssh.host, ssh_host(m.take("ssh"), "ssh"));
      ssh_details(m, c.ssh);
      c.ssh.key = expand_home(c.ssh.key);
    } else {
      if (kind == "local") {
        YAML::Node local = m.take("local");
        auto yes = y_.boolean(local, "local");
        if (yes && !*yes) y_.problem(local, "a site that is not local needs ssh: user@host");
      }
      for (auto key : {"port", "key", "options"}) m.misplaced(key, "belongs to a site with 'ssh'");
    }
    YAML::Node state = m.take("state");
    if (auto path = y_.absolute_path(state, "state")) {
      if (path->find_first_of(" \t\"'\\%$") == std::string::npos) c.state = *path;
      else y_.problem(state, "state must be a path without blanks, quotes, \\, % and $: units and crontabs name it");
    }
    YAML::Node boot = m.take("boot");
    if (boot.IsDefined() && boot.IsScalar() && boot.Scalar().rfind("directory:", 0) == 0) {
      if (boot.Scalar().size() < 12 || boot.Scalar()[10] != '/')
        y_.problem(boot, "boot: directory: needs an absolute path", "directory:/etc/rehome.d");
      else
        c.boot = boot.Scalar();
    } else {
      set(c.boot, y_.choice(boot, "boot", {"systemd", "cron", "none", "directory:/path"}));
    }
    set(c.psql, y_.absolute_path(m.take("psql"), "psql"));
    m.done();
  }

  void link(YamlMap& top) {
    const auto& site = d_.site;
    LinkConfig& l = d_.link;
    // The local site opens the link: it has what reaches the other one, and the other need not reach it.
    l.initiator = site.target.local || !site.source.local ? Side::target : Side::source;
    l.ssh = site[other(l.initiator)].ssh;
    YAML::Node n = top.take("link");
    if (!n.IsDefined()) {
      if (sites_clear_ && !site.source.local && !site.target.local && !one_machine_)
        y_.problem(top.node(), "both sites are remote, so 'link' must say which one reaches the other, and how",
                   "link: {from: target, to: " + site.source.ssh.host + ", key: /root/.ssh/id_ed25519}");
      return;
    }
    YamlMap m(y_, n, "link");
    if (auto from = y_.choice(m.take("from"), "from", {"source", "target"}))
      l.initiator = *from == "source" ? Side::source : Side::target;
    l.ssh = site[other(l.initiator)].ssh;
    YAML::Node to = m.take("to");
    if (auto host = ssh_host(to, "to")) {
      l.ssh = SshHost{};
      l.ssh.host = *host;
    } else if (m.valid() && !to.IsDefined() && sites_clear_ && l.ssh.host.empty() && !one_machine_) {
      y_.problem(n, "link needs 'to': the " + std::string(side_name(other(l.initiator))) +
                        " is local here, so how the other site reaches it is not known");
    }
    ssh_details(m, l.ssh);
    if (site[l.initiator].local) l.ssh.key = expand_home(l.ssh.key);
    m.done();
  }

  void store(const YAML::Node& n) {
    YamlMap m(y_, n, "a store");
    if (!m.valid()) return;
    StoreConfig s;
    s.name = unique_name(m, "stores");
    std::string kind = m.one_of({"files", "postgres"});
    if (kind == "files") {
      s.kind = StoreConfig::Kind::files;
      files(m.take("files"), s.files);
    } else if (kind == "postgres") {
      s.kind = StoreConfig::Kind::postgres;
      postgres(m.take("postgres"), s.postgres);
    }
    m.done();
    if (kind.empty()) unclear_stores_.insert(s.name);
    d_.stores.push_back(std::move(s));
  }

  void files(const YAML::Node& n, FilesConfig& f) {
    YamlMap m(y_, n, "files");
    if (!m.valid()) return;
    YAML::Node both = m.take("path");
    if (auto p = y_.absolute_path(both, "path")) f.path.source = f.path.target = *p;
    for (Side s : kSides) set(f.path[s], y_.absolute_path(m.take(std::string(side_name(s))), std::string(side_name(s))));
    if (!m.has("path") && (!m.has("source") || !m.has("target"))) {
      if (!m.has("source") && !m.has("target"))
        y_.problem(n, "files needs 'path', or 'source' and 'target' where the two differ");
      else
        y_.problem(n, std::string("files needs '") + (m.has("source") ? "target" : "source") + "' or 'path' too");
    } else if (m.has("path") && m.has("source") && m.has("target")) {
      y_.problem(m.key_mark("path"), "'path' has no effect: 'source' and 'target' are both written");
    }
    for (Side s : kSides)
      if (f.path[s] == "/") y_.problem(n, "a whole root file system is no store; name the directories of the deployment");
    YAML::Node at = m.has("target") ? m.take("target") : both;
    if (one_machine_ && at.IsDefined() && overlap(f.path.source, f.path.target))
      y_.problem(at, "source and target are one place: both sites are the same machine, and '" + f.path.source + "' and '" +
                         f.path.target + "' are the same or one inside the other");
    f.include = y_.texts(m.take("include"), "include");
    f.exclude = y_.texts(m.take("exclude"), "exclude");
    if (auto o = y_.choice(m.take("owner"), "owner", {"name", "number"})) f.owner_by_name = *o == "name";
    YAML::Node merge = m.take("merge");
    set(f.merge, y_.boolean(merge, "merge"));
    if (f.merge) y_.problem(merge, "merging into a directory that has files is not supported; the target must be empty");
    m.done();
  }

  SecretRef secret(const YAML::Node& n) {
    SecretRef ref;
    if (!n.IsDefined()) return ref;
    if (n.IsScalar()) {
      // The value is not repeated: it may be the secret itself.
      if (n.Scalar() == "pgpass") ref.from = SecretRef::From::pgpass;
      else y_.problem(n, "a password must not stand in this file", "{env: NAME}, {file: /path} or pgpass");
      return ref;
    }
    YamlMap m(y_, n, "password");
    std::string kind = m.one_of({"env", "file"});
    if (kind == "env") {
      YAML::Node v = m.take("env");
      if (auto name = y_.text(v, "env")) {
        bool fine = !std::isdigit(static_cast<unsigned char>(name->front())) &&
                    std::all_of(name->begin(), name->end(), [](unsigned char c) { return std::isalnum(c) || c == '_'; });
        if (!fine) y_.problem(v, "env must be the name of an environment variable, without $", "");
        ref = {SecretRef::From::environment, *name};
      }
    } else if (kind == "file") {
      if (auto path = y_.absolute_path(m.take("file"), "file", true)) ref = {SecretRef::From::file, *path};
    }
    m.done();
    return ref;
  }

  void postgres_server(YamlMap& m, PostgresServer& p) {
    YAML::Node host = m.take("host");
    if (auto h = y_.text(host, "host")) {
      if (h->find("://") != std::string::npos || h->find('@') != std::string::npos || h->find(' ') != std::string::npos)
        y_.problem(host, "host must be a host name, an address or a socket directory, no connection string",
                   "the keys host, port, user and password");
      else if (h->rfind("unix:", 0) == 0)
        y_.problem(host, "host must be the directory of the socket", h->substr(5));
      else if (auto close = h->find(']'); h->front() == '[' && close != std::string::npos) {
        // As it is written where a port follows.
        p.host = h->substr(1, close - 1);
        if (close + 1 < h->size()) y_.problem(host, "host takes no port; write it as a key of its own", p.host + ", port: " + h->substr(std::min(h->size(), close + 2)));
      } else if (h->front() != '/' && std::count(h->begin(), h->end(), ':') == 1)
        y_.problem(host, "host takes no port; write it as a key of its own",
                   h->substr(0, h->find(':')) + ", port: " + h->substr(h->find(':') + 1));
      else
        p.host = *h;
    }
    set(p.port, y_.integer(m.take("port"), "port", 1, 65535));
    set(p.user, y_.text(m.take("user"), "user"));
    set(p.os_user, y_.text(m.take("os_user"), "os_user"));
    if (m.has("password")) p.password = secret(m.take("password"));
    else m.take("password");
    set(p.admin_database, y_.text(m.take("admin_database"), "admin_database"));
  }

  void postgres(const YAML::Node& n, PostgresConfig& p) {
    YamlMap m(y_, n, "postgres");
    if (!m.valid()) return;
    YAML::Node databases = m.need("databases");
    if (databases.IsDefined() && databases.IsScalar()) {
      if (databases.Scalar() != "all")
        y_.problem(databases, "databases must be all or a list, not '" + databases.Scalar() + "'", "[" + databases.Scalar() + "]");
    } else {
      p.databases = y_.texts(databases, "databases");
      std::set<std::string> seen;
      if (databases.IsDefined() && databases.IsSequence())
        for (const auto& db : databases) {
          if (!db.IsScalar()) continue;
          if (!seen.insert(db.Scalar()).second) y_.problem(db, "database '" + db.Scalar() + "' is listed twice");
          if (db.Scalar() == "template0" || db.Scalar() == "template1")
            y_.problem(db, "'" + db.Scalar() + "' belongs to the server and is not moved");
        }
    }
    PostgresServer both;
    postgres_server(m, both);
    for (Side s : kSides) {
      PostgresServer& server = p.server[s];
      server = both;
      std::string key(side_name(s));
      YAML::Node side = m.take(key);
      if (side.IsDefined()) {
        YamlMap sm(y_, side, "postgres, " + key);
        if (sm.valid()) postgres_server(sm, server);
        sm.done();
      }
      if (server.host.empty()) {
        // What a distribution's package sets up: a socket, and peer authentication of the account of the same name.
        server.host = "/run/postgresql";
        if (server.os_user.empty() && server.password.from == SecretRef::From::none) server.os_user = server.user;
      }
      if (!server.os_user.empty() && server.host.front() != '/')
        y_.problem(side.IsDefined() ? side : n, "os_user needs a socket directory as host on the " + key +
                                                    ": peer authentication works through a unix socket only");
    }
    const auto &a = p.server.source, &b = p.server.target;
    auto here = [](const std::string& h) { return h == "localhost" || h == "127.0.0.1" || h == "::1" || h.front() == '/'; };
    if (one_machine_ && a.port == b.port && (a.host == b.host || (here(a.host) && here(b.host) && (a.host.front() == '/') != (b.host.front() == '/'))))
      y_.problem(n, "source and target are one server: both sites are the same machine, and both are " + a.host + " port " +
                        std::to_string(a.port));
    if (auto v = y_.choice(m.take("ddl"), "ddl", {"refuse", "block"}))
      p.ddl = *v == "refuse" ? PostgresConfig::Ddl::refuse : PostgresConfig::Ddl::block;
    set(p.roles, y_.boolean(m.take("roles"), "roles"));
    m.done();
  }

  void unit(const YAML::Node& n, ServiceSide& side) {
    static const std::vector<std::string> kinds{".service", ".slice", ".scope"}, idle{".target", ".socket", ".timer", ".path", ".mount"};
    auto s = y_.text(n, "systemd");
    if (!s) return;
    auto is_one_of = [&](const std::vector<std::string>& all) {
      return std::any_of(all.begin(), all.end(), [&](const std::string& k) { return s->size() > k.size() && s->ends_with(k); });
    };
    if (is_one_of(idle)) y_.problem(n, "systemd must be a unit that has processes, a .service, .slice or .scope: '" + *s + "' has none that could be frozen");
    else if (!is_one_of(kinds)) y_.problem(n, "systemd must be the full name of a unit, not '" + *s + "'", *s + ".service");
    else if (s->find('/') != std::string::npos) y_.problem(n, "systemd must be the name of a unit, not a path");
    else side.unit = *s;
  }

  void command(const YAML::Node& n, ServiceSide& side) {
    YamlMap m(y_, n, "command");
    if (!m.valid()) return;
    side = ServiceSide{};
    side.start = y_.words(m.need("start"), "start");
    side.stop = y_.words(m.need("stop"), "stop");
    set(side.pid_file, y_.absolute_path(m.need("pid_file"), "pid_file"));
    m.done();
  }

  void service(const YAML::Node& n) {
    YamlMap m(y_, n, "a service");
    if (!m.valid()) return;
    ServiceConfig s;
    s.name = unique_name(m, "services");
    std::map<Side, std::pair<std::string, YAML::Mark>> kinds;
    auto read_kind = [&](YamlMap& from, ServiceSide& side, const std::string& kind) {
      if (kind == "systemd") unit(from.take("systemd"), side);
      if (kind == "command") command(from.take("command"), side);
    };
    bool general = m.has("systemd") || m.has("command") || !(m.has("source") && m.has("target"));
    std::string kind;
    if (general) kind = m.one_of({"systemd", "command"});
    else m.take("systemd"), m.take("command");
    ServiceSide both;
    read_kind(m, both, kind);
    s.on = {both, both};
    for (Side side : kSides) {
      std::string key(side_name(side));
      YAML::Node sn = m.take(key);
      if (!sn.IsDefined()) continue;
      YamlMap sm(y_, sn, "service, " + key);
      std::string own = sm.one_of({"systemd", "command"});
      if (!own.empty() && !kind.empty() && own != kind)
        y_.problem(sm.key_mark(own), "a service is run by systemd on both sites or by commands on both");
      if (kind.empty()) kind = own;
      read_kind(sm, s.on[side], own);
      sm.done();
    }
    s.runtime = kind == "systemd" ? ServiceConfig::Runtime::systemd : ServiceConfig::Runtime::command;
    if (one_machine_ && s.runtime == ServiceConfig::Runtime::systemd && !s.on.source.unit.empty() && s.on.source.unit == s.on.target.unit)
      y_.problem(m.key_mark(m.has("systemd") ? "systemd" : "target"),
                 "source and target are one service: both sites are the same machine, and both units are '" + s.on.source.unit + "'");
    if (one_machine_ && !s.on.source.pid_file.empty() && s.on.source.pid_file == s.on.target.pid_file)
      y_.problem(m.key_mark(m.has("command") ? "command" : "target"),
                 "source and target are one service: both sites are the same machine, and both use the pid_file '" + s.on.source.pid_file + "'");
    set(s.warm, y_.boolean(m.take("warm"), "warm"));
    set(s.start_time, y_.duration(m.take("start_time"), "start_time", Millis(0), Millis(3600'000)));
    if (s.warm && m.has("start_time")) y_.problem(m.key_mark("start_time"), "'start_time' has no effect: a warm service starts before the pause; it belongs to warm: false");
    set(s.start_timeout, y_.duration(m.take("start_timeout"), "start_timeout", Millis(100), Millis(3600'000)));
    m.done();
    d_.services.push_back(std::move(s));
  }

  void traffic_side(YamlMap& m, TrafficSide& t, bool nginx) {
    set(t.application, y_.address(m.take("application"), "application"));
    set(t.front, y_.url(m.take("front"), "front"));
    if (!nginx) {
      set(t.listen, y_.address(m.take("listen"), "listen"));
      return;
    }
    set(t.listen, y_.address(m.take("gate"), "gate"));
    YAML::Node files = m.take("files");
    if (files.IsDefined()) {
      t.files = y_.texts(files, "files");
      if (files.IsSequence())
        for (const auto& f : files)
          if (f.IsScalar() && !f.Scalar().empty()) y_.absolute_path(f, "each of files");
    }
    set(t.nginx, y_.text(m.take("program"), "program"));
    set(t.nginx_conf, y_.absolute_path(m.take("conf"), "conf"));
  }

  void traffic(const YAML::Node& n) {
    YamlMap m(y_, n, "a traffic entry");
    if (!m.valid()) return;
    TrafficConfig t;
    t.name = unique_name(m, "traffic entries");
    std::string kind = m.one_of({"nginx", "gate"});
    bool nginx = kind == "nginx";
    t.kind = nginx ? TrafficConfig::Kind::nginx : TrafficConfig::Kind::gate;
    if (!kind.empty()) traffic_body(m.take(kind), t, nginx);
    YAML::Node tells = m.take("proxy_protocol");
    if (tells.IsDefined() && tells.IsScalar() && tells.Scalar().starts_with('v')) {
      if (auto v = y_.choice(tells, "proxy_protocol", {"true", "false", "v1", "v2"})) t.proxy_protocol = *v == "v1" ? 1 : 2;
    } else {
      set(t.proxy_protocol, y_.boolean(tells, "proxy_protocol"));
    }
    if (nginx && m.has("accept_proxy"))
      m.misplaced("accept_proxy", "belongs to traffic of kind gate; nginx does not send a PROXY header to an application");
    else
      set(t.accept_proxy, y_.boolean(m.take("accept_proxy"), "accept_proxy"));
    if (auto v = y_.choice(m.take("refuse_with"), "refuse_with", {"http_503", "close"})) t.refuse_with_503 = *v == "http_503";
    set(t.max_waiting, y_.integer(m.take("max_waiting"), "max_waiting", 1, 1'000'000));
    set(t.max_wait, y_.duration(m.take("max_wait"), "max_wait", Millis(100), Millis(3600'000)));
    if (auto v = y_.choice(m.take("longer_requests"), "longer_requests", {"back_out", "cut"}))
      t.longer_requests = *v == "cut" ? TrafficConfig::Longer::cut : TrafficConfig::Longer::back_out;
    m.done();
    for (const auto& other : d_.traffic) one_gate(m.key_mark(kind), t, other);
    d_.traffic.push_back(std::move(t));
  }

  void traffic_body(const YAML::Node& n, TrafficConfig& t, bool nginx) {
    std::string kind = nginx ? "nginx" : "gate", at = nginx ? "gate" : "listen";
    YamlMap m(y_, n, kind);
    if (!m.valid()) return;
    TrafficSide both;
    std::size_t before = mistakes();
    traffic_side(m, both, nginx);
    t.on = {both, both};
    if (!nginx) {
      auto take = y_.choice(m.take("take"), "take", {"listen", "redirect", "unix_socket"});
      if (take) t.take = *take == "listen" ? TrafficConfig::Take::listen
                         : *take == "redirect" ? TrafficConfig::Take::redirect : TrafficConfig::Take::unix_socket;
    }
    for (Side side : kSides) {
      std::string key(side_name(side));
      YAML::Node sn = m.take(key);
      if (!sn.IsDefined()) continue;
      YamlMap sm(y_, sn, kind + ", " + key);
      if (sm.valid()) traffic_side(sm, t.on[side], nginx);
      sm.done();
    }
    m.done();
    if (mistakes() != before) return;  // what follows would repeat them
    for (Side side : kSides) {
      const TrafficSide& s = t.on[side];
      std::string where = " on the " + std::string(side_name(side));
      if (s.application.empty()) y_.problem(n, kind + " needs 'application'" + where + ": where the application listens");
      if (s.listen.empty()) y_.problem(n, kind + " needs '" + at + "'" + where + ": where the gate listens");
      if (nginx && s.files.empty()) y_.problem(n, "nginx needs 'files'" + where + ": the configuration files that name the application");
      if (!s.listen.empty() && s.listen == s.application)
        y_.problem(n, "'" + at + "' and 'application' are one address" + where + ": " + s.listen);
      bool unix_both = s.listen.starts_with("unix:") && s.application.starts_with("unix:");
      if (t.take == TrafficConfig::Take::unix_socket && !unix_both)
        y_.problem(n, "take: unix_socket needs unix: addresses as 'listen' and 'application'" + where);
      if (t.take == TrafficConfig::Take::redirect && (s.listen.starts_with("unix:") || s.application.starts_with("unix:")))
        y_.problem(n, "take: redirect needs host:port addresses as 'listen' and 'application'" + where);
    }
    if (one_machine_ && !t.on.source.listen.empty() && t.on.source.listen == t.on.target.listen)
      y_.problem(n, "source and target are one gate: both sites are the same machine, and both listen at " + t.on.source.listen);
    if (one_machine_ && !t.on.source.application.empty() && t.on.source.application == t.on.target.application)
      y_.problem(n, "source and target are one application: both sites are the same machine, and both listen at " + t.on.source.application);
  }

  void one_gate(const YAML::Mark& at, const TrafficConfig& a, const TrafficConfig& b) {
    auto v6 = [](const Address& x) { return x.host.find(':') != std::string::npos; };
    for (Side s : kSides)
      for (Side u : kSides) {
        const std::string &one = a.on[s].listen, &two = b.on[u].listen;
        if ((s != u && !one_machine_) || one.empty() || two.empty()) continue;
        Address x = Address::parse(one), y = Address::parse(two);
        // 127.0.0.1 and ::1 are one host and two addresses, but for a listener on [::].
        if (!reach_the_same(x, y) || (v6(x) != v6(y) && x.host != "::" && y.host != "::")) continue;
        return y_.problem(at, "the gates of '" + b.name + "' and '" + a.name + "' both listen at " + one + " on the " + std::string(side_name(s)) + "; each needs an address of its own");
      }
  }

  void limits(const YAML::Node& n) {
    if (!n.IsDefined()) return;
    YamlMap m(y_, n, "limits");
    if (!m.valid()) return;
    set(d_.limits.wal_kept, y_.bytes(m.take("wal_kept"), "wal_kept", 16'777'216));
    set(d_.limits.bandwidth, y_.bytes(m.take("bandwidth"), "bandwidth", 10'000));
    set(d_.limits.jobs, y_.integer(m.take("jobs"), "jobs", 1, 64));
    m.done();
  }

  void same_place(YamlMap& m) {
    if (one_machine_ && !d_.site.source.state.empty() && d_.site.source.state == d_.site.target.state)
      y_.problem(m.key_mark("target"), "source and target are one place: both sites are the same machine and use the state directory '" +
                                           d_.site.source.state + "'");
    for (Side s : kSides)
      for (std::size_t i = 0; i < d_.stores.size(); i++)
        for (std::size_t k = 0; k < i; k++) {
          const auto &a = d_.stores[k], &b = d_.stores[i];
          if (a.kind != StoreConfig::Kind::files || b.kind != StoreConfig::Kind::files) continue;
          if (overlap(a.files.path[s], b.files.path[s]) && !(s == Side::target && overlap(a.files.path.source, b.files.path.source)))
            y_.problem(m.key_mark("stores"), "stores '" + a.name + "' and '" + b.name + "' overlap on the " + std::string(side_name(s)) +
                                                 ": '" + a.files.path[s] + "' and '" + b.files.path[s] + "'");
        }
  }

  std::size_t mistakes() const { return y_.mistakes(); }

  Deployment& d_;
  YamlText& y_;
  bool one_machine_ = false, sites_clear_ = false;
  std::map<std::string, std::map<std::string, int>> names_;
  std::set<std::string> unclear_stores_;
};

}  // namespace

Millis cold_start_time(const Deployment& d) {
  Millis all{0};
  for (const auto& s : d.services)
    if (!s.warm) all += s.start_time;
  return all;
}

std::vector<std::string> cold_starts(const Deployment& d) {
  std::vector<std::string> words;
  for (const auto& s : d.services)
    if (!s.warm) words.push_back(s.name + " is not warm: it starts inside the pause, after the decision, for about " + human_duration(s.start_time) + " (start_time)");
  return words;
}

Deployment read_deployment(const std::string& file, const std::string& text, std::vector<ConfigProblem>& problems) {
  Deployment d;
  d.file = file;
  d.hash = sha256_hex(text);
  YamlText y(text, problems);
  YAML::Node root = y.load();
  if (root.IsDefined()) DeploymentReader(d, y).read(root);
  std::stable_sort(problems.begin(), problems.end(), [](const ConfigProblem& a, const ConfigProblem& b) {
    return a.line != b.line ? a.line < b.line : a.column < b.column;
  });
  return d;
}

Deployment load_deployment(const std::string& file) {
  std::string text;
  try {
    text = read_file(file, 1u << 20);
  } catch (const Error& e) {
    throw Error(Code::config, e.message, "name the file with --file, or start one from docs/example.yaml");
  }
  std::vector<ConfigProblem> problems;
  Deployment d = read_deployment(file, text, problems);
  if (problems.empty()) return d;
  std::string all;
  for (const auto& p : problems) {
    all += (all.empty() ? "" : "\n") + file + ":" + std::to_string(p.line) + ":" + std::to_string(p.column) + ": " + p.message;
    if (!p.meant.empty()) all += "; did you mean " + p.meant + "?";
  }
  throw Error(Code::config, all, "every key is described in docs/CONFIG.md");
}

}  // namespace rehome
