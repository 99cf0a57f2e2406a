#include "stores/postgres/session.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <random>
#include <utility>

#include "base/text.h"

namespace rehome {

std::string passfile_line(const std::string& password) {
  std::string escaped;
  for (char ch : password) {
    if (ch == ':' || ch == '\\') escaped += '\\';
    escaped += ch;
  }
  return "*:*:*:*:" + escaped + "\n";
}

PgSession::PgSession(const PgAddress& address, const std::string& application, bool replication) : address_(address) {
  std::string port = std::to_string(address.port);
  const char* keys[] = {"host", "port", "user", "password", "dbname", "application_name", "connect_timeout", "replication",
                        "fallback_application_name", nullptr};
  const char* values[] = {address.host.c_str(), port.c_str(), address.user.c_str(), address.password.c_str(),
                          address.database.c_str(), application.c_str(), "15", replication ? "database" : nullptr,
                          "rehome", nullptr};
  connection_.reset(PQconnectdbParams(keys, values, 0));
  if (!connection_) throw Error(Code::internal, "out of memory for a connection");
  if (PQstatus(connection_.get()) != CONNECTION_OK) {
    std::string said(trim(PQerrorMessage(connection_.get())));
    // libpq names the socket of this process that the connection goes through.
    const std::string through = "connection to server on socket \"" + address.host + "/.s.PGSQL." + port + "\" failed: ";
    if (!address.server.empty() && said.starts_with(through)) said.erase(0, through.size());
    bool denied = said.find("authentication") != std::string::npos || said.find("no pg_hba.conf entry") != std::string::npos ||
                  said.find("password") != std::string::npos || said.find("role \"") != std::string::npos;
    bool missing = said.find("does not exist") != std::string::npos && said.find("database") != std::string::npos;
    throw Error(denied ? Code::denied : missing ? Code::config : Code::unreachable,
                address.label + ": cannot connect" + (address.server.empty() ? "" : " to " + address.server) + " as " + address.user + ": " + said,
                denied    ? "check user, os_user and password of this server, and its pg_hba.conf"
                : missing ? "correct the database's name, or create it"
                          : "is the server running, and is this its address as seen from its site?",
                !denied && !missing);
  }
  PQsetNoticeReceiver(
      connection_.get(),
      [](void* self, const PGresult* r) {
        const char* severity = PQresultErrorField(r, PG_DIAG_SEVERITY_NONLOCALIZED);
        if (severity && std::string_view(severity) == "WARNING")
          static_cast<PgSession*>(self)->notices_.emplace_back(PQresultErrorField(r, PG_DIAG_MESSAGE_PRIMARY));
      },
      this);
  // Settings of a server, role or database must not end our sessions, nor refuse their work, nor change what values look like: two
  // servers are compared by the text of their rows. Said here and not in the connection's options, so that RESET gives back what the
  // application has.
  std::string settings = "SET idle_in_transaction_session_timeout = 0; SET statement_timeout = 0; SET lock_timeout = 0; SET default_transaction_read_only = off; SET TimeZone = 'UTC'; "
                         "SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex'; SET lc_monetary = 'C'; SET default_transaction_isolation = 'read committed'; SET row_security = off; SET search_path = pg_catalog";
  // What we were told is committed is still there after a crash: a fence, a sequence's position.
  settings += "; " + pg_durable();
  // Bytes go from one database to another of the same encoding as they are: a role's client_encoding, or PGCLIENTENCODING here, would turn
  // them into others on one side alone.
  settings += "; SELECT set_config('client_encoding', current_setting('server_encoding'), false)";
  if (major() >= 14) settings += "; SET idle_session_timeout = 0";
  if (major() >= 17) settings += "; SET transaction_timeout = 0";
  // An event trigger of the application's, which may write, must not fire for our changes: on the side that is closed it would be refused.
  settings += "; SELECT set_config('session_replication_role', 'replica', false) WHERE current_setting('application_name') LIKE 'rehome%' AND current_setting('is_superuser') = 'on'";
  const std::string backend = value(settings + "; SELECT pg_backend_pid()", Deadline::in(Millis(15000)));
  // Each transaction of ours could be another server session, and a setting, a snapshot or a lock somebody else's.
  if (backend != std::to_string(PQbackendPID(connection_.get())))
    throw Error(Code::config, address.label + ": a connection pooler answers there, and not the server itself", "name the PostgreSQL server's own address and port in rehome.yaml");
}

std::vector<std::string> PgSession::take_notices() { return std::exchange(notices_, {}); }

void PgSession::fail(const PGresult* result, std::string_view sql) {
  auto field = [&](int code) -> std::string {
    const char* v = result ? PQresultErrorField(result, code) : nullptr;
    return v ? v : "";
  };
  std::string state = field(PG_DIAG_SQLSTATE), message = field(PG_DIAG_MESSAGE_PRIMARY);
  if (message.empty()) message = trim(PQerrorMessage(connection_.get()));
  std::string detail = field(PG_DIAG_MESSAGE_DETAIL);
  std::string text = address_.label + ": " + message;
  if (!detail.empty()) text += " (" + detail.substr(0, 300) + ")";
  // The statement's beginning tells which one; values are parameters and not in it.
  std::string head(sql.substr(0, 100));
  // Of a role's password, which cannot be a parameter, not a letter.
  if (auto secret = head.find(" PASSWORD '"); secret != std::string::npos) head.resize(secret + 9);
  for (char& c : head)
    if (c == '\n') c = ' ';
  text += " [" + head + (sql.size() > 100 ? "..." : "") + "]";
  bool lost = PQstatus(connection_.get()) != CONNECTION_OK;
  throw PgError(lost ? Code::unreachable : state == "28000" || state == "42501" ? Code::denied : Code::store, text,
                lost ? "is the server running? then resume" : "", lost || pg_is_lock_failure(state) || state.starts_with("40"),
                state, detail);
}

void PgSession::leave() {
  // PQfinish sends Terminate, which would end the kept backend and its snapshot; on a socket that is shut it cannot.
  ::shutdown(PQsocket(connection_.get()), SHUT_RDWR);
  connection_.reset();
}

void PgSession::cancel() {
  std::unique_ptr<PGcancel, decltype(&PQfreeCancel)> handle(PQgetCancel(connection_.get()), &PQfreeCancel);
  char said[256];
  if (handle) PQcancel(handle.get(), said, sizeof said);
}

std::vector<PgRow> PgSession::collect(std::string_view sql, Deadline deadline) {
  std::vector<PgRow> rows;
  bool cancelled = false, stopped = false;
  Result bad;
  while (true) {
    while (PQisBusy(connection_.get())) {
      pollfd p{PQsocket(connection_.get()), POLLIN, 0};
      int r = ::poll(&p, 1, static_cast<int>(deadline.left(Millis(stop_ ? 100 : 60000)).count()));
      if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", address_.label);
      stopped = stopped || (stop_ && *stop_ && !cancelled);
      if ((deadline.passed() || stopped) && !cancelled) {
        cancel();
        cancelled = true;
        deadline = Deadline::in(Millis(3000));
      } else if (deadline.passed()) {
        throw Error(Code::timeout, address_.label + ": no answer in time to [" + std::string(sql.substr(0, 80)) + "]", "", true);
      }
      if (r > 0 && !PQconsumeInput(connection_.get())) fail(nullptr, sql);
    }
    Result result(PQgetResult(connection_.get()));
    if (!result) break;
    switch (PQresultStatus(result.get())) {
      case PGRES_TUPLES_OK: {
        rows.clear();
        int n = PQntuples(result.get()), m = PQnfields(result.get());
        for (int i = 0; i < n; i++) {
          PgRow row;
          for (int k = 0; k < m; k++) {
            if (PQgetisnull(result.get(), i, k))
              row.emplace_back(std::nullopt);
            else
              row.emplace_back(std::string(PQgetvalue(result.get(), i, k), static_cast<std::size_t>(PQgetlength(result.get(), i, k))));
          }
          rows.push_back(std::move(row));
        }
        break;
      }
      case PGRES_COMMAND_OK:
        rows.clear();
        command_tag_ = PQcmdStatus(result.get());
        break;
      case PGRES_EMPTY_QUERY:
        break;
      default:
        if (!bad) bad = std::move(result);
    }
  }
  if (bad && stopped) throw Error(Code::interrupted, address_.label + ": stopped [" + std::string(sql.substr(0, 80)) + "]");
  if (bad && cancelled) {
    throw Error(Code::timeout, address_.label + ": took too long and was cancelled [" + std::string(sql.substr(0, 80)) + "]", "", true);
  }
  if (bad) fail(bad.get(), sql);
  return rows;
}

std::vector<PgRow> PgSession::query(const std::string& sql, Deadline deadline) {
  if (!PQsendQuery(connection_.get(), sql.c_str())) fail(nullptr, sql);
  return collect(sql, deadline);
}

std::vector<PgRow> PgSession::query(const std::string& sql, const std::vector<std::string>& parameters, Deadline deadline) {
  std::vector<const char*> values;
  for (const auto& p : parameters) values.push_back(p.c_str());
  if (!PQsendQueryParams(connection_.get(), sql.c_str(), static_cast<int>(values.size()), nullptr, values.data(), nullptr, nullptr, 0))
    fail(nullptr, sql);
  return collect(sql, deadline);
}

std::string PgSession::value(const std::string& sql, Deadline deadline) {
  auto rows = query(sql, deadline);
  if (rows.size() != 1 || rows[0].size() != 1)
    throw Error(Code::store, address_.label + ": expected one value from [" + sql.substr(0, 100) + "]");
  return rows[0][0].value_or("");
}

std::string PgSession::value(const std::string& sql, const std::vector<std::string>& parameters, Deadline deadline) {
  auto rows = query(sql, parameters, deadline);
  if (rows.size() != 1 || rows[0].size() != 1)
    throw Error(Code::store, address_.label + ": expected one value from [" + sql.substr(0, 100) + "]");
  return rows[0][0].value_or("");
}

std::int64_t PgSession::copy_to(const std::string& copy_out, PgSession& to, const std::string& copy_in,
                                const std::function<void(std::int64_t)>& moved) {
  PGconn* out = connection_.get();
  PGconn* in = to.connection_.get();
  {
    Result r(PQexec(out, copy_out.c_str()));
    if (PQresultStatus(r.get()) != PGRES_COPY_OUT) fail(r.get(), copy_out);
  }
  {
    Result r(PQexec(in, copy_in.c_str()));
    if (PQresultStatus(r.get()) != PGRES_COPY_IN) {
      cancel();
      while (Result rest{PQgetResult(out)}) {
        if (PQresultStatus(rest.get()) == PGRES_COPY_OUT) {
          char* drop = nullptr;
          while (PQgetCopyData(out, &drop, 0) > 0) PQfreemem(drop);
        }
      }
      to.fail(r.get(), copy_in);
    }
  }
  std::int64_t total = 0, unreported = 0;
  std::optional<Error> stopped;
  bool ended = false;
  // Batched: one PQputCopyData a row costs a function call and a buffer check for each.
  std::string batch;
  batch.reserve(1 << 17);
  auto put = [&] {
    if (!batch.empty() && PQputCopyData(in, batch.data(), static_cast<int>(batch.size())) != 1) to.fail(nullptr, copy_in);
    batch.clear();
  };
  while (true) {
    char* data = nullptr;
    int n = PQgetCopyData(out, &data, 0);
    if (n <= 0) {
      if (n == -2) stopped = Error(Code::store, address_.label + ": " + std::string(trim(PQerrorMessage(out))) + " [" + copy_out.substr(0, 100) + "]");
      ended = true;
      break;
    }
    batch.append(data, static_cast<std::size_t>(n));
    PQfreemem(data);
    total += n;
    unreported += n;
    if (batch.size() >= (1 << 16)) put();
    if (unreported >= (1 << 20)) {
      try {
        moved(unreported);
      } catch (const Error& e) {
        stopped = e;
        break;
      }
      unreported = 0;
    }
  }
  if (!stopped) {
    try {
      moved(unreported);
    } catch (const Error& e) {
      stopped = e;
    }
  }
  if (stopped) {
    PQputCopyEnd(in, "stopped by rehome");
    while (Result rest{PQgetResult(in)}) {
    }
    if (!ended) cancel();
    char* drop = nullptr;
    while (!ended && PQgetCopyData(out, &drop, 0) > 0) PQfreemem(drop);
    while (Result rest{PQgetResult(out)}) {
    }
    throw *stopped;
  }
  put();
  std::optional<Error> source_error;
  while (Result r{PQgetResult(out)}) {
    if (PQresultStatus(r.get()) != PGRES_COMMAND_OK) {
      // The target must not take a truncated table for a whole one.
      source_error = Error(Code::store, address_.label + ": " + std::string(trim(PQresultErrorMessage(r.get()))), "", true);
    }
  }
  if (PQputCopyEnd(in, source_error ? "the source failed" : nullptr) != 1) to.fail(nullptr, copy_in);
  Result failure;
  while (Result r{PQgetResult(in)})
    if (PQresultStatus(r.get()) != PGRES_COMMAND_OK && !failure) failure = std::move(r);
  if (source_error) throw *source_error;
  if (failure) to.fail(failure.get(), copy_in);
  return total;
}

std::string PgSession::quote(const std::string& literal) const { return pg_literal(literal); }

std::string pg_durable() { return "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply'"; }

void make_durable(PgSession& session) {
  session.exec("BEGIN");
  session.exec("SET LOCAL synchronous_commit = on");
  session.exec("SELECT pg_logical_emit_message(true, 'rehome', '')");
  session.exec("COMMIT");
}

namespace {

// What is not loaded takes its setting for a name of nobody's.
constexpr std::pair<const char*, const char*> kSayNothing[] = {
    {"log_statement", "none"}, {"log_min_duration_statement", "-1"}, {"log_min_duration_sample", "-1"}, {"log_transaction_sample_rate", "0"}, {"log_duration", "off"},
    {"log_min_error_statement", "panic"}, {"pg_stat_statements.track", "none"}, {"pg_stat_statements.track_utility", "off"}, {"pgaudit.log", "none"}};

}  // namespace

std::string pg_say_nothing() {
  std::string sql;
  for (const auto& [name, value] : kSayNothing) sql += std::string(sql.empty() ? "" : "; ") + "SET " + name + " = '" + value + "'";
  return sql;
}

std::string pg_say_nothing_options() {
  std::string options;
  for (const auto& [name, value] : kSayNothing) options += std::string(" -c ") + name + "=" + value;
  return options;
}

std::string pg_identifier(std::string_view name) {
  std::string out = "\"";
  for (char c : name) {
    if (c == '"') out += '"';
    out += c;
  }
  return out + "\"";
}

std::string pg_literal(std::string_view text) {
  // E'' with doubled backslashes reads the same whatever standard_conforming_strings says.
  bool backslash = text.find('\\') != std::string_view::npos;
  std::string out = backslash ? "E'" : "'";
  for (char c : text) {
    if (c == '\'' || c == '\\') out += c;
    out += c;
  }
  return out + "'";
}

std::string pg_conninfo_value(std::string_view text) {
  std::string out = "'";
  for (char c : text) {
    if (c == '\'' || c == '\\') out += '\\';
    out += c;
  }
  return out + "'";
}

bool pg_is_lock_failure(const std::string& s) {
  return s == "55P03" /* lock_timeout */ || s == "57014" /* statement_timeout */ || s == "40P01" /* deadlock */ ||
         s == "55006" /* object in use */;
}

void pg_random_wait(Millis most) {
  thread_local std::mt19937 random{std::random_device{}()};
  system_clock().sleep(Millis(std::uniform_int_distribution<std::int64_t>(1, most.count())(random)));
}

void pg_retry_locks(Deadline deadline, const std::function<void()>& work) {
  while (true) {
    try {
      return work();
    } catch (const PgError& e) {
      if (!pg_is_lock_failure(e.sqlstate) || deadline.passed()) throw;
    } catch (const Error& e) {
      if (e.code != Code::timeout || !e.retryable || deadline.passed()) throw;
    }
    pg_random_wait(Millis(100));
  }
}

}  // namespace rehome
