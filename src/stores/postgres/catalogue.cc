#include "stores/postgres/catalogue.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <thread>

#include "base/text.h"

namespace rehome {
namespace {

// `cost`: of 10 for a usual schema; the parts are dealt out by it.
struct Part {
  const char* name;
  int cost;
  std::string row, from;
};

// Objects of initdb are below this (FirstNormalObjectId).
#define OURS " >= 16384"

std::vector<Part> parts(int major, bool roles) {
  const std::string space =
      " NOT IN (SELECT oid FROM pg_namespace WHERE nspname IN ('pg_catalog', 'information_schema', 'rehome') OR nspname LIKE 'pg\\_toast%' OR nspname LIKE 'pg\\_temp%')";
  const std::string relation = " JOIN pg_class c ON c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c') AND c.oid" OURS " AND c.relpersistence <> 't' AND c.relnamespace" + space + " AND ";
  std::vector<Part> all;
  auto add = [&](const char* name, int cost, const std::string& row, const std::string& from) { all.push_back({name, cost, row, from}); };
  add("columns", 10, "a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.atthasdef, a.attidentity, a.attgenerated, a.attcollation, a.attstorage, a.attacl, a.attoptions, a.attfdwoptions",
      "pg_attribute a" + relation + "c.oid = a.attrelid AND a.attnum > 0 AND NOT a.attisdropped");
  add("relations", 3, "c.oid, c.relname, c.relnamespace, c.reloftype, c.relowner, c.relam, c.reltablespace, c.relpersistence, c.relkind, c.relrowsecurity, c.relforcerowsecurity, c.relispartition, c.relacl, c.reloptions, c.relpartbound",
      "pg_class c WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f', 'c') AND c.relpersistence <> 't' AND c.oid" OURS " AND c.relnamespace" + space);
  // Without oids of indexes: REINDEX CONCURRENTLY makes new ones, and an invalid one is its work in progress.
  add("indexes", 5, "i.indrelid, x.relname, x.relowner, x.relam, x.reloptions, i.indisunique, i.indisprimary, i.indisexclusion, i.indimmediate, i.indkey, i.indcollation, i.indclass, i.indoption, i.indexprs, i.indpred, i.indnkeyatts",
      "pg_index i JOIN pg_class x ON x.oid = i.indexrelid" + relation + "c.oid = i.indrelid AND i.indrelid" OURS " AND (i.indisvalid OR c.relkind = 'p')");
  add("constraints", 3, "k.conname, k.connamespace, k.contype, k.condeferrable, k.condeferred, k.convalidated, k.conrelid, k.contypid, k.confrelid, k.confupdtype, k.confdeltype, k.confmatchtype, k.connoinherit, k.conkey, k.confkey, k.conexclop, k.conbin",
      "pg_constraint k WHERE k.oid" OURS " AND k.connamespace" + space);
  add("column defaults", 4, "d.adrelid, d.adnum, d.adbin", "pg_attrdef d" + relation + "c.oid = d.adrelid");
  add("sequences", 2, "q.*", "pg_sequence q" + relation + "c.oid = q.seqrelid");
  add("triggers", 3, "t.tgrelid, t.tgname, t.tgfoid, t.tgtype, t.tgenabled, t.tgdeferrable, t.tginitdeferred, t.tgnargs, t.tgattr, t.tgargs, t.tgqual, t.tgoldtable, t.tgnewtable",
      "pg_trigger t" + relation + "c.oid = t.tgrelid AND NOT t.tgisinternal AND t.tgname NOT IN ('rehome_fence', 'rehome_fence_t')");
  add("functions", 2, std::string("p.oid, p.proname, p.pronamespace, p.proowner, p.prolang, p.procost, p.prorows, p.provariadic, p.prosupport, p.prokind, p.prosecdef, p.proleakproof, p.proisstrict, p.proretset, p.provolatile, p.proparallel, "
      "p.prorettype, p.proargtypes, p.proallargtypes, p.proargmodes, p.proargnames, p.proargdefaults, p.protrftypes, p.prosrc, p.probin, p.proconfig, p.proacl") + (major >= 14 ? ", p.prosqlbody" : ""),
      "pg_proc p WHERE p.oid" OURS " AND p.pronamespace" + space);
  // Row types and arrays come and go with what they belong to.
  add("types", 2, "y.oid, y.typname, y.typnamespace, y.typowner, y.typlen, y.typbyval, y.typtype, y.typcategory, y.typispreferred, y.typdelim, y.typelem, y.typinput, y.typoutput, y.typalign, y.typstorage, y.typnotnull, y.typbasetype, y.typtypmod, y.typcollation, y.typdefaultbin, y.typdefault, y.typacl",
      "pg_type y WHERE y.oid" OURS " AND y.typrelid = 0 AND NOT (y.typelem <> 0 AND y.typlen = -1) AND y.typnamespace" + space);
  add("enums", 1, "e.enumtypid, e.enumsortorder, e.enumlabel", "pg_enum e");
  add("ranges", 1, "r.rngtypid, r.rngsubtype, r.rngcollation, r.rngsubopc, r.rngcanonical, r.rngsubdiff", "pg_range r WHERE r.rngtypid" OURS);
  add("views and rules", 2, "r.rulename, r.ev_class, r.ev_type, r.ev_enabled, r.is_instead, r.ev_qual, r.ev_action", "pg_rewrite r" + relation + "c.oid = r.ev_class");
  add("policies", 1, "p.polname, p.polrelid, p.polcmd, p.polpermissive, p.polroles, p.polqual, p.polwithcheck", "pg_policy p" + relation + "c.oid = p.polrelid");
  add("inheritance", 1, "h.inhrelid, h.inhparent, h.inhseqno", "pg_inherits h" + relation + "c.oid = h.inhrelid");
  add("partitioning", 1, "p.partrelid, p.partstrat, p.partattrs, p.partclass, p.partcollation, p.partexprs", "pg_partitioned_table p" + relation + "c.oid = p.partrelid");
  add("schemas", 1, "n.oid, n.nspname, n.nspowner, n.nspacl", "pg_namespace n WHERE n.oid" + space);
  add("extensions", 1, "x.oid, x.extname, x.extowner, x.extnamespace, x.extversion, x.extcondition", "pg_extension x");
  add("default rights", 1, "d.defaclrole, d.defaclnamespace, d.defaclobjtype, d.defaclacl", "pg_default_acl d");
  add("event triggers", 1, "e.evtname, e.evtevent, e.evtowner, e.evtfoid, e.evtenabled, e.evttags", "pg_event_trigger e WHERE e.evtname NOT LIKE 'rehome\\_%'");
  add("extended statistics", 1, "s.stxrelid, s.stxname, s.stxnamespace, s.stxowner, s.stxkeys, s.stxkind", "pg_statistic_ext s" + relation + "c.oid = s.stxrelid");
  add("comments", 2, "d.classoid, d.objsubid, d.description", "pg_description d WHERE d.objoid" OURS " AND NOT (d.classoid = 'pg_class'::regclass AND EXISTS (SELECT 1 FROM pg_class c WHERE c.oid = d.objoid AND c.relpersistence = 't'))");
  add("security labels", 1, "l.classoid, l.objsubid, l.provider, l.label", "pg_seclabel l WHERE l.objoid" OURS);
  // What few have: whole rows.
  for (const char* rare : {"pg_cast", "pg_operator", "pg_opclass", "pg_opfamily", "pg_amop", "pg_amproc", "pg_collation", "pg_conversion", "pg_transform", "pg_language", "pg_am",
                           "pg_ts_config", "pg_ts_dict", "pg_ts_parser", "pg_ts_template", "pg_foreign_data_wrapper", "pg_foreign_server", "pg_user_mapping"})
    add(rare, 1, "r.*", std::string(rare) + " r WHERE r.oid" OURS);
  add("pg_aggregate", 1, "r.*", "pg_aggregate r WHERE r.aggfnoid::oid" OURS);
  add("pg_ts_config_map", 1, "r.*", "pg_ts_config_map r WHERE r.mapcfg" OURS);
  add("pg_foreign_table", 1, "r.*", "pg_foreign_table r");
  add("the database itself", 1, "d.datdba, d.datacl, shobj_description(d.oid, 'pg_database')", "pg_database d WHERE d.datname = current_database()");
  add("settings of the database", 1, "s.setrole, s.setconfig", "pg_db_role_setting s JOIN pg_database d ON d.oid = s.setdatabase WHERE d.datname = current_database()");
  if (!roles) return all;
  // Without the verifier, of which no hash leaves the server: ALTER ROLE writes the row anew, and VACUUM keeps its xmin.
  add("roles", 1, "r.oid, r.rolname, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin, r.rolreplication, r.rolbypassrls, r.rolconnlimit, r.rolvaliduntil, r.xmin", "pg_authid r WHERE r.rolname NOT LIKE 'pg\\_%'");
  add("memberships of roles", 1, std::string("m.roleid, m.member, m.admin_option") + (major >= 16 ? ", m.inherit_option, m.set_option" : ""), "pg_auth_members m");
  add("settings of roles", 1, "s.setrole, s.setconfig", "pg_db_role_setting s WHERE s.setdatabase = 0");
  return all;
}

// The parts, dealt out to `n` sessions.
std::vector<std::string> questions(int major, bool roles, std::size_t n) {
  std::vector<std::string> all(n);
  std::vector<int> load(n, 0);
  for (const auto& p : parts(major, roles)) {
    auto least = static_cast<std::size_t>(std::min_element(load.begin(), load.end()) - load.begin());
    load[least] += p.cost;
    // The sum of 64-bit hashes does not depend on the order; a bigint's sum is a numeric and does not overflow.
    all[least] += (all[least].empty() ? "SELECT '" : " UNION ALL SELECT '") + std::string(p.name) + "', count(*) || ':' || coalesce(sum(hashtextextended(ROW(" + p.row + ")::text, 0)), 0) FROM " + p.from;
  }
  return all;
}

void add(Json& all, const std::vector<PgRow>& rows) {
  for (auto& r : rows) all[*r[0]] = r[1].value_or("");
}

}  // namespace

Json catalogue_fingerprint(PgSession& session, bool roles) {
  Json all = Json::object();
  add(all, session.query(questions(session.major(), roles, 1)[0]));
  return all;
}

CatalogueQuestion::CatalogueQuestion(const std::vector<PgSession*>& sessions, bool roles) : sessions_(sessions) {
  auto all = questions(sessions.at(0)->major(), roles, sessions.size());
  for (std::size_t i = 0; i < all.size(); i++) sessions_[i]->exec("PREPARE rehome_fingerprint AS " + all[i]);
  // The plans, and the catalogues in the sessions' caches.
  ask(Deadline());
}

Json CatalogueQuestion::ask(Deadline deadline) const {
  Json all = Json::object();
  std::mutex mutex;
  std::optional<Error> failure;
  auto one = [&](std::size_t i) {
    try {
      auto rows = sessions_[i]->query("EXECUTE rehome_fingerprint", deadline);
      std::lock_guard lock(mutex);
      add(all, rows);
    } catch (const Error& e) {
      std::lock_guard lock(mutex);
      failure = e;
    }
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t i = 1; i < sessions_.size(); i++) others.emplace_back(one, i);
    one(0);
  }
  if (failure) throw *failure;
  return all;
}

