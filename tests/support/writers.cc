// rehome-writers: writes to the database past the service, in the ways that a fence or a follower may miss, and judges
// afterwards whether what was acknowledged is on the side that serves.
//   --init --db CONNINFO                            makes its two tables
//   --db CONNINFO [--admin-db CONNINFO] --history FILE [--KIND SESSIONS]... [--every-ms MS] [--long-ms MS] [--seconds S]
//   --judge FILE... --serving CONNINFO [--json FILE]    exit status 1 when anything is lost or doubled
// KIND is one of repeatable-read, long, superuser, replica-role, large-objects, ddl; superuser and replica-role use
// --admin-db. Until SIGTERM without --seconds. Sessions stay open, as those of a pool or of a person do.
#include <fcntl.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "support/direct.h"
#include "support/options.h"
#include "support/pg.h"
#include "sys/fs.h"

namespace rehome::testing {
namespace {

std::int64_t now_us() { return system_clock().now() / 1000; }

struct Settings {
  Millis every{20};
  Millis hold{1000};  // how long the transactions of `long` and `repeatable-read` stay open before their last write
};

// One session that writes in one way.
class Writer {
 public:
  Writer(std::string kind, std::string name, std::string conninfo, Settings settings, std::atomic<bool>& stop)
      : kind_(std::move(kind)), name_(std::move(name)), db_(std::move(conninfo)), settings_(settings), stop_(stop) {}

  // One transaction; the line for the history.
  Json write() {
    const std::string key = name_ + "-" + std::to_string(++count_);
    Json line = {{"key", key}, {"kind", kind_}, {"writer", name_}, {"start_us", now_us()}, {"outcome", "ok"}};
    bool committing = false;
    try {
      open();
      body(key);
      committing = true;
      db_.commit();
    } catch (const SqlError& e) {
      // Before COMMIT was sent nothing can stand. After it, an answer with a state of its own is the server's no.
      const bool doubt = committing && (e.state.empty() || e.state.rfind("57P", 0) == 0);
      line["outcome"] = doubt ? "unknown" : "failed";
      line["state"] = e.state;
      line["error"] = e.message;
      db_.rollback();
    }
    line["end_us"] = now_us();
    return line;
  }

  Millis pause() const { return kind_ == "ddl" ? settings_.every * 20 : settings_.every; }

 private:
  void open() {
    db_.raw();
    // Also after a reconnection: the role belongs to the session.
    if (kind_ == "replica-role") db_.script("SET session_replication_role = replica");
    db_.begin();
    if (kind_ == "repeatable-read") db_.script("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ");
  }

  void body(const std::string& key) {
    std::string number = "0";
    if (kind_ == "repeatable-read") {
      // The snapshot is taken here: whatever is forbidden later by a row that others write is not seen by it.
      db_.run("SELECT count(*) FROM direct_counters");
      hold();
    } else if (kind_ == "large-objects") {
      const Result r = db_.run("SELECT lo_from_bytea(0, convert_to(repeat($1, 300), 'UTF8'))", {key});
      number = value(r, 0, 0);
    } else if (kind_ == "ddl") {
      const std::string table = "direct_ddl_" + std::to_string(now_us());
      db_.script("CREATE TABLE " + table + " (key text PRIMARY KEY); INSERT INTO " + table + " VALUES ('" + key + "')");
      number = table.substr(table.rfind('_') + 1);
    }
    db_.run("INSERT INTO direct_writes (key, kind, n) VALUES ($1, $2, $3)", {key, kind_, number});
    if (kind_ == "long") hold();
    db_.run("INSERT INTO direct_counters AS c (writer, n) VALUES ($1, 1) ON CONFLICT (writer) DO UPDATE SET n = c.n + 1",
            {name_});
  }

  void hold() {
    for (const Deadline end = Deadline::in(settings_.hold); !end.passed() && !stop_;)
      system_clock().sleep(std::max(Millis(1), std::min(end.left(), Millis(50))));
  }

