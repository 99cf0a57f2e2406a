// pg_dump and pg_restore: which ones are used, where they run, and a schema's dump as entries.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "stores/postgres/postgres.h"

namespace rehome {

// One directory with both programs, on this machine or on a site.
struct PgPrograms {
  int major = 0;
  std::string directory;               // empty: found by PATH
  std::optional<Side> site;            // empty: this machine
  std::string says() const;            // "pg_dump 17 in /usr/lib/postgresql/17/bin on the target"
};

// All that are installed on this machine (PATH, and where Debian and the PostgreSQL project put them), or on that site.
std::vector<PgPrograms> find_pg_programs(StoreContext& c, std::optional<Side> where);
// The oldest on this machine that reads a server of `major`, else the oldest on a site; major 0 when there is none. An older
// one is better: what it writes suits an older target, and no pg_dump reads a server newer than itself.
PgPrograms choose_pg_programs(StoreContext& c, int major);

// One entry of an archive's table of contents.
struct SchemaEntry {
  int id = 0;
  std::int64_t class_oid = 0, oid = 0;        // at the dumped server; 0 for what is no object of its own (rights, comments)
  std::string kind, schema, tag, owner;       // "TABLE", "public", "orders", "shopkeeper"
  std::string sql;                            // without the settings that stand between entries
  std::vector<int> needs;                     // ids
  std::string key, hash;                      // what it is; its text (of a table also its oid: made anew it has other rows; and read_columns)
  std::string type, names, arguments;         // pg_identify_object_as_address; empty for what is no object of its own
};

// The ids of foreign keys, and of what is said of them.
std::set<int> of_foreign_keys(const std::vector<SchemaEntry>&);

// A dump without data, kept in a private directory (here or at the site where the programs run) until destroyed.
class SchemaDump {
 public:
  // `side`'s database, as of `snapshot` (empty: now). `options`: more for pg_dump, "--section=post-data". Without what is
  // ours: schema rehome, triggers, publications, subscriptions.
  SchemaDump(StoreContext& c, PostgresStore& store, const PgPrograms& programs, Side side, const std::string& database, const std::string& snapshot,
             const std::vector<std::string>& options);
  ~SchemaDump();
  SchemaDump(const SchemaDump&) = delete;
  SchemaDump& operator=(const SchemaDump&) = delete;

  const std::vector<SchemaEntry>& entries() const { return entries_; }
  // The statements of these entries, in an order in which they can be executed, for a session of `at`: settings in front
  // of them that it does not know are left out (a newer pg_dump, an older server).
  std::string script(const std::set<int>& ids, PgSession& at) const;
  // The archive, and a list for pg_restore -L, where the programs run on this machine; empty elsewhere.
  std::string archive() const;
  std::string list(const std::set<int>& ids) const;
  const PgPrograms& programs() const { return programs_; }

 private:
  std::string restore(const std::vector<std::string>& arguments) const;
  void parse(const std::string& script, const std::string& list);
  std::string run_there(const std::vector<std::string>& argv, const std::vector<std::pair<std::string, std::string>>& env, const char* what) const;
  StoreContext& c_;
  PgPrograms programs_;
  std::string user_;                          // the account at the site
  std::string directory_;
  std::vector<SchemaEntry> entries_;
};

}  // namespace rehome
