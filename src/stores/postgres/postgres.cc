#include "stores/postgres/postgres.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "base/text.h"
#include "config/config.h"

namespace rehome {

namespace {

// In one order, whatever the server's is.
std::vector<std::string> all_databases(PgSession& s) {
  std::vector<std::string> names;
  for (auto& row : s.query("SELECT datname FROM pg_database WHERE NOT datistemplate AND datallowconn ORDER BY datname COLLATE \"C\"")) names.push_back(*row[0]);
  return names;
}

}  // namespace

PostgresStore::PostgresStore(const StoreConfig& config, const Deployment& deployment) : config_(config) {
  std::string seed = deployment.name + "/" + config.name;
  char hex[17];
  std::snprintf(hex, sizeof hex, "%08x", static_cast<unsigned>(XXH64(seed.data(), seed.size(), 0) & 0xffffffffu));
  tag_ = hex;
}

std::string PostgresStore::key(const std::string& what, const std::string& database) const {
  return "postgres." + config_.name + (database.empty() ? "" : "." + database) + "." + what;
}

std::string PostgresStore::secret(Side side, const std::string& database) {
  const PostgresServer& s = server(side);
  if (s.password.from == SecretRef::From::none) return {};
  std::lock_guard lock(secrets_mutex_);
  auto& cached = secrets_[std::string(side_name(side)) + "/" + database];
  if (cached.empty()) cached = read_secret(s.password, s.host, s.port, database, s.user);
  return cached;
}

std::string PostgresStore::server_address(Side side) const {
  const PostgresServer& s = config_.postgres.server[side];
  if (s.host.starts_with('/')) return "unix:" + s.host + "/.s.PGSQL." + std::to_string(s.port);
  return (s.host.find(':') == std::string::npos ? s.host : "[" + s.host + "]") + ":" + std::to_string(s.port);
}

PgAddress PostgresStore::address(StoreContext& c, Side side, const std::string& database, const std::string& keep) {
  const PostgresServer& s = server(side);
  return {.label = std::string(side_name(side)) + ": database " + database,
          .server = server_address(side),
          .host = c.at(side).local_socket_for(server_address(side), s.os_user, keep),
          .port = 5432,
          .user = s.user,
          .password = secret(side, database),
          .database = database};
}

std::unique_ptr<PgSession> PostgresStore::session(StoreContext& c, Side side, const std::string& database, const std::string& application) {
  PgAddress to = address(c, side, database);
  try {
    return std::make_unique<PgSession>(to, application);
  } catch (const Error& e) {
    if (e.code != Code::unreachable) throw;
    // libpq only saw its connection closed; why, the agent at that end knows.
    try {
      c.at(side).open_relay(server_address(side), server(side).os_user);
    } catch (const Error& why) {
      throw Error(why.code, to.label + ": cannot connect as " + to.user + ": " + why.message, why.code == Code::unreachable ? e.hint : why.hint, why.retryable);
    }
    throw;
  }
}

std::vector<std::string> PostgresStore::databases(StoreContext& c) {
  if (!config_.postgres.databases.empty()) return config_.postgres.databases;
  Json known = c.recall(key("databases"));
  if (known.is_array()) return known.get<std::vector<std::string>>();
  return all_databases(*session(c, Side::source, server(Side::source).admin_database));
}

// No event trigger tells of CREATE DATABASE. At the target there may be others' databases: there those of the switch's moment are known.
PostgresStore::DatabaseChange PostgresStore::database_change(StoreContext& c, PgSession& serving, Side serves) {
  DatabaseChange change;
  if (!config_.postgres.databases.empty()) return change;
  const Json known = c.recall(key(serves == Side::source ? "databases" : "databases_target"));
  if (!known.is_array()) return change;
  auto now = all_databases(serving), then = known.get<std::vector<std::string>>();
  std::set_difference(now.begin(), now.end(), then.begin(), then.end(), std::back_inserter(change.come));
  if (serves == Side::target) then = databases(c);
  std::set_difference(then.begin(), then.end(), now.begin(), now.end(), std::back_inserter(change.gone));
  return change;
}

void PostgresStore::remember_target_databases(StoreContext& c) { c.remember(key("databases_target"), all_databases(*session(c, Side::target, server(Side::target).admin_database))); }

std::string PostgresStore::DatabaseChange::says(Side serves) const {
  std::vector<std::string> lines;
  for (const auto& name : come) lines.push_back("database " + name + " was made on the " + std::string(side_name(serves)) + " since, and is not on the other side");
  for (const auto& name : gone) lines.push_back("database " + name + " is gone from the " + std::string(side_name(serves)) + " (dropped, renamed, or closed to connections)");
  return join(lines, "\n");
}

PgFlow PostgresStore::flow(const std::string& database, Side publisher) const {
  const char* way = publisher == Side::source ? "f" : "r";
  char db[17];
  std::snprintf(db, sizeof db, "%08x", static_cast<unsigned>(XXH64(database.data(), database.size(), 1) & 0xffffffffu));
  std::string id = tag_ + "_" + db + "_" + way;
  return {.publisher = publisher,
          .publication = std::string("rehome_") + tag_ + "_" + way,
          .subscription = std::string("rehome_") + id,
          .slot = std::string("rehome_") + id,
          .service = "pg-" + config_.name + "-" + std::string(side_name(publisher)),
          .listener = "pg-" + config_.name + "-" + std::string(side_name(publisher))};
}

std::vector<PgTable> PostgresStore::tables(PgSession& s) {
  // A deferrable key identifies no row, and an identity whose index is gone is none (and cannot be said again). Extension
  // members are made by CREATE EXTENSION, and only those that it calls configuration hold what people wrote. Binary COPY only for
  // types whose wire form has not changed since 13 and that hold no oid of a catalogue row. Names are quoted all of them: what is a
  // reserved word depends on the major (system_user since 16), and the other side reads the list too.
  auto rows = s.query(R"(
    SELECT n.nspname, c.relname, c.oid, pg_table_size(c.oid), c.relkind = 'p', c.relpersistence = 'u',
           EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid AND (i.indisprimary OR i.indisreplident) AND i.indisvalid AND i.indimmediate),
           CASE WHEN c.relreplident = 'f' OR EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
               AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident)) THEN ''
             WHEN c.relreplident = 'd' THEN 'DEFAULT' ELSE 'NOTHING' END,
           (SELECT string_agg('"' || replace(a.attname, '"', '""') || '"', ', ' ORDER BY a.attnum) FROM pg_attribute a
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''),
           NOT EXISTS (SELECT 1 FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
             WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND t.oid NOT IN
              (16,17,18,20,21,23,25,700,701,1042,1043,1082,1083,1114,1184,1186,1266,1700,2950,114,3802,19)), x.extname, x.condition
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
      LEFT JOIN LATERAL (SELECT e.extname, e.extcondition[array_position(e.extconfig, c.oid)] AS condition FROM pg_extension e WHERE c.oid = ANY (e.extconfig) LIMIT 1) x ON true
     WHERE c.relkind IN ('r', 'p') AND c.relpersistence <> 't'
       AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname NOT LIKE 'pg\_toast%'
       AND (x.extname IS NOT NULL OR NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'))
     ORDER BY 4 DESC, 1, 2)");
  std::vector<PgTable> found;
  for (auto& r : rows) {
    PgTable t;
    t.schema = *r[0];
    t.name = *r[1];
    t.oid = std::stoll(*r[2]);
    t.bytes = std::stoll(r[3].value_or("0"));
    t.partitioned = *r[4] == "t";
    t.unlogged = *r[5] == "t";
    t.has_key = *r[6] == "t";
    t.identity = *r[7];
    t.columns = r[8].value_or("");
    t.binary = *r[9] == "t";
    t.extension = r[10].value_or("");
    // A line's end closes a comment that it may end with.
    if (r[11] && !r[11]->empty()) t.condition = *r[11] + "\n";
    found.push_back(std::move(t));
  }
  return found;
}

