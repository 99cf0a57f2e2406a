#include "stores/postgres/testing/pg_server.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "base/text.h"
#include "sys/process.h"

namespace rehome::testing {
namespace {

std::string account() { return ::geteuid() == 0 ? "postgres" : ""; }

// A fresh directory that the servers' account owns.
std::string make_place(const std::string& under) {
  const char* temporary = std::getenv("TMPDIR");
  std::string name = (!under.empty() ? under : temporary && *temporary ? temporary : "/tmp") + "/rhpgXXXXXX";
  if (!::mkdtemp(name.data())) throw errno_error(errno, "mkdtemp", name);
  if (!account().empty()) run_ok({.argv = {"chown", account(), name}});
  ::chmod(name.c_str(), 0755);
  return name;
}

// initdb costs a second of work and a copy of what it made a tenth. Two of each major, given in turns: the two servers of a move are
// told apart by their system identifier.
class Templates {
 public:
  ~Templates() {
    for (const auto& [key, place] : places_) remove_tree(place);
  }
  std::string next(int major, const std::string& bindir) {
    std::lock_guard lock(mutex_);
    std::string& place = places_[{major, turn_[major]++ % 2}];
    if (!place.empty()) return place + "/data";
    const std::string made = make_place("");
    run_ok({.argv = {bindir + "/initdb", "-D", made + "/data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"},
            .env = {{"LANG", "C.UTF-8"}},
            .directory = "/",
            .user = account()},
           Deadline::in(Millis(120000)), "initdb");
    return (place = made) + "/data";
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<int, int>, std::string> places_;
  std::map<int, int> turn_;
};

}  // namespace

PgServer::PgServer(int major, const std::vector<std::string>& settings, const std::string& under) : major_(major) {
  bindir_ = std::string(trim(run_ok({.argv = {REHOME_SOURCE_DIR "/tests/support/fetch-pg.sh", std::to_string(major)}},
                                    Deadline::in(Millis(300000)), "fetch-pg.sh")
                                 .out));
  static Templates templates;
  dir_ = make_place(under);
  run_ok({.argv = {"cp", "-a", templates.next(major, bindir_), data()}}, Deadline::in(Millis(120000)));
  std::string conf = read_file(data() + "/postgresql.conf");
  conf += "\nlisten_addresses = ''\nport = 5432\nunix_socket_directories = '" + dir_ +
          "'\nwal_level = logical\nmax_wal_senders = 30\nmax_replication_slots = 30\nmax_logical_replication_workers = 20\n"
          "max_worker_processes = 30\nshared_buffers = 128MB\nlog_min_messages = warning\nlog_line_prefix = '%m [%p] %a '\n";
  for (const auto& line : settings) conf += line + "\n";
  write_durably(data() + "/postgresql.conf", conf, 0644);
  if (!account().empty()) run_ok({.argv = {"chown", account(), data() + "/postgresql.conf"}});
  start();
}

PgServer::~PgServer() {
  try {
    stop("immediate");
    remove_tree(dir_);
  } catch (const Error&) {
    // A test that ends badly leaves its directory for a look.
  }
}

void PgServer::start() {
  run_ok({.argv = {bindir_ + "/pg_ctl", "-D", data(), "-l", dir_ + "/log", "-w", "-s", "start"}, .env = {{"LANG", "C.UTF-8"}}, .directory = "/", .user = account()},
         Deadline::in(Millis(60000)), "pg_ctl start");
  running_ = true;
}

void PgServer::stop(const char* mode) {
  if (!running_) return;
  running_ = false;
  run({.argv = {bindir_ + "/pg_ctl", "-D", data(), "-m", mode, "-w", "-s", "stop"}, .directory = "/", .user = account()},
      Deadline::in(Millis(60000)));
}

std::unique_ptr<PgSession> PgServer::session(const std::string& database, const std::string& application) const {
  return std::make_unique<PgSession>(
      PgAddress{.label = "test: " + database, .host = dir_, .port = 5432, .user = "postgres", .password = {}, .database = database},
      application);
}

std::string PgServer::conninfo(const std::string& database) const { return "host=" + dir_ + " port=5432 user=postgres dbname=" + pg_conninfo_value(database); }

}  // namespace rehome::testing
