// What breaks a PostgreSQL migration before it starts, and what it will cost. Reads only.
#include <algorithm>
#include <set>
#include <sstream>

#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/clients.h"
#include "stores/postgres/dump.h"
#include "stores/postgres/large_objects.h"
#include "stores/postgres/postgres.h"

namespace rehome {
namespace {

class Findings {
 public:
  explicit Findings(std::string object) : object_(std::move(object)) {}
  void error(const char* id, const std::string& object, const std::string& message, const std::string& mend, bool restart = false) {
    all.push_back({Finding::Level::error, std::string("postgres.") + id, object_ + object, message, mend, restart});
  }
  void warn(const char* id, const std::string& object, const std::string& message, const std::string& mend) {
    all.push_back({Finding::Level::warning, std::string("postgres.") + id, object_ + object, message, mend});
  }
  void note(const char* id, const std::string& object, const std::string& message) {
    all.push_back({Finding::Level::note, std::string("postgres.") + id, object_ + object, message, ""});
  }
  std::vector<Finding> all;

 private:
  std::string object_;
};

std::string names(const std::vector<PgRow>& rows) {
  std::vector<std::string> all;
  for (const auto& r : rows) all.push_back(r[0].value_or(""));
  return first_few(std::move(all));
}

// WITH RECURSIVE part(col, of, type): the columns of the tables with these oids, and what types their values are made of: a domain has its
// base type's, an array its elements', a row its columns'.
std::string parts_of_columns(const std::string& oids) {
  return R"(
      WITH RECURSIVE part(col, of, type) AS (
        SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) || '.' || quote_ident(a.attname), a.atttypid, a.atttypid FROM pg_class c
          JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped WHERE c.oid IN ()" + oids + R"()
        UNION SELECT part.col, part.of, more.type FROM part JOIN pg_type t ON t.oid = part.type, LATERAL (
          SELECT t.typbasetype WHERE t.typtype = 'd' UNION ALL SELECT t.typelem WHERE t.typelem <> 0 AND t.typlen = -1
          UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped) more(type))
      )";
}

// Ours are set in each session; a follower's walsender and workers have what server, database and role say.
std::string followers_setting(const char* name) { return std::string("(SELECT reset_val FROM pg_settings WHERE name = '") + name + "')"; }

// A sum as this server's followers write it. `setting`: of a database that is still to be made; empty: the session's own.
std::string money_as_written(PgSession& s, const std::string& setting) {
  try {
    s.exec("BEGIN; SELECT set_config('lc_monetary', " + (setting.empty() ? followers_setting("lc_monetary") : pg_literal(setting)) + ", true)");
    std::string said = s.value("SELECT (-1234567.89::numeric)::money");
    s.exec("ROLLBACK");
    return said;
  } catch (const PgError& e) {
    if (s.broken()) throw;
    s.exec("ROLLBACK");
    return e.message;
  }
}

bool known_version(PgSession& s, Side side, Findings& f) {
  std::string here(side_name(side)), version = "PostgreSQL " + s.value("SHOW server_version");
  if (s.major() < 13) f.error("version", here, version + " is older than 13", "update it to 13 or later first (pg_upgrade), or move it by dump and restore");
  if (s.major() > 18) f.error("version", here, version + " is newer than what this rehome knows (18)", "use a newer rehome");
  return s.major() >= 13 && s.major() <= 18;
}

