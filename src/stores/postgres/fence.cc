// The pause of one PostgreSQL store: soft fence, marker, proof, sequences, reverse slot, hard fence. All databases side by side.
// The fence is one transaction that holds every table's lock and the refusing trigger function's new body: ROLLBACK backs out,
// COMMIT makes it hard. One session does both, so a server that restarted in between fails the COMMIT (docs/model, HOLE_RESTART).
#include <algorithm>
#include <atomic>
#include <future>
#include <random>
#include <set>
#include <thread>

#include "base/text.h"
#include "stores/postgres/catalogue.h"
#include "stores/postgres/large_objects.h"
#include "stores/postgres/lock.h"

namespace rehome {
namespace {

std::string random_token() {
  std::random_device r;
  char hex[33];
  std::snprintf(hex, sizeof hex, "%08x%08x%08x%08x", r(), r(), r(), r());
  return hex;
}

struct Sequence {
  std::string name;
  std::int64_t last = 0, increment = 1, minimum = 0, maximum = 0;
  bool called = false;   // false: `last` itself comes next
  bool operator==(const Sequence&) const = default;
};

// Where sequences stand, all of them in a few round trips. pg_sequences reads each one's tuple without a lock that would wait, but has
// no position for one that was never called since it was positioned (setval(s, v, false), RESTART, TRUNCATE ... RESTART IDENTITY); those
// are asked themselves, by statements that are planned once, with the first answer: planning them takes longer than the answer.
class SequenceQuestion {
 public:
  // Prepares statements: outside of any transaction, once a session.
  explicit SequenceQuestion(PgSession& s) : session_(s) {
    std::vector<std::string> uncalled;
    for (const auto& q : list({}))
      if (!q.called) uncalled.push_back(q.name);
    for (std::size_t from = 0; from < uncalled.size(); from += kPiece) {
      std::vector<std::string> piece(uncalled.begin() + static_cast<std::ptrdiff_t>(from), uncalled.begin() + static_cast<std::ptrdiff_t>(std::min(uncalled.size(), from + kPiece)));
      prepared_.push_back("rehome_sequences_" + std::to_string(prepared_.size()));
      session_.exec("PREPARE " + prepared_.back() + " AS " + positions(piece));
    }
  }

  // By name.
  std::vector<Sequence> ask(Deadline deadline) const {
    std::vector<Sequence> all = list(deadline);
    auto find = [&](const std::string& name) {
      auto at = std::lower_bound(all.begin(), all.end(), name, [](const Sequence& a, const std::string& b) { return a.name < b; });
      return at != all.end() && at->name == name ? &*at : nullptr;
    };
    std::set<std::string> known;
    auto fill = [&](const std::vector<PgRow>& rows) {
      for (auto& r : rows) {
        known.insert(*r[0]);
        if (Sequence* q = find(*r[0])) {
          q->last = std::stoll(*r[1]);
          q->called = *r[2] == "t";
        }
      }
    };
    for (const auto& name : prepared_) fill(session_.query("EXECUTE " + name, deadline));
    std::vector<std::string> more;   // positioned since
    for (const auto& q : all)
      if (!q.called && !known.contains(q.name)) more.push_back(q.name);
    for (std::size_t from = 0; from < more.size(); from += kPiece)
      fill(session_.query(positions({more.begin() + static_cast<std::ptrdiff_t>(from), more.begin() + static_cast<std::ptrdiff_t>(std::min(more.size(), from + kPiece))}), deadline));
    return all;
  }

 private:
  // Each locks its sequences until its end: more at once would want a larger lock table.
  static constexpr std::size_t kPiece = 1000;

  static std::string positions(const std::vector<std::string>& names) {
    std::string sql;
    for (const auto& n : names) sql += (sql.empty() ? "SELECT " : " UNION ALL SELECT ") + pg_literal(n) + ", last_value, is_called FROM " + n;
    return sql;
  }

  std::vector<Sequence> list(Deadline deadline) const {
    std::vector<Sequence> all;
    for (auto& r : session_.query("SELECT '\"' || replace(schemaname, '\"', '\"\"') || '\".\"' || replace(sequencename, '\"', '\"\"') || '\"' COLLATE \"C\", last_value, increment_by, min_value, max_value FROM pg_sequences "
                                  "WHERE schemaname <> 'rehome' ORDER BY 1", deadline)) {
      Sequence q;
      q.name = *r[0];
      q.called = r[1].has_value();
      q.last = q.called ? std::stoll(*r[1]) : 0;
      q.increment = std::stoll(*r[2]);
      q.minimum = std::stoll(*r[3]);
      q.maximum = std::stoll(*r[4]);
      all.push_back(std::move(q));
    }
    return all;
  }

