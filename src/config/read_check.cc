#include "config/read_check.h"

#include <algorithm>

#include "base/text.h"

namespace rehome {
namespace {

class CheckReader {
 public:
  CheckReader(Deployment& d, YamlText& y, const std::set<std::string>& unclear_stores, const std::function<std::string(YamlMap&)>& unique_name)
      : d_(d), y_(y), unclear_stores_(unclear_stores), unique_name_(unique_name) {}

  void read(const YAML::Node& n) {
    YamlMap m(y_, n, "a check");
    if (!m.valid()) return;
    CheckConfig c;
    c.name = unique_name_(m);
    std::string kind = m.one_of({"http", "sql", "command"});
    auto only = [&](const std::string& of, const char* key) {
      if (kind == of || kind.empty()) return m.take(key);
      m.misplaced(key, "belongs to a check with '" + of + "'");
      return YAML::Node(YAML::NodeType::Undefined);
    };
    c.kind = kind == "sql" ? CheckConfig::Kind::sql : kind == "command" ? CheckConfig::Kind::command : CheckConfig::Kind::http;
    if (kind == "http") http_url(m.take("http"), c);
    set(c.status, y_.integer(only("http", "status"), "status", 100, 599));
    set(c.body, y_.any_scalar(only("http", "body"), "body"));
    if (kind == "sql") {
      set(c.sql, y_.text(m.take("sql"), "sql"));
      YAML::Node store = m.need("store");
      set(c.store, y_.text(store, "store"));
      if (!c.store.empty()) postgres_of_check(store, m, c);
    } else {
      only("sql", "store");
      only("sql", "database");
    }
    set(c.expect, y_.any_scalar(only("sql", "expect"), "expect"));
    if (kind == "command") c.command = y_.words(m.take("command"), "command");
    if (auto w = y_.choice(m.take("where"), "where", {"source", "target", "both"}))
      c.where = *w == "source" ? CheckConfig::Where::source : *w == "target" ? CheckConfig::Where::target : CheckConfig::Where::both;
    YAML::Node canary = m.take("canary");
    std::vector<YAML::Node> kinds;
    if (canary.IsDefined() && canary.IsSequence()) {
      for (const auto& k : canary) kinds.push_back(k);
    } else if (canary.IsDefined()) {
      kinds.push_back(canary);
    }
    for (const auto& k : kinds) {
      auto v = y_.choice(k, "canary", {"read", "write"});
      if (v) (*v == "read" ? c.canary : c.write_canary) = true;
      if (v && *v == "read" && !kind.empty()) read_canary(k, kind, c);
    }
    if ((c.canary || c.write_canary) && c.where == CheckConfig::Where::source)
      y_.problem(canary, "a canary runs at the site that takes over, so 'where: source' would never run it", "where: both");
    set(c.timeout, y_.duration(m.take("timeout"), "timeout", Millis(1), Millis(3600'000)));
    m.done();
    d_.checks.push_back(std::move(c));
  }

 private:
  void read_canary(const YAML::Node& n, const std::string& kind, const CheckConfig& c) {
    if (kind != "http") {
      y_.problem(n, "canary: read is for http only: inside the pause nothing else is asked, since programs and sessions start too slowly; "
                    "without it the check runs before the switch, with canary: write right after it");
      return;
    }
    if (c.url.empty()) return;
    const TrafficConfig* t = traffic_of(d_, c, Side::target);
    if (t && t->take != TrafficConfig::Take::listen)
      y_.problem(n, "canary: read cannot be asked of '" + t->name + "': the application's own address leads to the gate there, and that waits in the pause; "
                    "canary: write asks right after it");
  }

  void http_url(const YAML::Node& n, CheckConfig& c) {
    if (n.IsDefined() && n.IsScalar() && n.Scalar().starts_with("/")) {
      // A path is asked for at each site's own front door.
      c.url = n.Scalar();
      bool found = std::any_of(d_.traffic.begin(), d_.traffic.end(),
                               [](const TrafficConfig& t) { return !t.on.source.front.empty() && !t.on.target.front.empty(); });
      if (!found) y_.problem(n, "http is only a path, and no traffic entry has a 'front' to ask it at", "http://127.0.0.1" + c.url);
      return;
    }
    set(c.url, y_.url(n, "http"));
  }

  void postgres_of_check(const YAML::Node& store, YamlMap& m, CheckConfig& c) {
    YAML::Node database = m.take("database");
    set(c.database, y_.text(database, "database"));
    auto found = std::find_if(d_.stores.begin(), d_.stores.end(), [&](const StoreConfig& s) { return s.name == c.store; });
    if (found == d_.stores.end()) {
      std::vector<std::string> known;
      for (const auto& s : d_.stores) known.push_back(s.name);
      y_.problem(store, "no store is called '" + c.store + "'", nearest(c.store, known).value_or(known.size() == 1 ? known[0] : ""));
      return;
    }
    if (unclear_stores_.count(c.store)) return;
    if (found->kind != StoreConfig::Kind::postgres) {
      y_.problem(store, "store '" + c.store + "' is no database; sql asks a postgres store");
      return;
    }
    const auto& list = found->postgres.databases;
    if (c.database.empty() && list.size() == 1) c.database = list[0];
    if (c.database.empty() && !m.has("database"))
      y_.problem(m.node(), "the check needs 'database': store '" + c.store + "' has more than one");
    if (!c.database.empty() && !list.empty() && std::find(list.begin(), list.end(), c.database) == list.end())
      y_.problem(database, "store '" + c.store + "' does not move database '" + c.database + "'", nearest(c.database, list).value_or(""));
  }

  Deployment& d_;
  YamlText& y_;
  const std::set<std::string>& unclear_stores_;
  const std::function<std::string(YamlMap&)>& unique_name_;
};

}  // namespace

void read_check(const YAML::Node& n, Deployment& d, YamlText& y, const std::set<std::string>& unclear_stores, const std::function<std::string(YamlMap&)>& unique_name) {
  CheckReader(d, y, unclear_stores, unique_name).read(n);
}

}  // namespace rehome