void check_server(PgSession& s, Side side, std::size_t databases, std::int64_t wal_kept, Findings& f) {
  std::string here(side_name(side));
  if (s.value("SELECT rolsuper FROM pg_roles WHERE rolname = current_user") != "t")
    f.error("superuser", here, s.address().user + " is not a superuser", "connect as one: fences, event triggers and origins need it (ALTER ROLE ... SUPERUSER)");
  if (s.value("SELECT pg_is_in_recovery()") == "t") f.error("standby", here, "that server is a standby, and takes no writes", "name its primary, or make it one: SELECT pg_promote()");
  if (s.major() >= 17 && s.value("SHOW allow_alter_system") != "on")
    f.error("allow_alter_system", here, "allow_alter_system is off, and the run lowers wal_retrieve_retry_interval by ALTER SYSTEM, or a follower would wait for it after each blip of the link", "set allow_alter_system = on for the run where that server's configuration is kept, and reload it");
  if (s.value("SHOW wal_level") != "logical")
    f.error("wal_level", here, "wal_level is " + s.value("SHOW wal_level"), "ALTER SYSTEM SET wal_level = logical, then restart that server", true);
  if (s.value("SELECT '*' = ANY (regexp_split_to_array(current_setting('synchronous_standby_names'), '[[:space:],()\"]+'))") == "t")
    f.error("synchronous_standby_names", here, "synchronous_standby_names is " + s.value("SHOW synchronous_standby_names") + ": a name that fits everybody makes the run's follower a synchronous standby, which commits wait for, or take for one of yours",
            "name the standbys in it, SELECT pg_reload_conf()");
  auto limit = [&](const char* setting, std::int64_t used, std::int64_t needed) {
    std::int64_t have = s.number(std::string("SELECT current_setting('") + setting + "')::bigint");
    if (have - used < needed)
      f.error(setting, here, std::string(setting) + " is " + std::to_string(have) + ", " + std::to_string(used) + " in use, and the run needs " + std::to_string(needed),
              std::string("ALTER SYSTEM SET ") + setting + " = " + std::to_string(used + needed + 2) + ", then restart that server", true);
  };
  auto n = static_cast<std::int64_t>(databases);
  limit("max_replication_slots", s.number("SELECT count(*) FROM pg_replication_slots") + s.number("SELECT count(*) FROM pg_subscription"), n + 1);
  limit("max_wal_senders", s.number("SELECT count(*) FROM pg_stat_replication"), n + 1);
  limit("max_logical_replication_workers", s.number("SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL"), n);
  limit("max_worker_processes", s.number("SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL"), n + 1);
  // Until 17 the slots' limit was this one's too.
  if (s.major() >= 18) limit("max_active_replication_origins", s.number("SELECT count(*) FROM pg_replication_origin_status"), n + 1);
  // Ours has a limit of its own (limits: wal_kept), which says what it does; a slot that waits for its follower is nobody's forgotten one.
  if (std::int64_t kept = s.number("SELECT setting FROM pg_settings WHERE name = 'max_slot_wal_keep_size'"); kept >= 0 && kept << 20 < wal_kept)
    f.warn("max_slot_wal_keep_size", here, "max_slot_wal_keep_size is " + s.value("SHOW max_slot_wal_keep_size") + ", less than limits: wal_kept (" + human_bytes(wal_kept) + "): the server gives the run's slots up before, and the database must be copied again or has no way back",
           "ALTER SYSTEM SET max_slot_wal_keep_size = -1 for the run (wal_kept is the limit then), SELECT pg_reload_conf()");
  if (s.major() >= 18 && s.value("SELECT setting FROM pg_settings WHERE name = 'idle_replication_slot_timeout'") != "0")
    f.warn("idle_replication_slot_timeout", here, "idle_replication_slot_timeout is " + s.value("SHOW idle_replication_slot_timeout") + ": the server gives up a slot that no follower has used for that long, as during the copy, before the switch, and while the other host is away",
           "ALTER SYSTEM SET idle_replication_slot_timeout = 0 for the run, SELECT pg_reload_conf()");
  auto prepared = s.query("SELECT gid FROM pg_prepared_xacts");
  if (!prepared.empty())
    f.error("prepared", here, "pending prepared transactions: " + names(prepared) + "; the fence waits for them for ever", "COMMIT PREPARED or ROLLBACK PREPARED them");
  auto vacuum = s.query("SELECT datname || ': ' || query FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' AND query LIKE '%to prevent wraparound%'");
  if (!vacuum.empty()) f.warn("wraparound", here, "an anti-wraparound autovacuum runs and never yields to a lock: " + names(vacuum), "wait for its end before the switch");
}

// Of all databases at once: the cut locks every table, and what comes before a table's rows is made at the target in one transaction a database.
void check_locks(PgSession& s, Side side, std::int64_t needed, const char* why, Findings& f) {
  auto have = s.number("SELECT current_setting('max_locks_per_transaction')::bigint * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint)");
  if (needed <= have) return;
  const std::int64_t each = s.number("SHOW max_locks_per_transaction");
  f.error("max_locks_per_transaction", std::string(side_name(side)), std::string(why) + " take " + std::to_string(needed) + " locks at once, and the lock table holds " + std::to_string(have),
          "ALTER SYSTEM SET max_locks_per_transaction = " + std::to_string(each * needed / std::max<std::int64_t>(1, have) + each + 1) + ", then restart that server", true);
}

