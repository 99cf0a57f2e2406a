// stores/postgres/testing: real PostgreSQL servers and a Site without an agent, for the tests beside the driver and for
// bench/copy. Nothing of the product may include this folder.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "stores/postgres/session.h"
#include "sys/fs.h"

namespace rehome::testing {

// One server of any major in a temporary directory, run as account postgres (as the caller where that is not root), fsync
// on, listening on a unix socket of its own and on a free loopback port; stopped, and removed, when destroyed.
class PgServer {
 public:
  // `settings`: more lines for postgresql.conf. `under`: the parent directory, empty: the temporary one.
  explicit PgServer(int major, const std::vector<std::string>& settings = {}, const std::string& under = {});
  ~PgServer();
  PgServer(const PgServer&) = delete;
  PgServer& operator=(const PgServer&) = delete;

  int major() const { return major_; }
  const std::string& socket_directory() const { return dir_; }   // its port there is 5432
  std::string bindir() const { return bindir_; }
  std::string data() const { return dir_ + "/data"; }
  std::string log() const { return read_file(dir_ + "/log"); }
  std::unique_ptr<PgSession> session(const std::string& database, const std::string& application = "test") const;
  // conninfo for programs.
  std::string conninfo(const std::string& database) const;
  void start();
  void stop(const char* mode = "fast");

 private:
  int major_;
  std::string dir_, bindir_;
  bool running_ = false;
};

}  // namespace rehome::testing