  std::string kind_, name_;
  Session db_;
  Settings settings_;
  std::atomic<bool>& stop_;
  std::int64_t count_ = 0;
};

int make_tables(const Options& o) {
  Session db(o.need("db"));
  db.script("CREATE TABLE direct_writes (key text PRIMARY KEY, kind text NOT NULL, n bigint NOT NULL);"
            "CREATE TABLE direct_counters (writer text PRIMARY KEY, n bigint NOT NULL)");
  return 0;
}

int write_on(const Options& o) {
  const std::string path = o.need("history");
  Fd history(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!history) throw errno_error(errno, "open", path);
  const Settings settings{Millis(o.number("every-ms", 20)), Millis(o.number("long-ms", 1000))};

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::map<std::string, std::int64_t> totals = {{"ok", 0}, {"failed", 0}, {"unknown", 0}};
  const std::string start = std::to_string(now_us());
  std::vector<std::unique_ptr<Writer>> writers;
  for (auto& kind : direct_kinds()) {
    const bool admin = kind == "superuser" || kind == "replica-role";
    for (long long i = 0; i < o.number(kind, 0); ++i)
      writers.push_back(std::make_unique<Writer>(kind, kind + "-" + start + "-" + std::to_string(i),
                                                 o.need(admin ? "admin-db" : "db"), settings, stop));
  }
  if (writers.empty()) throw Error(Code::usage, "no kind of writer is asked for");
  std::vector<std::thread> threads;
  for (auto& writer : writers)
    threads.emplace_back([&, w = writer.get()] {
      while (!stop) {
        const Json line = w->write();
        {
          std::lock_guard lock(mutex);
          write_all(history.get(), dump_line(line) + "\n", "the history");
          ++totals[line.at("outcome")];
        }
        const Deadline next = Deadline::in(w->pause());
        while (!stop && !next.passed()) system_clock().sleep(std::max(Millis(1), std::min(next.left(), Millis(50))));
      }
    });
  const long long seconds = o.number("seconds", 0);
  const timespec most{.tv_sec = seconds, .tv_nsec = 0};
  if (seconds > 0) ::sigtimedwait(&signals, nullptr, &most);
  else ::sigwaitinfo(&signals, nullptr);
  stop = true;
  for (auto& t : threads) t.join();
  std::printf("%s\n", dump_line(totals).c_str());
  return 0;
}

DirectStored read_serving(Session& db) {
  DirectStored s;
  db.begin();
  db.script("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY");
  const Result rows = db.run(
      "SELECT w.key, w.kind, w.n, w.kind <> 'large-objects' OR EXISTS (SELECT FROM pg_largeobject_metadata WHERE oid = w.n) "
      "FROM direct_writes w");
  for (int i = 0; i < PQntuples(rows.get()); ++i) {
    const std::string key = value(rows, i, 0), kind = value(rows, i, 1), n = value(rows, i, 2);
    bool whole = value(rows, i, 3) == "t";
    if (whole && kind == "large-objects") {
      const Result r = db.run("SELECT lo_get($1::oid) = convert_to(repeat($2, 300), 'UTF8')", {n, key});
      whole = value(r, 0, 0) == "t";
    } else if (kind == "ddl") {
      const std::string table = "direct_ddl_" + n;
      whole = value(db.run("SELECT to_regclass($1) IS NOT NULL", {table}), 0, 0) == "t" &&
              value(db.run("SELECT count(*) FROM " + table + " WHERE key = $1", {key}), 0, 0) == "1";
    }
    s.written[key] = whole;
  }
  const Result counters = db.run("SELECT writer, n FROM direct_counters");
  for (int i = 0; i < PQntuples(counters.get()); ++i) s.counted[value(counters, i, 0)] = std::stoll(value(counters, i, 1));
  db.commit();
  return s;
}

int judge_all(const Options& o) {
  std::vector<DirectSeen> seen;
  for (auto& file : o.all("judge")) {
    const std::string text = read_file(file, std::size_t{4} << 30);
    std::size_t at = 0, number = 0;
    // A last line without its end belongs to a writer that was killed over it.
    for (std::size_t end; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
      ++number;
      try {
        seen.push_back(parse_direct(std::string_view(text).substr(at, end - at)));
      } catch (const Error& e) {
        throw e.in(file + ":" + std::to_string(number));
      }
    }
  }
  Session serving(o.need("serving"));
  const DirectVerdict v = judge_direct(seen, read_serving(serving));
  for (std::size_t i = 0; i < v.findings.size() && i < 20; ++i) std::printf("%s\n", v.findings[i].c_str());
  if (v.findings.size() > 20) std::printf("... and %zu more\n", v.findings.size() - 20);
  std::printf("%-16s %12s %8s\n", "kind", "acknowledged", "lost");
  for (auto& kind : direct_kinds()) {
    auto n = [&](const std::map<std::string, std::int64_t>& of) {
      auto it = of.find(kind);
      return static_cast<long long>(it == of.end() ? 0 : it->second);
    };
    if (n(v.acknowledged) || n(v.lost)) std::printf("%-16s %12lld %8lld\n", kind.c_str(), n(v.acknowledged), n(v.lost));
  }
  std::printf("doubled %lld, failed %lld, unknown %lld\n", static_cast<long long>(v.doubled),
              static_cast<long long>(v.failed), static_cast<long long>(v.unknown));
  if (o.has("json"))
    write_durably(o.need("json"), dump_line({{"acknowledged", v.acknowledged}, {"lost", v.lost}, {"doubled", v.doubled},
                                             {"failed", v.failed}, {"unknown", v.unknown}}) + "\n", 0644);
  return v.clean() ? 0 : 1;
}

int run_writers(int argc, char** argv) {
  std::vector<std::string> valued = {"db", "admin-db", "history", "every-ms", "long-ms", "seconds", "judge", "serving", "json"};
  valued.insert(valued.end(), direct_kinds().begin(), direct_kinds().end());
  const Options o(argc, argv, valued, {"init"});
  return o.has("init") ? make_tables(o) : o.has("judge") ? judge_all(o) : write_on(o);
}

}  // namespace
}  // namespace rehome::testing

int main(int argc, char** argv) {
  try {
    return rehome::testing::run_writers(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-writers: %s\n", e.what());
    return 2;
  }
}
