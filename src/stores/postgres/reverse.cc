// The way back, and what the agents must be able to do without a controller: stored psql scripts.
#include <algorithm>
#include <map>
#include <set>

#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/postgres.h"

namespace rehome {

namespace {

// Replication carries no sequence, and a cut does; a side that followed and is opened without one starts where its rows end, or it would
// give numbers again. A sequence that belongs to no column of numbers is moved by what an application is unlikely to have used, and one whose
// column only a look at every row would tell, which takes longer than anybody waits here, by twice the rows that ever came too. Nothing
// where the follower was never on: the undo of an attempt costs no time for it.
std::string advance_sequences(const std::string& subscription) {
  return "DO $rehome$ DECLARE r record; at numeric; most numeric; far numeric; BEGIN "
         "IF NOT EXISTS (SELECT 1 FROM pg_subscription WHERE subname = " + pg_literal(subscription) +
         " AND subenabled AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())) THEN RETURN; END IF; "
         "FOR r IN SELECT s.seqrelid::regclass AS seq, s.seqincrement AS step, s.seqmax, s.seqmin, d.refobjid::regclass AS tab, a.attname, EXISTS (SELECT 1 FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am m ON m.oid = x.relam "
         "WHERE i.indrelid = d.refobjid AND i.indkey[0] = d.refobjsubid AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree') AS led FROM pg_sequence s "
         "JOIN pg_class c ON c.oid = s.seqrelid AND c.relpersistence <> 't' JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname <> 'rehome' "
         "LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = s.seqrelid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i') AND d.refobjsubid > 0 "
         "LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid "
         // A text made of the number and other words tells no number.
         "AND (SELECT coalesce(nullif(y.typbasetype, 0), y.oid) FROM pg_type y WHERE y.oid = a.atttypid) IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype) LOOP "
         "EXECUTE format('SELECT last_value FROM %s', r.seq) INTO at; most := at; far := 1000; "
         "IF r.attname IS NOT NULL AND NOT r.led THEN far := far + 2 * (SELECT coalesce(sum(greatest(pg_stat_get_tuples_inserted(c.oid), c.reltuples, 0)), 0)::bigint FROM pg_class c WHERE c.oid = r.tab OR c.oid IN (SELECT relid FROM pg_partition_tree(r.tab))); END IF; "
         "IF r.led AND r.attname IS NOT NULL THEN EXECUTE format('SELECT coalesce(CASE WHEN $2 > 0 THEN max(%1$I) ELSE min(%1$I) END, $1) FROM %2$s', r.attname, r.tab) INTO most USING at, r.step; "
         "most := CASE WHEN r.step > 0 THEN greatest(most, at) ELSE least(most, at) END + 32 * r.step; END IF; "
         "IF r.attname IS NULL OR NOT r.led OR most NOT BETWEEN r.seqmin AND r.seqmax THEN most := at + far * r.step; END IF; "
         "IF most BETWEEN r.seqmin AND r.seqmax THEN PERFORM setval(r.seq, most::bigint); END IF; END LOOP; END $rehome$;\n";
}

// Name -> columns, as replication sends them.
std::map<std::string, std::set<std::string>> columns_sent(PgSession& s) {
  std::map<std::string, std::set<std::string>> all;
  for (auto& r : s.query("SELECT n.nspname, c.relname, a.attname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' "
                         "WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema')")) {
    auto& columns = all[pg_identifier(*r[0]) + "." + pg_identifier(*r[1])];
    if (r[2]) columns.insert(*r[2]);
  }
  return all;
}

// Of an hour's wait for the moment the views' content is that old at most, when their side takes over.
constexpr Millis kViewsAge = std::chrono::minutes(10);

std::set<std::string> populated_views(PgSession& s) {
  std::set<std::string> all;
  for (auto& r : s.query("SELECT quote_ident(schemaname) || '.' || quote_ident(matviewname) FROM pg_matviews WHERE ispopulated")) all.insert(*r[0]);
  return all;
}

// Views over data that replication does not refresh: those that are filled on the side that serves, one after what it reads.
void refresh_views(PgSession& s, const std::set<std::string>& populated) {
  for (auto& m : s.query(R"(
    WITH RECURSIVE reads(view, other) AS (
      SELECT DISTINCT r.ev_class, d.refobjid FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
        JOIN pg_class c ON c.oid = d.refobjid AND c.relkind IN ('v', 'm') WHERE d.refobjid <> r.ev_class),
    depth(view, n) AS (SELECT oid, 0 FROM pg_class WHERE relkind IN ('v', 'm') UNION SELECT reads.view, n + 1 FROM depth JOIN reads ON other = depth.view
      WHERE n < (SELECT count(*) FROM pg_class WHERE relkind IN ('v', 'm')))
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN depth ON depth.view = c.oid
     WHERE c.relkind = 'm' GROUP BY 1 ORDER BY max(depth.n), 1)"))
    if (populated.contains(*m[0])) s.exec("RESET search_path; REFRESH MATERIALIZED VIEW " + *m[0] + "; SET search_path = pg_catalog");
}

}  // namespace

void PostgresStore::make_up_for_cut(StoreContext& c, Direction d) {
  // Of all of them before any is changed.
  for (const auto& database : databases(c)) {
    if (d.yields == Side::source && c.recall(key("copied", database)) != true)
      throw Error(Code::state, "the target does not have everything: a copy of database " + database + " was begun again and not finished", "bring the source back, then rehome resume --recopy");
    auto rows = session(c, d.takes(), database)->query("SELECT r.srrelid::regclass::text FROM pg_subscription s JOIN pg_subscription_rel r ON r.srsubid = s.oid WHERE s.subname = $1 AND "
                                                       "s.subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND r.srsubstate <> 'r' ORDER BY 1", {flow(database, d.yields).subscription});
    std::vector<std::string> part;
    for (auto& r : rows) part.push_back(*r[0]);
    if (!part.empty()) c.log(config_.name + ": " + database + ": NOT WHOLE, for they were just being copied again, and rows are missing: " + join(part, ", "));
  }
  for (const auto& database : databases(c)) {
    auto s = session(c, d.takes(), database);
    s->exec(advance_sequences(flow(database, d.yields).subscription));
    // What the other side had filled, nobody can ask any more.
    refresh_views(*s, populated_views(*s));
    std::vector<std::string> empty;
    for (auto& r : s->query("SELECT quote_ident(schemaname) || '.' || quote_ident(matviewname) FROM pg_matviews WHERE NOT ispopulated ORDER BY 1")) empty.push_back(*r[0]);
    if (!empty.empty()) c.log(config_.name + ": " + database + ": materialized views that are not filled here, and may have been on the other side: " + first_few(std::move(empty)) + " (REFRESH MATERIALIZED VIEW)");
  }
}

// One that the server has given up, by its own limit of WAL or of idle time, has the name and is of no use.
void PostgresStore::make_reverse_slot(StoreContext& c, PgSession& publisher, const PgFlow& r) {
  if (slot_stands(publisher, r)) return;
  drop_slots(publisher, "slot_name = " + pg_literal(r.slot));
  c.note("slot " + r.slot, {{"where", publisher.address().label}, {"undo", "pg_drop_replication_slot"}});
  publisher.query("SELECT pg_create_logical_replication_slot(" + pg_literal(r.slot) + ", 'pgoutput')", Deadline::in(Millis(60000)));
}

// Everything is made before the pause and only positioned inside it: creating a slot waits for every writing transaction of
// the cluster, advancing one does not.
void PostgresStore::prepare_reverse(StoreContext& c, Direction d) {
  if (config_.postgres.databases.empty() && d.yields == Side::source) remember_target_databases(c);
  for (const auto& database : databases(c)) {
    PgFlow r = flow(database, d.takes());
    open_path(c, database, r);
    auto publisher = session(c, r.publisher, database);
    auto list = tables(*publisher);
    // What was dropped on the target since the switch, with a person's consent (accept_schema), has no place there: its rows stay here.
    if (d.yields == Side::target) {
      std::vector<std::string> behind;
      const auto here = columns_sent(*publisher), there = columns_sent(*session(c, d.yields, database));
      std::erase_if(list, [&](const PgTable& t) {
        if (t.partitioned || t.unlogged) return false;
        auto from = here.find(t.full()), to = there.find(t.full());
        const bool fits = from != here.end() && to != there.end() && std::includes(to->second.begin(), to->second.end(), from->second.begin(), from->second.end());
        if (!fits) behind.push_back(t.full());
        return !fits;
      });
      if (!behind.empty()) c.log(config_.name + ": " + database + ": the target has not these tables, or not all of their columns, and nothing brings their rows there when the source serves again: " + first_few(behind) + "; rehome resume --recopy does then");
    }
    publish(c, *publisher, r, list);
    make_reverse_slot(c, *publisher, r);
    subscribe(c, database, r, false);
    // What the target's schema is when it begins to serve: the way back is for that one.
    if (d.yields == Side::source) remember_schema(c, database, Side::target, publisher->value("SELECT pg_current_snapshot()"), catalogue_fingerprint(*publisher, config_.postgres.roles));
    refresh_views(*publisher, populated_views(*session(c, d.yields, database)));
  }
  views_again_ = Deadline::in(kViewsAge);
}

// What the forward follower writes is WAL too, and a slot that waits for a day would meet its limit; views grow old meanwhile.
void PostgresStore::renew_reverse(StoreContext& c, Direction d) {
  for (const auto& database : databases(c)) {
    PgFlow r = flow(database, d.takes());
    auto publisher = session(c, r.publisher, database);
    make_reverse_slot(c, *publisher, r);
    publisher->query("SELECT pg_replication_slot_advance(slot_name, pg_current_wal_flush_lsn()) FROM pg_replication_slots WHERE NOT active AND slot_name = " + pg_literal(r.slot), Deadline::in(Millis(60000)));
  }
  if (!views_again_.passed()) return;
  for (const auto& database : databases(c)) refresh_views(*session(c, d.takes(), database), populated_views(*session(c, d.yields, database)));
  views_again_ = Deadline::in(kViewsAge);
}

ActionSets PostgresStore::actions(StoreContext& c, Direction d) {
  ActionSets sets;
  auto action = [&](Side side, const std::string& what, const std::string& database, const std::string& input, bool warm) {
    const PostgresServer& pg = server(side);
    const std::string& program = c.deployment.site[side].psql;
    std::string info = "host=" + pg_conninfo_value(pg.host) + " port=" + std::to_string(pg.port) + " user=" + pg_conninfo_value(pg.user) + " dbname=" + pg_conninfo_value(database) +
                       " application_name=rehome_action connect_timeout=5";
    Action a;
    a.name = config_.name + " " + database + " " + what;
    std::string password = secret(side, database);
    if (!password.empty()) {
      std::string file = config_.name + "." + std::string(side_name(side)) + ".pgpass";
      a.credentials.emplace_back(file, passfile_line(password));
      info += " passfile=" + pg_conninfo_value(c.at(side).state() + "/credentials/" + file);
    }
    a.argv = {program.empty() ? "psql" : program, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", info};
    a.user = pg.os_user;
    a.input = "SET client_min_messages = 'error'\\; SET search_path = pg_catalog\\; SET statement_timeout = 0\\; SET lock_timeout = 0\\; SET idle_in_transaction_session_timeout = 0\\; "
              "SELECT set_config('transaction_timeout', '0', false) WHERE current_setting('transaction_timeout', true) IS NOT NULL\\; SET default_transaction_read_only = off\\; SET session_replication_role = replica\\; " + pg_durable() + ";\n" + input + "\n";
    a.try_input = "SELECT 1;\n";
    a.warm = warm;
    a.timeout = Millis(30000);
    return a;
  };
  for (const auto& database : databases(c)) {
    PgFlow forward = flow(database, d.yields), reverse = flow(database, d.takes());
    // A fence's COMMIT may still be in flight from a session of the attempt: those end first. A side that is opened again by a person's word
    // follows the other one no more, should it come back; in an attempt that is undone that follower was never on.
    sets.undo.push_back(action(d.yields, "lift the fence", database,
                               advance_sequences(reverse.subscription) +
                               "SELECT format('ALTER SUBSCRIPTION %I DISABLE', subname) FROM pg_subscription WHERE subname = " + pg_literal(reverse.subscription) +
                                   " AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND subenabled \\gexec\n" +
                               pgsql::end_fence_sessions() + ";\nBEGIN;\n" + pgsql::fence_function(false, "") + ";\n" +
                                   // What was opened after a switch takes changes of its schema, and goes on to.
                                   pgsql::ddl_function(config_.postgres.ddl == PostgresConfig::Ddl::block && d.yields == Side::source) + ";\nCOMMIT;",
                               true));
    const std::string sub = pg_literal(forward.subscription), this_database = " AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
    // So also here, where the epoch says that a person decided (its upper half): after a cut the tails take that follower away.
    sets.open.push_back(action(d.takes(), "open", database,
                               "SELECT format('ALTER SUBSCRIPTION %I DISABLE', subname) FROM pg_subscription WHERE @rehome_epoch@ >= 4294967296 AND subname = " + sub + this_database + " AND subenabled \\gexec\n" + pgsql::end_fence_sessions() + ";\nBEGIN;\n" + pgsql::fence_function(false, "") + ";\n" + pgsql::ddl_function(false) + ";\nCOMMIT;", true));
    for (Side side : {Side::source, Side::target})
      // What was written before is stopped in its sessions, and what comes later meets the trigger.
      sets.close[side].push_back(action(side, "close", database,
                                        pgsql::end_fence_sessions() + ";\nBEGIN;\n" + pgsql::fence_function(true, "the " + std::string(side_name(other(side))) + " was opened by hand, and serves") + ";\n" +
                                            pgsql::ddl_function(true) + ";\nCOMMIT;\n"
                                            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' "
                                            "AND application_name NOT LIKE 'rehome%';",
                                        false));
    sets.tail_takes.push_back(action(d.takes(), "forward follower off", database,
                                     "SELECT format('ALTER SUBSCRIPTION %I DISABLE', subname) FROM pg_subscription WHERE subname = " + sub + this_database + " \\gexec\n" +
                                         "SELECT format('ALTER SUBSCRIPTION %I SET (slot_name = NONE)', subname) FROM pg_subscription WHERE subname = " + sub + this_database + " \\gexec\n" +
                                         "SELECT format('DROP SUBSCRIPTION %I', subname) FROM pg_subscription WHERE subname = " + sub + this_database + " \\gexec",
                                     false));
    std::string slot = pg_literal(forward.slot);
    sets.tail_yields.push_back(action(d.yields, "old sessions ended, reverse follower on", database,
                                      "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend' "
                                      "AND application_name NOT LIKE 'rehome%';\n"
                                      "DO $rehome$ BEGIN FOR i IN 1..500 LOOP PERFORM pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = " + slot + " AND active; "
                                      "EXIT WHEN NOT EXISTS (SELECT 1 FROM pg_replication_slots WHERE slot_name = " + slot + " AND active); PERFORM pg_sleep(0.01); END LOOP; "
                                      "PERFORM pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = " + slot + "; END $rehome$;\n"
                                      "SELECT format('ALTER SUBSCRIPTION %I ENABLE', subname) FROM pg_subscription WHERE subname = " + pg_literal(reverse.subscription) + this_database + " AND NOT subenabled \\gexec",
                                      false));
  }
  return sets;
}

}  // namespace rehome
