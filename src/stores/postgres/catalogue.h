// The fingerprint of an application's schema: what event triggers miss (switched off, or disabled by a superuser) it finds.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "stores/postgres/session.h"

namespace rehome {

// Catalogue -> number and hash of its rows, for relations, columns, defaults, constraints, indexes, triggers, functions, types,
// policies, rules, grants, owners and all else that pg_dump -s would write for this database, but for the schema rehome, our
// triggers, publications, subscriptions, replica identities, temporary objects and statistics.
//
// The rows themselves are hashed, oids and node trees included, through the session's own snapshot: exact, and two
// fingerprints of one server can be compared, never those of two servers. VACUUM, ANALYZE, TRUNCATE, REINDEX, CLUSTER and a
// refreshed view leave it as it is: file nodes, flags that VACUUM corrects, and the oids of indexes are left out.
//
// With it what no dump of one database holds and no event trigger tells: settings, owner, rights and comment of the database, and of the
// whole cluster its roles, where the run carries those (`roles`). Nothing is made of a verifier: its row's number tells of a new one.
//
// Errors are those of PgSession::query.
Json catalogue_fingerprint(PgSession& session, bool roles = true);

// The same question, asked again and again, and planned once (which costs more than the answer): divided among several
// sessions of one server that nobody else uses meanwhile.
class CatalogueQuestion {
 public:
  // Prepares the statements: outside of any transaction.
  explicit CatalogueQuestion(const std::vector<PgSession*>& sessions, bool roles = true);
  Json ask(Deadline deadline) const;

 private:
  std::vector<PgSession*> sessions_;
};

// What differs, in words: "columns, functions"; empty: nothing. A missing fingerprint differs in everything.
std::string catalogue_difference(const Json& before, const Json& now);

// What an apply worker writes is written in the replica role, and what we change ourselves is changed in it: triggers and event triggers
// that fire there would add to what comes from the other side.
struct TriggerObstacle {
  const char* id;   // of its finding
  std::string what, mend;
};
std::vector<TriggerObstacle> triggers_on_replicated_rows(PgSession& session);

// The server's data directory; empty for an account that may not see it (pg_read_all_settings).
std::string data_directory(PgSession& session);

}  // namespace rehome
