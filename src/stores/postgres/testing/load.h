// Clients that write, and the history of what they were told.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "stores/postgres/testing/pg_server.h"

namespace rehome::testing {

// Threads that insert, update and delete in the tables of load_schema(), each transaction with a token of its own in
// `history`. They write to the server that `to` names; a refusal or a lost connection is counted, and they go on.
class Load {
 public:
  Load(std::vector<const PgServer*> servers, std::string database, int threads);
  ~Load() { stop(); }
  void route(std::size_t server) { to_ = server; }
  void stop();
  std::int64_t acknowledged() const { return acknowledged_; }
  std::int64_t refused() const { return refused_; }
  std::int64_t broken() const { return broken_; }
  // Longest time between two acknowledged writes of any one thread, milliseconds, since the last call.
  double longest_gap();

  // What is wrong with the history at this server; empty: every acknowledged write exactly once, nothing else but
  // writes whose outcome the client was never told.
  std::vector<std::string> judge(const PgServer& at);

  static std::string schema(int tables);

 private:
  void client(int number);
  std::vector<const PgServer*> servers_;
  std::string database_;
  std::atomic<std::size_t> to_{0};
  std::atomic<bool> stop_{false};
  std::atomic<std::int64_t> acknowledged_{0}, refused_{0}, broken_{0};
  std::mutex mutex_;
  double gap_ = 0;
  std::map<std::string, std::int64_t> amounts_;   // token -> amount, acknowledged
  std::set<std::string> unknown_;
  std::vector<std::jthread> threads_;
};

}  // namespace rehome::testing