  PgSession& session_;
  std::vector<std::string> prepared_;
};

// nextval is not fenced, and somebody may hold a number that he has not used yet: the other side starts a little further.
constexpr std::int64_t kSequenceMargin = 32;

constexpr int kMicroTries = 3;
constexpr Millis kMicroRest(200);

std::int64_t with_margin(const Sequence& q) {
  __int128 v = static_cast<__int128>(q.last) + static_cast<__int128>(q.increment) * kSequenceMargin;
  if (v > q.maximum || v < q.minimum) return q.last;   // near its end: the very next value, and no margin
  return static_cast<std::int64_t>(v);
}

}  // namespace

class PostgresCut : public Cut {
 public:
  // `measuring`: for the micro-fence, which carries nothing over.
  PostgresCut(StoreContext& c, PostgresStore& store, Direction d, bool measuring) : c_(c), store_(store), d_(d), measuring_(measuring) {
    for (const auto& database : store.databases(c)) {
      auto one = std::make_unique<Database>();
      one->name = database;
      one->forward = store.flow(database, d.yields);
      one->reverse = store.flow(database, d.takes());
      one->fence = store.session(c, d.yields, database, pgsql::kFenceApplication);
      if (!measuring) one->large = store.session(c, d.yields, database, pgsql::kFenceApplication);
      one->marker = store.session(c, d.yields, database, "rehome marker");
      one->target = store.session(c, d.takes(), database, "rehome cut");
      for (auto& look : one->look) look = store.session(c, d.yields, database, "rehome compare");
      make_ready(*one);
      all_.push_back(std::move(one));
    }
  }

  ~PostgresCut() override {
    // Sessions end with their objects, and with them every lock that is still soft.
    pulse_ = {};
  }

  // For the micro-fence, which must not hold writers for a follower that is behind.
  void await_followers(Deadline deadline) {
    each("followers", [&](Database& db) { db.quick = await_follower(*db.marker, *db.target, db.forward, deadline); });
  }

  void soft_fence(Deadline deadline) override {
    each("soft fence", [&](Database& db) {
      if (db.looking.valid()) db.looking.wait();   // of a try before
      std::lock_guard alive(db.fence_mutex);
      lock_writers(db, deadline);
      db.fenced = true;
      // Answered while the marker travels: 2,000 tables take longer than that.
      db.looking = std::async(std::launch::async, [&db, deadline] { return db.question->ask(deadline); });
    });
    int tries = 0;
    for (auto& db : all_) tries += db->lock->tries();
    timings_["lock tries"] = tries;
    keep_alive();
  }

  void marker(Deadline deadline) override {
    each("marker", [&](Database& db) {
      db.token = random_token();
      db.position = db.marker->value("SELECT pg_current_wal_insert_lsn()", deadline);
      db.marker->query("INSERT INTO rehome.marker(token) VALUES ($1)", {db.token}, deadline);
    });
  }

  void catch_up(Deadline deadline) override {
    each("catch up", [&](Database& db) {
      PgSession& t = *db.target;
      Deadline seen = measuring_ ? Deadline::in(db.quick) : deadline;
      while (t.query("SELECT 1 FROM rehome.marker WHERE token = $1", {db.token}, deadline).empty()) {
        if (seen.passed() || deadline.passed())
          throw Error(Code::timeout, db.name + ": the marker is not on the " + std::string(side_name(d_.takes())) + " yet", "wait for a smaller lag", true);
        system_clock().sleep(Millis(1));
      }
      // true: flushes what the apply worker wrote without waiting for the disk.
      std::string covered = t.value("SELECT coalesce(pg_replication_origin_progress('pg_' || (SELECT oid FROM pg_subscription WHERE subname = $1 AND "
                                    "subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())), true) > $2::pg_lsn, false)",
                                    {db.forward.subscription, db.position}, deadline);
      if (covered != "t")
        throw Error(Code::store, db.name + ": the marker is visible, but the follower's durable progress does not cover it", "try again", true);
      carry_sequences(db, deadline);
      if (!measuring_) carry_unreplicated(db, deadline);
    });
  }

