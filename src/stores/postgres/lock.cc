#include "stores/postgres/lock.h"

#include <algorithm>
#include <cctype>

namespace rehome {
namespace {

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

WriterLock::WriterLock(PostgresStore& store, Side side, PgSession& s, const std::vector<PgTable>& tables) : store_(store), side_(side), session_(s) {
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
  return sql + "rehome.ddl_log, pg_catalog.pg_class, pg_catalog.pg_proc, pg_catalog.pg_type, pg_catalog.pg_enum, pg_catalog.pg_namespace, pg_catalog.pg_largeobject, pg_catalog.pg_largeobject_metadata IN SHARE ROW EXCLUSIVE MODE";
}

void WriterLock::take(const std::string& then, Deadline deadline) {
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
      if (deadline.passed())
        throw Error(Code::timeout, session_.address().label + ": writers did not let every table be locked in " + std::to_string(tries_) + " tries: " + e.message,
                    "a long writing transaction is open, or the load is too high: wait, or hold the traffic longer", true);
      std::int64_t oid = e.sqlstate == "40P01" ? waited_for(e.detail, tables_) : 0;
      auto order = store_.lock_order(side_, session_.address().database);
      if (oid && (order.empty() || order.front() != oid)) {
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

}  // namespace rehome
