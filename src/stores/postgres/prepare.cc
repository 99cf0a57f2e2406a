// Phase prepare: what the source needs before a slot is made, the target's roles, databases and paths for replication.
#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <set>

#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/postgres.h"
#include "sys/fs.h"

namespace rehome {
namespace {

constexpr Millis kLockPatience(60000);
constexpr std::size_t kFenceGroup = 20;

// `sql` with those tables ("a, ONLY b") locked before it, all within 100 ms: lock_timeout counts each one for itself.
void bounded(PgSession& s, const std::string& tables, const char* mode, const std::string& sql) {
  pg_retry_locks(Deadline::in(kLockPatience), [&] {
    try {
      s.exec("BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL deadlock_timeout = '10ms'; SET LOCAL statement_timeout = '100ms'; LOCK TABLE ONLY " + tables + " IN " + mode + " MODE; SET LOCAL statement_timeout = 0; " + sql + "; COMMIT");
    } catch (const Error&) {
      if (!s.broken()) s.exec("ROLLBACK");
      throw;
    }
  });
}

// ICU's and the built-in locales, with which a database sorts otherwise than by its LC_COLLATE (15 and later).
std::string locale_provider(PgSession& from, PgSession& to, const std::string& database) {
  // Where the target's template0 has a provider of its own, the source's must be said.
  const std::string libc = to.major() >= 15 ? " LOCALE_PROVIDER libc" : "";
  if (from.major() < 15) return libc;
  std::string of = from.major() >= 17 ? "datlocale" : "daticulocale";
  std::string rules = from.major() >= 16 ? "daticurules" : "NULL";
  auto row = from.query("SELECT datlocprovider, " + of + ", " + rules + " FROM pg_database WHERE datname = " + pg_literal(database)).at(0);
  if (*row[0] == "i" && to.major() >= 15)
    return " LOCALE_PROVIDER icu ICU_LOCALE " + pg_literal(row[1].value_or("")) + (row[2] && to.major() >= 16 ? " ICU_RULES " + pg_literal(*row[2]) : "");
  if (*row[0] == "b" && to.major() >= 17) return " LOCALE_PROVIDER builtin BUILTIN_LOCALE " + pg_literal(row[1].value_or(""));
  return libc;
}

// Settings that are lists are stored as a list of identifiers, quoted where they must be; as one literal a list of two would be
// one strange name, and written as it is stored an empty name would be refused. So each is a literal of its own, as pg_dump does it
// (its variable_is_guc_list_quote names the settings).
std::string setting_value(const std::string& setting, const std::string& stored) {
  static const std::set<std::string> lists{"local_preload_libraries", "search_path", "session_preload_libraries", "shared_preload_libraries", "temp_tablespaces", "unix_socket_directories"};
  if (!lists.contains(setting)) return pg_literal(stored);
  std::vector<std::string> values;
  for (std::size_t i = 0; i < stored.size();) {
    if (stored[i] == ',' || stored[i] == ' ') {
      i++;
      continue;
    }
    std::string value;
    if (stored[i] == '"') {
      for (i++; i < stored.size() && (stored[i] != '"' || (i + 1 < stored.size() && stored[i + 1] == '"')); i++) {
        if (stored[i] == '"') i++;
        value += stored[i];
      }
      i++;
    } else {
      while (i < stored.size() && stored[i] != ',' && stored[i] != ' ') value += stored[i++];
    }
    values.push_back(pg_literal(value));
  }
  return values.empty() ? pg_literal("") : join(values, ", ");
}

// " SET name TO value" of a stored "name=value".
std::string set_clause(const std::string& stored) {
  auto eq = stored.find('=');
  std::string setting = stored.substr(0, eq);
  return " SET " + pg_identifier(setting) + " TO " + setting_value(setting, stored.substr(eq + 1));
}

}  // namespace

void PostgresStore::tune(StoreContext& c, Side side) {
  auto s = session(c, side, server(side).admin_database);
  // After a blip of the link an apply worker waits wal_retrieve_retry_interval (5 s) before it tries again: longer than any pause.
  if (c.recall(key("tuned." + std::string(side_name(side)))).is_null()) {
    // Another store of this cluster, or another run, may have set it already: what it sets is not what was there before.
    bool ours = s->number("SELECT count(*) FROM pg_file_settings WHERE name = 'wal_retrieve_retry_interval' AND sourcefile LIKE '%auto.conf' AND setting <> '100ms'") == 0;
    c.note("wal_retrieve_retry_interval = 100ms", {{"where", std::string(side_name(side))}, {"was", s->value("SHOW wal_retrieve_retry_interval")}, {"undo", "ALTER SYSTEM RESET"}});
    c.remember(key("tuned." + std::string(side_name(side))), ours ? Json("reset") : Json(s->value("SHOW wal_retrieve_retry_interval")));
  }
  s->exec("ALTER SYSTEM SET wal_retrieve_retry_interval = '100ms'");
  s->exec("SELECT pg_reload_conf()");
}

void PostgresStore::untune(StoreContext& c, Side side) {
  Json was = c.recall(key("tuned." + std::string(side_name(side))));
  if (!was.is_string()) return;
  auto s = session(c, side, server(side).admin_database);
  if (was == "reset")
    s->exec("ALTER SYSTEM RESET wal_retrieve_retry_interval");
  else
    s->exec("ALTER SYSTEM SET wal_retrieve_retry_interval = " + pg_literal(was.get<std::string>()));
  s->exec("SELECT pg_reload_conf()");
}

void PostgresStore::install_fence(StoreContext& c, PgSession& s, Side side, const std::vector<PgTable>& tables, bool refusing) {
  c.note("schema rehome, fence triggers, event triggers", {{"where", s.address().label}, {"tables", tables.size()}});
  std::string where = pgsql::who_serves(other(side));
  s.exec("CREATE SCHEMA IF NOT EXISTS rehome; GRANT USAGE ON SCHEMA rehome TO public");
  s.exec("CREATE TABLE IF NOT EXISTS rehome.marker(token text PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())");
  s.exec("CREATE TABLE IF NOT EXISTS rehome.ddl_log(n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL DEFAULT "
         "clock_timestamp(), who text NOT NULL DEFAULT session_user, tag text NOT NULL, object text, rewritten oid, xact xid8 NOT NULL DEFAULT pg_current_xact_id())");
  if (s.number("SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'rehome' AND p.proname = 'fence'") == 0)
    s.exec(pgsql::fence_function(refusing, where));
  s.exec(pgsql::ddl_function(config_.postgres.ddl == PostgresConfig::Ddl::block && side == Side::source));
  if (s.number("SELECT count(*) FROM pg_trigger WHERE tgname = 'rehome_log'") == 0)
    s.exec("CREATE TRIGGER rehome_log BEFORE INSERT ON rehome.ddl_log FOR EACH STATEMENT EXECUTE FUNCTION rehome.ddl_logged(); ALTER TABLE rehome.ddl_log ENABLE ALWAYS TRIGGER rehome_log");
  if (s.number("SELECT count(*) FROM pg_event_trigger WHERE evtname = 'rehome_ddl'") == 0)
    s.exec("CREATE EVENT TRIGGER rehome_ddl ON ddl_command_end EXECUTE FUNCTION rehome.ddl(); ALTER EVENT TRIGGER rehome_ddl ENABLE ALWAYS");
  if (s.number("SELECT count(*) FROM pg_event_trigger WHERE evtname = 'rehome_drop'") == 0)
    s.exec("CREATE EVENT TRIGGER rehome_drop ON sql_drop EXECUTE FUNCTION rehome.ddl(); ALTER EVENT TRIGGER rehome_drop ENABLE ALWAYS");
  s.exec(pgsql::rewrite_function());
  if (s.number("SELECT count(*) FROM pg_event_trigger WHERE evtname = 'rehome_rewrite'") == 0)
    s.exec("CREATE EVENT TRIGGER rehome_rewrite ON table_rewrite EXECUTE FUNCTION rehome.rewritten(); ALTER EVENT TRIGGER rehome_rewrite ENABLE ALWAYS");
  // Some tables in one transaction: one a table took 40 ms each, all at once would keep writers waiting for seconds. The locks
  // come first, in one statement that waits 100 ms at most for all of them; then nothing waits any more.
  s.exec("SET deadlock_timeout = '10ms'");
  auto missing = unfenced(s, tables);
  // DROP TRIGGER waits for readers too: only where half of the pair is there.
  std::set<std::int64_t> half;
  for (auto& r : s.query("SELECT DISTINCT tgrelid FROM pg_trigger WHERE tgname IN ('rehome_fence', 'rehome_fence_t')")) half.insert(std::stoll(*r[0]));
  std::deque<std::vector<PgTable>> groups;
  for (std::size_t i = 0; i < missing.size(); i += kFenceGroup)
    groups.emplace_back(missing.begin() + static_cast<std::ptrdiff_t>(i), missing.begin() + static_cast<std::ptrdiff_t>(std::min(missing.size(), i + kFenceGroup)));
  Deadline deadline = Deadline::in(kLockPatience + Millis(20 * static_cast<std::int64_t>(tables.size())));
  while (!groups.empty()) {
    auto group = groups.front();
    groups.pop_front();
    std::string names, work;
    for (const auto& t : group) {
      names += (names.empty() ? "ONLY " : ", ONLY ") + t.full();
      if (half.contains(t.oid)) work += "; DROP TRIGGER IF EXISTS rehome_fence ON " + t.full() + "; DROP TRIGGER IF EXISTS rehome_fence_t ON " + t.full();
      work += "; " + pgsql::fence_triggers(t);
    }
    try {
      s.exec("BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL deadlock_timeout = '10ms'; SET LOCAL statement_timeout = '100ms'; LOCK TABLE " + names +
             " IN SHARE ROW EXCLUSIVE MODE; SET LOCAL statement_timeout = 0" + work + "; COMMIT");
    } catch (const PgError& e) {
      if (!s.broken()) s.exec("ROLLBACK");
      if (!pg_is_lock_failure(e.sqlstate) || deadline.passed()) throw;
      // One busy table must not hold up its neighbours: halves, and that table alone in the end.
      if (group.size() > 1) {
        auto middle = group.begin() + static_cast<std::ptrdiff_t>(group.size() / 2);
        groups.emplace_back(group.begin(), middle);
        groups.emplace_back(middle, group.end());
      } else {
        groups.push_back(group);
      }
      pg_random_wait(Millis(groups.size() > 1 ? 20 : 100));
    }
  }
  s.take_notices();
}

std::vector<PgTable> PostgresStore::unfenced(PgSession& s, const std::vector<PgTable>& tables) {
  std::set<std::int64_t> done;
  for (auto& r : s.query("SELECT tgrelid FROM pg_trigger WHERE tgname IN ('rehome_fence', 'rehome_fence_t') AND tgenabled = 'A' GROUP BY 1 HAVING count(*) = 2"))
    done.insert(std::stoll(*r[0]));
  std::vector<PgTable> missing;
  for (const auto& t : tables)
    if (!done.contains(t.oid)) missing.push_back(t);
  return missing;
}

void PostgresStore::publish(StoreContext& c, PgSession& s, const PgFlow& flow, const std::vector<PgTable>& tables) {
  // Where nothing identifies a row, or a filter asks for a column that the identity lacks, its UPDATEs fail on the publisher from the
  // moment the table is published: FULL comes first.
  std::map<std::string, std::string> filters;
  const std::string fact = key("identity", s.address().database), side(side_name(flow.publisher));
  Json was = c.recall(fact);
  if (!was.is_object()) was = Json::object();
  const Json before = was;
  for (const auto& t : tables) {
    if (t.partitioned || t.unlogged) continue;
    // The other side's dump has brought FULL here; or it was given FULL under another name.
    auto known = std::find_if(before.begin(), before.end(), [&](const Json& w) { return w.value(side, std::int64_t{0}) == t.oid; });
    if (known == before.end()) known = before.find(t.full());
    if (known != before.end()) {
      Json entry = *known;
      entry[side] = t.oid;
      was[t.full()] = entry;
    }
    std::string filter = row_filter(s, t), identity = t.identity;
    if (filter.empty() && !t.condition.empty() && s.major() >= 15)
      c.log(config_.name + ": " + s.address().label + ": " + t.full() + " of extension " + t.extension + " is followed as a whole: a publication cannot have its condition (" + t.condition + ")");
    if (!filter.empty()) {
      filters[t.full()] = filter;
      identity = s.value("SELECT CASE relreplident WHEN 'd' THEN 'DEFAULT' WHEN 'n' THEN 'NOTHING' WHEN 'i' THEN coalesce((SELECT 'USING INDEX ' || quote_ident(x.relname) FROM pg_index i "
                         "JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid AND i.indisreplident), 'NOTHING') END FROM pg_class c WHERE oid = " + std::to_string(t.oid));
    }
    if (identity.empty()) continue;
    c.note("replica identity full", {{"where", s.address().label}, {"object", t.full()}, {"undo", "REPLICA IDENTITY " + identity}});
    was[t.full()]["identity"] = identity;
    was[t.full()][side] = t.oid;
    c.remember(fact, was);
    bounded(s, t.full(), "ACCESS EXCLUSIVE", "ALTER TABLE " + t.full() + " REPLICA IDENTITY FULL");
  }
  if (was != before) c.remember(fact, was);
  auto with_filters = [&](std::vector<std::string> names) {
    for (auto& n : names)
      if (filters.contains(n)) n += filters[n];
    return join(names, ", ONLY ");
  };
  // A slot that has decoded a transaction's earlier change of a table goes on as if the table were still unpublished, in servers before
  // these: there a table joins and leaves against writers.
  const std::map<int, int> mended{{13, 130021}, {14, 140018}, {15, 150013}, {16, 160009}, {17, 170005}};
  const char* mode = mended.contains(s.major()) && s.number("SHOW server_version_num") < mended.at(s.major()) ? "SHARE ROW EXCLUSIVE" : "SHARE UPDATE EXCLUSIVE";
  auto locked = [&](const std::vector<std::string>& names, const std::string& sql) { bounded(s, join(names, ", ONLY "), mode, sql); };
  c.note("publication " + flow.publication, {{"where", s.address().label}, {"undo", "DROP PUBLICATION"}});
  std::string name = pg_identifier(flow.publication);
  std::vector<std::string> wanted{"rehome.marker"};
  for (const auto& t : tables)
    if (!t.partitioned && !t.unlogged) wanted.push_back(t.full());
  if (s.number("SELECT count(*) FROM pg_publication WHERE pubname = " + pg_literal(flow.publication)) == 0) {
    locked(wanted, "CREATE PUBLICATION " + name + " FOR TABLE ONLY " + with_filters(wanted));
    return;
  }
  // Only what differs: each table named is locked, and a table that a vacuum works on keeps us waiting.
  auto have = published(s, flow);
  std::vector<std::string> more, less;
  for (const auto& t : wanted)
    if (!std::erase(have, t)) more.push_back(t);
  less = have;
  if (!more.empty()) locked(more, "ALTER PUBLICATION " + name + " ADD TABLE ONLY " + with_filters(more));
  if (!less.empty()) locked(less, "ALTER PUBLICATION " + name + " DROP TABLE ONLY " + join(less, ", ONLY "));
}

std::vector<std::string> PostgresStore::published(PgSession& s, const PgFlow& flow) {
  std::vector<std::string> all;
  for (auto& r : s.query("SELECT n.nspname, c.relname FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid "
                         "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = " + pg_literal(flow.publication)))
    all.push_back(*r[0] == "rehome" ? "rehome." + *r[1] : pg_identifier(*r[0]) + "." + pg_identifier(*r[1]));
  return all;
}

std::string PostgresStore::not_followed(PgSession& s, const PgFlow& flow, const std::vector<PgTable>& tables) {
  std::set<std::string> all, names;
  for (const auto& name : published(s, flow)) all.insert(name);
  for (const auto& t : tables)
    if (!t.partitioned && !t.unlogged && !all.contains(t.full())) names.insert(t.full());
  for (const auto& t : unfenced(s, tables)) names.insert(t.full());
  return first_few({names.begin(), names.end()});
}

std::string PostgresStore::socket_directory(StoreContext& c, Side side) {
  std::string fact = key("socket_directory." + std::string(side_name(side)));
  Json known = c.recall(fact);
  if (known.is_string()) return known.get<std::string>();
  std::string seed = c.at(side).state() + "\n" + tag_;
  char hex[17];
  std::snprintf(hex, sizeof hex, "%016llx", static_cast<unsigned long long>(XXH64(seed.data(), seed.size(), 2)));
  Outcome o = c.at(side).exec_ok({.argv = {"sh", "-c", "if [ -w /var/lib ]; then echo /var/lib; else echo /tmp; fi"}});
  std::string dir = std::string(trim(o.out)) + "/rehome-pg-" + hex;
  c.remember(fact, dir);
  return dir;
}

// The subscriber's server reaches the publisher's through both agents: a socket beside it, the link, a service over there.
void PostgresStore::open_path(StoreContext& c, const std::string& database, const PgFlow& flow) {
  Site& there = c.at(flow.publisher);
  Site& here = c.at(flow.subscriber());
  there.call("service.set", {{"name", flow.service}, {"to", server_address(flow.publisher)}, {"as_user", server(flow.publisher).os_user}});
  auto subscriber = session(c, flow.subscriber(), database);
  const std::string data = data_directory(*subscriber);
  Outcome owner = here.exec({.argv = {"stat", "-c", "%u", data}}, Deadline::in(Millis(10000)));
  if (!owner.ok())
    throw Error(Code::config, here.label() + ": the account of the PostgreSQL server is not known, for its data directory cannot be seen: " + std::string(trim(owner.err)),
                "the agent must run on the server's own host, and see that directory: mount it there under the same path");
  const std::string account(trim(owner.out));
  // The server's account must reach the socket, and the agent's state is closed to it. Nobody else may: over there the service
  // connects as the account that the configuration names, which is a superuser's.
  std::string dir = socket_directory(c, flow.subscriber());
  c.note("socket directory " + dir, {{"where", here.label()}, {"undo", "removed"}});
  here.exec_ok({.argv = {"sh", "-c", R"(mkdir -m 700 "$1" 2>/dev/null; [ -d "$1" ] && [ ! -L "$1" ] || exit 1
own=$(stat -c %u "$1") me=$(id -u)
[ "$own" = "$me" ] || [ "$own" = "$2" ] || exit 1
if [ "$me" = 0 ]; then chown "$2" "$1" && chmod 700 "$1"; elif [ "$me" = "$2" ]; then chmod 700 "$1"; else chmod 711 "$1"; fi)", "sh", dir, account}},
               Deadline::in(Millis(10000)), ("making " + dir).c_str());
  here.call("listen.set", {{"name", flow.listener}, {"at", "unix:" + dir + "/.s.PGSQL.5432"}, {"mode", 0666}, {"account", std::stoll(account)}, {"service", flow.service}});
  // In a container, on another host, or with a /tmp of its own the server does not see it, and would say so only when everything is copied.
  std::string seen;
  try {
    if (subscriber->value("SELECT size FROM pg_stat_file(" + pg_literal(dir + "/.s.PGSQL.5432") + ", true)").empty()) seen = "it is not there for it";
  } catch (const PgError& e) {
    if (e.code == Code::unreachable) throw;
    seen = e.message;
  }
  if (!seen.empty())
    throw Error(Code::config, here.label() + ": the PostgreSQL server does not see the agent's directory " + dir + ", through which it would follow: " + seen,
                "the agent must run on the server's own host, and the server must see that directory: mount it into a container under the same path; where its unit has PrivateTmp, run the agent as root, which uses /var/lib");
  std::string password = secret(flow.publisher, database);
  if (!password.empty()) {
    // In a file of the server's account: in the connection string it would be in the log, pg_subscription and pg_stat_activity.
    std::string file = dir + "/pgpass";
    here.call("put", {{"path", file}, {"content", passfile_line(password)}, {"mode", 0600}});
    here.exec_ok({.argv = {"chown", account, file}});
  }
}

std::string PostgresStore::connection_string(StoreContext& c, const std::string& database, const PgFlow& flow, int subscriber_major) {
  const PostgresServer& publisher = server(flow.publisher);
  std::string dir = socket_directory(c, flow.subscriber());
  std::string text = "host=" + pg_conninfo_value(dir) + " port=5432 user=" + pg_conninfo_value(publisher.user) + " dbname=" + pg_conninfo_value(database) +
                     " keepalives=0 application_name=" + pg_conninfo_value(flow.subscription);
  if (publisher.password.from != SecretRef::From::none) text += " passfile=" + pg_conninfo_value(dir + "/pgpass");
  // Rows are text on their way. A subscriber from 15 on says so itself: else the publisher writes as its server, database and role are set, and
  // the subscriber reads other dates, intervals and floats.
  if (subscriber_major < 15) text += " options=" + pg_conninfo_value("-c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=3");
  return text;
}

void PostgresStore::subscribe(StoreContext& c, const std::string& database, const PgFlow& flow, bool enabled) {
  auto s = session(c, flow.subscriber(), database);
  std::string name = pg_identifier(flow.subscription);
  auto there = s->query("SELECT subenabled, subslotname IS NOT NULL FROM pg_subscription WHERE subname = " + pg_literal(flow.subscription) +
                        " AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())");
  if (!there.empty() && (*there[0][1] != "t" || (!enabled && *there[0][0] != "t"))) {
    // A disabled one cannot be refreshed, and one that was prepared before a switch that backed out may not know every table: made
    // again. It has applied nothing: where one that has was disabled, its origin says from where it goes on.
    s->exec("ALTER SUBSCRIPTION " + name + " SET (slot_name = NONE)");
    s->exec("DROP SUBSCRIPTION " + name);
    there.clear();
  }
  if (there.empty()) {
    c.note("subscription " + flow.subscription, {{"where", s->address().label}, {"undo", "DROP SUBSCRIPTION"}});
    s->exec("CREATE SUBSCRIPTION " + name + " CONNECTION " + pg_literal(connection_string(c, database, flow, s->major())) + " PUBLICATION " +
            pg_identifier(flow.publication) + " WITH (copy_data = false, create_slot = false, enabled = false, slot_name = " + pg_literal(flow.slot) +
            // As before 16: else rows are written as their table's owner, whom row security and revoked rights may refuse them.
            (s->major() >= 16 ? ", run_as_owner = true)" : ")"));
  } else {
    if (enabled) s->exec("ALTER SUBSCRIPTION " + name + " ENABLE");   // a disabled one cannot be refreshed
    // It knows every table already, or that one has still to be copied: never counted as if it were.
    s->exec("ALTER SUBSCRIPTION " + name + " REFRESH PUBLICATION WITH (copy_data = true)");
  }
  if (enabled) s->exec("ALTER SUBSCRIPTION " + name + " ENABLE");
}

void PostgresStore::restore_roles(StoreContext& c) {
  if (!config_.postgres.roles) return;
  auto from = session(c, Side::source, server(Side::source).admin_database);
  auto to = session(c, Side::target, server(Side::target).admin_database);
  // A verifier is as good as a password to who wants to guess it, and a statement is judged for the log as it arrives: what keeps
  // it out must have been said before.
  to->exec(pg_say_nothing());
  Json made = c.recall(key("roles"));
  if (!made.is_array()) made = Json::array();
  std::set<std::string> there, known, ending;
  for (auto& r : to->query("SELECT rolname, rolvaliduntil FROM pg_roles")) {
    there.insert(*r[0]);
    if (r[1]) ending.insert(*r[0]);
  }
  // Those that were there before the run keep what they have. One that an interrupted try has made may lack anything.
  for (const auto& r : there)
    if (std::find(made.begin(), made.end(), Json(r)) == made.end()) known.insert(r);
  auto rows = from->query(
      "SELECT rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin, rolreplication, rolbypassrls, rolconnlimit, rolpassword, "
      "rolvaliduntil FROM pg_authid WHERE rolname NOT LIKE 'pg\\_%' ORDER BY oid");
  for (auto& r : rows) {
    if (known.contains(*r[0])) continue;
    bool again = there.contains(*r[0]);
    auto flag = [&](std::size_t i, const char* word) { return std::string(*r[i] == "t" ? " " : " NO") + word; };
    std::string sql = (again ? "ALTER ROLE " : "CREATE ROLE ") + pg_identifier(*r[0]) + flag(1, "SUPERUSER") + flag(2, "INHERIT") + flag(3, "CREATEROLE") +
                      flag(4, "CREATEDB") + flag(5, "LOGIN") + flag(6, "REPLICATION") + flag(7, "BYPASSRLS") + " CONNECTION LIMIT " + *r[8];
    if (r[10] || ending.contains(*r[0])) sql += " VALID UNTIL " + pg_literal(r[10].value_or("infinity"));
    if (!again) {
      c.note("role " + *r[0], {{"where", "target"}, {"undo", "stays, when it owns something"}});
      if (std::find(made.begin(), made.end(), Json(*r[0])) == made.end()) made.push_back(*r[0]);
      c.remember(key("roles"), made);
    }
    to->exec(sql);
    // The stored verifier, not a password.
    if (r[9] || again) to->exec("ALTER ROLE " + pg_identifier(*r[0]) + " PASSWORD " + (r[9] ? pg_literal(*r[9]) : "NULL"));
    if (again) to->exec("ALTER ROLE " + pg_identifier(*r[0]) + " RESET ALL");
  }
  for (const auto& r : made) {
    const std::string name = r.get<std::string>();
    if (!there.contains(name) || std::any_of(rows.begin(), rows.end(), [&](const PgRow& row) { return *row[0] == name; })) continue;
    // Gone at the source. What belongs to it here may not have got its new owner yet.
    try {
      to->exec("DROP ROLE " + pg_identifier(name));
    } catch (const PgError& e) {
      if (e.sqlstate != "2BP01") throw;
      to->exec("ALTER ROLE " + pg_identifier(name) + " NOLOGIN PASSWORD NULL");
      c.log(config_.name + ": target: role " + name + " is gone at the source, and stays, without login, for objects depend on it");
    }
  }
  // Who granted it is us there, so several grants of one membership become the sum of them.
  const bool options = from->major() >= 16 && to->major() >= 16;
  auto memberships = [&](PgSession& at) {
    std::map<std::pair<std::string, std::string>, std::vector<std::string>> all;
    for (auto& r : at.query(std::string("SELECT b.rolname, m.rolname, bool_or(a.admin_option)") + (options ? ", bool_or(a.inherit_option), bool_or(a.set_option)" : "") +
                            " FROM pg_auth_members a JOIN pg_roles b ON b.oid = a.roleid JOIN pg_roles m ON m.oid = a.member WHERE m.rolname NOT LIKE 'pg\\_%' GROUP BY 1, 2"))
      for (std::size_t i = 2; i < r.size(); i++) all[{*r[0], *r[1]}].push_back(*r[i] == "t" ? "TRUE" : "FALSE");
    return all;
  };
  const auto wanted = memberships(*from), have = memberships(*to);
  for (const auto& [m, is] : have)
    if (auto at = wanted.find(m); !known.contains(m.second) && (at == wanted.end() || at->second != is)) to->exec("REVOKE " + pg_identifier(m.first) + " FROM " + pg_identifier(m.second));
  for (const auto& [m, is] : wanted) {
    if (auto at = have.find(m); at != have.end() && (known.contains(m.second) || at->second == is)) continue;
    to->exec("GRANT " + pg_identifier(m.first) + " TO " + pg_identifier(m.second) +
             (options ? " WITH ADMIN " + is[0] + ", INHERIT " + is[1] + ", SET " + is[2] : is[0] == "TRUE" ? " WITH ADMIN OPTION" : ""));
  }
  // Of all roles: what the target has set by itself stays, for it is its other databases' too.
  const std::string of_all = "SELECT unnest(setconfig) FROM pg_db_role_setting WHERE setdatabase = 0 AND setrole = 0";
  auto setting = [](const PgRow& r) { return r[0]->substr(0, r[0]->find('=')); };
  Json ours = c.recall(key("settings_of_all"));
  if (!ours.is_array()) ours = Json::array();
  const Json before = ours;
  auto is_ours = [&](const std::string& name) { return std::find(before.begin(), before.end(), Json(name)) != before.end(); };
  std::set<std::string> own;
  for (auto& r : to->query(of_all))
    if (!is_ours(setting(r))) own.insert(setting(r));
  for (const auto& name : before) to->exec("ALTER ROLE ALL RESET " + pg_identifier(name.get<std::string>()));
  for (auto& r : from->query(of_all)) {
    if (own.contains(setting(r))) continue;
    if (!is_ours(setting(r))) {
      c.note("setting " + setting(r) + " of all roles", {{"where", "target"}, {"undo", "ALTER ROLE ALL RESET"}});
      ours.push_back(setting(r));
      c.remember(key("settings_of_all"), ours);
    }
    to->exec("ALTER ROLE ALL" + set_clause(*r[0]));
  }
  for (auto& r : from->query("SELECT r.rolname, unnest(s.setconfig) FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole WHERE s.setdatabase = 0"))
    if (!known.contains(*r[0])) to->exec("ALTER ROLE " + pg_identifier(*r[0]) + set_clause(*r[1]));
  to->take_notices();
}

Json PostgresStore::connection_limit(StoreContext& c, const std::string& database) {
  if (is_made(c, database)) return {};
  Json known = c.recall(key("connection_limit", database));
  if (known.is_null()) {
    auto rows = session(c, Side::target, server(Side::target).admin_database)->query("SELECT datconnlimit FROM pg_database WHERE datname = " + pg_literal(database));
    if (rows.empty()) return {};
    known = std::stoll(*rows[0][0]);
    c.remember(key("connection_limit", database), known);
  }
  return known;
}

bool PostgresStore::is_made(StoreContext& c, const std::string& database) {
  Json made = c.recall(key("made"));
  return made.is_array() && std::find(made.begin(), made.end(), Json(database)) != made.end();
}

void PostgresStore::create_database(StoreContext& c, const std::string& database) {
  auto from = session(c, Side::source, server(Side::source).admin_database);
  auto to = session(c, Side::target, server(Side::target).admin_database);
  auto row = from->query("SELECT pg_encoding_to_char(encoding), datcollate, datctype, pg_get_userbyid(datdba), datconnlimit, oid FROM pg_database WHERE datname = " +
                         pg_literal(database));
  if (row.empty())
    throw Error(Code::config, "source: database " + database + " does not exist", "correct databases: in rehome.yaml");
  auto& r = row[0];
  if (to->number("SELECT count(*) FROM pg_database WHERE datname = " + pg_literal(database)) == 0) {
    c.note("database " + database, {{"where", "target"}, {"undo", "DROP DATABASE"}});
    Json made = c.recall(key("made"));
    if (!made.is_array()) made = Json::array();
    made.push_back(database);
    c.remember(key("made"), made);
    to->exec("CREATE DATABASE " + pg_identifier(database) + " TEMPLATE template0 ENCODING " + pg_literal(*r[0]) + " LC_COLLATE " + pg_literal(*r[1]) +
             " LC_CTYPE " + pg_literal(*r[2]) + locale_provider(*from, *to, database) + " OWNER " + pg_identifier(*r[3]) + " CONNECTION LIMIT 0");
  }
  connection_limit(c, database);
  carry_database(c, database);
}

void PostgresStore::carry_database(StoreContext& c, const std::string& database) {
  auto from = session(c, Side::source, server(Side::source).admin_database);
  auto to = session(c, Side::target, server(Side::target).admin_database);
  const std::string name = pg_identifier(database), here = " d.datname = " + pg_literal(database);
  const bool made = is_made(c, database);
  auto both = [&](const std::string& sql) { return std::pair(from->query(sql), to->query(sql)); };
  auto whose = [&](const PgRow& r) { return (r[0]->empty() ? "ALTER DATABASE " + name : "ALTER ROLE " + pg_identifier(*r[0]) + " IN DATABASE " + name); };
  if (auto [owner, has] = both("SELECT pg_get_userbyid(d.datdba) FROM pg_database d WHERE" + here); made && owner != has) to->exec("ALTER DATABASE " + name + " OWNER TO " + pg_identifier(owner.at(0)[0].value_or("")));
  if (auto [settings, has] = both("SELECT coalesce(r.rolname, ''), unnest(s.setconfig) FROM pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase LEFT JOIN pg_roles r ON r.oid = s.setrole WHERE" + here + " ORDER BY 1"); settings != has) {
    if (made)
      for (auto& r : has) to->exec(whose(r) + " RESET ALL");
    for (auto& r : settings) to->exec(whose(r) + set_clause(*r[1]));
  }
  const std::string grantee = "CASE WHEN x.grantee = 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END";
  if (auto [rights, has] = both("SELECT " + grantee + ", x.privilege_type, x.is_grantable FROM pg_database d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x WHERE" + here + " ORDER BY 1, 2"); rights != has) {
    for (auto& r : has)
      if (made || *r[0] == "public") to->exec("REVOKE ALL ON DATABASE " + name + " FROM " + *r[0] + " CASCADE");
    for (auto& r : rights) to->exec("GRANT " + *r[1] + " ON DATABASE " + name + " TO " + *r[0] + (*r[2] == "t" ? " WITH GRANT OPTION" : ""));
  }
  if (auto [comment, has] = both("SELECT shobj_description(d.oid, 'pg_database') FROM pg_database d WHERE" + here); comment != has && (made || !has.at(0)[0]))
    to->exec("COMMENT ON DATABASE " + name + " IS " + (comment.at(0)[0] ? pg_literal(*comment[0][0]) : "NULL"));
}

// Owner and rights of schema public, which its own dump leaves out where they are as initdb of its major makes them: 15 makes other ones. A
// role that is not there is left out: before 14 there is none for whoever owns the database, who takes its place.
void PostgresStore::carry_public(StoreContext& c, const std::string& database) {
  auto from = session(c, Side::source, database), to = session(c, Side::target, database);
  std::set<std::string> roles{"PUBLIC"};
  for (auto& r : to->query("SELECT rolname FROM pg_roles")) roles.insert(*r[0]);
  const std::string owner = to->value("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()");
  auto role = [&](const std::optional<std::string>& r) { return *r == "pg_database_owner" && !roles.contains(*r) ? owner : *r; };
  auto rights = [&](PgSession& at) {
    auto rows = at.query("SELECT CASE WHEN x.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(x.grantee) END, x.privilege_type, x.is_grantable, pg_get_userbyid(n.nspowner) FROM pg_namespace n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) x WHERE n.nspname = 'public'");
    for (auto& r : rows) r[0] = role(r[0]), r[3] = role(r[3]);
    std::erase_if(rows, [&](const PgRow& r) { return !roles.contains(*r[0]); });
    std::sort(rows.begin(), rows.end());
    return rows;
  };
  auto name = [](const std::string& r) { return r == "PUBLIC" ? r : pg_identifier(r); };
  const auto wanted = rights(*from);
  auto have = rights(*to);
  if (wanted.empty() || have.empty() || wanted == have) return;
  if (wanted[0][3] != have[0][3] && roles.contains(*wanted[0][3])) to->exec("ALTER SCHEMA public OWNER TO " + pg_identifier(*wanted[0][3]));
  for (auto& r : rights(*to)) to->exec("REVOKE ALL ON SCHEMA public FROM " + name(*r[0]) + " CASCADE");
  for (auto& r : wanted) to->exec("GRANT " + *r[1] + " ON SCHEMA public TO " + name(*r[0]) + (*r[2] == "t" ? " WITH GRANT OPTION" : ""));
}

void PostgresStore::prepare_source(StoreContext& c, const std::string& database) {
  auto s = session(c, Side::source, database);
  auto list = tables(*s);
  install_fence(c, *s, Side::source, list, false);
  publish(c, *s, flow(database, Side::source), list);
}

void PostgresStore::prepare(StoreContext& c) {
  auto names = databases(c);
  c.remember(key("databases"), names);
  tune(c, Side::source);
  tune(c, Side::target);
  restore_roles(c);
  for (const auto& database : names) {
    if (c.cancelled) throw Error(Code::interrupted, "stopped while preparing " + database);
    prepare_database(c, database);
  }
}

void PostgresStore::prepare_database(StoreContext& c, const std::string& database) {
  create_database(c, database);
  prepare_source(c, database);
  open_path(c, database, flow(database, Side::source));
}

}  // namespace rehome
