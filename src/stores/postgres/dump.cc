#include "stores/postgres/dump.h"

#include <dirent.h>
#include <xxhash.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "base/text.h"
#include "stores/postgres/lock.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

constexpr std::chrono::hours kPatience(1);

// Prints "MAJOR DIRECTORY" for each pair of programs that runs. As one shell script, since a site runs the same.
const char* const kSearch =
    "for d in '' /usr/lib/postgresql/*/bin/ /usr/pgsql-*/bin/ /usr/local/pgsql/bin/; do "
    "v=$(\"${d}pg_dump\" --version 2>/dev/null) || continue; \"${d}pg_restore\" --version >/dev/null 2>&1 || continue; "
    "v=${v##*\\) }; echo \"${v%%[!0-9]*} $d\"; done";

std::string hash_of(const std::string& text) {
  char hex[33];
  XXH128_hash_t h = XXH3_128bits(text.data(), text.size());
  std::snprintf(hex, sizeof hex, "%016llx%016llx", static_cast<unsigned long long>(h.high64), static_cast<unsigned long long>(h.low64));
  return hex;
}

// "-- TOC entry 215 (class 1259 OID 16385)"; false for any other line.
bool header(const std::string& line, int& id, std::int64_t& class_oid, std::int64_t& oid) {
  long long a = 0, b = 0;
  int end = 0;
  if (std::sscanf(line.c_str(), "-- TOC entry %d (class %lld OID %lld)%n", &id, &a, &b, &end) != 3 || static_cast<std::size_t>(end) != line.size()) return false;
  class_oid = a;
  oid = b;
  return true;
}

bool is_ours(const SchemaEntry& e) {
  return (e.kind == "TRIGGER" && (e.tag.ends_with(" rehome_fence") || e.tag.ends_with(" rehome_fence_t"))) ||
         ((e.kind == "EVENT TRIGGER" || e.kind == "SCHEMA") && (e.tag == "rehome" || e.tag.starts_with("rehome_")));
}

}  // namespace

std::set<int> of_foreign_keys(const std::vector<SchemaEntry>& entries) {
  std::set<int> keys, all;
  for (const auto& e : entries)
    if (e.kind == "FK CONSTRAINT") keys.insert(e.id);
  for (const auto& e : entries)
    if (keys.contains(e.id) || std::any_of(e.needs.begin(), e.needs.end(), [&](int n) { return keys.contains(n); })) all.insert(e.id);
  return all;
}

std::string PgPrograms::says() const {
  return "pg_dump " + std::to_string(major) + (directory.empty() ? "" : " in " + directory) + " on " + (site ? "the " + std::string(side_name(*site)) : "this machine");
}

std::vector<PgPrograms> find_pg_programs(StoreContext& c, std::optional<Side> where) {
  Command command{.argv = {"sh", "-c", kSearch}};
  Outcome o = where ? c.at(*where).exec(command) : run(command, Deadline::in(Millis(30000)));
  std::vector<PgPrograms> found;
  for (const auto& line : split(o.out, '\n')) {
    auto blank = line.find(' ');
    if (blank == std::string::npos) continue;
    int major = std::atoi(line.c_str());
    if (major > 0) found.push_back({.major = major, .directory = line.substr(blank + 1), .site = where});
  }
  std::stable_sort(found.begin(), found.end(), [](const PgPrograms& a, const PgPrograms& b) { return a.major < b.major; });
  return found;
}

PgPrograms choose_pg_programs(StoreContext& c, int major) {
  // Of the sites the target first: the source has other work.
  for (std::optional<Side> where : {std::optional<Side>(), std::optional<Side>(Side::target), std::optional<Side>(Side::source)})
    for (const auto& p : find_pg_programs(c, where))
      if (p.major >= major) return p;
  return {};
}