void check_database(PgSession& s, const std::vector<PgTable>& tables, int target_major, Findings& f) {
  std::string where = "source: database " + s.address().database;
  std::string ids;
  std::int64_t unidentified = 0;
  for (const auto& t : tables) {
    if (t.partitioned || t.unlogged) continue;
    if (!t.identity.empty()) unidentified++;
    if (!t.has_key) ids += (ids.empty() ? "" : ",") + std::to_string(t.oid);
  }
  if (unidentified)
    f.note("keyless", where, counted(unidentified, "table") + " without a usable replica identity (no primary key, a deferrable one, or REPLICA IDENTITY NOTHING): they get FULL for the run; updates of large ones are slow to follow");
  if (!ids.empty()) {
    // Rows are compared by the equality of their columns' types.
    auto bad = s.query(parts_of_columns(ids) + R"(SELECT DISTINCT part.col || ' (' || format_type(part.of, NULL) || ')' FROM part JOIN pg_type t ON t.oid = part.type
       WHERE t.typtype = 'b' AND NOT (t.typelem <> 0 AND t.typlen = -1)
         AND NOT EXISTS (SELECT 1 FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod WHERE m.amname IN ('btree', 'hash') AND o.opcdefault
           AND (o.opcintype = t.oid OR EXISTS (SELECT 1 FROM pg_cast k WHERE k.castsource = t.oid AND k.casttarget = o.opcintype AND k.castmethod = 'b' AND k.castcontext = 'i'))) ORDER BY 1)");
    if (!bad.empty())
      f.error("identity_full", where, "without a key, and with a column that has no equality operator, so that a changed row cannot be found: " + names(bad),
              "add a primary key to these tables");
  }
  if (std::string told = PostgresStore::told_by_generated(s, tables, target_major); !told.empty())
    f.error("generated_identity", where, "replication does not send generated columns, and what tells these tables' rows apart holds some, so that their UPDATEs and DELETEs would fail here or stop the follower: " + told, PostgresStore::kMendGenerated);
  // The server starts one by itself when the age is reached; what is small is done before anybody waits.
  auto aged = s.query("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' "
                      "AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND pg_relation_size(c.oid) > 8000000 AND (age(c.relfrozenxid) > 0.95 * current_setting('autovacuum_freeze_max_age')::bigint OR "
                      "mxid_age(c.relminmxid) > 0.95 * current_setting('autovacuum_multixact_freeze_max_age')::bigint) ORDER BY pg_relation_size(c.oid) DESC");
  if (!aged.empty())
    f.warn("wraparound", where, "an anti-wraparound autovacuum, which never yields to a lock, is due or nearly so: " + names(aged), "VACUUM (FREEZE) them before the switch");
  std::int64_t unlogged = 0, unlogged_bytes = 0;
  for (const auto& t : tables)
    if (t.unlogged && !t.partitioned) unlogged++, unlogged_bytes += t.bytes;
  if (unlogged) f.warn("unlogged", where, std::to_string(unlogged) + " unlogged tables, " + human_bytes(unlogged_bytes) + ": replication does not carry them, they are copied inside the pause", "make them logged, or empty, or accept the time");
  auto children = s.query("SELECT DISTINCT c.oid::regclass::text || ' (to ' || p.oid::regclass::text || ')' FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_class p ON p.oid = k.confrelid "
                          "WHERE k.contype = 'f' AND c.relpersistence = 'u' AND p.relpersistence = 'p' ORDER BY 1");
  if (!children.empty())
    f.warn("unlogged_children", where, "unlogged tables with a foreign key to a logged one: " + names(children) + "; where that one is emptied by TRUNCATE ... CASCADE, the follower, which is told of the logged table alone, is refused at the other side and stands still",
           "make them logged (ALTER TABLE ... SET LOGGED), or drop these foreign keys until rehome complete, or use no TRUNCATE ... CASCADE there");
  auto lo = s.query("SELECT count(*), " + large_object_bytes() + " FROM pg_largeobject_metadata");
  if (*lo[0][0] != "0")
    f.warn("large_objects", where, *lo[0][0] + " large objects, about " + human_bytes(std::stoll(*lo[0][1])) + ": compared inside the pause, and the pages that changed since the pass before it copied. From the cut on nobody has the right to write them, and transactions that are open then are ended; no fence stops a superuser, or a function that runs as one, from writing them after it",
           "accept the time; the plan prices it");
  // Our tables would be in such a publication, and a server that follows it has none of them: it stops at their first row, and its slot
  // keeps WAL without an end. Who follows what, the slot does not say.
  auto everything = s.query("SELECT quote_ident(pubname) FROM pg_publication WHERE puballtables ORDER BY 1"),
       subscribers = s.query("SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'logical' AND plugin = 'pgoutput' AND database = current_database() AND slot_name NOT LIKE 'rehome\\_%' ORDER BY 1");
  if (!everything.empty() && !subscribers.empty())
    f.error("all_tables", where, "a publication FOR ALL TABLES publishes the tables that rehome makes here too, and a subscriber, which does not have them, stops at their first row while its slot keeps all WAL: publication " +
                                     names(everything) + ", slot " + names(subscribers),
            "give that publication its tables by name (DROP PUBLICATION, CREATE PUBLICATION ... FOR TABLE ..., then ALTER SUBSCRIPTION ... REFRESH PUBLICATION), or drop the subscriber first");
  auto foreign_slots = s.query("SELECT slot_name || coalesce(' (' || plugin || ')', '') FROM pg_replication_slots WHERE slot_type = 'logical' AND database = current_database() AND slot_name NOT LIKE 'rehome\\_%'");
  if (!foreign_slots.empty())
    f.warn("foreign_slots", where, "other programs follow this database: " + names(foreign_slots) + "; they will not follow to the target by themselves", "plan their move: they must start again on the target");
  for (const auto& t : triggers_on_replicated_rows(s)) f.error(t.id, where, t.what, t.mend);
  auto subs = s.query("SELECT subname FROM pg_subscription WHERE subenabled AND subname NOT LIKE 'rehome\\_%' AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())");
  if (!subs.empty())
    f.error("subscriptions", where, "this database subscribes elsewhere: " + names(subs) + "; what an apply worker writes passes the fence", "disable them for the switch (ALTER SUBSCRIPTION ... DISABLE), or move their publisher first");
  auto left = s.query("SELECT 'publication ' || quote_ident(pubname) FROM pg_publication WHERE pubname NOT LIKE 'rehome\\_%' UNION ALL "
                      "SELECT 'disabled subscription ' || quote_ident(subname) FROM pg_subscription WHERE NOT subenabled AND subname NOT LIKE 'rehome\\_%' AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) UNION ALL "
                      "SELECT 'comments on ' || count(*) || ' large objects' FROM pg_description WHERE classoid = 'pg_largeobject'::regclass HAVING count(*) > 0 ORDER BY 1");
  if (!left.empty()) f.note("not_carried", where, "make again on the target what is not carried: " + names(left));
  auto foreign_tables = s.query("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'f' LIMIT 20");
  if (!foreign_tables.empty()) f.note("foreign_tables", where, "foreign tables keep pointing where they point: " + names(foreign_tables));
}

