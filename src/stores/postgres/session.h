// stores/postgres: PostgreSQL 13 to 18, by libpq and native logical replication. session: one connection, errors that name
// server, database and what was asked; no password is ever in a text.
#pragma once

#include <libpq-fe.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/error.h"

namespace rehome {

// Where a session goes. Holds the password: never printed.
struct PgAddress {
  std::string label;      // "source: shop": for errors
  std::string server;     // the server as the configuration names it, for errors; empty: as `host` and `port`
  std::string host;       // socket directory or host, from this machine
  int port = 5432;
  std::string user;
  std::string password;
  std::string database;
};

using PgRow = std::vector<std::optional<std::string>>;

// An error of the server carries its SQLSTATE in `sqlstate`.
class PgError : public Error {
 public:
  PgError(Code code, std::string message, std::string hint, bool retryable, std::string sqlstate, std::string detail = {})
      : Error(code, std::move(message), std::move(hint), retryable), sqlstate(std::move(sqlstate)), detail(std::move(detail)) {}
  std::string sqlstate;
  std::string detail;   // the server's DETAIL, whole
};

// A passfile with this password for every server, database and user: libpq's format, its escapes applied.
std::string passfile_line(const std::string& password);

class PgSession {
 public:
  // `application`: what pg_stat_activity shows; our undo finds our own sessions by it. `replication`: a walsender. As a superuser and
  // under a name that begins with "rehome" it is of the replica role: triggers, event triggers and foreign keys that are not ENABLE ALWAYS
  // do not fire. Throws Error(config) where a connection pooler answers, Error(denied, unreachable) or PgError.
  PgSession(const PgAddress& address, const std::string& application, bool replication = false);
  PgSession(const PgSession&) = delete;
  PgSession& operator=(const PgSession&) = delete;

  // Runs one or several statements; the rows of the last one. With a deadline the statement is cancelled there and
  // Error(timeout) thrown.
  std::vector<PgRow> query(const std::string& sql, Deadline deadline = {});
  std::vector<PgRow> query(const std::string& sql, const std::vector<std::string>& parameters, Deadline deadline = {});
  void exec(const std::string& sql, Deadline deadline = {}) { query(sql, deadline); }
  // The only value of the only row; throws when there is none. NULL is "".
  std::string value(const std::string& sql, Deadline deadline = {});
  std::string value(const std::string& sql, const std::vector<std::string>& parameters, Deadline deadline = {});
  // The tag of the last command ("COMMIT"): a COMMIT of a failed transaction succeeds, with the tag ROLLBACK.
  const std::string& command_tag() const { return command_tag_; }
  std::int64_t number(const std::string& sql) { return std::stoll(value(sql)); }

  // Pumps COPY ... TO STDOUT of this session into COPY ... FROM STDIN of the other; `moved` hears the bytes as they go
  // and may throw, which ends both copies with an error. Returns all bytes.
  std::int64_t copy_to(const std::string& copy_out, PgSession& to, const std::string& copy_in,
                       const std::function<void(std::int64_t)>& moved);

  // From now on a statement that is waited for is cancelled when `stop` becomes true, and Error(interrupted) thrown. Outlives the session.
  void stop_on(const std::atomic<bool>& stop) { stop_ = &stop; }
  // Ends the session without a word to the server: the relay's far end, which an agent keeps, must not see a goodbye.
  void leave();
  int version() const { return PQserverVersion(connection_.get()); }   // 150004
  int major() const { return version() / 10000; }
  const PgAddress& address() const { return address_; }
  std::string quote(const std::string& literal) const;
  bool broken() const { return PQstatus(connection_.get()) != CONNECTION_OK; }
  // Notices (WARNING and above) since the last call.
  std::vector<std::string> take_notices();

 private:
  struct Close {
    void operator()(PGconn* c) const { PQfinish(c); }
  };
  struct Clear {
    void operator()(PGresult* r) const { PQclear(r); }
  };
  using Result = std::unique_ptr<PGresult, Clear>;
  [[noreturn]] void fail(const PGresult* result, std::string_view sql);
  std::vector<PgRow> collect(std::string_view sql, Deadline deadline);
  void cancel();
  PgAddress address_;
  std::unique_ptr<PGconn, Close> connection_;
  std::vector<std::string> notices_;
  std::string command_tag_;
  const std::atomic<bool>* stop_ = nullptr;
};

// The statement after which a session's COMMIT returns when it is on disk; what waits for more than that stays as it is set.
std::string pg_durable();
// Returns when all that the session's server has committed is on its disk, by whatever session and setting: for who writes down
// elsewhere that something is done. A commit that has written WAL flushes everything before it, hence the message. Throws PgError.
void make_durable(PgSession& session);
// What keeps the text of a session's statements out of its server's log and statistics, for those that hold a password: as a statement,
// to be sent before they are and before their transaction begins (a transaction is chosen for the log at its BEGIN), and as PGOPTIONS.
std::string pg_say_nothing();
std::string pg_say_nothing_options();
std::string pg_identifier(std::string_view name);                           // "quoted"
std::string pg_literal(std::string_view text);                              // 'quoted', standard_conforming_strings on
std::string pg_conninfo_value(std::string_view text);                       // 'quoted', for a connection string
// Runs `work` under lock_timeout 100 ms and tries it again after a random wait (5 to 100 ms) when it met a lock, until
// the deadline; then the last error. `work` must leave no transaction open when it throws.
void pg_retry_locks(Deadline deadline, const std::function<void()>& work);
// A random wait up to `most`: two who wait for each other do not meet again.
void pg_random_wait(Millis most);
bool pg_is_lock_failure(const std::string& sqlstate);

}  // namespace rehome