  void compare(Deadline deadline) override {
    refuse_other_databases(deadline);
    each("compare", [&](Database& db) {
      // What the event trigger did not see.
      REHOME_CHECK(db.looking.valid());
      std::string differs = catalogue_difference(db.fingerprint, db.looking.get());
      if (!differs.empty())
        throw Error(Code::verify, db.name + ": the schema was changed (" + differs + ") and the change is not on the " + std::string(side_name(d_.takes())), "rehome resume --recopy, then switch");
      // Under the fence nobody can add to the log: pg_class is locked.
      if (db.marker->number("SELECT count(*) FROM " + db.logged) > 0)
        throw Error(Code::verify, db.name + ": the schema was changed, and the change is not on the " + std::string(side_name(d_.takes())), "rehome resume --recopy, then switch");
      auto there = db.target->query("SELECT coalesce((SELECT string_agg(n, ', ') FROM unnest($1::text[]) n WHERE to_regclass(n) IS NULL), ''), coalesce((SELECT string_agg(srrelid::regclass::text, ', ') FROM pg_subscription_rel r "
                                    "JOIN pg_subscription s ON s.oid = srsubid WHERE srsubstate <> 'r' AND subname = $2 AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())), '')", {db.table_array, db.forward.subscription}, deadline).at(0);
      if (!there[1]->empty()) throw Error(Code::verify, db.name + ": not yet synchronised on the " + std::string(side_name(d_.takes())) + ": " + *there[1], "see status, then switch", true);
      const std::string& missing = *there[0];
      if (!missing.empty()) throw Error(Code::verify, db.name + ": missing on the " + std::string(side_name(d_.takes())) + ": " + missing, "copy again");
    });
  }

  void arm_reverse(Deadline deadline) override {
    each("arm reverse", [&](Database& db) {
      const std::string from = db.target->value("SELECT end_lsn FROM pg_replication_slot_advance($1, pg_current_wal_flush_lsn())", {db.reverse.slot}, deadline);
      // Where a slot stands is on the disk at the next checkpoint, and a crash before that would send what this side had sent itself. The
      // follower says where it begins; the fence's COMMIT makes that durable.
      db.marker->query("SELECT pg_replication_origin_advance('pg_' || oid, $2::pg_lsn) FROM pg_subscription WHERE subname = $1 AND subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())",
                       {db.reverse.subscription, from}, deadline);
    });
  }

  void hard_fence(Deadline deadline) override {
    each("hard fence", [&](Database& db) {
      REHOME_CHECK(db.fenced);
      std::lock_guard alive(db.fence_mutex);
      db.fence->exec("COMMIT", deadline);
      db.fenced = false;
      // COMMIT of a transaction that failed in between reports success with another tag.
      if (db.fence->command_tag() != "COMMIT")
        throw Error(Code::store, db.name + ": the fence's transaction had failed, its commit was a rollback", "try again", true);
      end_large_object_writers(db, deadline);
    });
  }

  void release() override {
    pulse_ = {};
    std::optional<Error> failure;
    for (auto& db : all_) {
      try {
        if (db->fenced && !db->fence->broken()) db->fence->exec("ROLLBACK", Deadline::in(Millis(2000)));
        if (db->large && !db->large->broken()) db->large->exec("ROLLBACK", Deadline::in(Millis(2000)));
      } catch (const Error& e) {
        // Its session goes with this object; the other databases must be let go now.
        failure = e;
      }
      db->fenced = false;
    }
    if (failure) throw *failure;
  }

  Json timings() const override { return timings_; }

 private:
  struct Database {
    std::string name;
    PgFlow forward, reverse;
    std::unique_ptr<PgSession> fence, marker, target, look[2];
    std::unique_ptr<PgSession> large;   // holds the writers of large objects back, longer than the fence's COMMIT
    std::unique_ptr<WriterLock> lock;
    std::mutex fence_mutex;   // the pulse and the phases share that session
    std::unique_ptr<CatalogueQuestion> question;
    std::unique_ptr<SequenceQuestion> positions, reached;   // of the yielding side, and of the other
    Json fingerprint;   // what the yielding side's schema must be
    std::string refuse, token, position, table_array;
    std::string logged;                // where its log holds what is not on the other side
    std::vector<PgTable> unlogged;
    std::atomic<bool> fenced{false};
    Millis quick{100};
    std::future<Json> looking;         // last: it ends before its sessions do
  };

