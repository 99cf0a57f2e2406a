// A table's first synchronisation by the server's own workers: waited for, and where it fails, why.
#include <algorithm>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/sync_watch.h"

namespace rehome {
namespace {

// A worker may be started twice for other reasons: a connection lost, a server that stops.
constexpr int kFails = 2;
constexpr int kFailsForGood = 20;
// An apply worker that has nothing to do starts the worker of a table once a second.
constexpr Millis kWatched(6000);
constexpr Millis kTried(10000);

}  // namespace

void PostgresStore::synchronise(StoreContext& c, const std::string& database, Side publisher) {
  PgFlow f = flow(database, publisher);
  auto s = session(c, publisher, database);
  auto list = tables(*s);
  install_fence(c, *s, publisher, list, false);
  publish(c, *s, f, list);
  auto t = session(c, f.subscriber(), database);
  t->exec(pgsql::fence_function_before_switch(pgsql::who_serves(publisher)));
  // Enabled first: one whose making was interrupted is not, and cannot be refreshed.
  t->exec("ALTER SUBSCRIPTION " + pg_identifier(f.subscription) + " ENABLE");
  t->exec("ALTER SUBSCRIPTION " + pg_identifier(f.subscription) + " REFRESH PUBLICATION WITH (copy_data = true)");
  watch_wal(c, publisher);   // the slots of the tables that are copied now, too
  SyncWatch watch(*t, f.subscription);
  Json reasons = Json::object();
  if (!c.recall(key("unsynchronised", database)).is_null()) c.remember(key("unsynchronised", database), Json());
  Deadline deadline = Deadline::in(std::chrono::hours(48));
  while (true) {
    watch.look();
    auto r = t->query("SELECT count(*), count(*) FILTER (WHERE r.srsubstate = 'r') FROM pg_subscription s JOIN pg_subscription_rel r ON r.srsubid = s.oid WHERE s.subname = " + pg_literal(f.subscription) + " GROUP BY s.oid");
    if (r.empty()) throw Error(Code::store, t->address().label + ": subscription " + f.subscription + " is gone", "rehome resume --recopy");
    std::int64_t all = std::stoll(*r[0][0]), ready = std::stoll(*r[0][1]);
    c.progress({.store = config_.name, .phase = "synchronise", .detail = join(watch.waiting(), ", "), .done = ready, .total = all, .unit = "tables"});
    if (ready == all) return;
    for (const auto& table : watch.failing(kFails)) {
      if (!reasons.contains(table)) {
        reasons[table] = why_not_synchronised(c, database, f, table);
        c.remember(key("unsynchronised", database), reasons);   // for status
        c.log(config_.name + ": " + database + ": the synchronisation of " + table + " fails: " + reasons[table].get<std::string>());
      }
      std::string why = reasons[table].get<std::string>();
      // Without a reason it may be a worker, slot or walsender that becomes free.
      const std::string limits = follower_timeouts(*s);
      if (!why.empty() || watch.restarts(table) > kFailsForGood)
        throw Error(Code::store, t->address().label + ": " + table + " cannot be synchronised" + (!why.empty() ? ": " + why : limits.empty() ? "" : "; what is set for the follower's user ends a copy that takes longer, and may be why: " + limits),
                    why.empty() && !limits.empty() ? "ALTER ROLE ... IN DATABASE ... SET it to 0 for that user; then resume" : why.empty() ? "that server's log says why (a free worker, slot or walsender may be missing); then resume" : "mend what it names; then resume", true);
    }
    if (c.cancelled) throw Error(Code::interrupted, "stopped while tables of " + database + " are synchronised; they go on by themselves");
    if (deadline.passed()) throw Error(Code::timeout, t->address().label + ": tables are still being synchronised", "resume", true);
    system_clock().sleep(Millis(50));
  }
}

std::string PostgresStore::missing_columns(PgSession& publisher, PgSession& subscriber, const std::string& table) {
  const std::string columns = "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(" + pg_literal(table) + ") AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum";
  std::vector<std::string> missing;
  auto there = subscriber.query(columns);
  for (auto& r : publisher.query(columns))
    if (std::find(there.begin(), there.end(), r) == there.end()) missing.push_back(*r[0]);
  return missing.empty() ? "" : subscriber.address().label + ": " + table + " has no column " + join(missing, ", ");
}

// What the worker does is done once more, and taken back: its error is what the worker's is, which only a log has.
std::string PostgresStore::why_not_synchronised(StoreContext& c, const std::string& database, const PgFlow& f, const std::string& table) {
  auto from = session(c, f.publisher, database, "rehome copy"), to = session(c, f.subscriber(), database, "rehome copy");
  if (std::string missing = missing_columns(*from, *to, table); !missing.empty()) return missing;
  Deadline deadline = Deadline::in(kTried);
  for (const auto& t : tables(*from)) {
    if (from->value("SELECT " + pg_literal(t.full()) + "::regclass = to_regclass(" + pg_literal(table) + ")") != "t") continue;
    std::string condition = to->major() < 15 || row_filter(*from, t).empty() ? "" : t.condition, why;
    to->exec("BEGIN; SET LOCAL session_replication_role = replica; SET LOCAL lock_timeout = '5s'; SET LOCAL statement_timeout = '15s'; " + pgsql::fence_function_while_copying(pgsql::who_serves(f.publisher)));
    try {
      from->copy_to("COPY (SELECT " + t.columns + " FROM ONLY " + t.full() + " " + condition + ") TO STDOUT", *to, "COPY " + t.full() + (t.columns.empty() ? "" : " (" + t.columns + ")") + " FROM STDIN", [&](std::int64_t) {
        if (deadline.passed()) throw Error(Code::timeout, table + " is large: what its worker met is not known");
      });
    } catch (const PgError& e) {
      if (to->broken() || from->broken()) throw;
      if (!e.retryable) why = e.message;
    } catch (const Error& e) {
      // Its error, if any, lies further behind.
      if (e.code != Code::timeout) throw;
    }
    to->exec("ROLLBACK");
    return why;
  }
  return {};
}

std::string PostgresStore::synchronisation_trouble(StoreContext& c, const std::string& database, const PgFlow& f, PgSession& publisher, PgSession& subscriber) {
  SyncWatch watch(subscriber, f.subscription);
  Deadline deadline = Deadline::in(kWatched);
  for (watch.look(); !watch.waiting().empty() && watch.failing(kFails).empty() && !deadline.passed() && !c.cancelled; watch.look()) system_clock().sleep(Millis(50));
  const Json reasons = c.recall(key("unsynchronised", database));
  std::vector<std::string> all;
  for (const auto& table : watch.failing(kFails)) {
    std::string why = missing_columns(publisher, subscriber, table);
    if (why.empty() && reasons.is_object() && reasons.contains(table)) why = reasons.at(table).get<std::string>();
    all.push_back("the synchronisation of " + table + " fails, and is tried again: " + (why.empty() ? "the log of the " + std::string(side_name(f.subscriber())) + "'s server says why" : why));
  }
  return join(all, "; ");
}

}  // namespace rehome
