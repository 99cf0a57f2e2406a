#include "stores/postgres/schema_change.h"

#include <algorithm>

#include "base/text.h"

namespace rehome {
namespace {

// pg_get_object_address raises an error for what does not exist: asked one by one, inside a function that catches that.
void make_question(PgSession& s) {
  s.exec("CREATE OR REPLACE FUNCTION pg_temp.rehome_there(kind text, names text[], arguments text[]) RETURNS boolean LANGUAGE plpgsql AS $rehome$ BEGIN "
         "PERFORM pg_catalog.pg_get_object_address(kind, names, arguments); RETURN true; EXCEPTION WHEN undefined_table OR undefined_object OR undefined_function OR "
         "undefined_column OR invalid_schema_name THEN RETURN false; END $rehome$");
}

std::string three(const std::string& type, const std::string& names, const std::string& arguments) {
  return pg_literal(type) + ", " + pg_literal(names) + "::text[], " + pg_literal(arguments) + "::text[]";
}

bool there(PgSession& s, const std::string& address) { return s.value("SELECT pg_temp.rehome_there(" + address + ")") == "t"; }

// What has no address of its own, and how it is taken back.
std::string undo_of(const SchemaEntry& e) {
  auto replaced = [&](const char* from, const char* to) {
    auto at = e.sql.find(from);
    return at == std::string::npos ? std::string() : e.sql.substr(0, at) + to;
  };
  if (e.kind == "COMMENT" || e.kind == "SECURITY LABEL") return replaced(" IS ", " IS NULL");
  if (e.kind == "ROW SECURITY") return replaced(" ENABLE ROW LEVEL SECURITY", " DISABLE ROW LEVEL SECURITY");
  if (e.kind == "SEQUENCE OWNED BY") return replaced(" OWNED BY ", " OWNED BY NONE");
  return {};
}

// Table -> what it is made of, as far as it is written in the table's own entry: columns, defaults, checks.
std::map<std::string, std::set<std::string>> shapes(PgSession& s, const std::set<std::string>& own_entries) {
  std::map<std::string, std::set<std::string>> all;
  for (auto& r : s.query("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), 'column ' || a.attnum || ' ' || a.atttypid || ' ' || a.attname, "
                         "CASE WHEN a.atthasdef THEN ARRAY[n.nspname, c.relname, a.attname]::text END FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_attribute a "
                         "ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped WHERE c.relkind IN ('r', 'p') AND c.oid >= 16384 AND n.nspname <> 'rehome' AND c.relpersistence <> 't' "
                         "UNION ALL SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname), 'check ' || k.conname, ARRAY[n.nspname, c.relname, k.conname]::text FROM pg_constraint k "
                         "JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE k.contype = 'c' AND n.nspname <> 'rehome' AND c.oid >= 16384")) {
    auto& shape = all[*r[0]];
    if (!r[1]) continue;
    bool check = r[1]->starts_with("check ");
    if (!check) shape.insert(*r[1]);
    if (r[2] && !own_entries.contains(*r[2])) shape.insert((check ? "" : "default ") + *r[1]);
  }
  return all;
}

std::vector<std::string> literals(const std::string& sql) {
  std::vector<std::string> all;
  for (std::size_t i = sql.find('('); i < sql.size(); i++) {
    if (sql[i] == ';') break;
    if (sql[i] != '\'') continue;
    std::string text;
    for (i++; i < sql.size(); i++) {
      if (sql[i] == '\'' && (i + 1 >= sql.size() || sql[i + 1] != '\'')) break;
      if (sql[i] == '\'') i++;
      text += sql[i];
    }
    all.push_back(text);
  }
  return all;
}

}  // namespace

void read_addresses(PgSession& s, std::vector<SchemaEntry>& entries) {
  std::string values;
  for (std::size_t i = 0; i < entries.size(); i++)
    if (entries[i].class_oid)
      values += (values.empty() ? "(" : ", (") + std::to_string(i) + ", " + std::to_string(entries[i].class_oid) + "::oid, " + std::to_string(entries[i].oid) + "::oid)";
  if (values.empty()) return;
  for (auto& r : s.query("SELECT x.i, a.type, a.object_names::text, a.object_args::text FROM (VALUES " + values + ") x(i, c, o), LATERAL pg_identify_object_as_address(x.c, x.o, 0) a")) {
    auto& e = entries[static_cast<std::size_t>(std::stoll(*r[0]))];
    e.type = r[1].value_or("");
    e.names = r[2].value_or("{}");
    e.arguments = r[3].value_or("{}");
  }
}

void read_columns(PgSession& s, std::vector<SchemaEntry>& entries) {
  std::map<std::int64_t, std::string> columns;
  for (auto& r : s.query("SELECT c.oid, md5(coalesce(string_agg(a.attnum::text, ',' ORDER BY a.attnum), '')) FROM pg_class c LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
                         "WHERE c.relkind IN ('r', 'p') AND c.oid >= 16384 GROUP BY c.oid"))
    columns[std::stoll(*r[0])] = *r[1];
  for (auto& e : entries)
    if (e.kind == "TABLE") e.hash += " " + columns[e.oid];
}

std::set<int> missing_objects(PgSession& s, const std::vector<SchemaEntry>& entries) {
  make_question(s);
  std::set<int> missing;
  std::string values;
  auto ask = [&] {
    if (!values.empty())
      for (auto& r : s.query("SELECT x.id FROM (VALUES " + values + ") x(id, t, n, a) WHERE NOT pg_temp.rehome_there(x.t, x.n, x.a)")) missing.insert(std::stoi(*r[0]));
    values.clear();
  };
  for (const auto& e : entries) {
    if (e.type.empty()) continue;
    values += (values.empty() ? "(" : ", (") + std::to_string(e.id) + ", " + three(e.type, e.names, e.arguments) + ")";
    if (values.size() > (1 << 20)) ask();
  }
  ask();
  return missing;
}

void write_copied_schema(PgSession& target, const std::vector<SchemaEntry>& entries, const std::set<int>& without) {
  target.exec("CREATE TABLE IF NOT EXISTS rehome.copied_schema(key text PRIMARY KEY, hash text NOT NULL, kind text NOT NULL, undo text NOT NULL, type text NOT NULL, names text NOT NULL, arguments text NOT NULL)");
  std::map<int, const SchemaEntry*> by_id;
  for (const auto& e : entries) by_id[e.id] = &e;
  std::string sql = "DELETE FROM rehome.copied_schema";
  std::size_t in_statement = 0;
  for (const auto& e : entries) {
    if (without.contains(e.id)) continue;
    // Rights are found by the object that they are on.
    const SchemaEntry* object = &e;
    if (e.kind == "ACL")
      for (int n : e.needs)
        if (by_id.contains(n) && !by_id[n]->type.empty()) object = by_id[n];
    sql += in_statement++ % 500 == 0 ? "; INSERT INTO rehome.copied_schema VALUES (" : ", (";
    for (const std::string* v : {&e.key, &e.hash, &e.kind}) sql += pg_literal(*v) + ", ";
    sql += pg_literal(undo_of(e)) + ", " + pg_literal(object->type) + ", " + pg_literal(object->names) + ", " + pg_literal(object->arguments) + ")";
  }
  target.exec(sql);
}

SchemaChange::SchemaChange(PgSession& target, const std::vector<SchemaEntry>& now, const std::set<std::int64_t>& rewritten) : now_(now) {
  if (target.value("SELECT to_regclass('rehome.copied_schema') IS NOT NULL") != "t") return;
  for (auto& r : target.query("SELECT * FROM rehome.copied_schema")) copied_[*r[0]] = {*r[1], *r[2], *r[3], *r[4], *r[5], *r[6]};
  known_ = !copied_.empty();
  std::map<std::string, const SchemaEntry*> by_key;
  for (const auto& e : now_) by_key[e.key] = &e;
  std::set<const SchemaEntry*> changed;
  // A partition that is attached or detached is made anew; its index likewise.
  auto whole = [&](const std::string& key, const std::string& kind) {
    auto rest = key.substr(key.find('\t'));
    auto at = by_key.find(kind + rest);
    if (at != by_key.end()) changed.insert(at->second);
    if (kind != "INDEX" || at != by_key.end()) return;
    // The index of a constraint; or it went with its table.
    auto parts = split(key, '\t');
    for (const auto& e : now_)
      if (e.kind == "CONSTRAINT" && e.schema == parts[1] && e.tag.ends_with(" " + parts[2])) changed.insert(&e);
  };
  for (const auto& e : now_) {
    auto at = copied_.find(e.key);
    if (at != copied_.end() && at->second.hash == e.hash && !(e.kind == "TABLE" && rewritten.contains(e.oid))) continue;
    changed.insert(&e);
    if (e.kind == "TABLE ATTACH" && copied_.contains("TABLE\t" + e.schema + "\t" + e.tag)) whole(e.key, "TABLE");
    if (e.class_oid && e.type.empty()) obstacle_ = e.kind + " " + e.tag + " changed";
  }
  for (const auto& [key, c] : copied_) {
    if (by_key.contains(key)) continue;
    gone_.push_back(key);
    if (c.kind == "TABLE ATTACH") whole(key, "TABLE");
    if (c.kind == "INDEX ATTACH") whole(key, "INDEX");
  }
  for (const auto& e : now_)
    if (changed.contains(&e)) changed_.push_back(&e);
}

std::string SchemaChange::says() const {
  std::vector<std::string> names;
  for (const auto* e : changed_) names.push_back(e->kind + " " + e->tag);
  for (const auto& k : gone_) {
    auto parts = split(k, '\t');
    names.push_back(parts[0] + " " + (parts.size() > 2 ? parts[2] : "") + " (gone)");
  }
  return first_few(std::move(names));
}

// Default rights as they are where nobody has altered any: that is what those in a dump start from.
void SchemaChange::reset_default_rights(PgSession& t, const std::string& address) {
  const std::string d = "(SELECT d.*, r.rolname, n.nspname, CASE defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'FUNCTIONS' WHEN 'T' THEN 'TYPES' WHEN 'n' THEN 'SCHEMAS' ELSE 'LARGE OBJECTS' END AS word "
                        "FROM pg_default_acl d JOIN pg_get_object_address(" + address + ") a ON a.objid = d.oid JOIN pg_roles r ON r.oid = d.defaclrole LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace) d";
  const std::string whose = "format('ALTER DEFAULT PRIVILEGES FOR ROLE %I', d.rolname) || CASE WHEN d.nspname IS NULL THEN '' ELSE format(' IN SCHEMA %I', d.nspname) END";
  const std::string who = "CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END";
  for (auto& r : t.query("SELECT 0, " + whose + " || format(' REVOKE ALL ON %s FROM %s CASCADE', d.word, " + who + ") FROM " + d + ", LATERAL aclexplode(d.defaclacl) x UNION "
                         // Those of a schema are added to the ones of the database, and start from none.
                         "SELECT 1, " + whose + " || format(' GRANT %s ON %s TO %s', x.privilege_type, d.word, " + who + ") FROM " + d + ", LATERAL aclexplode(acldefault(CASE d.defaclobjtype WHEN 'S' THEN 's' ELSE d.defaclobjtype END, d.defaclrole)) x "
                         "WHERE d.nspname IS NULL ORDER BY 1, 2"))
    t.exec(*r[1]);
}

void SchemaChange::drop_object(PgSession& t, const std::string& type, const std::string& names, const std::string& arguments) {
  std::string address = three(type, names, arguments);
  if (!there(t, address)) return;
  if (type == "default acl") return reset_default_rights(t, address);
  auto row = t.query("SELECT i.identity, CASE WHEN a.classid = 'pg_constraint'::regclass THEN (SELECT conrelid::regclass::text FROM pg_constraint WHERE oid = a.objid) "
                     "WHEN a.classid = 'pg_attrdef'::regclass THEN (SELECT adrelid::regclass::text FROM pg_attrdef WHERE oid = a.objid) END, "
                     "CASE WHEN a.classid = 'pg_constraint'::regclass THEN (SELECT quote_ident(conname) FROM pg_constraint WHERE oid = a.objid) "
                     "WHEN a.classid = 'pg_attrdef'::regclass THEN (SELECT quote_ident(attname) FROM pg_attrdef d JOIN pg_attribute b ON b.attrelid = d.adrelid AND b.attnum = d.adnum WHERE d.oid = a.objid) END, "
                     "(SELECT format('ALTER TABLE %s ALTER COLUMN %I DROP IDENTITY', d.refobjid::regclass, b.attname) FROM pg_depend d JOIN pg_attribute b ON b.attrelid = d.refobjid AND b.attnum = d.refobjsubid "
                     "WHERE d.classid = 'pg_class'::regclass AND d.objid = a.objid AND a.classid = 'pg_class'::regclass AND d.deptype = 'i' AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0) "
                     "FROM pg_get_object_address(" + address + ") a, LATERAL pg_identify_object(a.classid, a.objid, a.objsubid) i").at(0);
  if (type == "table constraint")
    t.exec("ALTER TABLE " + row[1].value_or("") + " DROP CONSTRAINT " + row[2].value_or("") + " CASCADE");
  else if (type == "default value")
    t.exec("ALTER TABLE " + row[1].value_or("") + " ALTER COLUMN " + row[2].value_or("") + " DROP DEFAULT");
  else if (type == "sequence" && row[3])
    t.exec(*row[3]);
  else
    t.exec("DROP " + (type == "statistics object" ? "STATISTICS" : type) + " " + row[0].value_or("") + " CASCADE");
}

// An object's rights as they are when it is made: that is what the rights in a dump start from.
void SchemaChange::reset_rights(PgSession& t, const std::string& type, const std::string& names, const std::string& arguments) {
  std::string address = three(type, names, arguments);
  if (!there(t, address)) return;
  std::string word = type == "sequence" ? "SEQUENCE" : type == "schema" ? "SCHEMA" : type == "type" ? "TYPE" : type == "function" || type == "procedure" || type == "aggregate" ? "ROUTINE"
                     : type == "table" || type == "view" || type == "materialized view" || type == "foreign table" ? "TABLE" : "";
  if (word.empty()) throw Error(Code::store, t.address().label + ": rights on a " + type + " cannot be brought by object");
  auto rows = t.query("WITH a AS (SELECT a.*, i.identity FROM pg_get_object_address(" + address + ") a, LATERAL pg_identify_object(a.classid, a.objid, a.objsubid) i), "
                      "o AS (SELECT relacl AS acl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", relowner) AS base FROM pg_class, a WHERE oid = objid AND classid = 'pg_class'::regclass "
                      "UNION ALL SELECT proacl, acldefault('f', proowner) FROM pg_proc, a WHERE oid = objid AND classid = 'pg_proc'::regclass "
                      "UNION ALL SELECT nspacl, acldefault('n', nspowner) FROM pg_namespace, a WHERE oid = objid AND classid = 'pg_namespace'::regclass "
                      "UNION ALL SELECT typacl, acldefault('T', typowner) FROM pg_type, a WHERE oid = objid AND classid = 'pg_type'::regclass), "
                      "b AS (SELECT coalesce((SELECT initprivs FROM pg_init_privs i WHERE i.objoid = a.objid AND i.classoid = a.classid AND i.objsubid = 0), o.base) AS acl FROM a, o) "
                      "SELECT 0, format('REVOKE ALL ON " + word + " %s FROM %s CASCADE', a.identity, CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END) FROM a, o, LATERAL aclexplode(o.acl) x "
                      "UNION SELECT 0, format('REVOKE ALL ON " + word + " %s FROM %s CASCADE', a.identity, CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END) FROM a, pg_attribute t, LATERAL aclexplode(t.attacl) x "
                      "WHERE a.classid = 'pg_class'::regclass AND t.attrelid = a.objid "
                      "UNION SELECT 1, format('GRANT %s ON " + word + " %s TO %s', x.privilege_type, a.identity, CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END) FROM a, o, b, LATERAL aclexplode(b.acl) x "
                      "WHERE o.acl IS NOT NULL ORDER BY 1, 2");
  for (auto& r : rows) t.exec(*r[1]);
  reset_.insert(type + names + arguments);
}