// Encoding, LC_COLLATE, LC_CTYPE, and what the order of words is taken from: another provider sorts otherwise by the same LC_COLLATE.
std::string locale_of(PgSession& s) {
  std::string provider = s.major() < 15 ? "'libc'"
                                        : "CASE datlocprovider WHEN 'i' THEN 'icu' WHEN 'b' THEN 'builtin' ELSE 'libc' END || coalesce(' ' || " + std::string(s.major() >= 17 ? "datlocale" : "daticulocale") + ", '')" +
                                              (s.major() >= 16 ? " || coalesce(' with rules ' || daticurules, '')" : "");
  return s.value("SELECT pg_encoding_to_char(encoding) || ' ' || datcollate || ' ' || datctype || ' ' || " + provider + " FROM pg_database WHERE datname = current_database()");
}

// What words are compared by must be at the target before its database is made. Its own library is asked: a name that it does
// not know fails CREATE DATABASE and CREATE COLLATION.
void check_locales(StoreContext& c, PgSession& s, PgSession& target, const std::string& database, Findings& f) {
  auto simple = [](const std::string& v) {
    std::string out;
    for (char ch : v)
      if (ch != '-') out += static_cast<char>(std::tolower(static_cast<unsigned char>(ch)));
    return out;
  };
  std::set<std::string> known{"c", "posix", "c.utf8", "ucs_basic", ""};
  for (const auto& l : split(c.target.exec({.argv = {"sh", "-c", "locale -a 2>/dev/null"}}).out, '\n')) known.insert(simple(l));
  const std::string mend = "generate it on the target (locale-gen), then restart its PostgreSQL";
  auto row = s.query("SELECT datcollate, datctype FROM pg_database WHERE datname = current_database()")[0];
  for (const auto& locale : {*row[0], *row[1] == *row[0] ? std::string() : *row[1]})
    if (!known.contains(simple(locale))) f.error("collation", "target", "locale " + locale + " of database " + database + " is not installed there", mend);
  // Made by a person: the dump makes them again, from the locale.
  for (auto& r : s.query("SELECT quote_ident(n.nspname) || '.' || quote_ident(collname), collcollate FROM pg_collation k JOIN pg_namespace n ON n.oid = k.collnamespace "
                         "WHERE n.nspname NOT IN ('pg_catalog', 'information_schema') AND k.collprovider = 'c'"))
    if (!known.contains(simple(r[1].value_or("")))) f.error("collation", "target", "locale " + r[1].value_or("") + " of collation " + *r[0] + " in database " + database + " is not installed there", mend);
  // Made by initdb from what the host had then: the dump only names them.
  std::set<std::string> there;
  for (auto& r : target.query("SELECT collname FROM pg_collation WHERE collnamespace = 'pg_catalog'::regnamespace")) there.insert(*r[0]);
  for (auto& r : s.query("SELECT DISTINCT k.collname FROM pg_attribute a JOIN pg_collation k ON k.oid = a.attcollation JOIN pg_class t ON t.oid = a.attrelid "
                         "WHERE k.collnamespace = 'pg_catalog'::regnamespace AND t.relnamespace NOT IN ('pg_catalog'::regnamespace, 'information_schema'::regnamespace) AND a.attnum > 0"))
    if (!there.contains(*r[0]))
      f.error("collation", "target", "collation " + *r[0] + ", which columns of database " + database + " use, is not known there",
              "install the locale or an ICU build on the target, then SELECT pg_import_system_collations('pg_catalog') in the database");
  if (s.major() >= 15) {
    std::string provider = s.value("SELECT datlocprovider FROM pg_database WHERE datname = current_database()");
    if ((provider == "i" && target.major() < 15) || (provider == "b" && target.major() < 17))
      f.error("locale_provider", "target", "database " + database + " uses a locale provider that PostgreSQL " + std::to_string(target.major()) + " does not have for a database",
              "take a target of PostgreSQL " + std::string(provider == "i" ? "15" : "17") + " or later");
  }
}

}  // namespace

// Its extension lives in one database of a cluster, not in those that its jobs run in, and who is to serve has jobs of its own.
void PostgresStore::check_cron(StoreContext& c, Side side, PgSession& admin, const std::vector<std::string>& databases, std::vector<Finding>& all) {
  const std::string home = admin.value("SELECT coalesce(current_setting('cron.database_name', true), '')");
  std::set<std::string> look(databases.begin(), databases.end());
  if (!home.empty()) look.insert(home);
  for (const auto& database : look) {
    if (admin.query("SELECT 1 FROM pg_database WHERE datname = $1 AND datallowconn", {database}).empty()) continue;
    auto s = session(c, side, database);
    // Who may not look is no superuser, which is a finding of its own.
    if (s->value("SELECT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'cron' AND c.relname = 'job' AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT')) "
                 "AND EXISTS (SELECT 1 FROM pg_extension WHERE extname = 'pg_cron')") != "t") continue;
    std::string jobs;
    for (const auto& name : databases) jobs += (jobs.empty() ? "" : ", ") + pg_literal(name);
    const auto count = s->number("SELECT count(*) FROM cron.job WHERE active AND database IN (" + jobs + ")");
    if (count)
      all.push_back({Finding::Level::warning, "postgres.pg_cron", config_.name + ": " + std::string(side_name(side)) + ": database " + database, "pg_cron has " + std::to_string(count) + " active jobs in databases that move; " +
                     (side == Side::source && std::find(databases.begin(), databases.end(), database) == databases.end() ? "they are kept in this database, which does not move: they stay behind, and fail after the switch" : "they would run on both sides after the copy"),
                     "cron.unschedule them on the side that does not serve, and cron.schedule_in_database them on the other after the switch"});
  }
}

