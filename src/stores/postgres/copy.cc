// Phase copy: one slot with its exported snapshot a database, schema by pg_dump from that snapshot, tables by parallel COPY, the rest
// by pg_restore with parallel index builds. Finished tables are remembered and not copied again.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <set>
#include <thread>

#include "base/parallel.h"
#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/large_objects.h"
#include "stores/postgres/lock.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/schema_change.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

struct Piece {
  std::size_t table;
  std::string range;     // WHERE clause, or empty
  std::int64_t bytes = 0;
  bool whole = false;
};

// WHERE clauses that together hold each row of the table once: quantiles of the first column of a primary key, as ANALYZE
// saw them (wrong ones cost evenness only), or equal steps of an integer's range. Empty: no key, or nothing known, or a key of a type that
// somebody made: its operators lie in another schema than ours are looked for in, if it has any.
std::vector<std::string> key_ranges(PgSession& s, const PgTable& t, std::int64_t parts) {
  auto key = s.query("SELECT quote_ident(a.attname), a.attname, format_type(a.atttypid, a.atttypmod), a.atttypid IN (20, 21, 23), "
                     "EXISTS (SELECT 1 FROM pg_collation l WHERE l.oid = a.attcollation AND NOT l.collisdeterministic), "
                     "EXISTS (SELECT 1 FROM pg_type y WHERE y.oid = a.atttypid AND (y.typtype = 'e' OR coalesce(nullif(y.typbasetype, 0), y.oid) < 16384)) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid "
                     "AND a.attnum = i.indkey[0] WHERE i.indisprimary AND i.indrelid = " + std::to_string(t.oid));
  if (key.empty() || *key[0][4] == "t" || *key[0][5] != "t") return {};
  std::vector<std::string> bounds;
  auto seen = s.query("SELECT unnest(histogram_bounds::text::text[]) FROM pg_stats WHERE NOT inherited AND schemaname = " + pg_literal(t.schema) + " AND tablename = " + pg_literal(t.name) + " AND attname = " + pg_literal(*key[0][1]));
  if (static_cast<std::int64_t>(seen.size()) > parts) {
    for (std::int64_t p = 1; p < parts; p++) bounds.push_back(*seen[static_cast<std::size_t>(p) * seen.size() / static_cast<std::size_t>(parts)][0]);
  } else if (*key[0][3] == "t") {
    auto ends = s.query("SELECT min(" + *key[0][0] + "), max(" + *key[0][0] + ") FROM ONLY " + t.full());
    if (!ends[0][0]) return {};
    __int128 low = std::stoll(*ends[0][0]), high = std::stoll(*ends[0][1]);
    for (std::int64_t p = 1; p < parts; p++) bounds.push_back(std::to_string(static_cast<std::int64_t>(low + (high - low) * p / parts)));
  }
  bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
  if (bounds.empty()) return {};
  auto value = [&](const std::string& b) { return pg_literal(b) + "::" + *key[0][2]; };
  std::vector<std::string> ranges{*key[0][0] + " < " + value(bounds.front())};
  for (std::size_t i = 0; i + 1 < bounds.size(); i++) ranges.push_back(*key[0][0] + " >= " + value(bounds[i]) + " AND " + *key[0][0] + " < " + value(bounds[i + 1]));
  ranges.push_back(*key[0][0] + " >= " + value(bounds.back()));
  return ranges;
}

// A token bucket over all workers; 0 bytes a second means no limit.
class Throttle {
 public:
  explicit Throttle(std::int64_t bytes_per_second) : rate_(bytes_per_second), from_(system_clock().now()) {}
  void spend(std::int64_t bytes) {
    if (rate_ <= 0) return;
    std::int64_t all = spent_ += bytes;
    double due_ms = static_cast<double>(all) * 1000 / static_cast<double>(rate_);
    double ahead = due_ms - ms_between(from_, system_clock().now());
    if (ahead > 1) system_clock().sleep(Millis(static_cast<std::int64_t>(std::min(ahead, 1000.0))));
  }

 private:
  std::int64_t rate_;
  Ticks from_;
  std::atomic<std::int64_t> spent_{0};
};