void SchemaChange::extend_enum(PgSession& t, const SchemaEntry& e) {
  auto labels = literals(e.sql);
  std::vector<std::string> have;
  std::string address = three(e.type, e.names, e.arguments);
  for (auto& r : t.query("SELECT e.enumlabel FROM pg_enum e, pg_get_object_address(" + address + ") a WHERE e.enumtypid = a.objid ORDER BY e.enumsortorder")) have.push_back(*r[0]);
  std::size_t at = 0;
  for (const auto& l : labels)
    if (at < have.size() && have[at] == l) at++;
  std::string name = t.value("SELECT i.identity FROM pg_get_object_address(" + address + ") a, LATERAL pg_identify_object(a.classid, a.objid, a.objsubid) i");
  if (have.empty() || at < have.size()) return drop_object(t, e.type, e.names, e.arguments);
  for (std::size_t i = 0; i < labels.size(); i++) {
    if (std::find(have.begin(), have.end(), labels[i]) != have.end()) continue;
    t.exec("ALTER TYPE " + name + " ADD VALUE " + pg_literal(labels[i]) + (i ? " AFTER " + pg_literal(labels[i - 1]) : " BEFORE " + pg_literal(have[0])));
  }
  t.exec("ALTER TYPE " + name + " OWNER TO " + pg_identifier(e.owner));
}