std::string PostgresStore::follower_timeouts(PgSession& s) {
  std::vector<std::string> all;
  for (auto& r : s.query("SELECT name || ' = ' || reset_val || coalesce(' ' || unit, '') FROM pg_settings WHERE name IN ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout') AND reset_val <> '0' ORDER BY 1")) all.push_back(*r[0]);
  return join(all, ", ");
}

namespace {

// What the servers' own processes, which follow, take from them: none of these is ours to set.
void check_followers(PgSession& s, PgSession& t, bool made, const std::vector<PgTable>& tables, Findings& f) {
  const std::string database = s.address().database, in = " IN DATABASE " + pg_identifier(database);
  for (PgSession* at : {&s, &t}) {
    std::string said = PostgresStore::follower_timeouts(*at);
    const bool of_role = at == &t && !made;   // there is no such database yet
    if (!said.empty())
      f.warn("timeouts", std::string(side_name(at == &s ? Side::source : Side::target)) + ": database " + database, "set for " + at->address().user + ", who follows: " + said + "; where a table is copied by the server itself (rehome resume --recopy), it ends a copy that takes longer, again and again",
             "ALTER ROLE " + pg_identifier(at->address().user) + (of_role ? "" : in) + " SET " + said.substr(0, said.find(' ')) + " = 0" + (said.find(',') != std::string::npos ? ", and the others likewise" : ""));
  }
  std::string oids;
  for (const auto& table : tables)
    if (!table.partitioned && !table.unlogged) oids += (oids.empty() ? "" : ",") + std::to_string(table.oid);
  if (oids.empty()) return;
  auto money = s.query(parts_of_columns(oids) + "SELECT DISTINCT col FROM part WHERE type = 'money'::regtype ORDER BY 1");
  if (money.empty()) return;
  std::string carried;
  if (!made)
    for (auto& r : s.query("SELECT substr(v, 13) FROM pg_db_role_setting x JOIN pg_database d ON d.oid = x.setdatabase AND x.setrole = 0, unnest(x.setconfig) v WHERE d.datname = current_database() AND v LIKE 'lc\\_monetary=%'")) carried = *r[0];
  if (std::string from = money_as_written(s, ""), to = money_as_written(t, carried); from != to)
    f.error("lc_monetary", "database " + database, "columns of type money, whose values the followers write by the one server's lc_monetary and read by the other's, and these differ (" + from + " here, " + to + " there): " + names(money),
            "give both servers the same lc_monetary (ALTER SYSTEM SET lc_monetary = 'C', SELECT pg_reload_conf(); ALTER DATABASE and ALTER ROLE ... SET come before it), or make the columns numeric");
}

// What a role, a database or a role in a database has set, and the target's version does not know. `kept`: roles whose own settings stay
// as the target has them.
void check_settings(PgSession& s, PgSession& admin_target, const std::string& database, bool roles, const std::set<std::string>& kept, Findings& f) {
  auto unknown = [&](const PgRow& r) { return !(r[2] && kept.contains(*r[2])) && r[1]->find('.') == std::string::npos && admin_target.query("SELECT 1 WHERE current_setting($1, true) IS NULL", {*r[1]}).size() == 1; };
  std::vector<std::string> all, mends;
  for (auto& r : s.query("SELECT CASE WHEN x.setdatabase = 0 THEN 'ALTER ROLE ' || coalesce(quote_ident(r.rolname), 'ALL') WHEN x.setrole = 0 THEN 'ALTER DATABASE ' || quote_ident(d.datname) "
                         "ELSE 'ALTER ROLE ' || quote_ident(r.rolname) || ' IN DATABASE ' || quote_ident(d.datname) END, split_part(v, '=', 1), CASE WHEN x.setdatabase = 0 THEN r.rolname END FROM pg_db_role_setting x LEFT JOIN pg_roles r ON r.oid = x.setrole "
                         "LEFT JOIN pg_database d ON d.oid = x.setdatabase, unnest(x.setconfig) v WHERE d.datname = $1 OR x.setdatabase = 0 AND $2 ORDER BY 1, 2", {database, roles ? "t" : "f"})) {
    if (!unknown(r)) continue;
    all.push_back(*r[1]);
    mends.push_back(*r[0] + " RESET " + *r[1]);
  }
  if (!all.empty())
    f.error("settings", "source: database " + database, "settings that PostgreSQL " + std::to_string(admin_target.major()) + " does not know, and with which nothing can be made there: " + first_few(all), join(mends, "; "));
}

}  // namespace