  void make_ready(Database& db) {
    PgSession& s = *db.fence;
    auto tables = store_.tables(s);
    if (std::string bare = store_.not_followed(s, db.forward, tables); !bare.empty())
      throw Error(Code::verify, db.name + ": nothing follows these tables, or they have no fence: " + bare, "rehome resume --recopy, then switch");
    for (const auto& t : tables)
      if (t.unlogged && !t.partitioned) db.unlogged.push_back(t);
    db.lock = std::make_unique<WriterLock>(store_, d_.yields, s, tables, !db.large);
    s.exec("SET client_min_messages = 'error'; " + pgsql::large_object_rights_table());
    if (db.large) db.large->exec("SET deadlock_timeout = '10ms'; SET idle_in_transaction_session_timeout = '4s'; SET client_min_messages = 'error'");
    db.refuse = pgsql::fence_function(true, std::string("the ") + std::string(side_name(d_.takes())) + " serves now") + "; " + pgsql::ddl_function(true);
    db.table_array = "{";
    for (const auto& t : tables) {
      std::string quoted = t.full(), escaped;
      for (char ch : quoted) {
        if (ch == '"' || ch == '\\') escaped += '\\';
        escaped += ch;
      }
      db.table_array += (db.table_array.size() > 1 ? ",\"" : "\"") + escaped + "\"";
    }
    db.table_array += "}";
    // Not what the log holds by now: a switch may have waited for its moment for a day since somebody looked.
    db.logged = store_.logged_since(c_, db.name, d_.yields);
    db.question = std::make_unique<CatalogueQuestion>(std::vector<PgSession*>{db.look[0].get(), db.look[1].get()}, store_.config().postgres.roles);
    db.fingerprint = c_.recall(store_.schema_key("fingerprint", db.name, d_.yields));
    db.marker->exec("SET client_min_messages = 'error'; SET jit = off");
    db.target->exec("SET client_min_messages = 'error'; SET jit = off");
    // Parsed and planned once, and the catalogue in this backend's cache, before the pause.
    db.target->query("SELECT 1 FROM rehome.marker WHERE token = $1", {std::string("none")});
    db.target->exec("SET session_replication_role = replica; SET deadlock_timeout = '10ms'");
    // Once without the fence, so that inside it only what changed since is left; what changes under our eyes is met again there.
    std::int64_t brought = 0;
    carry_large_objects(*db.marker, *db.target, {}, [&](std::int64_t bytes) {
      if (c_.cancelled) throw Error(Code::interrupted, "stopped while carrying large objects of " + db.name);
      c_.progress({.store = store_.name(), .phase = "large objects", .detail = db.name, .done = brought += bytes});
    });
    db.reached = std::make_unique<SequenceQuestion>(*db.target);
    db.positions = std::make_unique<SequenceQuestion>(*db.marker);
    carry_sequences(db, {});
    db.target->query("SELECT end_lsn FROM pg_replication_slot_advance($1, pg_current_wal_flush_lsn())", std::vector<std::string>{db.reverse.slot});
  }

  void lock_writers(Database& db, Deadline deadline) {
    for (int tries = 1;; tries++) {
      db.lock->take(db.refuse, deadline);
      if (!db.large) return;
      try {
        // After the tables, and let go with them: who holds one and waits here must get on.
        db.large->exec("BEGIN; SET LOCAL lock_timeout = '100ms'; SET LOCAL statement_timeout = '100ms'; LOCK TABLE pg_catalog.pg_largeobject, pg_catalog.pg_largeobject_metadata IN SHARE MODE; SET LOCAL statement_timeout = 0", deadline);
        return;
      } catch (const Error& e) {
        for (PgSession* s : {db.large.get(), db.fence.get()})
          if (!s->broken()) s->exec("ROLLBACK");
        const auto* said = dynamic_cast<const PgError*>(&e);
        if (!said || !pg_is_lock_failure(said->sqlstate)) throw;
        if (deadline.passed())
          throw Error(Code::timeout, db.name + ": writers did not let the large objects be locked in " + std::to_string(tries) + " tries: " + e.message, "a long transaction that writes large objects is open: wait, or hold the traffic longer", true);
      }
      pg_random_wait(Millis(20));
    }
  }

