// stores: one folder a driver, all behind this interface. A driver knows its store and the Site interface; it knows no
// plan, no traffic and no other store. Who calls what, and when, is ops' business.
//
// The life of a store in a run:
//   preflight, estimate            change nothing
//   prepare, copy                  idempotent; each change is written down with note() before it is made
//   follow_status, verify          any time while following
//   open_cut -> Cut                sessions and statements made ready before the pause; the Cut does the pause
//   actions                        what the agents must be able to do without the controller
//   finish, abandon                complete and cancel: everything of ours gone, proven
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"
#include "config/deployment.h"
#include "site/site.h"

namespace rehome {

// Y yields, T takes over. A switch has source -> target, a reverse target -> source.
struct Direction {
  Side yields = Side::source;
  Side takes() const { return other(yields); }
};

struct Capabilities {
  bool follow = false, reverse = false, soft_fence = false, hard_fence = false, verify = false;
};

struct Finding {
  enum class Level { error, warning, note } level = Level::error;
  std::string id;       // stable: "postgres.wal_level"
  std::string object;   // "source: database shop, table public.orders"
  std::string message;  // what is wrong
  std::string mend;     // what the person does next
  bool needs_restart = false;
};

// What copying takes on the target. Stores whose places lie on one file system share what is free there.
struct Room {
  std::string path;
  std::int64_t device = 0;             // st_dev
  std::int64_t needed = 0, free = 0;   // bytes
};

// What a store will cost; every number with its reason in words.
struct Estimate {
  std::int64_t bytes = 0;
  std::int64_t objects = 0;            // rows or files
  Millis copy{0};
  Millis pause{0};                     // this store's own part of the pause
  std::vector<std::string> reasons;    // "2 large objects: copied inside the pause, about 3 ms"
  std::vector<std::string> again;      // what resume copies again of a copy that was interrupted, and why
  Json facts = Json::object();         // what the plan was made from: flat, name -> value; compared when a plan is stale
};

struct Progress {
  std::string store, phase, detail;
  std::int64_t done = 0, total = 0;    // bytes unless `unit` says otherwise
  std::string unit = "bytes";
};

struct FollowStatus {
  bool following = false;
  bool coming = false;                 // not yet, and the agents bring it there by themselves
  std::int64_t lag_bytes = 0;          // known to be behind
  Millis lag{0};
  std::int64_t open_write_age_ms = 0;  // the oldest open writing transaction (postgres): a lag that lag does not show
  std::string trouble;                 // why it does not follow, and what the person does; empty: it does
  Json detail = Json::object();
};

struct Difference {
  std::string object;   // "shop: public.orders key (17)" or a path
  std::string what;     // "missing on target", "differs", "extra on target"
};
struct Verdict {
  bool equal = false;
  std::int64_t compared = 0;           // rows or files
  std::vector<Difference> differences; // at most 1000; `more` says how many others
  std::int64_t more = 0;
  Json detail = Json::object();        // per table: rows, hash, milliseconds
};

// One stored action for an agent; see docs/PROTOCOL.md. `credentials` become 0600 files before use; the strings in them
// are secrets and appear nowhere else.
struct Action {
  std::string name;
  std::vector<std::string> argv;
  std::vector<std::pair<std::string, std::string>> env;
  std::string input, try_input, user;
  bool warm = false;
  Millis timeout{10000};
  std::vector<std::pair<std::string, std::string>> credentials;  // file name under STATE/credentials -> content
};
struct ActionSets {
  std::vector<Action> undo;       // at Y: unfence
  std::vector<Action> open;       // at T: open to the application
  std::vector<Action> tail_takes; // at T, after the commit: forward followers off and dropped
  // At either: closed for good, when its agent learns that the other one was opened by a person's word.
  BySide<std::vector<Action>> close;
  std::vector<Action> tail_yields;// at Y, after tail_takes: old sessions ended, reverse followers on
};

// What a driver is given for one run.
struct StoreContext {
  const Deployment& deployment;
  Site& source;
  Site& target;
  std::function<void(const Progress&)> progress;        // cheap; may be called often
  // Writes {what, where, how to undo} to the journal durably before the change is made.
  std::function<void(const std::string& what, const Json& detail)> note;
  // Facts of this run that later commands need (snapshot name, table lists, slot names): read and durably written.
  std::function<Json(const std::string& key)> recall;
  std::function<void(const std::string& key, const Json& value)> remember;
  std::function<void(const std::string& line)> log;
  const std::atomic<bool>& cancelled;                   // looked at between pieces of work; then Error(interrupted)
  // A host that a person has declared gone for good: finish, abandon and leftovers do the other side alone.
  std::optional<Side> gone{};

