// The PostgreSQL driver. One store may hold one, several or all databases of a cluster; each database has a forward flow
// (source publishes, target subscribes) and, before a switch, a reverse one.
//
// The driver's phases are a file each: prepare, copy, follow, fence (the Cut), verify, actions, cleanup, preflight.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "stores/postgres/session.h"
#include "stores/store.h"

namespace rehome {

struct PgPrograms;
struct SchemaEntry;
class SchemaDump;

struct PgTable {
  std::string schema, name;
  std::int64_t oid = 0, bytes = 0;
  bool partitioned = false;    // a parent without rows of its own
  bool unlogged = false;
  bool has_key = false;        // a primary key or a replica identity index by which a follower finds a row
  std::string identity;        // what REPLICA IDENTITY comes to where a published table's rows could not be changed; empty: they can
  std::string columns;         // quoted, without generated ones
  // The extension whose configuration it is: CREATE EXTENSION makes the table, maybe with rows, and those that meet the condition
  // ("WHERE id > 100"; empty: all) are people's, to move.
  std::string extension, condition;
  bool binary = false;         // every type's binary form is the same on all majors
  std::string full() const { return pg_identifier(schema) + "." + pg_identifier(name); }
};

// Names of one flow's objects in one database. `publisher` is the side whose changes it carries.
struct PgFlow {
  Side publisher = Side::source;
  std::string publication, subscription, slot, service, listener;
  Side subscriber() const { return other(publisher); }
};

class PostgresStore : public Store {
 public:
  PostgresStore(const StoreConfig& config, const Deployment& deployment);

  const std::string& name() const override { return config_.name; }
  const char* kind() const override { return "postgres"; }
  Capabilities capabilities() const override {
    return {.follow = true, .reverse = true, .soft_fence = true, .hard_fence = true, .verify = true};
  }
  std::vector<Finding> preflight(StoreContext&) override;
  std::optional<Room> room() const override { return room_; }
  Estimate estimate(StoreContext&) override;
  void prepare(StoreContext&) override;
  void copy(StoreContext&) override;
  bool copied(StoreContext&) override;
  void follow(StoreContext&) override;
  FollowStatus follow_status(StoreContext&) override;
  std::vector<std::string> needs_recopy(StoreContext&) override;
  void recopy(StoreContext&) override;
  Verdict verify(StoreContext&) override;
  void prepare_reverse(StoreContext&, Direction) override;
  void renew_reverse(StoreContext&, Direction) override;
  void make_up_for_cut(StoreContext&, Direction) override;
  ActionSets actions(StoreContext&, Direction) override;
  std::unique_ptr<Cut> open_cut(StoreContext&, Direction) override;
  Millis micro_fence(StoreContext&, Direction, Deadline) override;
  std::vector<std::string> finish(StoreContext&, Side serves) override;
  std::vector<std::string> abandon(StoreContext&) override;
  void unfence_source(StoreContext&) override;
  std::vector<std::string> leftovers(StoreContext&) override;
  std::optional<std::string> ask(StoreContext&, Side, const std::string& database, const std::string& query, Millis timeout, bool writes) override;

  // Tables are split by ranges into pieces of that many bytes, where they are larger than that and than `split_share` times what one
  // worker has to copy. Tests make both small.
  std::int64_t split_bytes = 256 << 20;
  double split_share = 1.25;
  // When a switch that waits refreshes the materialized views of the side that takes over once more.
  Deadline views_again_;