std::vector<std::pair<std::string, std::string>> client_environment(const PgAddress& a) {
  std::vector<std::pair<std::string, std::string>> env{{"PGHOST", a.host}, {"PGPORT", std::to_string(a.port)}, {"PGUSER", a.user},
                                                       {"PGDATABASE", a.database}, {"PGAPPNAME", "rehome copy"}};
  if (!a.password.empty()) env.emplace_back("PGPASSWORD", a.password);
  return env;
}

}  // namespace

PostgresStore::SnapshotState PostgresStore::snapshot_state(StoreContext& c, const std::string& database, const PgFlow& flow) {
  Json known = c.recall(key("snapshot", database));
  if (!known.is_string()) return {};
  if (known == "lost") return {.is = SnapshotState::lost};
  auto s = session(c, Side::source, database, "rehome copy");
  if (!slot_stands(*s, flow)) return {.is = SnapshotState::lost, .why = "the slot of " + database + " is gone (it passed the limit of WAL kept, or somebody dropped it)"};
  const Json keeps = c.source.call("keep.list");
  for (const auto& k : keeps.at("kept")) {
    if (get_string(k, "name") != flow.slot || !get_bool(k, "alive")) continue;
    try {
      s->exec("BEGIN ISOLATION LEVEL REPEATABLE READ");
      s->exec("SET TRANSACTION SNAPSHOT " + pg_literal(known.get<std::string>()));
      return {.is = SnapshotState::held, .name = known.get<std::string>()};
    } catch (const PgError&) {
      // Gone with its session.
    }
  }
  Json sections = c.recall(key("sections", database)), done = c.recall(key("done", database));
  if (!sections.is_array() || sections.empty() || !done.is_array() || done.empty())
    return {.is = SnapshotState::lost, .why = "the snapshot of " + database + " is lost before a table was finished"};
  std::string changed = schema_change(c, database, Side::source);
  if (!changed.empty()) return {.is = SnapshotState::lost, .why = "the snapshot of " + database + " is lost, and its schema changed meanwhile: " + changed};
  return {.is = SnapshotState::rest};
}

PostgresStore::CopyRest PostgresStore::what_is_left(StoreContext& c, const std::string& database, PgSession& source) {
  std::set<std::string> finished;
  for (const Json done = c.recall(key("done", database)); const auto& d : done) finished.insert(d.get<std::string>());
  CopyRest r;
  std::vector<std::string> names;
  std::int64_t bytes = 0;
  for (const auto& table : tables(source)) {
    if (table.partitioned || table.unlogged) continue;
    if (finished.contains(table.full())) {
      r.stay.push_back(table);
      continue;
    }
    r.again.push_back(table);
    names.push_back(table.full());
    bytes += table.bytes;
  }
  r.says = "the snapshot of " + database + " is lost; " + std::to_string(r.stay.size()) + " finished tables stay, " + std::to_string(r.again.size()) + " are copied again (" + human_bytes(bytes) + "): " + join(names, ", ");
  return r;
}

std::vector<std::string> PostgresStore::left_to_copy(StoreContext& c, const std::string& database) {
  if (c.recall(key("copied", database)) == true) return {};
  SnapshotState snapshot = snapshot_state(c, database, flow(database, Side::source));
  if (snapshot.is == SnapshotState::lost) return {(snapshot.why.empty() ? "the first copy of " + database + " must begin anew" : snapshot.why) + "; all tables are copied again"};
  if (snapshot.is == SnapshotState::rest) return {what_is_left(c, database, *session(c, Side::source, database)).says};
  return {};
}

