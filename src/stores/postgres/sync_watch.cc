#include "stores/postgres/sync_watch.h"

#include <algorithm>
#include <set>

namespace rehome {

void SyncWatch::look() {
  std::set<std::string> there;
  // A worker writes state d when it is connected and begins to copy, each time anew (LogicalRepSyncTableStart, 13 to 18): another
  // version of a row that was d is another start. One that cannot connect is seen only while it tries.
  for (auto& r : session_.query("SELECT r.srrelid::regclass::text, CASE r.srsubstate WHEN 'd' THEN r.xmin::text ELSE '' END, coalesce(max(w.pid)::text, '') FROM pg_subscription s JOIN pg_subscription_rel r ON r.srsubid = s.oid "
                                "LEFT JOIN pg_stat_subscription w ON w.subid = s.oid AND w.relid = r.srrelid WHERE s.subname = $1 AND s.subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) "
                                "AND r.srsubstate IN ('i', 'd') GROUP BY r.srrelid, r.srsubstate, r.xmin::text", {subscription_})) {
    there.insert(*r[0]);
    Table& t = tables_[*r[0]];
    if (!t.row.empty() && !r[1]->empty() && t.row != *r[1]) t.new_rows++;
    if (!t.worker.empty() && !r[2]->empty() && t.worker != *r[2]) t.new_workers++;
    if (!r[1]->empty()) t.row = *r[1];
    if (!r[2]->empty()) t.worker = *r[2];
  }
  std::erase_if(tables_, [&](const auto& t) { return !there.contains(t.first); });
}

std::vector<std::string> SyncWatch::waiting() const {
  std::vector<std::string> all;
  for (const auto& [name, t] : tables_) all.push_back(name);
  return all;
}

int SyncWatch::restarts(const std::string& table) const {
  auto at = tables_.find(table);
  return at == tables_.end() ? 0 : std::max(at->second.new_rows, at->second.new_workers);
}

std::vector<std::string> SyncWatch::failing(int least) const {
  std::vector<std::string> all;
  for (const auto& [name, t] : tables_)
    if (restarts(name) >= least) all.push_back(name);
  return all;
}

}  // namespace rehome