  // The fence's COMMIT has taken the rights to write large objects, which a statement looks at before it waits for the lock, and a
  // transaction that is open may know as they were: those end while the lock still holds them back. Where there is no large object, only
  // those that wait to make the first.
  void end_large_object_writers(Database& db, Deadline deadline) {
    auto end = [](const std::string& since) {
      return "SELECT pg_stat_clear_snapshot(); SELECT count(pg_terminate_backend(pid)), statement_timestamp() FROM pg_stat_activity WHERE datname = current_database() AND application_name NOT LIKE 'rehome%' AND "
             "backend_type NOT LIKE 'logical replication%' AND backend_type NOT IN ('walsender', 'autovacuum worker', 'parallel worker') AND (EXISTS (SELECT 1 FROM pg_catalog.pg_largeobject_metadata) AND xact_start <= " + since + " OR "
             "pid IN (SELECT pid FROM pg_locks WHERE NOT granted AND relation IN ('pg_catalog.pg_largeobject'::regclass, 'pg_catalog.pg_largeobject_metadata'::regclass)))";
    };
    auto ended = db.large->query(end("statement_timestamp()"), deadline).at(0);
    const std::string since = pg_literal(*ended[1]);
    while (*ended[0] != "0") {
      if (deadline.passed()) throw Error(Code::timeout, db.name + ": sessions that may write large objects do not end", "try again", true);
      system_clock().sleep(Millis(1));
      ended = db.large->query(end(since), deadline).at(0);
    }
    // The lock goes with its session: on this side nobody waits for it any more.
  }

  // CREATE DATABASE waits for the fence's end, or makes this wait for its own: then the lock's timeout ends the attempt.
  void refuse_other_databases(Deadline deadline) {
    if (!store_.config().postgres.databases.empty() || all_.empty()) return;
    Database& db = *all_[0];
    std::lock_guard alive(db.fence_mutex);
    db.fence->exec("LOCK TABLE pg_catalog.pg_database IN SHARE MODE", deadline);
    if (std::string changed = store_.database_change(c_, *db.fence, d_.yields).says(d_.yields); !changed.empty())
      throw Error(Code::verify, store_.name() + ": " + changed, d_.yields == Side::source ? "rehome resume --recopy, then switch; or drop it, or rehome cancel and begin again" : "drop it or rename it back, then reverse again");
  }

  // A fence that its holder has forgotten falls by the idle timeout; one that only waits for slower stores must not.
  void keep_alive() {
    pulse_ = std::jthread([this](std::stop_token stop) {
      while (!stop.stop_requested()) {
        for (int i = 0; i < 50 && !stop.stop_requested(); i++) system_clock().sleep(Millis(10));
        for (auto& db : all_) {
          std::unique_lock alive(db->fence_mutex, std::try_to_lock);
          if (!alive || !db->fenced || stop.stop_requested()) continue;
          try {
            db->fence->exec("SELECT 1", Deadline::in(Millis(1000)));
            if (db->large) db->large->exec("SELECT 1", Deadline::in(Millis(1000)));
          } catch (const Error&) {
            // The COMMIT will fail, and say why.
          }
        }
      }
    });
  }

  void each(const char* what, const std::function<void(Database&)>& work) {
    Ticks from = system_clock().now();
    std::vector<std::optional<Error>> failures(all_.size());
    {
      std::vector<std::jthread> threads;
      for (std::size_t i = 1; i < all_.size(); i++)
        threads.emplace_back([&, i] {
          try {
            work(*all_[i]);
          } catch (const Error& e) {
            failures[i] = e;
          }
        });
      try {
        if (!all_.empty()) work(*all_[0]);
      } catch (const Error& e) {
        failures[0] = e;
      }
    }
    timings_[what] = ms_between(from, system_clock().now());
    for (auto& f : failures)
      if (f) throw *f;
  }

  // Sets only what has changed since it was last carried: 2,000 sequences of which ten move cost ten.
  void carry_sequences(Database& db, Deadline deadline) {
    std::string values;
    int changed = 0;
    // Asked anew on the other side too: the follower, which carries TRUNCATE ... RESTART IDENTITY, may have set one back.
    auto asked = std::async(std::launch::async, [&] { return db.reached->ask(deadline); });
    const auto yields = db.positions->ask(deadline);
    const auto there = asked.get();
    for (const auto& q : yields) {
      auto at = std::lower_bound(there.begin(), there.end(), q, [](const Sequence& a, const Sequence& b) { return a.name < b.name; });
      // Of one that was only positioned nobody holds a number: the other side gives the very same next.
      std::int64_t wanted = q.called ? with_margin(q) : q.last;
      if (at == there.end() || at->name != q.name)
        throw Error(Code::verify, db.name + ": sequence " + q.name + " is missing on the " + std::string(side_name(d_.takes())),
                    d_.yields == Side::source ? "rehome resume --recopy, then switch" : "make it on the source, where SET application_name = 'rehome by hand' lets a superuser do so; then reverse again");
      // Half of the margin must be left of what was carried before.
      const std::int64_t least = wanted == q.last ? q.last + (q.increment > 0 ? 1 : -1) : q.last + q.increment * (kSequenceMargin / 2);
      bool enough = !q.called ? !at->called && at->last == wanted : at->called && (q.increment > 0 ? at->last >= least && at->last <= wanted : at->last <= least && at->last >= wanted);
      if (enough) continue;
      values += (changed++ ? ", (" : "(") + pg_literal(q.name) + "::regclass, " + std::to_string(wanted) + "::bigint, " + (q.called ? "true)" : "false)");
    }
    if (changed) db.target->query("SELECT setval(s, v, c) FROM (VALUES " + values + ") x(s, v, c)", deadline);
  }