  // For the phases and the Cut.
  // Where a schema dump lies while it is read, on whichever host pg_dump runs: a name with a random end behind it.
  std::string dump_place() const { return "/tmp/rehome-dump-" + tag_; }
  std::string server_address(Side side) const;   // as seen from its site, for a relay
  PgAddress address(StoreContext&, Side, const std::string& database, const std::string& keep = {});
  std::unique_ptr<PgSession> session(StoreContext&, Side, const std::string& database, const std::string& application = "rehome");
  std::vector<std::string> databases(StoreContext&);
  // Of `databases: all`: which have come to the side that serves since the run knows them, and which have gone, a line each. Empty
  // where they are named. Reads the admin database.
  struct DatabaseChange {
    std::vector<std::string> come, gone;
    std::string says(Side serves) const;   // empty: none
  };
  DatabaseChange database_change(StoreContext&, PgSession& serving, Side serves);
  PgFlow flow(const std::string& database, Side publisher) const;
  std::vector<PgTable> tables(PgSession&);
  // Which of the publisher's `tables` its publication or its fence lacks, as this session's snapshot has it: their rows would be copied
  // once, and no later write would come over or be refused. Empty: none.
  std::string not_followed(PgSession& publisher, const PgFlow&, const std::vector<PgTable>& tables);
  // Of these tables, which are to be followed between this server and one of `other_major`: those whose rows would be told apart by generated
  // columns, "public.a (b), ...". Their UPDATEs and DELETEs fail. Empty: none.
  static std::string told_by_generated(PgSession&, const std::vector<PgTable>&, int other_major);
  static const char* const kMendGenerated;
  // The flow's slot is there, and the server still has the WAL that it asks for.
  static bool slot_stands(PgSession& publisher, const PgFlow&);
  // The timeouts that server, database and role set for a follower of the session's user, "statement_timeout = 60000 ms, ...". Empty: none.
  static std::string follower_timeouts(PgSession&);
  // Where that side's server finds the socket that leads to the other's, and the passfile for it: a directory of the agent's
  // account that the server's account may enter (the agent's state is closed to it), kept over a reboot where it can be,
  // since the listener comes back with the agent. Its name is told by the agent's state: two runs never share one.
  std::string socket_directory(StoreContext&, Side);
  // The key under which a fact of this store is remembered.
  std::string key(const std::string& what, const std::string& database = {}) const;
  std::string schema_key(const std::string& what, const std::string& database, Side) const;
  // "rehome.ddl_log WHERE ...": what it holds beside what was accepted. A change that was open then, and commits later, is among it.
  std::string logged_since(StoreContext&, const std::string& database, Side);
  // The oids of the tables that were rewritten since: a rewrite is no change of rows to a follower.
  std::set<std::int64_t> rewritten_since(StoreContext&, const std::string& database, Side);
  const PostgresServer& server(Side side) const { return config_.postgres.server[side]; }
  const StoreConfig& config() const { return config_; }
  // The tables that the application locks first, as fences have met them: a fence that locks in the same order meets no
  // deadlock. Oids at `side`.
  std::vector<std::int64_t> lock_order(Side side, const std::string& database);
  void locks_first(Side side, const std::string& database, std::int64_t oid);

