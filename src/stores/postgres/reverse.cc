// The way back, and what the agents must be able to do without a controller: stored psql scripts.
#include "base/text.h"
#include "stores/postgres/postgres.h"

namespace rehome {

// Everything is made before the pause and only positioned inside it: creating a slot waits for every writing transaction of
// the cluster, advancing one does not.
void PostgresStore::prepare_reverse(StoreContext& c, Direction d) {
  for (const auto& database : databases(c)) {
    PgFlow r = flow(database, d.takes());
    open_path(c, database, r);
    auto publisher = session(c, r.publisher, database);
    publish(c, *publisher, r, tables(*publisher));
    if (publisher->number("SELECT count(*) FROM pg_replication_slots WHERE slot_name = " + pg_literal(r.slot)) == 0) {
      c.note("slot " + r.slot, {{"where", publisher->address().label}, {"undo", "pg_drop_replication_slot"}});
      publisher->query("SELECT pg_create_logical_replication_slot(" + pg_literal(r.slot) + ", 'pgoutput')", Deadline::in(Millis(60000)));
    }
    subscribe(c, database, r, false);
    // Views over data that replication does not refresh.
    for (auto& m : publisher->query("SELECT quote_ident(schemaname) || '.' || quote_ident(matviewname) FROM pg_matviews WHERE ispopulated"))
      publisher->exec("RESET search_path; REFRESH MATERIALIZED VIEW " + *m[0] + "; SET search_path = pg_catalog");
  }
}

ActionSets PostgresStore::actions(StoreContext& c, Direction d) {
  ActionSets sets;
  auto action = [&](Side side, const std::string& what, const std::string& database, const std::string& input, bool warm) {
    const PostgresServer& pg = server(side);
    const std::string& program = c.deployment.site[side].psql;
    std::string info = "host=" + pg.host + " port=" + std::to_string(pg.port) + " user=" + pg.user + " dbname=" + database +
                       " application_name=rehome_action connect_timeout=5";
    Action a;
    a.name = config_.name + " " + database + " " + what;
    std::string password = secret(side, database);
    if (!password.empty()) {
      std::string file = config_.name + "." + std::string(side_name(side)) + ".pgpass";
      a.credentials.emplace_back(file, passfile_line(password));
      info += " passfile=" + c.at(side).state() + "/credentials/" + file;
    }
    a.argv = {program.empty() ? "psql" : program, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", info};
    a.user = pg.os_user;
    a.input = "SET client_min_messages = 'error';\n" + input + "\n";
    a.try_input = "SELECT 1;\n";
    a.warm = warm;
    a.timeout = Millis(30000);
    return a;
  };
  for (const auto& database : databases(c)) {
    PgFlow forward = flow(database, d.yields), reverse = flow(database, d.takes());
    // A fence's COMMIT may still be in flight from a session of the attempt: those end first.
    sets.undo.push_back(action(d.yields, "lift the fence", database,
                               pgsql::end_fence_sessions() + ";\nBEGIN;\n" + pgsql::fence_function(false, "") + ";\n" +
                                   pgsql::ddl_function(config_.postgres.ddl == PostgresConfig::Ddl::block) + ";\nCOMMIT;",
                               true));
    sets.open.push_back(action(d.takes(), "open", database,
                               pgsql::end_fence_sessions() + ";\nBEGIN;\n" + pgsql::fence_function(false, "") + ";\n" + pgsql::ddl_function(false) + ";\nCOMMIT;", true));
    std::string sub = pg_literal(forward.subscription);
    std::string this_database = " AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())";
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