  bool has(Side s) const { return gone != s; }
  Site& at(Side s) const { return s == Side::source ? source : target; }
};

// The pause of one store. Made before it, with every session open and every statement known. Calls come in this order,
// each with the attempt's deadline; any may throw, and then release() is called, or the object destroyed (the same): all
// that was soft falls, and followers still follow. After hard_fence() only the agents' stored actions undo.
class Cut {
 public:
  virtual ~Cut() = default;
  virtual void soft_fence(Deadline) = 0;          // on return no write of the application gets through at Y
  virtual void marker(Deadline) = 0;              // after every store's soft fence and the services' freeze
  virtual void catch_up(Deadline) = 0;            // marker seen at T, durably; what replication does not carry is carried
  virtual void compare(Deadline) = 0;             // the cheap proof; throws Error(verify)
  virtual void arm_reverse(Deadline) = 0;         // reverse followers positioned at the cut
  virtual void hard_fence(Deadline) = 0;          // durable refusal at Y
  virtual void release() = 0;
  virtual Json timings() const = 0;               // step -> ms, and counts
};

class Store {
 public:
  virtual ~Store() = default;
  virtual const std::string& name() const = 0;
  virtual const char* kind() const = 0;
  virtual Capabilities capabilities() const = 0;

  virtual std::vector<Finding> preflight(StoreContext&) = 0;
  // As the last preflight() saw it; nothing where that could not tell, or the copy has begun.
  virtual std::optional<Room> room() const { return {}; }
  virtual Estimate estimate(StoreContext&) = 0;

  virtual void prepare(StoreContext&) = 0;        // triggers, publications, slots, closed target; idempotent
  virtual void copy(StoreContext&) = 0;           // finished tables or files are not copied again
  // Whether what copy() brought is there as a whole: a recopy that was interrupted may have left half of it. Then copy() finishes it.
  virtual bool copied(StoreContext&) { return true; }
  virtual void follow(StoreContext&) = 0;         // from here it follows without the controller
  virtual FollowStatus follow_status(StoreContext&) = 0;
  // What must still be copied again before a switch ("table public.t: ALTER TABLE at ..."); empty: nothing.
  virtual std::vector<std::string> needs_recopy(StoreContext&) = 0;
  virtual void recopy(StoreContext&) = 0;
  virtual Verdict verify(StoreContext&) = 0;

  virtual void prepare_reverse(StoreContext&, Direction) = 0;   // disabled reverse follower; before the pause, idempotent
  // Now and then while a switch waits for its moment: what is prepared for the way back begins now, and holds nothing older.
  virtual void renew_reverse(StoreContext&, Direction) {}
  virtual ActionSets actions(StoreContext&, Direction) = 0;
  // Before the side that takes over is opened by a person's word without a cut, the other one being gone: what a cut would have
  // carried over and can be told from this side alone. Uses this side only. Idempotent. Throws Error(state) where the first copy, or a
  // repeated one, was never finished there; what is whole but for some tables is said.
  virtual void make_up_for_cut(StoreContext&, Direction) {}
  virtual std::unique_ptr<Cut> open_cut(StoreContext&, Direction) = 0;
  // Soft fence, marker, proof, let go: milliseconds it took. A retryable Error(state): a follower is behind, and nothing was locked.
  virtual Millis micro_fence(StoreContext&, Direction, Deadline) = 0;

  // Removes all that rehome made at both sites, except Y's hard fence when the run is committed. Returns what it left
  // ("source: refusing trigger on 200 tables"). `serves`: the side that serves now.
  virtual std::vector<std::string> finish(StoreContext&, Side serves) = 0;
  // cancel: as finish with the source serving, and what was copied to the target is removed.
  virtual std::vector<std::string> abandon(StoreContext&) = 0;
  virtual void unfence_source(StoreContext&) = 0;
  // One query at one side, for the deployment's own checks, in a session like the application's that only reads unless it `writes`.
  // Returns the one value of the answer ("" for NULL), or nothing where it is no single one. Throws what the store says, also when
  // a statement takes longer than `timeout`; stores without a query language refuse.
  virtual std::optional<std::string> ask(StoreContext&, Side, const std::string& /*database*/, const std::string& /*query*/, Millis /*timeout*/, bool /*writes*/) {
    throw Error(Code::config, "store " + name() + " answers no queries", "use an http or command check");
  }
  // What of ours is still there (empty after finish or abandon): the proof of `complete`.
  virtual std::vector<std::string> leftovers(StoreContext&) = 0;
};

}  // namespace rehome
