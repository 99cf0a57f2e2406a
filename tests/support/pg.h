// One PostgreSQL session of a test tool: opens itself again when it has ended, and prepares its statements anew.
#pragma once

#include <libpq-fe.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"

namespace rehome::testing {

// A refused statement or a lost connection. `state` is the SQLSTATE, empty when the connection itself failed.
class SqlError : public Error {
 public:
  SqlError(std::string message, std::string state)
      : Error(Code::store, std::move(message)), state(std::move(state)) {}
  std::string state;
};

using Result = std::unique_ptr<PGresult, decltype(&PQclear)>;

class Session {
 public:
  explicit Session(std::string conninfo) : conninfo_(std::move(conninfo)) {}
  // Runs one statement with text parameters, prepared once per connection. Throws SqlError; connects when needed.
  Result run(const std::string& sql, const std::vector<std::string>& parameters = {});
  // Statements separated by semicolons, without parameters.
  void script(const std::string& sql);
  // BEGIN. A connection found dead here has carried nothing of the transaction, so one new one is tried.
  void begin();
  void commit();  // throws unless the server says that it committed
  void rollback() noexcept;
  void close() { connection_.reset(); }
  PGconn* raw();  // connected

 private:
  void connect();
  Result check(PGresult* result);
  std::string conninfo_;
  std::unique_ptr<PGconn, decltype(&PQfinish)> connection_{nullptr, PQfinish};
  std::set<std::string> prepared_;
};

inline std::string value(const Result& r, int row, int column) { return PQgetvalue(r.get(), row, column); }

}  // namespace rehome::testing