// The walsender's connection is kept by the source's agent, so that the snapshot lives on when this process dies.
std::string PostgresStore::hold_snapshot(StoreContext& c, const std::string& database, const PgFlow& flow) {
  std::string keep = flow.slot;
  SnapshotState before = snapshot_state(c, database, flow);
  if (before.is == SnapshotState::held) return before.name;
  if (before.is == SnapshotState::rest) return {};
  if (!before.why.empty()) c.log(config_.name + ": " + before.why);
  auto admin = session(c, Side::source, database);
  if (before.is == SnapshotState::lost) {
    // Tables finished under the lost slot cannot be followed by the new one.
    c.log(config_.name + ": all tables of " + database + " are copied again");
    c.remember(key("done", database), Json::array());
    c.remember(key("sections", database), Json::array());
    c.remember(key("postdata_begun", database), Json());
    // A subscription, and the prepared way back's slot, would keep the target's database from being made anew.
    // Its fence stays until nobody but superusers can connect any more, and goes with its tables.
    for (Side publisher : {Side::source, Side::target}) remove_flow(c, database, this->flow(database, publisher));
  }
  for (int tries = 1;; tries++) {
    c.source.call("keep.drop", {{"name", keep}});
    // What an earlier slot held back is covered by no snapshot any more: the tables that used it start again.
    drop_slots(*admin, "slot_name = " + pg_literal(flow.slot));
    // Tables may have come since the run was prepared: other databases were copied meanwhile, or a person was away.
    prepare_source(c, database);
    c.note("slot " + flow.slot, {{"where", "source: " + database}, {"undo", "pg_drop_replication_slot"}});
    PgAddress a = address(c, Side::source, database, keep);
    PgSession walsender(a, "rehome snapshot", true);
    auto rows = walsender.query("CREATE_REPLICATION_SLOT " + pg_identifier(flow.slot) + " LOGICAL pgoutput EXPORT_SNAPSHOT");
    std::string snapshot = rows.at(0).at(2).value_or("");
    {
      // What the schema is compared with later: as the snapshot has it.
      auto s = session(c, Side::source, database, "rehome copy");
      s->exec("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
      s->exec("SET TRANSACTION SNAPSHOT " + pg_literal(snapshot));
      // The slot waits for open transactions: a table that one of them has made is in the snapshot, and nobody would follow it.
      if (std::string bare = not_followed(*s, flow, tables(*s)); !bare.empty()) {
        if (tries == 10) throw Error(Code::store, "source: database " + database + ": tables are made all the time: " + bare, "wait until a migration of the application is over, then resume", true);
        c.log(config_.name + ": " + database + ": its slot is made anew, for these tables were made meanwhile: " + bare);
        continue;
      }
      remember_schema(c, database, Side::source, s->value("SELECT pg_current_snapshot()"), catalogue_fingerprint(*s, config_.postgres.roles));
      c.remember(key("extensions", database), extension_versions(*s));
    }
    c.remember(key("snapshot", database), snapshot);
    walsender.leave();
    return snapshot;
  }
}

const PgPrograms& PostgresStore::programs(StoreContext& c) {
  std::lock_guard lock(mutex_);
  if (!programs_) {
    int major = PgSession(address(c, Side::source, server(Side::source).admin_database), "rehome").major();
    PgPrograms found = choose_pg_programs(c, major);
    if (!found.major)
      throw Error(Code::config, "neither this machine nor a site has a pg_dump that reads a source of " + std::to_string(major),
                  "install postgresql-client-" + std::to_string(major) + " or later where rehome runs, or on a site");
    programs_ = std::make_shared<PgPrograms>(found);
  }
  return *programs_;
}

std::unique_ptr<SchemaDump> PostgresStore::dump_section(StoreContext& c, const std::string& database, const std::string& section, const std::string& snapshot) {
  const Json done = c.recall(key("sections", database));
  if (done.is_array() && std::find(done.begin(), done.end(), Json(section)) != done.end()) return {};
  return std::make_unique<SchemaDump>(c, *this, programs(c), Side::source, database, snapshot, std::vector<std::string>{"--section=" + section});
}

void PostgresStore::restore_section(StoreContext& c, const std::string& database, const std::string& section, const SchemaDump* dumped, bool foreign_keys) {
  if (!dumped) return;
  const SchemaDump& dump = *dumped;
  Json done = c.recall(key("sections", database));
  if (!done.is_array()) done = Json::array();
  auto target = session(c, Side::target, database, "rehome copy");
  std::set<int> wanted;
  const std::set<int> later = foreign_keys ? std::set<int>() : of_foreign_keys(dump.entries());
  for (const auto& e : dump.entries())
    // A materialized view's rows are data that need all tables.
    if (!later.contains(e.id) && (foreign_keys || e.kind != "MATERIALIZED VIEW DATA")) wanted.insert(e.id);
  if (section == "pre-data") {
    // A resumed or repeated run may meet a schema of ours. A database that this run made is made anew: dropping its
    // schemas one by one would lose what template0 gave schema public (owner, rights, comment).
    if (!c.recall(key("predata_begun", database)).is_null()) {
      if (is_made(c, database)) {
        target.reset();
        session(c, Side::target, server(Side::target).admin_database)->exec("DROP DATABASE IF EXISTS " + pg_identifier(database) + " WITH (FORCE)");
        create_database(c, database);
        target = session(c, Side::target, database, "rehome copy");
      } else {
        // What the fence took from the catalogue is written down in schema rehome alone.
        target->exec(pgsql::open_large_objects());
        for (auto& r : target->query("SELECT nspname FROM pg_namespace WHERE nspname NOT LIKE 'pg\\_%' AND nspname NOT IN ('information_schema', 'public') ORDER BY nspname = 'rehome'"))
          target->exec("DROP SCHEMA " + pg_identifier(*r[0]) + " CASCADE");
        std::string owner = target->value("SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace WHERE nspname = 'public'");
        target->exec("DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION " + owner + "; GRANT USAGE ON SCHEMA public TO public; COMMENT ON SCHEMA public IS 'standard public schema'");
      }
    }
    c.remember(key("predata_begun", database), true);
  } else if (!c.recall(key("postdata_begun", database)).is_null()) {
    // Some of it may be there from an interrupted run.
    auto entries = dump.entries();
    read_addresses(*session(c, Side::source, database), entries);
    auto missing = missing_objects(*target, entries);
    for (const auto& e : entries)
      if (!e.type.empty() && !missing.contains(e.id) && !e.tag.ends_with(" _RETURN")) wanted.erase(e.id);
  }
  if (section == "post-data") c.remember(key("postdata_begun", database), true);
  std::string failed;
  // pg_restore begins with settings that only its own major knows; and only a local one reaches the target.
  if (section == "post-data" && !dump.archive().empty() && dump.programs().major <= std::max(target->major(), 16)) {
    TempDir dir("rehome-list");
    write_durably(dir.path() + "/list", dump.list(wanted));
    auto env = client_environment(address(c, Side::target, database));
    env.emplace_back("PGOPTIONS", "-c maintenance_work_mem=256MB -c synchronous_commit=off -c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 -c default_transaction_read_only=off -c session_replication_role=replica" +
                                       std::string(target->major() >= 17 ? " -c transaction_timeout=0" : "") + pg_say_nothing_options());
    if (wanted.empty()) env.clear();
    Outcome o = wanted.empty() ? Outcome{} : run({.argv = {dump.programs().directory + "pg_restore", "--exit-on-error", "-L", dir.path() + "/list", "-d", "dbname=" + pg_conninfo_value(database), "-j", std::to_string(std::max(1, c.deployment.limits.jobs)), dump.archive()}, .env = env},
                                                 Deadline::in(std::chrono::hours(48)), &c.cancelled);
    if (!o.ok()) failed = "pg_restore ended with status " + std::to_string(o.status) + ": " + std::string(trim(o.err));
    // By a new session: this one has waited long.
    if (o.ok()) make_durable(*session(c, Side::target, database, "rehome copy"));
  } else {
    try {
      // A user mapping holds a password, and the whole is one statement.
      target->exec("SET maintenance_work_mem = '256MB'; " + pg_say_nothing());
      target->stop_on(c.cancelled);
      // As one transaction: all of it, or nothing.
      target->exec("BEGIN");
      target->exec(dump.script(wanted, *target));
      target->exec("COMMIT");
    } catch (const PgError& e) {
      if (e.code == Code::unreachable) throw;
      failed = e.message;
    }
  }
  if (!failed.empty()) {
    if (failed.size() > 1200) failed.resize(1200);
    throw Error(Code::store, "target: restoring " + section + " into " + database + ": " + failed, "mend what it names on the target, then resume");
  }
  if (section == "pre-data") carry_public(c, database);
  done.push_back(section);
  c.remember(key("sections", database), done);
}

void PostgresStore::copy_database(StoreContext& c, const std::string& database) {
  PgFlow f = flow(database, Side::source);
  // A statement of a controller that died goes on: an index that it builds is there a while after somebody looked for it.
  session(c, Side::target, database)->exec(pgsql::end_sessions("application_name = 'rehome copy'"));
  std::string snapshot = hold_snapshot(c, database, f);
  // As they are now or as the snapshot has them, never older: what changes later, the fingerprint tells.
  restore_roles(c);
  carry_database(c, database);
  if (snapshot.empty()) return copy_rest(c, database);
  c.progress({.store = config_.name, .phase = "schema", .detail = database});
  // Until the triggers are there nobody but superusers may connect: an application that is pointed at the new server too early must
  // not write between its tables' making and their closing.
  auto admin = session(c, Side::target, server(Side::target).admin_database);
  Json limit = connection_limit(c, database);
  if (limit.is_null())
    limit = session(c, Side::source, database)->number("SELECT datconnlimit FROM pg_database WHERE datname = current_database()");
  else
    c.note("connection limit 0", {{"where", "target: database " + database}, {"was", limit}, {"undo", "put back"}});
  admin->exec("ALTER DATABASE " + pg_identifier(database) + " CONNECTION LIMIT 0");
  // The limit is asked of who comes. Where an earlier copy's tables are, the fence goes with them.
  session(c, Side::target, database)->exec(pgsql::end_sessions("backend_type = 'client backend' AND application_name NOT LIKE 'rehome%' AND NOT (SELECT rolsuper FROM pg_roles WHERE oid = usesysid)"));
  // All of it before the rows: what is dropped while they are copied can be locked, or named, no more.
  std::unique_ptr<SchemaDump> pre_data, post_data;
  std::vector<SchemaEntry> copied_schema;
  try {
    pre_data = dump_section(c, database, "pre-data", snapshot);
    post_data = dump_section(c, database, "post-data", snapshot);
    copied_schema = read_copied_schema(c, database, snapshot);
  } catch (const Error& e) {
    // Words that pg_dump has from the server, asked for in C: of an object that the snapshot names and nobody finds any more.
    const bool missing = e.code == Code::store && (e.message.find("does not exist") != std::string::npos || e.message.find("could not open relation") != std::string::npos || e.message.find("cache lookup failed") != std::string::npos);
    std::string changed = missing ? schema_change(c, database, Side::source) : "";
    if (changed.empty()) throw;
    c.remember(key("snapshot", database), "lost");
    throw Error(Code::store, "source: database " + database + ": its schema has changed since its snapshot, which cannot be read any more: " + join(split(changed, '\n'), "; ") + ": " + e.message, "rehome resume begins this database's copy anew");
  }
  restore_section(c, database, "pre-data", pre_data.get());
  // From its first table on the target refuses its application, and everybody but the copy's own sessions, until the commit opens it.
  const std::string elsewhere = pgsql::who_serves(Side::source);
  {
    auto target = session(c, Side::target, database);
    install_fence(c, *target, Side::target, tables(*target), true);
    target->exec(pgsql::fence_function_while_copying(elsewhere));
  }
  admin->exec("ALTER DATABASE " + pg_identifier(database) + " CONNECTION LIMIT " + std::to_string(limit.get<std::int64_t>()));

  std::vector<PgTable> all;
  std::map<std::string, std::int64_t> files;
  {
    auto s = session(c, Side::source, database, "rehome copy");
    s->exec("BEGIN ISOLATION LEVEL REPEATABLE READ");
    s->exec("SET TRANSACTION SNAPSHOT " + pg_literal(snapshot));
    all = tables(*s);
    files = files_in_snapshot(*s);
    if (std::string bare = not_followed(*s, f, all); !bare.empty())
      throw Error(Code::store, "source: database " + database + ": nothing follows these tables, which are in its snapshot: " + bare, "rehome cancel, then begin again");
  }
  std::set<std::string> finished;
  Json done = c.recall(key("done", database));
  if (done.is_array())
    for (const auto& d : done) finished.insert(d.get<std::string>());

  int source_major = 0;
  std::vector<Piece> pieces;
  std::int64_t total = 0, before = 0;
  // A table is split only where it would keep one worker busy when the others are done: a whole one is written frozen, a split one
  // is written once more when its rows are first read.
  std::int64_t all_bytes = 0;
  for (const auto& t : all) all_bytes += t.partitioned || finished.contains(t.full()) ? 0 : t.bytes;
  const std::int64_t long_one = std::max(split_bytes, static_cast<std::int64_t>(split_share * static_cast<double>(all_bytes) / std::max(1, c.deployment.limits.jobs)));
  {
    auto s = session(c, Side::source, database, "rehome copy");
    source_major = s->major();
    for (std::size_t i = 0; i < all.size(); i++) {
      const PgTable& t = all[i];
      if (t.partitioned) continue;
      total += t.bytes;
      if (finished.contains(t.full())) {
        before += t.bytes;
        continue;
      }
      std::int64_t parts = !t.unlogged && t.extension.empty() && t.bytes > long_one ? (t.bytes + split_bytes - 1) / split_bytes : 1;
      // Before 14 a ctid range scans the whole table: ranges of its key then.
      if (parts > 1 && source_major < 14) {
        auto ranges = key_ranges(*s, t, parts);
        for (const auto& range : ranges) pieces.push_back({i, " WHERE " + range, t.bytes / static_cast<std::int64_t>(ranges.size()), false});
        if (!ranges.empty()) continue;
        parts = 1;
      }
      if (parts <= 1) {
        pieces.push_back({i, "", t.bytes, true});
        continue;
      }
      // relpages is stale without ANALYZE: the file's size is not. The last range is open-ended.
      std::int64_t pages = s->number("SELECT pg_relation_size(" + std::to_string(t.oid) + ") / current_setting('block_size')::int");
      std::int64_t step = pages / parts + 1;
      for (std::int64_t p = 0; p < parts; p++) {
        std::string range = " WHERE ctid >= '(" + std::to_string(p * step) + ",0)'::tid";
        if (p + 1 < parts) range += " AND ctid < '(" + std::to_string((p + 1) * step) + ",0)'::tid";
        pieces.push_back({i, range, t.bytes / parts, false});
      }
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.bytes > b.bytes; });

  std::vector<int> open_pieces(all.size(), 0);
  for (const auto& p : pieces) open_pieces[p.table]++;
  // Split tables are emptied once, before any of their pieces; whole ones in their own transaction, which also lets FREEZE work.
  {
    auto t = session(c, Side::target, database, "rehome copy");
    std::set<std::size_t> split_tables;
    for (const auto& p : pieces)
      if (!p.whole) split_tables.insert(p.table);
    for (std::size_t i : split_tables) t->exec("TRUNCATE ONLY " + all[i].full());
  }

  std::mutex mutex;
  std::deque<Piece> queue(pieces.begin(), pieces.end());
  std::atomic<std::int64_t> moved{before};
  Throttle throttle(c.deployment.store_bandwidth());
  Ticks reported = 0, remembered = system_clock().now();
  std::set<std::size_t> left_out;
  // Of a table that is not as the snapshot has it nothing is copied: recopy brings it, for the log has it as written anew.
  auto leave_out = [&](std::size_t table, PgSession& to) {
    {
      std::lock_guard lock(mutex);
      if (!left_out.insert(table).second) return;
    }
    const PgTable& t = all[table];
    to.exec(pgsql::empty_table(t));
    session(c, Side::source, database)->query("INSERT INTO rehome.ddl_log(tag, object, rewritten) VALUES ('changed while it was copied:', $1, $2)", {t.full(), std::to_string(t.oid)});
    c.log(config_.name + ": " + database + ": " + t.full() + " has changed since the copy began, and is left out: rehome resume --recopy brings it");
  };
  auto require_slot = [&](PgSession& source) {
    if (!slot_stands(source, f))
      throw Error(Code::store, "source: the slot of " + database + " went while it was copied: it kept more WAL than limits: wal_kept allows (" + human_bytes(c.deployment.limits.wal_kept) + "), or somebody dropped it",
                  "raise wal_kept, or copy when less is written; rehome resume begins this database's copy anew");
  };
  // The journal must not know of rows that a crash of the target takes away again.
  auto remember_finished = [&](PgSession& to) {
    make_durable(to);
    c.remember(key("done", database), Json(finished));
  };
  int workers = std::min<int>(std::max(1, c.deployment.limits.jobs), static_cast<int>(std::max<std::size_t>(1, pieces.size())));
  try {
    in_parallel(workers, [&](const std::atomic<bool>& failed) {
      auto from = session(c, Side::source, database, "rehome copy");
      auto to = session(c, Side::target, database, "rehome copy");
      to->exec("SET synchronous_commit = off; SET lock_timeout = 0; SET session_replication_role = replica");
      bool same_major = from->major() == to->major();
      while (true) {
        Piece piece;
        {
          std::lock_guard lock(mutex);
          if (queue.empty() || failed) return;
          piece = queue.front();
          queue.pop_front();
        }
        // Without it nobody could follow from this snapshot on: what is still to come would be copied in vain.
        require_slot(*from);
        const PgTable& t = all[piece.table];
        std::string format = t.binary && same_major ? "FORMAT binary" : "FORMAT text";
        std::string columns = t.columns.empty() ? "" : " (" + t.columns + ")";
        const std::string select = "SELECT " + t.columns + " FROM ONLY " + t.full() + " " + t.condition + piece.range;
        std::string out = "COPY (" + select + ") TO STDOUT (" + format + ")";
        std::string in = "COPY " + t.full() + columns + " FROM STDIN (" + format + (piece.whole && t.extension.empty() ? ", FREEZE" : "") + ")";
        // Each piece in a transaction of its own: a lock that is kept lets ALTER TABLE wait for the end of the copy, and everybody behind it.
        bool as_it_was = true;
        try {
          ReadLocked now = lock_to_read(*from, snapshot, t, select, c.cancelled);
          // Its rows have gone, or other ones stand where a range says. One that is copied whole reads as what it was, or as empty: that the
          // log or the follower tells, but keys that point to its rows would not be true.
          const auto then = files.find(t.full());
          as_it_was = now.oid == t.oid && ((then != files.end() && now.file == then->second) || (piece.whole && !now.referenced));
        } catch (const PgError& e) {
          if (e.sqlstate != "42P01" && e.sqlstate != "42703" && e.sqlstate != "3F000") throw;
          as_it_was = false;
        }
        if (!as_it_was) leave_out(piece.table, *to);
        to->exec("BEGIN");
        if (piece.whole) to->exec(pgsql::empty_table(t));
        if (as_it_was) from->copy_to(out, *to, in, [&](std::int64_t bytes) {
          throttle.spend(bytes);
          std::int64_t now_moved = moved += bytes;
          if (c.cancelled) throw Error(Code::interrupted, "stopped while copying " + t.full());
          std::lock_guard lock(mutex);
          Ticks now = system_clock().now();
          if (ms_between(reported, now) >= 200) {
            reported = now;
            c.progress({.store = config_.name, .phase = "copy", .detail = t.full(), .done = now_moved, .total = std::max(total, now_moved)});
          }
        });
        to->exec("COMMIT");
        // After it: what is left out later is emptied with all its pieces.
        from->exec("ROLLBACK");
        std::lock_guard lock(mutex);
        if (--open_pieces[piece.table] == 0) {
          finished.insert(t.full());
          // Small tables together: a durable journal line for each of 2,000 would cost seconds.
          if (t.bytes > (8 << 20) || ms_between(remembered, system_clock().now()) >= 1000) {
            remember_finished(*to);
            remembered = system_clock().now();
          }
        }
      }
    });
  } catch (const Error& e) {
    try {
      remember_finished(*session(c, Side::target, database, "rehome copy"));
    } catch (const Error& again) {
      c.log(config_.name + ": what was copied last is copied again: " + again.what());
    }
    throw e.in(config_.name);
  }
  remember_finished(*session(c, Side::target, database, "rehome copy"));

  c.progress({.store = config_.name, .phase = "indexes and constraints", .detail = database, .done = total, .total = total});
  // Keys would find their rows missing where a table is to be copied again, and come with that.
  const bool all_there = rewritten_since(c, database, Side::source).empty();
  restore_section(c, database, "post-data", post_data.get(), all_there);
  if (!all_there) std::erase_if(copied_schema, [later = of_foreign_keys(copied_schema)](const SchemaEntry& e) { return later.contains(e.id); });
  auto target = session(c, Side::target, database);
  c.progress({.store = config_.name, .phase = "analyze", .detail = database, .done = total, .total = total});
  analyze(c, database);
  {
    auto t = session(c, Side::target, database, "rehome copy");
    t->exec("BEGIN");
    write_copied_schema(*t, copied_schema, {});
    t->exec("COMMIT");
  }
  target->exec(pgsql::fence_function_before_switch(elsewhere));
  require_slot(*session(c, Side::source, database));
  // The snapshot has done its work; what holds it back would keep vacuum from the source's dead rows.
  c.source.call("keep.drop", {{"name", f.slot}});
  copy_large_objects(c, database);
  c.remember(key("copied", database), true);
}

// The slot still holds every change since the lost snapshot, so the finished tables are followed from it. The others are emptied,
// and copied by the follower itself, each from a snapshot of its own.
void PostgresStore::copy_rest(StoreContext& c, const std::string& database) {
  PgFlow f = flow(database, Side::source);
  c.source.call("keep.drop", {{"name", f.slot}});
  auto s = session(c, Side::source, database);
  auto t = session(c, Side::target, database, "rehome copy");
  if (t->number("SELECT count(*) FROM pg_subscription WHERE subname = " + pg_literal(f.subscription)) == 0) {
    CopyRest rest = what_is_left(c, database, *s);
    t->exec("SET session_replication_role = replica");
    c.log(config_.name + ": " + rest.says);
    // Alone or together, as a foreign key asks for it.
    std::vector<std::string> names;
    for (const auto& table : rest.again) {
      if (table.extension.empty())
        names.push_back(table.full());
      else
        t->exec(empty_to_synchronise(*s, *t, table));
    }
    if (!names.empty()) t->exec("TRUNCATE ONLY " + join(names, ", ONLY "));
    restore_section(c, database, "post-data", dump_section(c, database, "post-data", "").get(), false);
    // Only the finished tables are known to the subscription when it is made.
    publish(c, *s, f, rest.stay);
    subscribe(c, database, f, true);
  }
  synchronise(c, database, Side::source);
  auto now = read_source_schema(c, database);
  finish_schema(c, database, now);
  // What was written down as copied is the schema of this moment, and the finished tables' rows are the snapshot's: a change in between
  // is brought by a copy of the whole, for want of a record.
  if (!schema_change(c, database, Side::source).empty()) t->exec("DELETE FROM rehome.copied_schema");
  analyze(c, database);
  copy_large_objects(c, database);
  c.remember(key("copied", database), true);
}

// No follower brings them: those that are there now, so that a switch finds only what has changed since.
void PostgresStore::copy_large_objects(StoreContext& c, const std::string& database) {
  auto from = session(c, Side::source, database), to = session(c, Side::target, database, "rehome copy");
  to->exec("SET synchronous_commit = off");
  const std::int64_t total = from->number("SELECT pg_relation_size('pg_catalog.pg_largeobject')");
  std::int64_t moved = 0;
  Throttle throttle(c.deployment.store_bandwidth());
  carry_large_objects(*from, *to, {}, [&](std::int64_t bytes) {
    throttle.spend(bytes);
    moved += bytes;
    if (c.cancelled) throw Error(Code::interrupted, "stopped while copying large objects of " + database);
    c.progress({.store = config_.name, .phase = "large objects", .detail = database, .done = moved, .total = std::max(total, moved)});
  });
  make_durable(*to);
}

// One worker alone would be the long end of a copy. A parent's ANALYZE does its partitions too.
void PostgresStore::analyze(StoreContext& c, const std::string& database) {
  std::vector<std::string> names;
  for (auto& r : session(c, Side::target, database)->query("SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'm') "
                                                           "AND NOT c.relispartition AND c.relpersistence <> 't' AND n.nspname <> 'information_schema' ORDER BY c.relkind = 'p' DESC, pg_table_size(c.oid) DESC"))
    names.push_back(*r[0]);
  std::atomic<std::size_t> next{0};
  in_parallel(c.deployment.limits.jobs, [&](const std::atomic<bool>& failed) {
    auto s = session(c, Side::target, database);
    s->stop_on(c.cancelled);
    for (std::size_t i; !failed && (i = next++) < names.size();) s->exec("ANALYZE " + names[i]);
  });
}

void PostgresStore::copy(StoreContext& c) {
  // An interrupted try may have ended between its dropping and its making.
  for (const auto& database : databases(c))
    if (c.recall(key("copied", database)) != true) create_database(c, database);
  watch_wal(c, Side::source);
  for (const auto& database : databases(c)) {
    if (c.recall(key("copied", database)) == true) continue;
    copy_database(c, database);
  }
}

bool PostgresStore::copied(StoreContext& c) {
  const auto all = databases(c);
  return std::all_of(all.begin(), all.end(), [&](const std::string& database) { return c.recall(key("copied", database)) == true; });
}

}  // namespace rehome