std::vector<Finding> PostgresStore::preflight(StoreContext& c) {
  Findings f(config_.name + ": ");
  BySide<std::unique_ptr<PgSession>> admin;
  for (Side side : {Side::source, Side::target}) {
    try {
      admin[side] = session(c, side, server(side).admin_database);
    } catch (const Error& e) {
      f.all.push_back({Finding::Level::error, "postgres.connect", config_.name, e.message, e.hint});
    }
    const std::string& named = c.deployment.site[side].psql;
    // Through a shell: a program that is missing is a finding here, and no error of the agent.
    Outcome psql = c.at(side).exec({.argv = {"sh", "-c", "\"$1\" --version", "sh", named.empty() ? "psql" : named}});
    if (!psql.ok()) f.error("psql", std::string(side_name(side)), "psql is not on that host; the agent needs it to undo and to open without us", "install postgresql-client there, or name it with psql: in the site");
  }
  if (!admin.source || !admin.target) return f.all;
  // What is asked below is in the words of the versions that are known.
  bool source_known = known_version(*admin.source, Side::source, f), target_known = known_version(*admin.target, Side::target, f);
  if (!source_known || !target_known) return f.all;
  const std::vector<std::string> list = databases(c);
  check_server(*admin.source, Side::source, list.size(), c.deployment.limits.wal_kept, f);
  check_server(*admin.target, Side::target, list.size(), c.deployment.limits.wal_kept, f);
  if (admin.source->major() > admin.target->major())
    f.warn("downgrade", "target", "the target (" + std::to_string(admin.target->major()) + ") is older than the source (" + std::to_string(admin.source->major()) + "): what only the newer knows is refused while copying", "prefer the same or a newer version");

  if (PgPrograms programs = choose_pg_programs(c, admin.source->major()); programs.major) {
    // Only what is not as everybody expects is worth a line.
    if (programs.site || !programs.directory.empty()) f.note("pg_dump", programs.site ? std::string(side_name(*programs.site)) : "this machine", programs.says() + " is used: the one in PATH here does not read a source of " + std::to_string(admin.source->major()));
  } else {
    int newest = 0;
    for (std::optional<Side> where : {std::optional<Side>(), std::optional<Side>(Side::source), std::optional<Side>(Side::target)})
      for (const auto& p : find_pg_programs(c, where)) newest = std::max(newest, p.major);
    std::string needed = std::to_string(admin.source->major());
    for (const char* program : {"pg_dump", "pg_restore"})
      f.error(program, "this machine", newest ? std::string(program) + " " + std::to_string(newest) + " is the newest here and on both sites, and cannot read a source of " + needed : std::string(program) + " is installed neither here nor on a site",
              "install postgresql-client-" + needed + " or later where rehome runs, or on either site");
  }
  std::set<std::string> available;
  for (auto& r : admin.target->query("SELECT name FROM pg_available_extensions")) available.insert(*r[0]);
  std::set<std::string> there;
  for (auto& r : admin.target->query("SELECT datname FROM pg_database")) there.insert(*r[0]);
  std::set<std::string> kept;
  const Json made_roles = c.recall(key("roles"));
  for (auto& r : admin.target->query("SELECT rolname FROM pg_roles"))
    if (!made_roles.is_array() || std::find(made_roles.begin(), made_roles.end(), Json(*r[0])) == made_roles.end()) kept.insert(*r[0]);
  const bool begun = !c.recall(key("databases")).is_null();
  std::int64_t bytes = 0, table_count = 0, most_relations = 0;
  for (const auto& database : list) {
    if (admin.source->number("SELECT count(*) FROM pg_database WHERE datname = " + pg_literal(database)) == 0) {
      std::vector<std::string> known;
      for (auto& r : admin.source->query("SELECT datname FROM pg_database WHERE NOT datistemplate")) known.push_back(*r[0]);
      auto near = nearest(database, known);
      f.error("database", "source: database " + database, "it does not exist", near ? "did you mean " + *near + "?" : "correct databases: in rehome.yaml");
      continue;
    }
    auto s = session(c, Side::source, database);
    auto all = tables(*s);
    check_database(*s, all, admin.target->major(), f);
    // What lies in it is neither dumped nor copied, and goes with the end of a run. Another run's fences would be taken for this one's.
    auto require_own_schema = [&](Side side, PgSession& there) {
      if (!begun && there.number("SELECT count(*) FROM pg_namespace WHERE nspname = 'rehome'") > 0)
        f.error("schema", std::string(side_name(side)) + ": database " + database, "it has a schema rehome, which is the name of the run's own, and this run has not made it",
                "where it is another run's or was left by one, end that run there first (rehome complete --unfence-source, rehome cancel); else rename it: ALTER SCHEMA rehome RENAME TO ...");
    };
    require_own_schema(Side::source, *s);
    std::vector<PgRow> conditional;
    // With indexes and large objects, which pg_table_size is without.
    bytes += s->number("SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint FROM pg_class c WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND (c.oid >= 16384 OR c.oid IN ('pg_catalog.pg_largeobject'::regclass, 'pg_catalog.pg_largeobject_metadata'::regclass))");
    table_count += static_cast<std::int64_t>(all.size());
    // Each with its toast table, that one's index, and its sequences.
    most_relations = std::max(most_relations, s->number("SELECT count(*) FROM pg_class WHERE oid >= 16384 AND relpersistence <> 't' AND (relkind IN ('r', 'p', 'S', 'v', 'm', 'f', 't', 'c') OR relkind = 'i' AND relnamespace = 'pg_toast'::regnamespace)"));
    for (const auto& t : all) {
      if (!t.condition.empty()) conditional.push_back({t.full()});
    }
    if (int older = std::min(admin.source->major(), admin.target->major()); !conditional.empty() && older < 15)
      f.note("extension_rows", "source: database " + database, "of these tables of extensions the rows that meet the extension's own condition are moved, and the others are left to the target's version of it: " + names(conditional) +
             "; PostgreSQL " + std::to_string(older) + " follows no part of a table, so a change of the others is followed too, and they come along where rehome resume --recopy copies such a table again");
    for (auto& r : s->query("SELECT extname FROM pg_extension"))
      if (!available.contains(*r[0])) f.error("extension", "target", "extension " + *r[0] + " of database " + database + " is not installed there", "install its package on the target");
    // What lies in the database's own tablespace goes where the target's database is; what names one is refused without it.
    for (auto& r : s->query("SELECT t.spcname, string_agg(c.oid::regclass::text, ', ' ORDER BY c.oid) FROM (SELECT * FROM pg_class WHERE relkind IN ('r', 'p', 'i', 'I', 'm') AND relpersistence <> 't' ORDER BY oid) c JOIN pg_tablespace t ON t.oid = c.reltablespace "
                            "WHERE t.spcname NOT IN ('pg_default', 'pg_global') GROUP BY 1 ORDER BY 1"))
      if (admin.target->query("SELECT 1 FROM pg_tablespace WHERE spcname = $1", {*r[0]}).empty())
        f.error("tablespace", "target", "tablespace " + *r[0] + " is not there, and in database " + database + " these lie in it: " + (r[1]->size() > 200 ? r[1]->substr(0, 200) + "..." : *r[1]),
                "CREATE TABLESPACE " + pg_identifier(*r[0]) + " LOCATION '...' on the target, or move them out of it on the source");
    check_locales(c, *s, *admin.target, database, f);
    auto t = there.contains(database) ? session(c, Side::target, database) : nullptr;
    check_followers(*s, t ? *t : *admin.target, t != nullptr, all, f);
    check_settings(*s, *admin.target, database, config_.postgres.roles, kept, f);
    if (t && !begun) {
      require_own_schema(Side::target, *t);
      auto full = t->query("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S') AND n.nspname NOT IN "
                           "('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_toast%' LIMIT 20");
      if (!full.empty()) f.error("not_empty", "target: database " + database, "it is not empty: " + names(full), "drop or rename it, or correct the target");
      std::string here = locale_of(*t), wanted = locale_of(*s);
      if (here.substr(0, here.find(' ')) != wanted.substr(0, wanted.find(' ')))
        f.error("encoding", "target: database " + database, "it is there already, with " + here + ", and the source's has " + wanted, "drop it: rehome makes it as the source's is");
      else if (here != wanted)
        f.warn("locale", "target: database " + database, "it is there already, with " + here + ", and the source's has " + wanted + ": its order of words differs",
               "drop it: rehome makes it as the source's is");
    }
  }
  if (config_.postgres.roles) {
    std::string parameters = admin.source->major() >= 15 ? "SELECT DISTINCT 'rights on parameter ' || parname FROM pg_parameter_acl UNION ALL " : "";
    auto left = admin.source->query(parameters + "SELECT 'rights on tablespace ' || quote_ident(spcname) FROM pg_tablespace WHERE spcacl IS NOT NULL UNION ALL "
                                    "SELECT 'comment on role ' || quote_ident(r.rolname) FROM pg_roles r JOIN pg_shdescription d ON d.classoid = 'pg_authid'::regclass AND d.objoid = r.oid WHERE r.oid >= 16384 ORDER BY 1");
    if (!left.empty()) f.note("not_carried", "source", "make again on the target what is not carried (pg_dumpall --globals-only has it): " + names(left));
  }
  for (Side side : {Side::source, Side::target}) check_cron(c, side, *admin[side], list, f.all);
  check_locks(*admin.source, Side::source, 2 * table_count, "the tables of all databases", f);
  check_locks(*admin.target, Side::target, std::max(2 * table_count, most_relations), "the tables of all databases, or the relations of one that are made in one transaction,", f);
  std::string data = data_directory(*admin.target);
  room_.reset();
  // What cannot be seen is a finding below.
  if (Outcome seen = data.empty() || begun ? Outcome{.status = 1} : c.target.exec({.argv = {"sh", "-c", "stat -Lc %d \"$1\" && stat -fc '%a %S' \"$1\"", "sh", data}}); seen.ok()) {
    std::istringstream numbers(seen.out);
    std::int64_t device = 0, blocks = 0, block = 0;
    if (!(numbers >> device >> blocks >> block)) throw Error(Code::internal, "stat said of " + data + ": " + seen.out);
    room_ = {data, device, bytes + bytes / 2, blocks * block};
    if (room_->free < room_->needed)
      f.error("space", "target", human_bytes(room_->free) + " are free in " + data + ", and " + human_bytes(bytes) + " of tables, their indexes and large objects are to come", "make room, or move the data directory");
  }
  // A server follows the other through a socket for its own account alone, and the password for that lies in a file that this account
  // reads (prepare, open_path).
  for (Side side : {Side::source, Side::target}) {
    std::string directory = data_directory(*admin[side]);
    if (!directory.empty() && !c.at(side).exec({.argv = {"stat", directory}}).ok())
      f.error("data_directory", std::string(side_name(side)), "the server's data directory " + directory + " cannot be seen on that host, so the account that it runs as is not known", "use an account of the server's own host; where the server runs in a container, mount its data directory on the host under the same path");
    if (server(other(side)).password.from == SecretRef::From::none) continue;
    if (!directory.empty() && !c.at(side).exec({.argv = {"sh", "-c", "[ \"$(id -u)\" = 0 ] || [ -O \"$1\" ]", "sh", directory}}).ok())
      f.error("passfile", std::string(side_name(side)), "this account can give its server no file with the other server's password: it is neither root nor the account that the server runs as", "use root, or the server's account, for that site");
  }
  for (auto& finding : clients_of_source(c, config_.name, server(Side::source))) f.all.push_back(std::move(finding));
  return f.all;
}