SchemaDump::SchemaDump(StoreContext& c, PostgresStore& store, const PgPrograms& programs, Side side, const std::string& database, const std::string& snapshot,
                       const std::vector<std::string>& options)
    : c_(c), programs_(programs) {
  PgAddress a = store.address(c, side, database);
  if (programs.site) {
    if (*programs.site == side) {
      // There the server is reached as that site sees it, by the account whose name it trusts.
      const PostgresServer& server = store.server(side);
      a.host = server.host;
      a.port = server.port;
      user_ = server.os_user;
    } else {
      // The way that the followers go: a socket there that leads to the other server.
      a.host = store.socket_directory(c, *programs.site);
      a.port = 5432;
    }
  }
  directory_ = std::string(trim(run_there({"mktemp", "-d", store.dump_place() + ".XXXXXX"}, {}, "mktemp")));
  std::vector<std::pair<std::string, std::string>> env{{"PGHOST", a.host}, {"PGPORT", std::to_string(a.port)}, {"PGUSER", a.user}, {"PGDATABASE", a.database}, {"PGAPPNAME", "rehome copy"}};
  if (!a.password.empty()) env.emplace_back("PGPASSWORD", a.password);
  // pg_dump says no SQLSTATE: its words are the server's, and must be the ones that are looked for.
  env.emplace_back("PGOPTIONS", "-c lc_messages=C");
  // All names quoted: what is a reserved word is the other side's to say, and it may be newer.
  std::vector<std::string> argv{programs.directory + "pg_dump", "-Fc", "--quote-all-identifiers", "--exclude-schema=rehome", "--lock-wait-timeout=100", "--no-publications", "--no-subscriptions", "-f", directory_ + "/dump"};
  argv.insert(argv.end(), options.begin(), options.end());
  if (!snapshot.empty()) argv.push_back("--snapshot=" + snapshot);
  try {
    // It holds the locks that it has while it waits for more, and others wait for it: never for long.
    for (Deadline deadline = Deadline::in(kPatience);; pg_random_wait(Millis(100))) {
      try {
        run_there(argv, env, "pg_dump");
        break;
      } catch (const Error& e) {
        if (e.message.find("canceling statement due to statement timeout") == std::string::npos) throw;
        if (c.cancelled) throw Error(Code::interrupted, "stopped while pg_dump waits for locks in " + database);
        if (deadline.passed())
          throw Error(Code::timeout, a.label + ": pg_dump cannot lock all tables, which it does not let others wait for: " + who_locks(*store.session(c, side, database), 0), "let that session end, then resume", true);
      }
    }
    // -v writes each entry's number, which is what tells entries apart; the text between them is never interpreted.
    parse(restore({"-v"}), restore({"-l"}));
  } catch (...) {
    run_there({"rm", "-rf", directory_}, {}, "rm");
    throw;
  }
}

SchemaDump::~SchemaDump() {
  try {
    run_there({"rm", "-rf", directory_}, {}, "rm");
  } catch (const Error&) {
    // A site that is away keeps a directory of a few kilobytes.
  }
}

std::string SchemaDump::run_there(const std::vector<std::string>& argv, const std::vector<std::pair<std::string, std::string>>& env, const char* what) const {
  Command command{.argv = argv, .env = env};
  if (!programs_.site) return run_ok(command, Deadline::in(kPatience), what).out;
  command.user = user_;
  return c_.at(*programs_.site).exec_ok(command, Deadline::in(kPatience), what).out;
}

std::string SchemaDump::restore(const std::vector<std::string>& arguments) const {
  // By way of a file: a captured output has a limit of size.
  std::vector<std::string> argv{programs_.directory + "pg_restore", "-f", directory_ + "/out"};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  argv.push_back(directory_ + "/dump");
  run_there(argv, {}, "pg_restore");
  if (!programs_.site) return read_file(directory_ + "/out");
  std::string all;
  constexpr std::size_t piece = 4 << 20;
  for (std::size_t i = 0;; i++) {
    std::string part = run_there({"dd", "if=" + directory_ + "/out", "bs=" + std::to_string(piece), "skip=" + std::to_string(i), "count=1", "status=none"}, {}, "dd");
    all += part;
    if (part.size() < piece) return all;
  }
}

