// What must be copied again, and how: only the tables concerned, by the server's own synchronisation of single tables on the
// running subscription. The same brings the rest of a first copy whose snapshot was lost.
#include <algorithm>
#include <iterator>
#include <set>

#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/schema_change.h"

namespace rehome {
namespace {

constexpr Millis kStalled(60000);

void at_subscriber(PgSession& t, const std::function<void()>& work) {
  pg_retry_locks(Deadline::in(Millis(120000)), [&] {
    try {
      // Nobody but the follower waits here.
      t.exec("BEGIN; SET LOCAL lock_timeout = '2s'");
      work();
    } catch (const Error&) {
      if (!t.broken()) t.exec("ROLLBACK");
      throw;
    }
  });
}

}  // namespace

PostgresStore::SourceSchema PostgresStore::read_source_schema(StoreContext& c, const std::string& database) {
  auto s = session(c, Side::source, database);
  for (int i = 0; i < 5; i++) {
    SourceSchema now;
    now.ddl = s->value("SELECT pg_current_snapshot()");
    now.fingerprint = catalogue_fingerprint(*s, config_.postgres.roles);
    now.dump = std::make_unique<SchemaDump>(c, *this, programs(c), Side::source, database, "", std::vector<std::string>{"-s"});
    now.entries = now.dump->entries();
    try {
      read_addresses(*s, now.entries);
      read_columns(*s, now.entries);
    } catch (const PgError&) {
      continue;   // something in the dump has gone since
    }
    if (catalogue_fingerprint(*s, config_.postgres.roles) == now.fingerprint) return now;
  }
  throw Error(Code::store, "source: database " + database + ": its schema changes all the time", "wait until a migration of the application is over, then try again", true);
}

void PostgresStore::remember_schema(StoreContext& c, const std::string& database, Side side, const std::string& seen, const Json& fingerprint) {
  c.remember(schema_key("ddl_seen", database, side), readable_snapshot(seen));
  c.remember(schema_key("fingerprint", database, side), fingerprint);
}

std::string PostgresStore::logged_since(StoreContext& c, const std::string& database, Side side) {
  const Json seen = c.recall(schema_key("ddl_seen", database, side));
  return "rehome.ddl_log" + (seen.is_string() ? " WHERE NOT pg_visible_in_snapshot(xact, " + pg_literal(seen.get<std::string>()) + ")" : std::string(" WHERE true"));
}

std::set<std::int64_t> PostgresStore::rewritten_since(StoreContext& c, const std::string& database, Side side) {
  std::set<std::int64_t> all;
  for (auto& r : session(c, side, database)->query("SELECT DISTINCT rewritten FROM " + logged_since(c, database, side) + " AND rewritten IS NOT NULL")) all.insert(std::stoll(*r[0]));
  return all;
}

std::string PostgresStore::schema_key(const std::string& what, const std::string& database, Side side) const {
  return key(side == Side::source ? what : what + "_target", database);
}

std::vector<SchemaEntry> PostgresStore::read_copied_schema(StoreContext& c, const std::string& database, const std::string& snapshot) {
  SchemaDump dump(c, *this, programs(c), Side::source, database, snapshot, {"-s"});
  auto entries = dump.entries();
  auto s = session(c, Side::source, database);
  {
    auto then = session(c, Side::source, database, "rehome copy");
    then->exec("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
    then->exec("SET TRANSACTION SNAPSHOT " + pg_literal(snapshot));
    read_columns(*then, entries);
  }
  try {
    read_addresses(*s, entries);
  } catch (const PgError&) {
    entries.clear();   // dropped since: without this record a later change copies the whole database again, and says so
  }
  for (const auto& e : entries)
    if (e.class_oid && e.type.empty()) {
      entries.clear();
      break;
    }
  return entries;
}

void PostgresStore::finish_schema(StoreContext& c, const std::string& database, const SourceSchema& now) {
  auto s = session(c, Side::source, database);
  auto t = session(c, Side::target, database, "rehome copy");
  c.progress({.store = config_.name, .phase = "foreign keys", .detail = database});
  at_subscriber(*t, [&] {
    SchemaChange change(*t, now.entries);
    std::set<int> keys;
    change.to_restore(*t, keys);
    // Checked now, while every table stands where the source stood at one commit.
    if (!keys.empty()) t->exec(now.dump->script(keys, *t));
    t->exec("SET search_path = pg_catalog");
    write_copied_schema(*t, now.entries, {});
    t->exec("COMMIT");
  });
  // A view over another unfilled one waits for it.
  std::set<std::string> filled;
  for (auto& r : s->query("SELECT quote_ident(schemaname) || '.' || quote_ident(matviewname) FROM pg_matviews WHERE ispopulated")) filled.insert(*r[0]);
  for (bool again = true; again;) {
    again = false;
    for (auto& r : t->query("SELECT quote_ident(schemaname) || '.' || quote_ident(matviewname) FROM pg_matviews WHERE NOT ispopulated")) {
      if (!filled.contains(*r[0])) continue;
      try {
        t->exec("RESET search_path; REFRESH MATERIALIZED VIEW " + *r[0] + "; SET search_path = pg_catalog");
        again = true;
      } catch (const PgError& e) {
        if (e.sqlstate != "55000") throw;
        t->exec("SET search_path = pg_catalog");
      }
    }
  }
}

bool PostgresStore::follower_passes(StoreContext& c, const std::string& database, Side publisher) {
  PgFlow f = flow(database, publisher);
  auto s = session(c, publisher, database, "rehome marker"), t = session(c, f.subscriber(), database);
  std::string token = s->value("INSERT INTO rehome.marker(token) VALUES ('recopy ' || gen_random_uuid()) RETURNING token"), at;
  Deadline deadline = Deadline::in(kStalled);
  while (t->query("SELECT 1 FROM rehome.marker WHERE token = $1", {token}).empty()) {
    if (c.cancelled) throw Error(Code::interrupted, "stopped while waiting for the follower of " + database);
    std::string now = s->value("SELECT coalesce((SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = " + pg_literal(f.slot) + "), '')");
    if (now != at) deadline = Deadline::in(kStalled);
    at = now;
    if (now.empty() || deadline.passed()) return false;
    system_clock().sleep(Millis(20));
  }
  return true;
}

// Between the change at the source and ours at the target the stream may hold rows of several shapes of a table. They are
// not wanted (the table is copied again), but the follower refuses a column that it cannot name: so the old table, while it
// is unsubscribed, gets the new one's columns too, and a table that has a new name gets a stand-in under it.
std::string PostgresStore::copy_changed(StoreContext& c, const std::string& database) {
  PgFlow f = flow(database, Side::source);
  auto s = session(c, Side::source, database);
  auto t = session(c, Side::target, database, "rehome copy");
  t->exec(pg_say_nothing());   // what is made anew may hold a password
  SourceSchema now = read_source_schema(c, database);
  // Before objects that belong to them, or that they have rights on.
  restore_roles(c);
  carry_database(c, database);
  // After the schema was read: one more is met again.
  auto rewritten = rewritten_since(c, database, Side::source);
  auto at_source = tables(*s);
  std::set<std::string> published_now;
  for (const auto& p : published(*s, f)) published_now.insert(p);
  // A table that nothing follows, as one that a reverse left behind, has other rows there, and maybe other columns.
  for (const auto& x : at_source)
    if (!x.partitioned && !x.unlogged && !published_now.contains(x.full())) rewritten.insert(x.oid);
  SchemaChange change(*t, now.entries, rewritten);
  if (!change.known()) return "there is no record of what was copied";
  if (!change.obstacle().empty()) return change.obstacle();
  if (!slot_stands(*s, f)) return "its slot is gone";
  if (!follows(*t, f)) return "its follower is gone";
  const Json extensions = extension_versions(*s);
  const auto updates = extension_updates(c, database, *s, *t);
  const std::string where = pgsql::who_serves(Side::source);
  try {
    t->exec("CREATE TABLE IF NOT EXISTS rehome.stand_in(name text PRIMARY KEY, kind text NOT NULL)");
    // Tried, to learn which tables go.
    std::set<std::string> there, affected;
    for (const auto& x : tables(*t)) there.insert(x.full());
    auto drop = [&] {
      for (auto& r : t->query("SELECT name, kind FROM rehome.stand_in ORDER BY kind DESC")) t->exec("DROP " + *r[1] + " IF EXISTS " + *r[0] + (*r[1] == "TABLE" ? " CASCADE" : ""));
      t->exec("DELETE FROM rehome.stand_in");
      change.drop(*t);
    };
    at_subscriber(*t, [&] {
      drop();
      std::set<std::string> left;
      for (const auto& x : tables(*t)) left.insert(x.full());
      for (const auto& x : there)
        if (!left.contains(x)) affected.insert(x);
      for (const auto& x : at_source)
        if (!left.contains(x.full())) affected.insert(x.full());
      t->exec("ROLLBACK");
    });
    // An extension's update writes its tables at both sides; one that is not published was made anew with its extension.
    for (const auto& x : at_source) {
      bool renewed = std::any_of(updates.begin(), updates.end(), [&](const ExtensionUpdate& u) { return u.name == x.extension; });
      if (!x.extension.empty() && !x.unlogged && !x.partitioned && (renewed || rewritten.contains(x.oid) || !published_now.contains(x.full()))) affected.insert(x.full());
    }
    std::vector<std::string> again;
    for (const auto& x : at_source)
      if (affected.contains(x.full())) again.push_back(x.full());
    c.log(config_.name + ": " + database + ": changed: " + (change.empty() ? "nothing that a dump would hold" : change.says()) + "; copied again: " + (again.empty() ? "no table" : first_few(again)));
    if (!affected.empty()) {
      std::vector<PgTable> kept;
      for (const auto& x : at_source)
        if (!affected.contains(x.full())) kept.push_back(x);
      publish(c, *s, f, kept);
    }
    // Before the follower passes: an extension's table gets the columns that its rows have by then.
    if (!updates.empty())
      at_subscriber(*t, [&] {
        t->exec(pgsql::fence_function_while_copying(where));
        update_extensions(*t, updates);
        t->exec(pgsql::fence_function_before_switch(where));
        t->exec("COMMIT");
      });
    if (!affected.empty()) {
      at_subscriber(*t, [&] {
        for (const auto& x : at_source) {
          if (!affected.contains(x.full()) || (!x.extension.empty() && there.contains(x.full()))) continue;
          bool exists = there.contains(x.full());
          if (!exists && !published_now.contains(x.full())) continue;
          if (!exists && t->number("SELECT count(*) FROM pg_namespace WHERE nspname = " + pg_literal(x.schema)) == 0)
            t->exec("CREATE SCHEMA " + pg_identifier(x.schema) + "; INSERT INTO rehome.stand_in VALUES (" + pg_literal(pg_identifier(x.schema)) + ", 'SCHEMA')");
          if (!exists) t->exec("CREATE TABLE " + x.full() + "()");
          t->exec("INSERT INTO rehome.stand_in VALUES (" + pg_literal(x.full()) + ", 'TABLE') ON CONFLICT DO NOTHING");
          std::string root = t->value("SELECT coalesce(pg_partition_root(" + pg_literal(x.full()) + ")::regclass, " + pg_literal(x.full()) + "::regclass)::text");
          for (auto& r : s->query("SELECT attname FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attgenerated = '' AND attrelid = " + std::to_string(x.oid)))
            if (t->number("SELECT count(*) FROM pg_attribute WHERE NOT attisdropped AND attrelid = " + pg_literal(x.full()) + "::regclass AND attname = " + pg_literal(*r[0])) == 0)
              t->exec("ALTER TABLE " + root + " ADD COLUMN " + pg_identifier(*r[0]) + " text");
        }
        t->exec("COMMIT");
      });
      t->exec("ALTER SUBSCRIPTION " + pg_identifier(f.subscription) + " REFRESH PUBLICATION WITH (copy_data = true)");
      if (!follower_passes(c, database, Side::source)) return "its follower does not get past the change; the target server's log says why";
    }
    at_subscriber(*t, [&] {
      drop();
      std::set<int> keys;
      std::set<int> ids = change.to_restore(*t, keys);
      change.restore(*t, *now.dump, ids);
      update_extensions(*t, updates);   // made just now, in the target's own version
      t->exec("SET LOCAL session_replication_role = replica");
      // Rows that CREATE EXTENSION or its update has made there, where the source's come.
      t->exec(pgsql::fence_function_while_copying(where));
      auto at_target_now = tables(*t);
      std::set<std::string> here;
      for (const auto& x : at_target_now) here.insert(x.full());
      for (const auto& x : at_source)
        if (!x.extension.empty() && !x.unlogged && affected.contains(x.full()) && here.contains(x.full())) t->exec(empty_to_synchronise(*s, *t, x));
      t->exec(pgsql::fence_function_before_switch(where));
      // Closed in the transaction that makes them.
      for (const auto& x : unfenced(*t, at_target_now)) t->exec(pgsql::fence_triggers(x));
      write_copied_schema(*t, now.entries, keys);
      t->exec("COMMIT");
    });
    synchronise(c, database, Side::source);
    finish_schema(c, database, now);
    for (const auto& x : again) t->exec("ANALYZE " + x);
  } catch (const PgError& e) {
    // What the database refused has been taken back with its transaction. A lost connection or a lock is no reason to begin again.
    if (e.retryable) throw;
    return e.message;
  }
  c.remember(key("extensions", database), extensions);
  remember_schema(c, database, Side::source, now.ddl, now.fingerprint);
  return {};
}

std::string PostgresStore::schema_change(StoreContext& c, const std::string& database, Side side) {
  auto s = session(c, side, database);
  std::vector<std::string> all;
  for (auto& r : s->query("SELECT tag, object, at::text FROM " + logged_since(c, database, side) + " ORDER BY n LIMIT 50"))
    all.push_back(*r[0] + " " + r[1].value_or("") + " at " + *r[2]);
  // What the event trigger did not see.
  std::string differs = catalogue_difference(c.recall(schema_key("fingerprint", database, side)), catalogue_fingerprint(*s, config_.postgres.roles));
  if (!differs.empty() && all.empty()) all.push_back("changed, and no event trigger told of it: " + differs);
  return join(all, "\n");
}

std::vector<std::string> PostgresStore::needs_recopy(StoreContext& c) {
  std::vector<std::string> all;
  const Side serves = serving(c);
  const auto change = database_change(c, *session(c, serves, server(serves).admin_database), serves);
  for (const auto& line : split(change.says(serves), '\n'))
    if (!line.empty()) all.push_back(line);
  for (const auto& database : databases(c)) {
    if (std::find(change.gone.begin(), change.gone.end(), database) != change.gone.end()) continue;
    PgFlow f = flow(database, Side::source);
    auto s = session(c, Side::source, database);
    const bool window = follows(*s, flow(database, Side::target));
    if (!window && c.recall(key("copied", database)) != true) {
      all.push_back(database + ": everything: a copy of it was begun and not finished");
      continue;
    }
    if (!window && !slot_stands(*s, f))
      all.push_back(database + ": everything: slot " + f.slot + " is gone (it passed the limit of WAL kept, or somebody dropped it)");
    const std::string changed = schema_change(c, database, window ? Side::target : Side::source);
    for (const auto& line : split(changed, '\n'))
      if (!line.empty()) all.push_back(database + ": " + line);
    if (!window && changed.empty())
      if (std::string bare = not_followed(*s, f, tables(*s)); !bare.empty()) all.push_back(database + ": nothing follows these tables, or they have no fence: " + bare);
  }
  return all;
}

void PostgresStore::copy_whole(StoreContext& c, const std::string& database, const std::string& why) {
  c.log(config_.name + ": " + database + " is copied again as a whole: " + why);
  // First of all: from here on what is there is followed no more until it is whole, whoever goes on with it.
  c.remember(key("copied", database), false);
  c.remember(key("snapshot", database), "lost");
  open_path(c, database, flow(database, Side::source));
  copy_database(c, database);
}

bool PostgresStore::follows(PgSession& subscriber, const PgFlow& f) {
  return subscriber.number("SELECT count(*) FROM pg_subscription WHERE subenabled AND subname = " + pg_literal(f.subscription)) > 0;
}

// The same statement on both sides may give other rows (random(), now()), and the follower is told of none of them: those tables are
// taken from it and emptied, and the synchronisation that comes next brings them.
void PostgresStore::copy_back(StoreContext& c, const std::string& database, const std::set<std::int64_t>& rewritten) {
  PgFlow f = flow(database, Side::target);
  auto s = session(c, Side::source, database, "rehome copy"), t = session(c, Side::target, database);
  std::vector<PgTable> kept, again;
  std::vector<std::string> names;
  for (const auto& x : tables(*t)) {
    const bool renewed = rewritten.contains(x.oid) && !x.partitioned && !x.unlogged;
    (renewed ? again : kept).push_back(x);
    if (renewed) names.push_back(x.full());
  }
  if (again.empty()) return;
  c.log(config_.name + ": " + database + ": rewritten on the target, and copied back: " + first_few(names) + "; until they are there, the source lacks their rows");
  publish(c, *t, f, kept);
  s->exec("ALTER SUBSCRIPTION " + pg_identifier(f.subscription) + " REFRESH PUBLICATION");
  // What it has read of them before must not come after they are empty.
  if (!follower_passes(c, database, Side::target))
    throw Error(Code::store, "source: database " + database + ": its follower does not pass", "the source server's log says why; then rehome resume --recopy", true);
  const std::string where = pgsql::who_serves(Side::target);
  at_subscriber(*s, [&] {
    s->exec("LOCK TABLE ONLY " + join(names, ", ONLY ") + " IN SHARE ROW EXCLUSIVE MODE; SET LOCAL session_replication_role = replica; " + pgsql::fence_function_while_copying(where));
    // TRUNCATE minds foreign keys, of tables that stay too.
    for (const auto& x : again) s->exec(x.extension.empty() ? "DELETE FROM ONLY " + x.full() : empty_to_synchronise(*t, *s, x));
    s->exec(pgsql::fence_function(true, where) + "; COMMIT");
  });
}

// In the fallback window the schema of the old side is a person's to change: which of a new version's changes the old one can
// live with, nobody else knows. Every row of the serving side must have its place there; then new tables are copied and followed.
void PostgresStore::accept_schema(StoreContext& c, const std::string& database) {
  const std::string changed = schema_change(c, database, Side::target);
  if (changed.empty()) return;
  auto s = session(c, Side::source, database), t = session(c, Side::target, database);
  const std::string seen = t->value("SELECT pg_current_snapshot()");
  const Json fingerprint = catalogue_fingerprint(*t, config_.postgres.roles);
  auto columns = [&](PgSession& at) {
    std::set<std::string> all;   // by raw names: what quote_ident quotes depends on the major
    for (auto& r : at.query("SELECT schemaname, sequencename FROM pg_sequences WHERE schemaname <> 'rehome'")) all.insert("sequence " + pg_identifier(*r[0]) + "." + pg_identifier(*r[1]));
    for (const auto& x : tables(at)) {
      all.insert("table " + x.full());
      for (auto& r : at.query("SELECT attname || ' ' || format_type(atttypid, atttypmod) FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attgenerated = '' AND attrelid = " + std::to_string(x.oid)))
        all.insert(x.full() + "." + *r[0]);
    }
    return all;
  };
  std::vector<std::string> missing, extra;
  const auto there = columns(*s), here = columns(*t);
  std::set_difference(here.begin(), here.end(), there.begin(), there.end(), std::back_inserter(missing));
  std::set_difference(there.begin(), there.end(), here.begin(), here.end(), std::back_inserter(extra));
  if (!missing.empty())
    throw Error(Code::state, database + ": the source has no place for rows of the target: " + first_few(missing) + " (changed on the target: " + join(split(changed, '\n'), "; ") + ")",
                "make the same change on the source, where SET application_name = 'rehome by hand' lets a superuser do so, or undo it on the target; then rehome resume --recopy");
  c.log(config_.name + ": " + database + ": changed on the target since the switch, and the source's own business from here on: " + join(split(changed, '\n'), "; "));
  if (!extra.empty())
    c.log(config_.name + ": " + database + ": the source alone has, and keeps: " + first_few(extra) + "; drop by hand what the application is not to have after rehome reverse, which leaves the rest of their tables' rows on the source");
  const std::string where = pgsql::who_serves(Side::target);
  // A table that was made there by hand is closed like the others.
  install_fence(c, *s, Side::source, tables(*s), true);
  auto close = [&] { s->exec("BEGIN; " + pgsql::fence_function(true, where) + "; " + pgsql::ddl_function(true) + "; COMMIT"); };
  try {
    copy_back(c, database, rewritten_since(c, database, Side::target));
    synchronise(c, database, Side::target);
  } catch (const Error&) {
    if (!s->broken()) close();
    throw;
  }
  close();
  remember_schema(c, database, Side::target, seen, fingerprint);
}

Side PostgresStore::serving(StoreContext& c) {
  auto s = session(c, Side::source, server(Side::source).admin_database);
  for (const auto& database : databases(c))
    if (s->number("SELECT count(*) FROM pg_subscription WHERE subenabled AND subname = " + pg_literal(flow(database, Side::target).subscription)) > 0) return Side::target;
  return Side::source;
}

void PostgresStore::take_in_databases(StoreContext& c) {
  const Side serves = serving(c);
  const auto change = database_change(c, *session(c, serves, server(serves).admin_database), serves);
  if (!change.gone.empty())
    throw Error(Code::state, config_.name + ": " + change.says(serves), serves == Side::source ? "make it again under that name; else rehome cancel and begin again" : "make it again under that name; or rehome complete, which needs no way back");
  if (serves == Side::target) {
    if (!change.come.empty())
      throw Error(Code::state, config_.name + ": " + change.says(serves), "the way back cannot bring it: dump and restore it on the source and drop it here when you reverse, or rehome complete, which needs no way back");
    return;
  }
  auto names = databases(c);
  names.insert(names.end(), change.come.begin(), change.come.end());
  std::sort(names.begin(), names.end());
  if (!change.come.empty()) {
    c.log(config_.name + ": made since, and copied now: " + join(change.come, ", "));
    c.remember(key("databases"), names);
    restore_roles(c);
  }
  // Also those of a try that was interrupted.
  for (const auto& database : names)
    if (c.recall(key("copied", database)).is_null()) prepare_database(c, database);
}

void PostgresStore::recopy(StoreContext& c) {
  if (config_.postgres.databases.empty()) take_in_databases(c);
  if (!copied(c)) {
    copy(c);
    // Of the others the slot may be gone.
    for (const auto& database : databases(c))
      if (slot_stands(*session(c, Side::source, database), flow(database, Side::source))) follow_database(c, database);
  }
  bool window = false;
  for (const auto& database : databases(c)) {
    PgFlow f = flow(database, Side::source);
    auto s = session(c, Side::source, database);
    const Side serving = follows(*s, flow(database, Side::target)) ? Side::target : Side::source;
    // As before the run: one that came since would go with the schema, and act there.
    auto there = session(c, serving, database);
    const std::string where = std::string(side_name(serving)) + ": database " + database + ": ";
    for (const auto& t : triggers_on_replicated_rows(*there)) throw Error(Code::state, where + t.what, t.mend);
    if (std::string told = told_by_generated(*there, tables(*there), session(c, other(serving), database)->major()); !told.empty())
      throw Error(Code::state, where + "replication does not send generated columns, and these tables' rows are told apart by some: " + told, kMendGenerated);
    if (serving == Side::target) {
      window = true;
      accept_schema(c, database);
      continue;
    }
    bool slot = slot_stands(*s, f);
    // A table that a reverse left behind has changed nothing.
    if (slot && schema_change(c, database, Side::source).empty() && not_followed(*s, f, tables(*s)).empty()) continue;
    std::string why = slot ? copy_changed(c, database) : "its slot is gone (it passed the limit of WAL kept, or somebody dropped it)";
    if (!why.empty()) copy_whole(c, database, why);
  }
  if (!window) follow(c);
}

}  // namespace rehome
