// Which tables' first synchronisation fails, told by what every major shows: a worker that fails is started again for ever, and no server
// before 15 counts that.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "stores/postgres/session.h"

namespace rehome {

class SyncWatch {
 public:
  SyncWatch(PgSession& subscriber, std::string subscription) : session_(subscriber), subscription_(std::move(subscription)) {}
  // Asks the server once, at best every 50 ms: a worker may live shorter than that, but it leaves a trace.
  void look();
  // Tables that are still to be copied, as regclass writes them.
  std::vector<std::string> waiting() const;
  // How often a table's worker was started again between the looks; 0: unknown table.
  int restarts(const std::string& table) const;
  // Those with so many restarts.
  std::vector<std::string> failing(int restarts) const;

 private:
  struct Table {
    std::string row, worker;   // the version of its row in pg_subscription_rel, the worker's process
    int new_rows = 0, new_workers = 0;
  };
  PgSession& session_;
  std::string subscription_;
  std::map<std::string, Table> tables_;
};

}  // namespace rehome
