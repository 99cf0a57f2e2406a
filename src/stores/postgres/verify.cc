// The deep comparison: per table, order-independent, computed inside both servers at one consistent point, which the micro-fence
// makes: lock, marker, snapshots exported on both sides, let go. Rows that differ are named.
#include <algorithm>
#include <deque>
#include <map>
#include <thread>

#include "base/parallel.h"
#include "base/text.h"
#include "stores/postgres/large_objects.h"
#include "stores/postgres/lock.h"

namespace rehome {
namespace {

// The lock holds writers 100 ms while it is waited for and 100 ms while a marker travels; they have five times as long between two tries.
constexpr int kTries = 10;
constexpr Millis kRest(1000), kTry(10000), kCatchUp = std::chrono::hours(24);

// What logical replication does not carry is copied inside the pause, so before it a difference is none; how much there is to
// be copied is worth knowing.
std::string large_objects_sql() {
  return "SELECT count(*), coalesce(sum(hashtextextended(m.oid || pg_get_userbyid(m.lomowner) || " + large_object_rights() + ", 42)), 0) + "
         "coalesce((SELECT sum(hashtextextended(l.loid || ' ' || l.pageno || encode(l.data, 'hex'), 42)) FROM pg_largeobject l), 0) FROM pg_largeobject_metadata m";
}

// What is moved of it: an extension's own rows may be others at the other side.
std::string rows_of(const PgTable& t) { return t.condition.empty() ? "ONLY " + t.full() : "(SELECT * FROM ONLY " + t.full() + " " + t.condition + ") AS own"; }

// A row's text form is the same on all majors with our settings (DateStyle, extra_float_digits); the sum of 64-bit hashes
// does not depend on the order. Two rows that swap would cancel only with equal hashes.
std::string table_hash_sql(const PgTable& t) {
  return "SELECT count(*), coalesce(sum(hashtextextended(ROW(" + t.columns + ")::text, 42)::numeric), 0) FROM " + rows_of(t);
}

// Each table in a transaction of its own: a lock that is kept lets ALTER TABLE wait for the end of the comparison, and everybody behind it.
// False: the file is not the one of the snapshot, whose rows may be gone.
bool begin_reading(StoreContext& c, PgSession& s, const std::string& snapshot, const PgTable& t, const std::map<std::string, std::int64_t>& files) {
  ReadLocked now = lock_to_read(s, snapshot, t, "SELECT " + t.columns + " FROM " + rows_of(t), c.cancelled);
  auto was = files.find(t.full());
  return was != files.end() && was->second == now.file;
}

std::string key_columns(PgSession& s, const PgTable& t) {
  return s.value("SELECT coalesce((SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY k.n) FROM pg_index i, unnest(i.indkey) WITH ORDINALITY k(a, n) JOIN pg_attribute a ON a.attnum = k.a "
                 "WHERE i.indrelid = " + std::to_string(t.oid) + " AND i.indisprimary AND a.attrelid = i.indrelid), '')");
}

}  // namespace

std::string PostgresStore::compare_rows(StoreContext& c, const std::string& database, const PgTable& t, const std::string& snap_s, const std::string& snap_t, Verdict& v) {
  auto s = session(c, Side::source, database, "rehome verify"), d = session(c, Side::target, database, "rehome verify");
  std::string keys = key_columns(*s, t);
  // Without a key a row is named by its whole content's hash.
  std::string name = keys.empty() ? "left(ROW(" + t.columns + ")::text, 200)" : "ROW(" + keys + ")::text";
  // First where: the rows in 4,096 heaps by the hash of their names, each heap's hash made inside the servers. Only the rows of heaps
  // that differ are sorted and fetched.
  const std::string heap = "(hashtextextended(" + name + ", 7) & 4095)";
  std::map<std::string, std::string> heaps[2];
  auto ask = [&](PgSession& one, const std::string& snapshot, std::map<std::string, std::string>& into) {
    lock_to_read(one, snapshot, t, "SELECT " + t.columns + " FROM " + rows_of(t), c.cancelled);
    for (auto& r : one.query("SELECT " + heap + ", count(*), sum(hashtextextended(ROW(" + t.columns + ")::text, 42)) FROM " + rows_of(t) + " GROUP BY 1")) into[*r[0]] = *r[1] + " " + r[2].value_or("");
  };
  ask(*s, snap_s, heaps[0]);
  ask(*d, snap_t, heaps[1]);
  std::string differing;
  for (int side : {0, 1})
    for (const auto& [number, hash] : heaps[side]) {
      auto there = heaps[1 - side].find(number);
      // What is on both sides is seen from the first.
      if (there == heaps[1 - side].end() || (side == 0 && there->second != hash)) differing += (differing.empty() ? "" : ", ") + number;
    }
  if (differing.empty()) return {};
  for (auto* one : {s.get(), d.get()}) {
    one->exec("DECLARE rows CURSOR FOR SELECT " + name + " AS k, hashtextextended(ROW(" + t.columns + ")::text, 42)::text AS h FROM " + rows_of(t) + " WHERE " + heap + " IN (" + differing + ") ORDER BY (" + name + ") COLLATE \"C\", 2");
  }
  struct Stream {
    PgSession& session;
    std::vector<PgRow> rows;
    std::size_t at = 0;
    bool end = false;
    const PgRow* peek() {
      if (at == rows.size() && !end) {
        rows = session.query("FETCH 5000 FROM rows");
        at = 0;
        end = rows.empty();
      }
      return at < rows.size() ? &rows[at] : nullptr;
    }
  } from{*s, {}, 0, false}, to{*d, {}, 0, false};
  auto differ = [&](const PgRow& row, const char* what) {
    if (v.differences.size() < 1000)
      v.differences.push_back({database + ": " + t.full() + " " + row[0].value_or(""), what});
    else
      v.more++;
  };
  while (true) {
    const PgRow* a = from.peek();
    const PgRow* b = to.peek();
    if (!a && !b) return {};
    if (!b || (a && *(*a)[0] < *(*b)[0])) {
      differ(*a, "missing on target");
      from.at++;
    } else if (!a || *(*b)[0] < *(*a)[0]) {
      differ(*b, "extra on target");
      to.at++;
    } else {
      if ((*a)[1] != (*b)[1]) differ(*a, "differs");
      from.at++;
      to.at++;
    }
  }
}

Verdict PostgresStore::verify(StoreContext& c) {
  Verdict v;
  v.equal = true;
  for (const auto& database : databases(c)) {
    // Whichever way it flows now.
    Side publisher = Side::source;
    for (Side p : {Side::source, Side::target}) {
      PgFlow f = flow(database, p);
      if (session(c, f.subscriber(), database)->number("SELECT count(*) FROM pg_subscription WHERE subenabled AND subname = " + pg_literal(f.subscription)) > 0) publisher = p;
    }
    PgFlow f = flow(database, publisher);
    auto y = session(c, publisher, database, pgsql::kFenceApplication), m = session(c, publisher, database, "rehome marker"), t = session(c, f.subscriber(), database, "rehome verify");
    auto hold_y = session(c, publisher, database, "rehome verify"), hold_t = session(c, f.subscriber(), database, "rehome verify");
    auto list = tables(*hold_y);
    std::string snap_y, snap_t;
    std::map<std::string, std::int64_t> files_y, files_t;
    WriterLock lock(*this, publisher, *y, list);
    for (int tries = 1;; tries++) {
      // After a long copy there is much to catch up with: writers do not wait for that.
      Millis quick = await_follower(*m, *t, f, Deadline::in(kCatchUp), [&](std::int64_t behind) {
        if (c.cancelled) throw Error(Code::interrupted, "stopped while waiting for the follower of " + database);
        c.progress({.store = config_.name, .phase = "verify", .detail = database + ": waiting for the follower, " + human_bytes(behind) + " behind"});
      });
      try {
        lock.take("", Deadline::in(kTry), 1);
        hold_y->exec("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
        snap_y = hold_y->value("SELECT pg_export_snapshot()");
        std::string token = m->value("INSERT INTO rehome.marker(token) VALUES ('verify ' || gen_random_uuid()) RETURNING token");
        Deadline seen = Deadline::in(quick);
        while (t->query("SELECT 1 FROM rehome.marker WHERE token = $1", {token}).empty()) {
          if (seen.passed()) throw Error(Code::timeout, database + ": the follower fell behind while writers waited for it", "wait for a smaller load, then verify again", true);
          system_clock().sleep(Millis(1));
        }
        hold_t->exec("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY");
        snap_t = hold_t->value("SELECT pg_export_snapshot()");
        y->exec("ROLLBACK");
        break;
      } catch (const Error& e) {
        for (auto* s : {y.get(), hold_y.get(), hold_t.get()})
          if (!s->broken()) s->exec("ROLLBACK");
        if (e.code != Code::timeout || !e.retryable || tries == kTries) throw;
      }
      system_clock().sleep(kRest);
    }
    std::string snap_s = publisher == Side::source ? snap_y : snap_t, snap_d = publisher == Side::source ? snap_t : snap_y;
    files_y = files_in_snapshot(*hold_y);
    files_t = files_in_snapshot(*hold_t);
    const auto& files_s = publisher == Side::source ? files_y : files_t;
    const auto& files_d = publisher == Side::source ? files_t : files_y;
    std::deque<const PgTable*> queue;
    for (const auto& table : list)
      if (!table.partitioned) queue.push_back(&table);
    std::mutex mutex;
    std::vector<const PgTable*> different, emptied;
    Json detail = Json::array();
    std::size_t total = queue.size(), done = 0;
    in_parallel(std::max(1, c.deployment.limits.jobs), [&](const std::atomic<bool>& failed) {
      auto s = session(c, Side::source, database, "rehome verify"), d = session(c, Side::target, database, "rehome verify");
      s->stop_on(c.cancelled);
      d->stop_on(c.cancelled);
      while (true) {
        const PgTable* table;
        {
          std::lock_guard lock(mutex);
          if (queue.empty() || failed || c.cancelled) return;
          table = queue.front();
          queue.pop_front();
        }
        Ticks from = system_clock().now();
        std::vector<PgRow> a, b;
        bool as_it_was = true, other_as_it_was = true;
        std::optional<Error> other_failure;
        {
          // Both servers at once.
          std::jthread far([&] {
            try {
              other_as_it_was = begin_reading(c, *d, snap_d, *table, files_d);
              b = d->query(table_hash_sql(*table));
              d->exec("ROLLBACK");
            } catch (const Error& e) {
              other_failure = e;
            }
          });
          as_it_was = begin_reading(c, *s, snap_s, *table, files_s);
          a = s->query(table_hash_sql(*table));
          s->exec("ROLLBACK");
        }
        if (other_failure) throw *other_failure;
        std::lock_guard lock(mutex);
        bool same = a == b;
        if (!table->unlogged) {
          v.compared += std::stoll(*a[0][0]);
          if (!same) (as_it_was && other_as_it_was ? different : emptied).push_back(table);
        }
        if (detail.size() < 5000) {
          Json line = {{"table", database + ": " + table->full()}, {"rows", std::stoll(*a[0][0])}, {"equal", same}, {"ms", ms_between(from, system_clock().now())}};
          if (table->unlogged) line["copied"] = "in the pause";
          detail.push_back(std::move(line));
        }
        c.progress({.store = config_.name, .phase = "verify", .detail = table->full(), .done = static_cast<std::int64_t>(++done), .total = static_cast<std::int64_t>(total), .unit = "tables"});
      }
    });
    if (c.cancelled) throw Error(Code::interrupted, "stopped while comparing " + database);
    for (const PgTable* table : different) compare_rows(c, database, *table, snap_s, snap_d, v);
    for (const PgTable* table : emptied) v.differences.push_back({database + ": " + table->full(), "was truncated or rewritten before it was compared: verify again"});
    v.equal = v.equal && different.empty() && emptied.empty();
    {
      auto s = session(c, Side::source, database, "rehome verify"), d = session(c, Side::target, database, "rehome verify");
      auto a = s->query(large_objects_sql()), b = d->query(large_objects_sql());
      if (*a[0][0] != "0" || *b[0][0] != "0")
        detail.push_back({{"table", database + ": large objects"}, {"rows", std::stoll(*a[0][0])}, {"equal", a == b}, {"copied", "in the pause"}});
    }
    v.detail[database] = detail;
  }
  return v;
}

}  // namespace rehome