const char* const PostgresStore::kMendGenerated = "give each a key of plain columns: a primary key, or a unique index and ALTER TABLE ... REPLICA IDENTITY USING INDEX ...";

// Generated columns are not sent, and where 18 is told to send them, the same column of the other side refuses them. A follower finds a row
// by the identity's index, and for want of one by the primary key; with FULL, 18 refuses to publish a change that lacks a column.
std::string PostgresStore::told_by_generated(PgSession& s, const std::vector<PgTable>& tables, int other_major) {
  std::string all = "0", full = "0";
  for (const auto& t : tables) {
    if (t.partitioned || t.unlogged) continue;
    all += "," + std::to_string(t.oid);
    if (!t.identity.empty() || !t.condition.empty()) full += "," + std::to_string(t.oid);   // they get it (publish)
  }
  std::vector<std::string> names;
  for (auto& r : s.query("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) || ' (' || string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) || ')' FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
                         "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated <> '' WHERE c.oid IN (" + all + ") AND (EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.oid "
                         "AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) AND CASE WHEN c.relreplident = 'i' AND c.oid NOT IN (" + full + ") THEN i.indisreplident ELSE i.indisprimary END)" +
                         (std::max(s.major(), other_major) >= 18 ? " OR c.relreplident = 'f' OR c.oid IN (" + full + ")" : std::string()) + ") GROUP BY n.nspname, c.relname ORDER BY 1"))
    names.push_back(*r[0]);
  return first_few(std::move(names));
}

