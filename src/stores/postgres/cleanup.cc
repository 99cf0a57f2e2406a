// complete and cancel: everything of ours gone at both servers, and the proof of it.
#include "base/text.h"
#include "stores/postgres/postgres.h"

namespace rehome {

void PostgresStore::drop_slots(PgSession& publisher, const std::string& which) {
  Deadline deadline = Deadline::in(Millis(10000));
  while (true) {
    auto slots = publisher.query("SELECT slot_name, active_pid FROM pg_replication_slots WHERE " + which);
    if (slots.empty()) return;
    if (deadline.passed()) throw Error(Code::store, publisher.address().label + ": slot " + *slots[0][0] + " stays in use", "end the session that uses it, then repeat the command");
    try {
      for (auto& slot : slots) publisher.exec(slot[1] ? "SELECT pg_terminate_backend(" + *slot[1] + ")" : "SELECT pg_drop_replication_slot(" + pg_literal(*slot[0]) + ")");
    } catch (const PgError& e) {
      // Taken by a worker, or dropped by its own, in between.
      if (e.sqlstate != "55006" && e.sqlstate != "42704") throw;
    }
    system_clock().sleep(Millis(20));
  }
}

std::string PostgresStore::synchronising_slots(PgSession& subscriber, const PgFlow& f) {
  auto rows = subscriber.query("SELECT s.oid, c.system_identifier FROM pg_subscription s, pg_control_system() c WHERE subname = " + pg_literal(f.subscription) + " AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())");
  return rows.empty() ? "" : "slot_name LIKE 'pg\\_" + *rows[0][0] + "\\_sync\\_%\\_" + *rows[0][1] + "'";
}

// A database that somebody dropped took with it what was made there.
bool PostgresStore::has_database(StoreContext& c, Side side, const std::string& database) {
  return c.has(side) && session(c, side, server(side).admin_database)->number("SELECT count(*) FROM pg_database WHERE datname = " + pg_literal(database)) > 0;
}

void PostgresStore::remove_flow(StoreContext& c, const std::string& database, const PgFlow& f) {
  std::unique_ptr<PgSession> pub = has_database(c, f.publisher, database) ? session(c, f.publisher, database) : nullptr;
  if (has_database(c, f.subscriber(), database)) {
    auto sub = session(c, f.subscriber(), database);
    std::string name = pg_identifier(f.subscription);
    if (std::string syncing = synchronising_slots(*sub, f); !syncing.empty()) {
      sub->exec("ALTER SUBSCRIPTION " + name + " DISABLE");
      sub->exec("ALTER SUBSCRIPTION " + name + " SET (slot_name = NONE)");
      if (pub) drop_slots(*pub, syncing);
      sub->exec("DROP SUBSCRIPTION " + name);
    }
  }
  if (pub) remove_publisher(c, *pub, f);
}

void PostgresStore::remove_publisher(StoreContext& c, PgSession& publisher, const PgFlow& f) {
  c.at(f.publisher).call("keep.drop", {{"name", f.slot}});
  drop_slots(publisher, "slot_name = " + pg_literal(f.slot));
  publisher.exec("DROP PUBLICATION IF EXISTS " + pg_identifier(f.publication));
}

void PostgresStore::remove_objects(StoreContext& c, Side side, const std::string& database, bool keep_fence) {
  if (!has_database(c, side, database)) return;
  auto s = session(c, side, database);
  s->exec("SET client_min_messages = 'error'");
  s->exec("DROP EVENT TRIGGER IF EXISTS rehome_ddl; DROP EVENT TRIGGER IF EXISTS rehome_drop; DROP EVENT TRIGGER IF EXISTS rehome_rewrite");
  // Put back only what this run changed, and nobody since.
  const Json identities = c.recall(key("identity", database));
  auto bounded = [&](const std::string& sql) {
    pg_retry_locks(Deadline::in(Millis(120000)), [&] {
      try {
        // An autovacuum yields only to who has waited for the deadlock's timeout.
        s->exec("BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL deadlock_timeout = '10ms'; " + sql + "; COMMIT");
      } catch (const Error&) {
        if (!s->broken()) s->exec("ROLLBACK");
        throw;
      }
    });
  };
  // By oid where that is known and there: it may have another name by now.
  for (const auto& [table, was] : identities.items()) {
    const std::string oid = std::to_string(was.value(std::string(side_name(side)), std::int64_t{0}));
    for (auto& r : s->query("SELECT oid::regclass::text FROM pg_class WHERE oid = coalesce((SELECT oid FROM pg_class WHERE oid = " + oid + "), to_regclass(" + pg_literal(table) + ")) AND relreplident = 'f'"))
      bounded("ALTER TABLE " + *r[0] + " REPLICA IDENTITY " + get_string(was, "identity"));
  }
  if (keep_fence) {
    // What refuses must not depend on what goes.
    s->exec("DROP FUNCTION IF EXISTS rehome.ddl(); DROP FUNCTION IF EXISTS rehome.rewritten(); DROP TABLE IF EXISTS rehome.ddl_log; DROP FUNCTION IF EXISTS rehome.ddl_logged(); DROP TABLE IF EXISTS rehome.marker");
    // A database without a table and a large object has no fence.
    if (s->number("SELECT count(*) FROM pg_trigger WHERE tgname IN ('rehome_fence', 'rehome_fence_t')") + s->number("SELECT count(*) FROM pg_largeobject_metadata") == 0) s->exec(pgsql::open_large_objects() + "; DROP SCHEMA IF EXISTS rehome CASCADE");
    return;
  }
  for (auto& r : s->query("SELECT DISTINCT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
                          "WHERE t.tgname IN ('rehome_fence', 'rehome_fence_t')"))
    bounded("DROP TRIGGER IF EXISTS rehome_fence ON " + *r[0] + "; DROP TRIGGER IF EXISTS rehome_fence_t ON " + *r[0]);
  s->exec(pgsql::open_large_objects() + "; DROP SCHEMA IF EXISTS rehome CASCADE");
}

std::vector<std::string> PostgresStore::finish(StoreContext& c, Side serves) {
  std::vector<std::string> left;
  for (const auto& database : databases(c)) {
    for (Side publisher : {Side::source, Side::target}) remove_flow(c, database, flow(database, publisher));
    remove_objects(c, serves, database, false);
    if (!has_database(c, other(serves), database)) continue;
    remove_objects(c, other(serves), database, true);
    auto s = session(c, other(serves), database);
    left.push_back(s->address().label + ": refusing trigger on " +
                   counted(s->number("SELECT count(DISTINCT tgrelid) FROM pg_trigger WHERE tgname IN ('rehome_fence', 'rehome_fence_t')"), "table") + " (the fence)");
  }
  take_helpers(c);
  return left;
}

void PostgresStore::take_helpers(StoreContext& c) {
  for (Side side : {Side::source, Side::target}) {
    if (!c.has(side)) continue;
    untune(c, side);
    c.at(side).call("child.drop", {{"name", "wal-limit-" + config_.name}});
    c.at(side).exec_ok({.argv = {"rm", "-rf", socket_directory(c, side)}});
    // Of a controller that was killed.
    c.at(side).exec_ok({.argv = {"sh", "-c", "rm -rf -- \"$1\".*", "sh", dump_place()}});
  }
}

std::vector<std::string> PostgresStore::abandon(StoreContext& c) {
  std::vector<std::string> left;
  if (!c.has(Side::target)) {
    for (const auto& database : databases(c)) {
      for (Side publisher : {Side::source, Side::target}) remove_flow(c, database, flow(database, publisher));
      remove_objects(c, Side::source, database, false);
    }
    take_helpers(c);
    return left;
  }
  auto admin = session(c, Side::target, server(Side::target).admin_database);
  for (const auto& database : databases(c)) {
    bool there = admin->number("SELECT count(*) FROM pg_database WHERE datname = " + pg_literal(database)) > 0;
    if (there) {
      for (Side publisher : {Side::source, Side::target}) remove_flow(c, database, flow(database, publisher));
    } else if (has_database(c, Side::source, database)) {
      remove_publisher(c, *session(c, Side::source, database), flow(database, Side::source));
    }
    remove_objects(c, Side::source, database, false);
    if (there && is_made(c, database)) {
      // Nobody but us may have used it: the fence refused everything.
      admin->exec("ALTER DATABASE " + pg_identifier(database) + " CONNECTION LIMIT 0");
      pg_retry_locks(Deadline::in(Millis(30000)), [&] {
        admin->exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = " + pg_literal(database) + " AND pid <> pg_backend_pid()");
        admin->exec("DROP DATABASE IF EXISTS " + pg_identifier(database));
      });
    } else if (there) {
      remove_objects(c, Side::target, database, false);
      if (Json limit = c.recall(key("connection_limit", database)); !limit.is_null()) admin->exec("ALTER DATABASE " + pg_identifier(database) + " CONNECTION LIMIT " + limit.dump());
      left.push_back("target: database " + database + " was there before the run and stays, with what was copied");
    }
  }
  const Json settings = c.recall(key("settings_of_all"));
  for (const auto& [_, name] : settings.items()) admin->exec("ALTER ROLE ALL RESET " + pg_identifier(name.get<std::string>()));
  Json roles = c.recall(key("roles"));
  if (roles.is_array())
    for (const auto& r : roles) {
      try {
        admin->exec("DROP ROLE IF EXISTS " + pg_identifier(r.get<std::string>()));
      } catch (const PgError& e) {
        left.push_back("target: role " + r.get<std::string>() + " (" + e.message + ")");
      }
    }
  take_helpers(c);
  return left;
}

void PostgresStore::unfence_source(StoreContext& c) {
  for (const auto& database : databases(c)) {
    for (Side side : {Side::source, Side::target}) {
      if (!has_database(c, side, database)) continue;
      auto s = session(c, side, database);
      if (s->value("SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = 'rehome')") != "t") continue;
      remove_objects(c, side, database, false);
    }
  }
}

std::vector<std::string> PostgresStore::leftovers(StoreContext& c) {
  std::vector<std::string> all;
  for (Side side : {Side::source, Side::target}) {
    if (!c.has(side)) continue;
    auto admin = session(c, side, server(side).admin_database);
    std::string where(side_name(side));
    for (auto& r : admin->query("SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'rehome\\_" + tag_ + "%'")) all.push_back(where + ": slot " + *r[0]);
    for (auto& r : admin->query("SELECT subname FROM pg_subscription WHERE subname LIKE 'rehome\\_" + tag_ + "%'")) all.push_back(where + ": subscription " + *r[0]);
    if (Json was = c.recall(key("tuned." + where)); was.is_string())
      for (auto& r : admin->query("SELECT setting FROM pg_file_settings WHERE name = 'wal_retrieve_retry_interval' AND sourcefile LIKE '%auto.conf' AND setting <> $1", {was.get<std::string>()}))
        all.push_back(where + ": wal_retrieve_retry_interval = " + *r[0]);
    const Json children = c.at(side).call("child.status");
    for (const auto& child : children.at("children"))
      if (get_string(child, "name") == "wal-limit-" + config_.name) all.push_back(where + ": the agent's " + get_string(child, "name"));
    // Of a table synchronisation whose subscription is gone: its slot is named after both, and after the subscriber's cluster.
    if (c.has(other(side))) {
      auto subscriber = session(c, other(side), server(other(side)).admin_database);
      const std::string cluster = subscriber->value("SELECT system_identifier FROM pg_control_system()"),
                        theirs = subscriber->value("SELECT coalesce(string_agg(oid::text, ','), '0') FROM pg_subscription");
      for (auto& r : admin->query("SELECT slot_name, database FROM pg_replication_slots WHERE slot_name ~ ('^pg_[0-9]+_sync_[0-9]+_' || $1 || '$') AND split_part(slot_name, '_', 2) <> ALL (string_to_array($2, ','))", {cluster, theirs}))
        for (const auto& database : databases(c))
          if (database == *r[1]) all.push_back(where + ": slot " + *r[0]);
    }
    for (const auto& database : databases(c)) {
      if (admin->number("SELECT count(*) FROM pg_database WHERE datname = " + pg_literal(database)) == 0) continue;
      auto s = session(c, side, database);
      for (auto& r : s->query("SELECT pubname FROM pg_publication WHERE pubname LIKE 'rehome\\_" + tag_ + "%'")) all.push_back(where + ": " + database + ": publication " + *r[0]);
      for (auto& r : s->query("SELECT evtname FROM pg_event_trigger WHERE evtname LIKE 'rehome\\_%'")) all.push_back(where + ": " + database + ": event trigger " + *r[0]);
      auto fence = s->number("SELECT count(DISTINCT tgrelid) FROM pg_trigger WHERE tgname IN ('rehome_fence', 'rehome_fence_t')");
      const Json identities = c.recall(key("identity", database));
      for (const auto& [table, was] : identities.items())
        for (auto& r : s->query("SELECT oid::regclass::text FROM pg_class WHERE oid = coalesce((SELECT oid FROM pg_class WHERE oid = $1::oid), to_regclass($2)) AND relreplident = 'f'",
                                {std::to_string(was.value(where, std::int64_t{0})), table}))
          all.push_back(where + ": " + database + ": replica identity full of " + *r[0]);
      if (fence)
        all.push_back(where + ": " + database + ": refusing trigger on " + counted(fence, "table") + " (the fence)");
      else if (s->number("SELECT count(*) FROM pg_namespace WHERE nspname = 'rehome'") > 0)
        all.push_back(where + ": " + database + ": schema rehome");
    }
    for (const auto& at : split(trim(c.at(side).exec_ok({.argv = {"sh", "-c", "ls -d -- \"$1\".* 2>/dev/null; true", "sh", dump_place()}}).out), '\n'))
      if (!at.empty()) all.push_back(where + ": " + at);
    if (c.at(side).exec({.argv = {"test", "-e", socket_directory(c, side)}}).ok()) all.push_back(where + ": " + socket_directory(c, side));
  }
  return all;
}

}  // namespace rehome
