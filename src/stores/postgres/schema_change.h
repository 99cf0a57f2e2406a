// What was copied, object by object, and what has changed since: the source's schema is compared with its own earlier self, so
// the two servers may be of different majors. The earlier self is a table of the target, rehome.copied_schema: it changes in
// the transaction that changes the target's schema.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "stores/postgres/dump.h"

namespace rehome {

// Fills type, names and arguments of the entries, as `s` (the dumped server) knows them. An object that has gone meanwhile is
// a PgError or stays without: the caller dumps again.
void read_addresses(PgSession& s, std::vector<SchemaEntry>& entries);
// Puts the numbers of its columns into a table's hash: one that was dropped and added again as the last looks the same in a dump, and
// has lost its values. `s` sees the dumped server as the dump did.
void read_columns(PgSession& s, std::vector<SchemaEntry>& entries);
// The ids of those entries with an address that do not exist at `s`, another server.
std::set<int> missing_objects(PgSession& s, const std::vector<SchemaEntry>& entries);
// Replaces rehome.copied_schema by `entries`, but for those in `without`. In the caller's transaction, or in one of its own.
void write_copied_schema(PgSession& target, const std::vector<SchemaEntry>& entries, const std::set<int>& without);

class SchemaChange {
 public:
  // `now`: with addresses and columns. Reads rehome.copied_schema; known() is false where there is none. `rewritten`: oids of tables
  // that have changed, whatever their text says.
  SchemaChange(PgSession& target, const std::vector<SchemaEntry>& now, const std::set<std::int64_t>& rewritten = {});
  bool known() const { return known_; }
  bool empty() const { return changed_.empty() && gone_.empty(); }
  // Why it cannot be done object by object; empty: it can.
  const std::string& obstacle() const { return obstacle_; }
  std::size_t size() const { return changed_.size() + gone_.size(); }
  // The changed objects' names, for a log, the first few.
  std::string says() const;

  // In the caller's transaction at the target: changes in place what can be (functions, new labels of an enum, schemas'
  // owners, rights back to their defaults), and drops what else has changed or is gone, with all that depends on it. A table
  // that loses a column, default or check by that is dropped as a whole: its rows have changed. PgErrors pass through.
  void drop(PgSession& target);
  // After drop(), in the same transaction: the entries to restore, foreign keys apart. `foreign_keys` gets those.
  std::set<int> to_restore(PgSession& target, std::set<int>& foreign_keys) const;
  // Makes these, from the dump that `now` came from; in the same transaction, of a session after pg_say_nothing().
  void restore(PgSession& target, const SchemaDump& dump, const std::set<int>& ids);

 private:
  struct Copied {
    std::string hash, kind, undo, type, names, arguments;
  };
  void drop_object(PgSession& target, const std::string& type, const std::string& names, const std::string& arguments);
  void reset_rights(PgSession& target, const std::string& type, const std::string& names, const std::string& arguments);
  void reset_default_rights(PgSession& target, const std::string& address);
  void extend_enum(PgSession& target, const SchemaEntry& entry);
  const std::vector<SchemaEntry>& now_;
  std::map<std::string, Copied> copied_;
  std::vector<const SchemaEntry*> changed_;   // new ones too
  std::vector<std::string> gone_;             // keys
  std::set<std::string> reset_;               // keys of objects whose rights were reset
  std::string obstacle_;
  bool known_ = false;
};

// The source's schema at one moment, with what will tell whether it has changed since.
struct PostgresStore::SourceSchema {
  std::string ddl;   // a snapshot that is no newer than the rest
  Json fingerprint;
  std::unique_ptr<SchemaDump> dump;
  std::vector<SchemaEntry> entries;
};

// The text of a pg_snapshot as its type reads it back. A slot's own may have its xmin beyond its xmax, which the type refuses: what is
// below xmin is visible in it.
std::string readable_snapshot(const std::string& text);

}  // namespace rehome