 private:
  void check_cron(StoreContext&, Side, PgSession& admin, const std::vector<std::string>& databases, std::vector<Finding>&);
  void prepare_source(StoreContext&, const std::string& database);
  void prepare_database(StoreContext&, const std::string& database);
  void remember_target_databases(StoreContext&);
  // Prepares databases that have come to the source since the list of all of them was made.
  void take_in_databases(StoreContext&);
  void follow_database(StoreContext&, const std::string& database);
  void install_fence(StoreContext&, PgSession&, Side, const std::vector<PgTable>&, bool refusing);
  // Those without both triggers.
  std::vector<PgTable> unfenced(PgSession&, const std::vector<PgTable>&);
  // Makes the publication's list what `tables` says, adding and removing only what differs.
  void publish(StoreContext&, PgSession&, const PgFlow&, const std::vector<PgTable>&);
  // " WHERE (...)": the table's condition, where that server publishes a part of a table (15 on) and takes this one; else empty.
  std::string row_filter(PgSession& publisher, const PgTable&);
  // Before the server's own synchronisation copies an extension's table: what that copies is taken out of it.
  std::string empty_to_synchronise(PgSession& publisher, PgSession& subscriber, const PgTable& at_publisher);
  // The publication's tables, as PgTable::full() writes them, and rehome.marker.
  std::vector<std::string> published(PgSession&, const PgFlow&);
  void open_path(StoreContext&, const std::string& database, const PgFlow&);
  void subscribe(StoreContext&, const std::string& database, const PgFlow&, bool enabled);
  std::string connection_string(StoreContext&, const std::string& database, const PgFlow&, int subscriber_major);
  // Brings roles, their memberships and settings, and settings of all roles, as they are now. Those that the target had before the run
  // stay as they are.
  void restore_roles(StoreContext&);
  void create_database(StoreContext&, const std::string& database);
  // Owner, settings, rights and comment of the database, which are in no dump, as they are now. One that was there before the run only gets
  // more of them.
  void carry_database(StoreContext&, const std::string& database);
  // The same of schema public: what its own major's dump leaves out.
  void carry_public(StoreContext&, const std::string& database);
  // Whether this run made the target's database.
  bool is_made(StoreContext&, const std::string& database);
  // How many may connect to the target's database as it was before the run, which closes it for a while; null where this run made it.
  Json connection_limit(StoreContext&, const std::string& database);
  // As of `snapshot` (empty: now). Null where the section is restored already.
  std::unique_ptr<SchemaDump> dump_section(StoreContext&, const std::string& database, const std::string& section, const std::string& snapshot);
  // `foreign_keys` false: post-data without them, while tables that they point to are still empty. Nothing where `dump` is null.
  void restore_section(StoreContext&, const std::string& database, const std::string& section, const SchemaDump* dump, bool foreign_keys = true);
  void copy_database(StoreContext&, const std::string& database);
  void watch_wal(StoreContext&, Side);
  // What has become of a first copy's snapshot. `rest`: it is lost, but the slot holds all that has happened since, and the
  // finished tables stay. `lost`: the slot is of no use either, or what was copied is none, for the reason `why` (empty: known
  // before). `none`: no copy was begun.
  struct SnapshotState {
    enum { none, held, rest, lost } is = none;
    std::string name, why;
  };
  SnapshotState snapshot_state(StoreContext&, const std::string& database, const PgFlow&);
  // What a copy that lost its snapshot keeps and what it copies again, and the same in words.
  struct CopyRest {
    std::vector<PgTable> stay, again;
    std::string says;
  };
  CopyRest what_is_left(StoreContext&, const std::string& database, PgSession& source);
  // For the plan of a run that has lost a snapshot; empty: nothing is copied twice.
  std::vector<std::string> left_to_copy(StoreContext&, const std::string& database);
  // The name of the snapshot that goes with the flow's slot. Empty: it is lost, but the slot holds all that has happened since,
  // and the finished tables stay.
  std::string hold_snapshot(StoreContext&, const std::string& database, const PgFlow&);
  // The rest of a copy whose snapshot is lost. Interrupted, it goes on where it was.
  void copy_rest(StoreContext&, const std::string& database);
  void analyze(StoreContext&, const std::string& database);
  void copy_large_objects(StoreContext&, const std::string& database);
  void copy_whole(StoreContext&, const std::string& database, const std::string& why);
  // Brings what has changed at the source since the copy; the tables concerned are copied again. Returns why that is not
  // possible, and then the whole database must be copied; empty: done. Interrupted, it begins again with what is left.
  std::string copy_changed(StoreContext&, const std::string& database);
  struct SourceSchema;
  SourceSchema read_source_schema(StoreContext&, const std::string& database);
  // What a first copy writes down as copied, for recopy to compare with. Empty where an object has gone since the snapshot.
  std::vector<SchemaEntry> read_copied_schema(StoreContext&, const std::string& database, const std::string& snapshot);
  // A side's schema as the other one has it: the source's since it was copied, the target's since the switch.
  // `seen`: a snapshot, for the log's numbers come in another order than their commits.
  void remember_schema(StoreContext&, const std::string& database, Side, const std::string& seen, const Json& fingerprint);
  // Every table of the publisher published, and copied to the other side where the subscription does not know it yet; until all
  // are followed.
  void synchronise(StoreContext&, const std::string& database, Side publisher);
  // Why the worker of that table fails: what the other side's table lacks, or what a COPY of ours met there, which is taken back. Empty:
  // not known.
  std::string why_not_synchronised(StoreContext&, const std::string& database, const PgFlow&, const std::string& table);
  // Empty: each column has its place.
  static std::string missing_columns(PgSession& publisher, PgSession& subscriber, const std::string& table);
  // Where tables are still being copied: which of them fail, and why. Looks for some seconds; empty: none does.
  std::string synchronisation_trouble(StoreContext&, const std::string& database, const PgFlow&, PgSession& publisher, PgSession& subscriber);
  // recopy in the fallback window: what was changed on the target since the switch.
  void accept_schema(StoreContext&, const std::string& database);
  // Empties the target's `rewritten` tables on the source, unsubscribed. The next synchronise() brings their rows; until then they lack.
  void copy_back(StoreContext&, const std::string& database, const std::set<std::int64_t>& rewritten);
  // Which side serves, as the followers stand.
  Side serving(StoreContext&);
  static bool follows(PgSession& subscriber, const PgFlow&);   // its subscription is on
  // What has become of the source's extensions since they were copied.
  struct ExtensionUpdate {
    std::string name, to;
  };
  // Those of another version than then, that the target has in an older one and can bring to it. Throws where the target lacks
  // what it would take, with nothing done.
  std::vector<ExtensionUpdate> extension_updates(StoreContext&, const std::string& database, PgSession& source, PgSession& target);
  // In a transaction of the target that lets this session through the fence. Those that are not there, or not older, stay.
  static void update_extensions(PgSession& target, const std::vector<ExtensionUpdate>&);
  static Json extension_versions(PgSession&);   // name -> version
  // Foreign keys and materialized views: what needs all tables filled.
  void finish_schema(StoreContext&, const std::string& database, const SourceSchema&);
  // Whether the follower reaches what is written now; false when it stands still for a minute.
  bool follower_passes(StoreContext&, const std::string& database, Side publisher);
  // What has changed in a side's schema since it was remembered, a line each; empty: nothing.
  std::string schema_change(StoreContext&, const std::string& database, Side);
  const PgPrograms& programs(StoreContext&);
  void take_helpers(StoreContext&);   // what finish and abandon have in common: settings, watchers, sockets
  void tune(StoreContext&, Side);
  void untune(StoreContext&, Side);
  bool has_database(StoreContext&, Side, const std::string& database);   // false where the host is gone too
  void remove_flow(StoreContext&, const std::string& database, const PgFlow&);
  // Which slots at the publisher are those of tables that the subscription is just synchronising, as SQL; empty: there is no such
  // subscription. Their names hold its oid and its cluster's number, nothing of ours.
  std::string synchronising_slots(PgSession& subscriber, const PgFlow&);
  void remove_publisher(StoreContext&, PgSession& publisher, const PgFlow&);
  // The slots of which `which` (SQL) is true go, and who uses them is ended.
  void drop_slots(PgSession& publisher, const std::string& which);
  void make_reverse_slot(StoreContext&, PgSession& publisher, const PgFlow&);
  void remove_objects(StoreContext&, Side, const std::string& database, bool keep_fence);
  std::string secret(Side, const std::string& database);
  std::string compare_rows(StoreContext&, const std::string& database, const PgTable&, const std::string& snap_s,
                           const std::string& snap_t, Verdict&);

