// The lock that holds every writer of a database back: what the cut, the micro-fence and the comparison share.
#pragma once

#include <functional>
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
  WriterLock(PostgresStore& store, Side side, PgSession& s, const std::vector<PgTable>& tables);

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
  int tries_ = 0;
};

// Before writers are held for a marker: sends one and waits for it without any lock, then another, until one is quick. Throws
// Error(timeout), which says how far behind the follower is, at the deadline and when it makes no progress for ten minutes.
// `waits` hears now and then how many bytes are missing, and may throw. Returns how long writers may be held for the next one:
// 100 ms, and the ways to both servers.
Millis await_follower(PgSession& publisher, PgSession& subscriber, const PgFlow& flow, Deadline deadline, const std::function<void(std::int64_t)>& waits = {});

}  // namespace rehome