bool PostgresStore::slot_stands(PgSession& publisher, const PgFlow& f) {
  return publisher.number("SELECT count(*) FROM pg_replication_slots WHERE slot_name = " + pg_literal(f.slot) + " AND wal_status IS DISTINCT FROM 'lost'") > 0;
}

std::vector<std::int64_t> PostgresStore::lock_order(Side side, const std::string& database) {
  std::lock_guard lock(mutex_);
  return lock_order_[std::string(side_name(side)) + "/" + database];
}

void PostgresStore::locks_first(Side side, const std::string& database, std::int64_t oid) {
  std::lock_guard lock(mutex_);
  auto& order = lock_order_[std::string(side_name(side)) + "/" + database];
  std::erase(order, oid);
  order.insert(order.begin(), oid);
}

std::optional<std::string> PostgresStore::ask(StoreContext& c, Side side, const std::string& database, const std::string& query, Millis timeout, bool writes) {
  auto s = session(c, side, database, "rehome check");
  // As the application's own sessions are, but for what could keep us waiting.
  s->exec("RESET ALL; SET default_transaction_read_only = " + std::string(writes ? "off" : "on") + "; SET statement_timeout = " + std::to_string(timeout.count()));
  // The server ends what takes too long, and says so; the later deadline is for one that does not answer.
  auto rows = s->query(query, Deadline::in(timeout + Millis(5000)));
  if (rows.size() != 1 || rows[0].size() != 1) return std::nullopt;
  return rows[0][0].value_or("");
}

