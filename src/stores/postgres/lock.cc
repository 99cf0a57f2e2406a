#include "stores/postgres/lock.h"

#include <algorithm>
#include <cctype>

#include "base/text.h"

namespace rehome {
namespace {

// A table that VACUUM FULL writes anew is held for about as long as it takes to copy.
constexpr Millis kLocked = std::chrono::hours(1);

// The first of `known` among the numbers of a deadlock's DETAIL, whose first line says what we waited for. Numbers only:
// the words are in the server's language.
std::int64_t waited_for(const std::string& detail, const std::vector<std::pair<std::int64_t, std::string>>& known) {
  for (std::size_t i = 0; i < detail.size();) {
    if (!std::isdigit(static_cast<unsigned char>(detail[i]))) {
      i++;
      continue;
    }
    std::int64_t n = 0;
    for (; i < detail.size() && std::isdigit(static_cast<unsigned char>(detail[i])) && n < (1LL << 40); i++) n = n * 10 + (detail[i] - '0');
    // A process number may equal a table's oid: the relation is preceded by the process in the line, and oids of user
    // tables start at 16384, so a wrong guess only costs the order, never correctness.
    for (const auto& [oid, name] : known)
      if (oid == n) return oid;
    if (i < detail.size() && detail[i] == '\n') break;
  }
  return 0;
}

}  // namespace

WriterLock::WriterLock(PostgresStore& store, Side side, PgSession& s, const std::vector<PgTable>& tables, bool large_objects)
    : store_(store), side_(side), session_(s), large_objects_(large_objects) {
  s.exec("SET deadlock_timeout = '10ms'; SET idle_in_transaction_session_timeout = '4s'; SET client_min_messages = 'error'");
  for (const auto& t : tables) tables_.emplace_back(t.oid, "ONLY " + t.full());
  std::sort(tables_.begin(), tables_.end());
}

std::string WriterLock::statement() const {
  std::string sql = "LOCK TABLE ";
  auto first = store_.lock_order(side_, session_.address().database);
  auto is_first = [&](std::int64_t oid) { return std::find(first.begin(), first.end(), oid) != first.end(); };
  for (std::int64_t oid : first)
    for (const auto& [o, name] : tables_)
      if (o == oid) sql += name + ", ";
  for (const auto& [o, name] : tables_)
    if (!is_first(o)) sql += name + ", ";
  // What DDL writes that locks no relation: functions, types, schemas; and the log, which a transaction with DDL holds to its end.
  return sql + "rehome.ddl_log, pg_catalog.pg_class, pg_catalog.pg_proc, pg_catalog.pg_type, pg_catalog.pg_enum, pg_catalog.pg_namespace" + std::string(large_objects_ ? ", pg_catalog.pg_largeobject, pg_catalog.pg_largeobject_metadata" : "") + " IN SHARE ROW EXCLUSIVE MODE";
}

void WriterLock::take(const std::string& then, Deadline deadline, int most) {
  while (true) {
    tries_++;
    std::string sql = "BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '100ms'; " + statement() +
                      "; SET LOCAL statement_timeout = 0" + (then.empty() ? "" : "; " + then);
    try {
      session_.exec(sql, deadline);
      return;
    } catch (const PgError& e) {
      if (session_.broken()) throw;
      session_.exec("ROLLBACK");
      if (!pg_is_lock_failure(e.sqlstate)) throw;
      std::int64_t oid = e.sqlstate == "40P01" ? waited_for(e.detail, tables_) : 0;
      auto order = store_.lock_order(side_, session_.address().database);
      bool learnt = oid && (order.empty() || order.front() != oid);
      if (!learnt) most--;
      if (deadline.passed() || most <= 0)
        throw Error(Code::timeout, session_.address().label + ": writers did not let every table be locked in " + std::to_string(tries_) + " tries: " + e.message,
                    "a long writing transaction is open, or the load is too high: wait, or hold the traffic longer", true);
      if (learnt) {
        store_.locks_first(side_, session_.address().database, oid);
        continue;
      }
    } catch (const Error&) {
      if (!session_.broken()) session_.exec("ROLLBACK");
      throw;
    }
    pg_random_wait(Millis(20));
  }
}

ReadLocked lock_to_read(PgSession& s, const std::string& snapshot, const PgTable& t, const std::string& select, const std::atomic<bool>& cancelled) {
  Deadline deadline = Deadline::in(kLocked);
  while (true) {
    try {
      // LIMIT 0 reads nothing, and locks what the whole would: the table and its indexes.
      auto row = s.query("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT " + pg_literal(snapshot) + "; SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '100ms'; " + select +
                         " LIMIT 0; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; SELECT x::oid, pg_relation_filenode(x), EXISTS (SELECT 1 FROM pg_constraint WHERE contype = 'f' AND confrelid = x) FROM to_regclass(" + pg_literal(t.full()) + ") x").at(0);
      return {.oid = std::stoll(row[0].value_or("0")), .file = std::stoll(row[1].value_or("0")), .referenced = *row[2] == "t"};
    } catch (const PgError& e) {
      if (s.broken()) throw;
      s.exec("ROLLBACK");
      if (!pg_is_lock_failure(e.sqlstate)) throw;
      if (cancelled) throw Error(Code::interrupted, "stopped while waiting for a lock on " + t.full());
      if (deadline.passed())
        throw Error(Code::timeout, s.address().label + ": " + t.full() + " stays locked for all readers, by " + who_locks(s, t.oid), "let that session end, then resume", true);
    }
    pg_random_wait(Millis(100));
  }
}

std::map<std::string, std::int64_t> files_in_snapshot(PgSession& s) {
  std::map<std::string, std::int64_t> all;
  for (auto& r : s.query("SELECT n.nspname, c.relname, c.relfilenode FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'r' AND c.oid >= 16384"))
    all[pg_identifier(*r[0]) + "." + pg_identifier(*r[1])] = std::stoll(*r[2]);
  return all;
}

std::string who_locks(PgSession& s, std::int64_t oid) {
  return s.value("SELECT coalesce(string_agg(DISTINCT format('process %s (%s, \"%s\", %s)', a.pid, a.usename, a.application_name, l.relation::regclass), '; '), 'a session that has ended') FROM pg_locks l JOIN pg_stat_activity a USING (pid) "
                 "WHERE l.locktype = 'relation' AND l.granted AND l.mode = 'AccessExclusiveLock' AND a.application_name NOT LIKE 'rehome%' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())" +
                 (oid ? " AND l.relation = " + std::to_string(oid) : std::string()));
}

Millis await_follower(PgSession& publisher, PgSession& subscriber, const PgFlow& flow, Deadline deadline, const std::function<void(std::int64_t)>& waits) {
  Ticks from = system_clock().now();
  publisher.exec("SELECT 1");
  subscriber.exec("SELECT 1");
  const Millis quick(100 + static_cast<std::int64_t>(2 * ms_between(from, system_clock().now())));
  // One large transaction shows no progress until its end.
  constexpr Millis kStalled = std::chrono::minutes(10);
  Deadline stalled = Deadline::in(kStalled);
  std::string confirmed;
  while (true) {
    std::string token = publisher.value("INSERT INTO rehome.marker(token) VALUES ('wait ' || gen_random_uuid()) RETURNING token");
    Deadline soon = Deadline::in(quick);
    while (subscriber.query("SELECT 1 FROM rehome.marker WHERE token = $1", {token}).empty()) {
      if (!soon.passed() && !deadline.passed()) {
        system_clock().sleep(Millis(1));
        continue;
      }
      auto slot = publisher.query("SELECT confirmed_flush_lsn, pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn)::bigint FROM pg_replication_slots WHERE slot_name = " + pg_literal(flow.slot));
      if (slot.empty() || !slot[0][0]) throw Error(Code::store, publisher.address().label + ": slot " + flow.slot + " is gone", "see status");
      if (*slot[0][0] != confirmed) stalled = Deadline::in(kStalled);
      confirmed = *slot[0][0];
      std::int64_t behind = std::stoll(*slot[0][1]);
      if (deadline.passed() || stalled.passed())
        throw Error(Code::timeout, subscriber.address().label + ": its follower is " + human_bytes(behind) + " behind" + (stalled.passed() ? ", and stands still" : ""), "wait for a smaller lag, which status shows; then try again", true);
      if (waits) waits(behind);
      system_clock().sleep(Millis(50));
    }
    if (!soon.passed()) return quick;
  }
}

}  // namespace rehome
