#include "support/pg.h"

#include <string_view>

#include "base/text.h"

namespace rehome::testing {

void Session::connect() {
  prepared_.clear();
  // What the caller says comes later in the list and so wins over these.
  const char* names[] = {"connect_timeout", "tcp_user_timeout", "application_name", "dbname", nullptr};
  const char* values[] = {"3", "5000", "rehome-test", conninfo_.c_str(), nullptr};
  connection_.reset(PQconnectdbParams(names, values, 1));
  if (PQstatus(connection_.get()) != CONNECTION_OK) {
    std::string message(trim(PQerrorMessage(connection_.get())));
    connection_.reset();
    throw SqlError(message, "");
  }
  PQsetNoticeProcessor(connection_.get(), [](void*, const char*) {}, nullptr);
}

PGconn* Session::raw() {
  if (!connection_ || PQstatus(connection_.get()) != CONNECTION_OK) connect();
  return connection_.get();
}

Result Session::check(PGresult* raw_result) {
  Result result(raw_result, PQclear);
  auto status = PQresultStatus(result.get());
  if (status == PGRES_COMMAND_OK || status == PGRES_TUPLES_OK) return result;
  const char* state = result ? PQresultErrorField(result.get(), PG_DIAG_SQLSTATE) : nullptr;
  SqlError error(std::string(trim(result ? PQresultErrorMessage(result.get()) : PQerrorMessage(connection_.get()))),
                 state ? state : "");
  // 57P0x: the server is going away; 26000: somebody discarded our statements. Both are mended by a new connection.
  if (PQstatus(connection_.get()) != CONNECTION_OK || error.state.rfind("57P", 0) == 0 || error.state == "26000")
    connection_.reset();
  throw error;
}

Result Session::run(const std::string& sql, const std::vector<std::string>& parameters) {
  PGconn* c = raw();
  const std::string name = "s" + std::to_string(std::hash<std::string>{}(sql));
  if (!prepared_.count(sql)) {
    check(PQprepare(c, name.c_str(), sql.c_str(), 0, nullptr));
    prepared_.insert(sql);
  }
  std::vector<const char*> values;
  for (auto& p : parameters) values.push_back(p.c_str());
  return check(PQexecPrepared(c, name.c_str(), static_cast<int>(values.size()), values.data(), nullptr, nullptr, 0));
}

void Session::script(const std::string& sql) { check(PQexec(raw(), sql.c_str())); }

void Session::begin() {
  try {
    script("BEGIN");
  } catch (const SqlError&) {
    if (connection_) throw;
    script("BEGIN");
  }
}

void Session::commit() {
  Result r = check(PQexec(connection_.get(), "COMMIT"));
  // A failed transaction answers ROLLBACK to COMMIT, without an error.
  if (std::string_view(PQcmdStatus(r.get())) != "COMMIT") throw SqlError("the transaction was rolled back", "40000");
}

void Session::rollback() noexcept {
  if (!connection_) return;
  Result r(PQexec(connection_.get(), "ROLLBACK"), PQclear);
  if (PQresultStatus(r.get()) != PGRES_COMMAND_OK) connection_.reset();
}

}  // namespace rehome::testing