  // What logical replication does not carry, copied whole inside the pause; the plan has priced it.
  void carry_unreplicated(Database& db, Deadline deadline) {
    if (!db.unlogged.empty()) carry_unlogged(db, deadline);
    carry_large_objects(*db.marker, *db.target, deadline);
  }

  void carry_unlogged(Database& db, Deadline deadline) {
    // The fence on the target refuses even us: a replica role passes no ALWAYS trigger, so it is switched off and on inside one transaction.
    std::string off, on, plain, own;
    for (const auto& t : db.unlogged) {
      off += "; ALTER TABLE " + t.full() + " DISABLE TRIGGER rehome_fence, DISABLE TRIGGER rehome_fence_t";
      on += "ALTER TABLE " + t.full() + " ENABLE ALWAYS TRIGGER rehome_fence, ENABLE ALWAYS TRIGGER rehome_fence_t; ";
      if (t.extension.empty())
        plain += (plain.empty() ? "; TRUNCATE ONLY " : ", ONLY ") + t.full();
      else
        own += "; " + pgsql::empty_table(t);
    }
    // All in one statement: one that another's foreign key points to is emptied only together with that one.
    db.target->exec("BEGIN" + off + own + plain, deadline);
    for (const auto& t : db.unlogged) {
      std::string columns = t.columns.empty() ? "" : "(" + t.columns + ")";
      // Not by the fence's own session: that one's pulse goes on meanwhile.
      db.marker->copy_to("COPY (SELECT " + t.columns + " FROM ONLY " + t.full() + " " + t.condition + ") TO STDOUT", *db.target, "COPY " + t.full() + columns + " FROM STDIN", [&](std::int64_t) {
        if (deadline.passed()) throw Error(Code::timeout, "copying unlogged table " + t.full() + " inside the pause took too long", "raise max_pause");
      });
    }
    db.target->exec(on + "COMMIT", deadline);
  }

  StoreContext& c_;
  PostgresStore& store_;
  Direction d_;
  bool measuring_;
  std::vector<std::unique_ptr<Database>> all_;
  Json timings_ = Json::object();
  std::jthread pulse_;
};

std::unique_ptr<Cut> PostgresStore::open_cut(StoreContext& c, Direction d) { return std::make_unique<PostgresCut>(c, *this, d, false); }

Millis PostgresStore::micro_fence(StoreContext& c, Direction d, Deadline deadline) {
  PostgresCut cut(c, *this, d, true);
  double took = 0;
  for (int tries = 1;; tries++) {
    try {
      cut.await_followers(deadline);
    } catch (Error& e) {
      // Nothing has been locked yet.
      if (tries == 1 && e.code == Code::timeout && e.retryable) e.code = Code::state;
      throw;
    }
    Ticks from = system_clock().now();
    try {
      cut.soft_fence(deadline);
      cut.marker(deadline);
      cut.catch_up(deadline);
      cut.release();
      took = ms_between(from, system_clock().now());
      break;
    } catch (const Error& e) {
      cut.release();
      if (e.code != Code::timeout || !e.retryable || tries == kMicroTries || deadline.passed()) throw;
    }
    system_clock().sleep(kMicroRest);
  }
  // What is copied whole inside the pause would keep writers waiting for a measurement: it is estimated, as in the plan.
  for (const auto& database : databases(c))
    for (const auto& t : tables(*session(c, d.yields, database)))
      if (t.unlogged && !t.partitioned) took += static_cast<double>(pause_for_unlogged(t.bytes).count());
  return Millis(static_cast<std::int64_t>(took + 0.5));
}

}  // namespace rehome