Estimate PostgresStore::estimate(StoreContext& c) {
  Estimate e;
  BySide<std::unique_ptr<PgSession>> admin;
  for (Side side : {Side::source, Side::target}) {
    admin[side] = session(c, side, server(side).admin_database);
    e.facts[std::string(side_name(side)) + ".version"] = admin[side]->value("SHOW server_version");
    e.facts[std::string(side_name(side)) + ".system"] = admin[side]->value("SELECT system_identifier::text FROM pg_control_system()");
  }
  bool unknown = false;   // rows of a table that no ANALYZE has counted
  std::int64_t unlogged = 0, large = 0, large_bytes = 0, table_count = 0, sequence_count = 0;
  for (const auto& database : databases(c)) {
    auto s = session(c, Side::source, database);
    std::vector<std::string> schema;
    for (const auto& t : tables(*s)) {
      e.bytes += t.bytes;
      if (t.unlogged) unlogged += t.bytes;
      table_count++;
      schema.push_back(t.full() + "(" + t.columns + ")");
    }
    // They come by size, which changes by itself, and a plan must not go stale by it.
    std::sort(schema.begin(), schema.end());
    e.objects += s->number("SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class WHERE relkind = 'r' AND relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname LIKE 'pg\\_%' OR nspname = 'information_schema')");
    if (s->number("SELECT count(*) FROM pg_class WHERE relkind = 'r' AND (reltuples < 0 OR reltuples = 0 AND relpages = 0) AND pg_relation_size(oid) > 0 AND relnamespace NOT IN (SELECT oid FROM pg_namespace WHERE nspname LIKE 'pg\\_%' OR nspname = 'information_schema')") > 0)
      unknown = true;
    large += s->number("SELECT count(*) FROM pg_largeobject_metadata");
    std::int64_t in_objects = s->number("SELECT " + large_object_bytes());
    large_bytes += in_objects;
    e.bytes += in_objects;
    sequence_count += s->number("SELECT count(*) FROM pg_sequences");
    for (auto& line : left_to_copy(c, database)) e.again.push_back(std::move(line));
    e.facts["schema." + database] = s->value("SELECT md5(" + pg_literal(join(schema, ";")) + ")");
  }
  if (unknown) e.objects = -1;
  std::int64_t rate = 40'000'000;   // rows and indexes together, seen on two shared cores
  if (std::int64_t share = c.deployment.store_bandwidth(); share > 0) {
    rate = std::min(rate, share);
    e.reasons.push_back(human_bytes(share) + " a second is this store's part of limits.bandwidth; what the servers synchronise by themselves (resume --recopy) and what follows is not held to it");
  }
  e.copy = Millis(e.bytes * 1000 / rate);
  std::int64_t pause = 20 + table_count / 20 + sequence_count / 40;
  e.reasons.push_back(counted(table_count, "table") + " locked and " + counted(sequence_count, "sequence") + " read: about " + std::to_string(pause) + " ms");
  if (unlogged) {
    pause += pause_for_unlogged(unlogged).count();
    e.reasons.push_back(human_bytes(unlogged) + " in unlogged tables: copied inside the pause, about " + human_duration(pause_for_unlogged(unlogged)));
  }
  if (large) {
    // Every page is hashed, on both sides at once: 250 MB and 200,000 small objects a second, seen on two shared cores.
    std::int64_t ms = large / 200 + large_bytes / 250'000 + 15;
    pause += ms;
    e.reasons.push_back(counted(large, "large object") + ", " + human_bytes(large_bytes) + ": compared inside the pause, about " + human_duration(Millis(ms)) + "; those changed since the pass before it once more page by page, and their changed pages copied, and sessions with an open transaction ended");
  }
  e.pause = Millis(pause);
  return e;
}

}  // namespace rehome
