// The lock that holds every writer of a database back: what the cut, the micro-fence and the comparison share.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "stores/postgres/postgres.h"

namespace rehome {

// All tables of one database in SHARE ROW EXCLUSIVE mode, pg_class (which holds DDL back) and the large objects' catalogues.
//
// Writers that hold one table and want another which we have already locked make a deadlock, which our own short
// deadlock_timeout ends by failing us, never them. Under a steady load of such transactions every try would fail, so each
// deadlock teaches the order: the table that we waited for is one that the application locks before those we held, and
// goes to the front. Two tables updated in one order by everybody cost one failed try; the store keeps what was learnt, so
// that the micro-fence learns for the real cut.
class WriterLock {
 public:
  // `s` is the session that will hold the lock. Sets its deadlock_timeout, and an idle timeout after which a stopped
  // holder lets go by itself.
  // `large_objects` false: their catalogues are locked by somebody else.
  WriterLock(PostgresStore& store, Side side, PgSession& s, const std::vector<PgTable>& tables, bool large_objects = true);

  // BEGIN, the locks, and `then` in one round trip. Each try is bounded by 100 ms as a whole (lock_timeout counts each lock
  // for itself), then everybody goes on, and after a random wait it is tried again until the deadline, `most` times at most
  // (a try that taught the order does not count); Error(timeout) then. A throw leaves no transaction open.
  void take(const std::string& then, Deadline deadline, int most = 1 << 30);
  int tries() const { return tries_; }

 private:
  std::string statement() const;
  PostgresStore& store_;
  Side side_;
  PgSession& session_;
  std::vector<std::pair<std::int64_t, std::string>> tables_;   // oid, "ONLY name"
  bool large_objects_;
  int tries_ = 0;
};

// A table as a transaction that reads it has found it under its name: not the one of the snapshot where the oid is another, and not its
// rows where the file is. TRUNCATE and what writes a table anew take rows away from older snapshots, or move them.
struct ReadLocked {
  std::int64_t oid = 0, file = 0;
  bool referenced = false;     // by a foreign key
};
// Begins a transaction of `s` that reads as of `snapshot` and holds the locks that `select` needs, for the caller to end. Waits 100 ms at
// most for all of them, with no other lock held, and after a random wait tries again, for an hour. Throws Error(timeout), which names who
// holds the table, Error(interrupted) when cancelled, PgError where it cannot be read any more; then no transaction is open.
ReadLocked lock_to_read(PgSession& s, const std::string& snapshot, const PgTable&, const std::string& select, const std::atomic<bool>& cancelled);
// PgTable::full() -> file of all tables as the transaction's snapshot has them.
std::map<std::string, std::int64_t> files_in_snapshot(PgSession&);
// Who holds that table (0: any) of the session's database in ACCESS EXCLUSIVE mode, for an error's text.
std::string who_locks(PgSession&, std::int64_t oid);

// Before writers are held for a marker: sends one and waits for it without any lock, then another, until one is quick. Throws
// Error(timeout), which says how far behind the follower is, at the deadline and when it makes no progress for ten minutes.
// `waits` hears now and then how many bytes are missing, and may throw. Returns how long writers may be held for the next one:
// 100 ms, and the ways to both servers.
Millis await_follower(PgSession& publisher, PgSession& subscriber, const PgFlow& flow, Deadline deadline, const std::function<void(std::int64_t)>& waits = {});

}  // namespace rehome