std::string catalogue_difference(const Json& before, const Json& now) {
  std::string out;
  for (auto& [name, value] : now.items())
    if (!before.is_object() || before.value(name, Json()) != value) out += (out.empty() ? "" : ", ") + name;
  return out;
}

std::vector<TriggerObstacle> triggers_on_replicated_rows(PgSession& session) {
  std::vector<TriggerObstacle> all;
  for (const bool always : {true, false}) {
    auto rows = session.query(std::string("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), quote_ident(t.tgname) FROM pg_trigger t "
                                          "JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE t.tgname NOT IN ('rehome_fence', 'rehome_fence_t') "
                                          // Until 14 a partition's copy of its parent's is internal, as those of foreign keys are; these are in no dump.
                                          "AND (NOT t.tgisinternal OR t.tgparentid <> 0 AND t.tgconstraint = 0) AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND c.relpersistence <> 't' AND t.tgenabled = '") +
                              (always ? "A" : "R") + "' ORDER BY 1, 2");
    if (rows.empty()) continue;
    std::vector<std::string> names;
    for (auto& r : rows) names.push_back(*r[0] + ": " + *r[1]);
    const std::string few = first_few(names), likewise = names.size() > 1 ? " (the others likewise)" : "", table = "ALTER TABLE " + *rows[0][0];
    if (always)
      all.push_back({"always_triggers", "triggers that are ENABLE ALWAYS fire for replicated rows too: on the side that follows they would do again what they have done here, beside the rows that come from here: " + few,
                     table + " ENABLE TRIGGER " + *rows[0][1] + likewise + ": it fires for all that applications write, as now, and not for what is replicated; ENABLE ALWAYS again after rehome complete"});
    else
      all.push_back({"replica_triggers", "triggers that are ENABLE REPLICA fire for replicated rows alone: on the side that follows they would change what comes from here, or add to it: " + few,
                     table + " DISABLE TRIGGER " + *rows[0][1] + likewise + ": nothing that applications write fires it; ENABLE REPLICA again after rehome complete"});
  }
  auto fires = [&](const std::string& which) {
    std::vector<std::string> names;
    for (auto& r : session.query("SELECT quote_ident(evtname) FROM pg_event_trigger WHERE evtname NOT LIKE 'rehome\\_%' AND " + which + " ORDER BY 1")) names.push_back(*r[0]);
    return names;
  };
  if (auto names = fires("evtevent <> 'login' AND evtenabled IN ('A', 'R')"); !names.empty())
    all.push_back({"event_triggers", "event triggers that are ENABLE ALWAYS or ENABLE REPLICA fire for the changes that rehome makes itself: what they write would be more rows on one side, and is refused on the side that does not serve: " + first_few(names),
                   "ALTER EVENT TRIGGER " + names[0] + " ENABLE: it fires for all that applications change, as ALWAYS does; or DISABLE, where it was REPLICA; as it was again after rehome complete"});
  // Before a session can say that it is none of the application's; a walsender is one too.
  if (auto names = fires("evtevent = 'login' AND evtenabled <> 'D'"); !names.empty())
    all.push_back({"login_triggers", "event triggers on login fire for the sessions of rehome and of the followers too; where one writes it is refused on the side that does not serve, and nobody can connect there: " + first_few(names),
                   "ALTER EVENT TRIGGER " + names[0] + " DISABLE, and ENABLE after rehome complete"});
  return all;
}

std::string data_directory(PgSession& session) {
  return session.value("SELECT coalesce((SELECT setting FROM pg_settings WHERE name = 'data_directory'), '')");
}

}  // namespace rehome