void SchemaChange::drop(PgSession& t) {
  make_question(t);
  reset_.clear();
  std::set<std::string> own_entries;
  for (const auto& e : now_)
    if (e.type == "default value" || e.type == "table constraint") own_entries.insert(e.names);
  auto before = shapes(t, own_entries);
  auto attempt = [&](const std::string& sql) {
    t.exec("SAVEPOINT rehome");
    try {
      t.exec(sql);
      t.exec("RELEASE SAVEPOINT rehome");
      return true;
    } catch (const PgError& e) {
      if (t.broken() || pg_is_lock_failure(e.sqlstate)) throw;
      t.exec("ROLLBACK TO SAVEPOINT rehome");
      return false;
    }
  };
  t.exec("SET LOCAL check_function_bodies = off");
  for (const auto& key : gone_) {
    const Copied& c = copied_.at(key);
    // What it was on may be gone too.
    if (!c.undo.empty()) attempt(c.undo);
    if (c.kind == "ACL") reset_rights(t, c.type, c.names, c.arguments);
  }
  std::map<int, const SchemaEntry*> by_id;
  for (const auto& e : now_) by_id[e.id] = &e;
  for (const auto* e : changed_) {
    bool old = copied_.contains(e->key);
    if (e->kind == "ACL") {
      for (int n : e->needs)
        if (by_id.contains(n) && !by_id[n]->type.empty()) reset_rights(t, by_id[n]->type, by_id[n]->names, by_id[n]->arguments);
      continue;
    }
    if (e->type.empty() || !old) continue;
    // A view that needs a primary key is dumped as a stand-in, and as itself when the keys are there.
    if (e->kind == "RULE" && e->tag.ends_with(" _RETURN")) {
      if (!attempt(e->sql)) t.exec("DROP VIEW IF EXISTS " + pg_identifier(e->schema) + "." + pg_identifier(e->tag.substr(0, e->tag.size() - 8)) + " CASCADE");
      continue;
    }
    if (e->kind == "SCHEMA") {
      t.exec("ALTER SCHEMA " + pg_identifier(e->tag) + " OWNER TO " + pg_identifier(e->owner));
      continue;
    }
    // What belongs to it is not taken away, unless its new schema is still to come.
    if (auto schema = e->sql.find(" WITH SCHEMA "); e->kind == "EXTENSION" && schema != std::string::npos &&
                                                    attempt("ALTER EXTENSION " + pg_identifier(e->tag) + " SET SCHEMA " + e->sql.substr(schema + 13)))
      continue;
    if ((e->kind == "FUNCTION" || e->kind == "PROCEDURE") && e->sql.starts_with("CREATE ") && attempt("CREATE OR REPLACE " + e->sql.substr(7))) continue;
    if (e->kind == "TYPE" && e->sql.find(" AS ENUM (") != std::string::npos && there(t, three(e->type, e->names, e->arguments))) {
      extend_enum(t, *e);
      continue;
    }
    const Copied& c = copied_.at(e->key);
    drop_object(t, c.type, c.names, c.arguments);
  }
  for (const auto& key : gone_) {
    const Copied& c = copied_.at(key);
    if (c.kind != "ACL" && !c.type.empty() && !key.ends_with(" _RETURN")) drop_object(t, c.type, c.names, c.arguments);
  }
  for (bool again = true; again;) {
    again = false;
    auto after = shapes(t, own_entries);
    for (const auto& [table, shape] : after) {
      auto was = before.find(table);
      if (was == before.end() || std::includes(shape.begin(), shape.end(), was->second.begin(), was->second.end())) continue;
      t.exec("DROP TABLE IF EXISTS " + table + " CASCADE");
      again = true;
      break;
    }
  }
}