  StoreConfig config_;
  std::optional<Room> room_;
  std::string tag_;          // short hash of deployment and store: part of every name that is global to a cluster
  std::mutex mutex_;
  std::mutex secrets_mutex_;   // its own: an address, and its password, is asked for by those who hold the other
  std::map<std::string, std::string> secrets_;
  std::map<std::string, std::vector<std::int64_t>> lock_order_;
  std::shared_ptr<PgPrograms> programs_;   // once looked for
};

// How long unlogged tables of that size take to copy inside the pause: 50 MB/s, seen on two shared cores.
inline Millis pause_for_unlogged(std::int64_t bytes) { return Millis(bytes / 50'000); }

// SQL that several phases share.
namespace pgsql {
// The trigger functions' bodies, and the rights on what writes large objects. The open one lets everything through, the refusing one
// nothing but replication. Several statements.
std::string fence_function(bool refusing, const std::string& where);
// Takes from everybody but superusers the right to call the functions that write large objects, and keeps what it was; gives it back
// as it was. Idempotent. A transaction that is open then may not have heard of it.
std::string large_object_rights_table();
std::string close_large_objects();
std::string open_large_objects();
// The refusing body while the first copy runs: it lets through a superuser's session that calls itself "rehome copy", and nobody else.
std::string fence_function_while_copying(const std::string& where);
// The refusing body from the copy's end to the switch: lets the server's own first copy of a table through.
std::string fence_function_before_switch(const std::string& where);
// For the fence's hint: "the source serves until the switch", "the target serves now".
std::string who_serves(Side);
// Of what is to be copied: of an extension's table the rows that meet its condition, or all of them where it is copied `whole`. For a
// session with session_replication_role = replica. Extensions come with their foreign keys, which TRUNCATE minds.
std::string empty_table(const PgTable&, bool whole = false);
// Makes both triggers of a table that has neither; several statements.
std::string fence_triggers(const PgTable&);
std::string ddl_function(bool refusing);
// Records a table whose rows ALTER TABLE or ALTER TYPE writes anew: neither a dump nor the follower tells. By its oid, for it may get
// another name in the same transaction.
std::string rewrite_function();
// Terminates the other sessions in this database of which that is true, in columns of pg_stat_activity, and waits until they are gone (5 s).
std::string end_sessions(const std::string& which);
// Those of our earlier sessions that could still commit a fence. A statement sent by a dead agent's life may land late; docs/model has
// the run in which that loses a write.
std::string end_fence_sessions();
extern const char* const kFenceApplication;
}  // namespace pgsql

}  // namespace rehome