namespace pgsql {

const char* const kFenceApplication = "rehome fence";

// Statement-level triggers do not fire for the rows that an apply worker writes, but TRUNCATE triggers do: an origin session
// is what tells an apply worker apart. SECURITY DEFINER, since that function is not for everybody.
static std::string refusing_body(const std::string& exception, const std::string& where) {
  return "CREATE OR REPLACE FUNCTION rehome.fence() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS "
         "$rehome$ BEGIN IF TG_OP = 'TRUNCATE' AND pg_replication_origin_session_is_setup() THEN RETURN NULL; END IF; " +
         exception + "RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction', MESSAGE = 'this database does not serve', HINT = " + pg_literal(where) +
         "; END $rehome$";
}

std::string fence_function(bool refusing, const std::string& where) {
  if (!refusing)
    return "CREATE OR REPLACE FUNCTION rehome.fence() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS "
           "$rehome$ BEGIN RETURN NULL; END $rehome$; " + open_large_objects();
  return refusing_body("", where) + "; " + close_large_objects();
}

// No trigger fires for them. Rights on the functions are what every way to write them passes, a client's fastpath too. The
// catalogue's rows are changed themselves, since REVOKE and GRANT leave a list where there was none. Where there is no large object they
// stay: who makes the first writes its number into a table, which refuses.
std::string large_object_rights_table() { return "CREATE TABLE IF NOT EXISTS rehome.large_object_rights(function oid PRIMARY KEY, rights aclitem[])"; }

std::string close_large_objects() {
  return large_object_rights_table() +
         "; INSERT INTO rehome.large_object_rights SELECT oid, proacl FROM pg_catalog.pg_proc WHERE pronamespace = 'pg_catalog'::regnamespace AND proname IN "
         "('lo_creat', 'lo_create', 'lo_from_bytea', 'lo_import', 'lo_put', 'lo_truncate', 'lo_truncate64', 'lo_unlink', 'lowrite') AND EXISTS (SELECT 1 FROM pg_catalog.pg_largeobject_metadata) ON CONFLICT DO NOTHING; "
         "UPDATE pg_catalog.pg_proc SET proacl = ARRAY[makeaclitem(proowner, proowner, 'EXECUTE', false)] WHERE oid IN (SELECT function FROM rehome.large_object_rights)";
}

std::string open_large_objects() {
  return "DO $rehome$ BEGIN IF to_regclass('rehome.large_object_rights') IS NOT NULL THEN "
         "UPDATE pg_catalog.pg_proc p SET proacl = r.rights FROM rehome.large_object_rights r WHERE p.oid = r.function; DELETE FROM rehome.large_object_rights; END IF; END $rehome$";
}

// A table's first synchronisation is a COPY by a worker of the server's own. A worker is told by its backend type, which only
// the server gives (an origin session is not yet set up in 13's): no client has it, whatever its role, name and settings. What
// could still write here is somebody else's subscription, which takes a superuser to make (16 on: pg_create_subscription); the
// fence of the cut has no such exception.
std::string fence_function_before_switch(const std::string& where) {
  return refusing_body("IF TG_OP = 'INSERT' AND (SELECT backend_type FROM pg_stat_activity WHERE pid = pg_backend_pid()) LIKE 'logical replication%' THEN RETURN NULL; END IF; ", where);
}

std::string who_serves(Side side) { return side == Side::source ? "the source serves until the switch" : "the target serves now"; }

std::string empty_table(const PgTable& t, bool whole) {
  return t.extension.empty() ? "TRUNCATE ONLY " + t.full() : "DELETE FROM ONLY " + t.full() + (whole ? "" : " " + t.condition);
}

std::string fence_triggers(const PgTable& t) {
  return "CREATE TRIGGER rehome_fence BEFORE INSERT OR UPDATE OR DELETE ON " + t.full() +
         " FOR EACH STATEMENT EXECUTE FUNCTION rehome.fence(); CREATE TRIGGER rehome_fence_t BEFORE TRUNCATE ON " + t.full() +
         " FOR EACH STATEMENT EXECUTE FUNCTION rehome.fence(); ALTER TABLE " + t.full() +
         " ENABLE ALWAYS TRIGGER rehome_fence, ENABLE ALWAYS TRIGGER rehome_fence_t";
}

std::string fence_function_while_copying(const std::string& where) {
  return refusing_body("IF current_setting('application_name') = 'rehome copy' AND (SELECT rolsuper FROM pg_roles WHERE rolname = session_user) THEN RETURN NULL; END IF; ", where);
}

// Recorded or refused: what was changed, and by whom. Our own work, temporary objects and what changes no schema are not meant. What waits for
// the log while it is locked has the recording body already: after it the log's own trigger refuses.
std::string ddl_function(bool refusing) {
  const std::string refuse = "RAISE EXCEPTION USING ERRCODE = 'read_only_sql_transaction', MESSAGE = 'this database is being moved: no change of its schema', "
                             "HINT = 'rehome status says when it is over'; ";
  return "CREATE OR REPLACE FUNCTION rehome.ddl_logged() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog AS $rehome$ BEGIN " +
         (refusing ? "IF current_setting('application_name') LIKE 'rehome%' THEN RETURN NULL; END IF; " + refuse : std::string("RETURN NULL; ")) + "END $rehome$; "
         "CREATE OR REPLACE FUNCTION rehome.ddl() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS "
         "$rehome$ DECLARE r record; BEGIN IF current_setting('application_name') LIKE 'rehome%' THEN RETURN; END IF; "
         "IF TG_EVENT = 'sql_drop' THEN FOR r IN SELECT * FROM pg_event_trigger_dropped_objects() LOOP "
         "IF NOT r.is_temporary AND r.original THEN " + (refusing ? refuse : "INSERT INTO rehome.ddl_log(tag, object) VALUES (TG_TAG, r.object_identity); ") + "END IF; END LOOP; "
         "ELSE FOR r IN SELECT * FROM pg_event_trigger_ddl_commands() LOOP "
         "IF r.schema_name IS DISTINCT FROM 'pg_temp' AND r.object_type NOT IN ('publication', 'subscription') AND r.command_tag NOT IN ('REFRESH MATERIALIZED VIEW', 'REINDEX') THEN " +
         (refusing ? refuse : "INSERT INTO rehome.ddl_log(tag, object) VALUES (r.command_tag, r.object_identity); ") + "END IF; END LOOP; END IF; END $rehome$";
}

std::string rewrite_function() {
  return "CREATE OR REPLACE FUNCTION rehome.rewritten() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS "
         "$rehome$ BEGIN IF current_setting('application_name') LIKE 'rehome%' THEN RETURN; END IF; "
         "INSERT INTO rehome.ddl_log(tag, object, rewritten) SELECT TG_TAG || ' (rows rewritten)', c.oid::regclass::text, c.oid FROM pg_class c "
         "WHERE c.oid = pg_event_trigger_table_rewrite_oid() AND c.relpersistence <> 't'; END $rehome$";
}

std::string end_sessions(const std::string& which) {
  return "DO $rehome$ DECLARE n int; BEGIN FOR i IN 1..500 LOOP "
         "SELECT count(pg_terminate_backend(pid)) INTO n FROM pg_stat_activity WHERE " + which + " "
         "AND datname = current_database() AND pid <> pg_backend_pid(); EXIT WHEN n = 0; PERFORM pg_sleep(0.01); "
         "PERFORM pg_stat_clear_snapshot(); END LOOP; IF n > 0 THEN RAISE EXCEPTION '% sessions do not end', n; END IF; END $rehome$";
}

std::string end_fence_sessions() { return end_sessions("application_name = '" + std::string(kFenceApplication) + "'"); }

}  // namespace pgsql

}  // namespace rehome