std::set<int> SchemaChange::to_restore(PgSession& t, std::set<int>& foreign_keys) const {
  std::set<int> missing = missing_objects(t, now_), out;
  std::map<int, const SchemaEntry*> by_id;
  std::set<const SchemaEntry*> changed(changed_.begin(), changed_.end());
  for (const auto& e : now_) by_id[e.id] = &e;
  for (const auto& e : now_) {
    bool wanted = missing.contains(e.id), with_key = e.kind == "FK CONSTRAINT";
    if (e.type.empty()) {
      wanted = changed.contains(&e);
      for (int n : e.needs) {
        wanted = wanted || missing.contains(n);
        with_key = with_key || (missing.contains(n) && by_id.contains(n) && by_id[n]->kind == "FK CONSTRAINT");
        wanted = wanted || (e.kind == "ACL" && by_id.contains(n) && reset_.contains(by_id[n]->type + by_id[n]->names + by_id[n]->arguments));
      }
    }
    if (wanted) (with_key ? foreign_keys : out).insert(e.id);
  }
  return out;
}

void SchemaChange::restore(PgSession& t, const SchemaDump& dump, const std::set<int>& ids) {
  // A partition of a table that is there already comes with its own indexes, and is attached when it has them: attached bare
  // it would be given new ones. Where both are new, the dump's order is the one that leaves the parent's index valid.
  std::map<int, const SchemaEntry*> by_id;
  for (const auto& e : now_) by_id[e.id] = &e;
  std::set<int> first, attach, attach_index, rights;
  for (int id : ids) {
    const SchemaEntry& e = *by_id.at(id);
    bool parent_there = false;
    for (int n : e.needs) parent_there = parent_there || (by_id.contains(n) && by_id[n]->kind == "TABLE" && !ids.contains(n));
    if (e.kind == "ACL")
      rights.insert(id);
    else if (e.kind == "TABLE ATTACH" && parent_there)
      attach.insert(id);
    else if (e.kind == "INDEX ATTACH")
      attach_index.insert(id);
    else
      first.insert(id);
  }
  for (const auto* part : {&first, &attach, &attach_index})
    if (!part->empty()) t.exec(dump.script(*part, t));
  // What was made just now got the default rights, which a dump restores last.
  if (t.value("SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_default_acl)") == "t") {
    const std::set<std::string> with_rights{"TABLE", "VIEW", "MATERIALIZED VIEW", "FOREIGN TABLE", "SEQUENCE", "FUNCTION", "PROCEDURE", "AGGREGATE", "TYPE", "DOMAIN", "SCHEMA"};
    t.exec("SET search_path = pg_catalog");
    for (int id : ids)
      if (with_rights.contains(by_id.at(id)->kind)) reset_rights(t, by_id.at(id)->type, by_id.at(id)->names, by_id.at(id)->arguments);
  }
  if (!rights.empty()) t.exec(dump.script(rights, t));
  t.exec("SET search_path = pg_catalog");
}

std::string readable_snapshot(const std::string& text) {
  const auto bounds = split(text, ':');
  const bool crossed = bounds.size() == 3 && std::stoll(bounds[0]) > std::stoll(bounds[1]);
  return crossed ? bounds[0] + ":" + bounds[0] + ":" : text;
}

}  // namespace rehome