void SchemaDump::parse(const std::string& script, const std::string& list) {
  std::map<int, std::pair<std::int64_t, std::int64_t>> known;
  std::map<int, std::size_t> order;
  for (const auto& line : split(list, '\n')) {
    int id = 0;
    long long a = 0, b = 0;
    if (std::sscanf(line.c_str(), "%d; %lld %lld ", &id, &a, &b) != 3) continue;
    known[id] = {a, b};
    order.emplace(id, order.size());
  }
  std::set<int> seen;
  SchemaEntry* entry = nullptr;
  std::string before;
  bool naming = false;
  for (auto& line : split(script, '\n')) {
    int id = 0;
    std::int64_t class_oid = 0, oid = 0;
    // A function's body may hold such a line: the number must be one that is expected, with its oids, once.
    if (before == "--" && header(line, id, class_oid, oid) && known.contains(id) && known[id] == std::pair(class_oid, oid) && seen.insert(id).second) {
      entries_.emplace_back();
      entry = &entries_.back();
      entry->id = id;
      entry->class_oid = class_oid;
      entry->oid = oid;
      naming = true;
    } else if (entry && naming && line.starts_with("-- Dependencies: ")) {
      for (const auto& n : split(line.substr(17), ' '))
        if (!n.empty()) entry->needs.push_back(std::atoi(n.c_str()));
    } else if (entry && naming && line.starts_with("-- Name: ")) {
      auto owner = line.rfind("; Owner: "), schema = line.rfind("; Schema: ", owner), kind = line.rfind("; Type: ", schema);
      if (owner == std::string::npos || schema == std::string::npos || kind == std::string::npos) throw Error(Code::store, "pg_restore wrote an entry that rehome does not know: " + line.substr(0, 120));
      entry->tag = line.substr(9, kind - 9);
      entry->kind = line.substr(kind + 8, schema - kind - 8);
      entry->schema = line.substr(schema + 10, owner - schema - 10);
      entry->owner = line.substr(owner + 9);
      if (auto space = entry->owner.rfind("; Tablespace: "); space != std::string::npos) entry->owner.resize(space);
      naming = false;
    } else if (entry && !naming) {
      entry->sql += line + "\n";
    }
    before = line;
  }
  std::erase_if(entries_, is_ours);
  std::map<std::string, int> keys;
  for (auto& e : entries_) {
    // Settings for the entries that follow stand at the end, and the next one's comment begins with "--".
    std::vector<std::string> kept, hashed;
    auto lines = split(e.sql, '\n');
    auto idle = [](const std::string& l) { return l.empty() || l == "--" || l.starts_with("SET default_") || l.starts_with("\\unrestrict ") || l.starts_with("-- Completed on ") || l.starts_with("-- PostgreSQL database dump complete"); };
    while (!lines.empty() && idle(lines.back())) lines.pop_back();
    while (!lines.empty() && idle(lines.front())) lines.erase(lines.begin());
    for (auto& l : lines) {
      kept.push_back(l);
      // Ours, for the run, on a table without a key.
      if (!(l.starts_with("ALTER TABLE ONLY ") && l.find(" REPLICA IDENTITY ") != std::string::npos)) hashed.push_back(l);
    }
    while (!hashed.empty() && hashed.back().empty()) hashed.pop_back();
    e.sql = join(kept, "\n");
    e.key = e.kind + "\t" + e.schema + "\t" + e.tag + (e.kind == "DEFAULT ACL" ? "\t" + e.owner : "");
    if (int n = keys[e.key]++) e.key += "\t" + std::to_string(n);
    e.hash = hash_of(join(hashed, "\n") + "\n" + e.owner + (e.kind == "TABLE" ? std::to_string(e.oid) : ""));
  }
  std::stable_sort(entries_.begin(), entries_.end(), [&](const SchemaEntry& a, const SchemaEntry& b) { return order[a.id] < order[b.id]; });
}

std::string SchemaDump::list(const std::set<int>& ids) const {
  std::string text;
  for (const auto& e : entries_)
    if (ids.contains(e.id)) text += std::to_string(e.id) + ";\n";
  return text;
}

std::string SchemaDump::archive() const { return programs_.site ? "" : directory_ + "/dump"; }

std::string SchemaDump::script(const std::set<int>& ids, PgSession& at) const {
  if (ids.empty()) return {};
  std::string file = directory_ + "/list";
  if (programs_.site)
    c_.at(*programs_.site).exec_ok({.argv = {"sh", "-c", "cat > \"$1\"", "sh", file}, .input = list(ids), .user = user_}, Deadline::in(Millis(60000)), "writing a list");
  else
    write_durably(file, list(ids));
  std::set<std::string> settings;
  for (auto& r : at.query("SELECT name FROM pg_catalog.pg_settings")) settings.insert(*r[0]);
  std::string out;
  bool preamble = true;
  auto lines = split(restore({"-L", file}), '\n');
  for (std::size_t i = 0; i < lines.size(); i++) {
    const std::string& l = lines[i];
    if (preamble && (l.starts_with("-- Name: ") || l.starts_with("CREATE ") || l.starts_with("ALTER "))) preamble = false;
    // psql's own words around the whole, in pg_restore of late 2025.
    if ((preamble && l.starts_with("\\restrict ")) || (i + 3 >= lines.size() && l.starts_with("\\unrestrict "))) continue;
    if (preamble && l.starts_with("SET ") && !settings.contains(l.substr(4, l.find(' ', 4) - 4))) continue;
    out += l + "\n";
  }
  return out;
}

}  // namespace rehome
