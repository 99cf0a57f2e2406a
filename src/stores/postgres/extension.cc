// What is particular to extensions: rows of their configuration that are people's, and versions that change while we follow.
#include "base/text.h"
#include "stores/postgres/postgres.h"

namespace rehome {

std::string PostgresStore::row_filter(PgSession& s, const PgTable& t) {
  if (t.condition.size() < 6 || s.major() < 15) return {};
  std::string word = t.condition.substr(0, 5);
  for (char& c : word) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  if (word != "WHERE") return {};
  std::string filter = " WHERE (" + t.condition.substr(5) + ")";
  bool taken = true;
  // Which expressions a publication takes, only its server knows.
  pg_retry_locks(Deadline::in(Millis(60000)), [&] {
    s.exec("BEGIN; SET LOCAL lock_timeout = '100ms'");
    try {
      s.exec("CREATE PUBLICATION rehome_probe FOR TABLE ONLY " + t.full() + filter);
    } catch (const PgError& e) {
      if (s.broken()) throw;
      s.exec("ROLLBACK");
      if (e.retryable) throw;
      taken = false;
      return;
    }
    s.exec("ROLLBACK");
  });
  return taken ? filter : "";
}

std::string PostgresStore::empty_to_synchronise(PgSession& publisher, PgSession& subscriber, const PgTable& t) {
  // A server before 15 asks for the whole table.
  return pgsql::empty_table(t, subscriber.major() < 15 || row_filter(publisher, t).empty());
}

Json PostgresStore::extension_versions(PgSession& s) {
  Json all = Json::object();
  for (auto& r : s.query("SELECT extname, extversion FROM pg_extension")) all[*r[0]] = *r[1];
  return all;
}

std::vector<PostgresStore::ExtensionUpdate> PostgresStore::extension_updates(StoreContext& c, const std::string& database, PgSession& source, PgSession& target) {
  const Json copied = c.recall(key("extensions", database)), now = extension_versions(source), there = extension_versions(target);
  std::vector<ExtensionUpdate> updates;
  for (const auto& [name, version] : now.items()) {
    const std::string to = version.get<std::string>();
    if ((copied.is_object() && copied.contains(name) && copied.at(name) == version) || (there.contains(name) && there.at(name) == version)) continue;
    const std::string is = "extension " + name + " of database " + database + " is of version " + to + " on the source now";
    const std::string repeat = " on the target; then rehome resume --recopy";
    if (target.query("SELECT 1 FROM pg_available_extensions WHERE name = $1", {name}).empty())
      throw Error(Code::state, is + ", and is not installed on the target", "install its package" + repeat);
    if (there.contains(name)) {
      const std::string has = there.at(name).get<std::string>();
      auto way = [&](const std::string& from, const std::string& until) {
        return !target.query("SELECT 1 FROM pg_extension_update_paths($1) WHERE source = $2 AND target = $3 AND path IS NOT NULL", {name, from, until}).empty();
      };
      // One that is ahead of the source, as it was after the first copy, stays so.
      if (!way(has, to) && way(to, has)) continue;
      if (!way(has, to))
        throw Error(Code::state, is + ", and the target has " + has + " and no way from there to it (it could be: " +
                                     target.value("SELECT coalesce(string_agg(version, ', ' ORDER BY version), '') FROM pg_available_extension_versions WHERE name = $1", {name}) + ")",
                    "install the package that brings version " + to + repeat);
    }
    updates.push_back({name, to});
  }
  return updates;
}

void PostgresStore::update_extensions(PgSession& t, const std::vector<ExtensionUpdate>& updates) {
  for (const auto& u : updates)
    if (!t.query("SELECT 1 FROM pg_extension e, LATERAL pg_extension_update_paths(e.extname) p WHERE e.extname = $1 AND p.source = e.extversion AND p.target = $2 AND p.path IS NOT NULL", {u.name, u.to}).empty())
      t.exec("ALTER EXTENSION " + pg_identifier(u.name) + " UPDATE TO " + pg_literal(u.to));
}

}  // namespace rehome
