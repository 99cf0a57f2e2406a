#include "stores/postgres/large_objects.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <thread>
#include <tuple>

#include "base/text.h"

namespace rehome {
namespace {

// Of one transaction: each object takes a place in the lock table, and each page's hash some hundred bytes here.
constexpr std::size_t kObjects = 500;
constexpr std::size_t kPages = 32768;
constexpr std::size_t kFetched = 5000;

struct Changed {
  std::int64_t oid = 0, pages = 0;
  bool make = false, rights = false, content = false;
};

struct Page {
  std::int64_t oid = 0, number = 0;
  std::string hash;
  auto place() const { return std::tie(oid, number); }
};

void both(const std::function<void()>& one, const std::function<void()>& other) {
  std::optional<Error> failure;
  {
    std::jthread beside([&] {
      try {
        other();
      } catch (const Error& e) {
        failure = e;
      }
    });
    one();
  }
  if (failure) throw *failure;
}

std::string array(const std::vector<std::int64_t>& numbers, const char* type) {
  std::string out = "'{";
  for (std::size_t i = 0; i < numbers.size(); i++) out += (i ? "," : "") + std::to_string(numbers[i]);
  return out + "}'::" + type + "[]";
}

std::string oids(const std::vector<std::int64_t>& all) { return array(all, "oid"); }

// One side's objects in the order of their oids, read as they are asked for.
class Objects {
 public:
  Objects(PgSession& s, Deadline deadline) : session_(s), deadline_(deadline) {
    s.exec("BEGIN; DECLARE rehome_objects NO SCROLL CURSOR FOR SELECT m.oid, pg_get_userbyid(m.lomowner) || ' ' || " + large_object_rights() +
               ", coalesce(l.pages, 0), coalesce(l.hash, 0) FROM pg_catalog.pg_largeobject_metadata m LEFT JOIN (SELECT loid, count(*) AS pages, "
               "sum(hashtextextended(encode(data, 'hex'), pageno)) AS hash FROM pg_catalog.pg_largeobject GROUP BY loid) l ON l.loid = m.oid ORDER BY m.oid",
           deadline);
    fetch();
  }
  // Null at the end.
  const PgRow* peek() {
    if (at_ == rows_.size() && !rows_.empty()) fetch();
    return rows_.empty() ? nullptr : &rows_[at_];
  }
  std::int64_t oid() { return peek() ? std::stoll(*(*peek())[0]) : std::numeric_limits<std::int64_t>::max(); }
  void next() { at_++; }

 private:
  void fetch() {
    rows_ = session_.query("FETCH " + std::to_string(kFetched) + " FROM rehome_objects", deadline_);
    at_ = 0;
  }
  PgSession& session_;
  Deadline deadline_;
  std::vector<PgRow> rows_;
  std::size_t at_ = 0;
};

void find_changed(PgSession& from, PgSession& to, Deadline deadline, std::vector<Changed>& changed, std::vector<std::int64_t>& gone) {
  std::optional<Objects> here, there;
  // The first row needs the hash of every page.
  both([&] { here.emplace(from, deadline); }, [&] { there.emplace(to, deadline); });
  while (here->peek() || there->peek()) {
    if (there->oid() < here->oid()) {
      gone.push_back(there->oid());
      there->next();
      continue;
    }
    const PgRow& a = *here->peek();
    Changed c{.oid = here->oid(), .pages = std::stoll(*a[2])};
    if (there->oid() == c.oid) {
      const PgRow& b = *there->peek();
      c.pages = std::max(c.pages, static_cast<std::int64_t>(std::stoll(*b[2])));
      c.rights = a[1] != b[1];
      c.content = a[2] != b[2] || a[3] != b[3];
      there->next();
    } else {
      c.make = c.rights = c.content = true;
    }
    if (c.rights || c.content) changed.push_back(c);
    here->next();
  }
  from.exec("COMMIT", deadline);
  to.exec("COMMIT", deadline);
}

void bring_rights(PgSession& from, PgSession& to, const std::vector<std::int64_t>& objects, Deadline deadline) {
  std::string sql;
  std::vector<std::int64_t> with_rights;
  for (auto& r : from.query("SELECT oid, quote_ident(pg_get_userbyid(lomowner)), lomacl IS NOT NULL FROM pg_catalog.pg_largeobject_metadata WHERE oid = ANY (" + oids(objects) + ")", deadline)) {
    sql += "ALTER LARGE OBJECT " + *r[0] + " OWNER TO " + *r[1] + "; ";
    if (*r[2] == "t") with_rights.push_back(std::stoll(*r[0]));
  }
  to.exec(sql, deadline);
  // All is taken from everybody, the owner too, and then given as it is at the other side.
  const std::string holder = "CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END";
  const std::string each = " FROM pg_catalog.pg_largeobject_metadata m, aclexplode(coalesce(m.lomacl, acldefault('L', m.lomowner))) x WHERE m.oid = ANY (";
  std::set<std::int64_t> again(with_rights.begin(), with_rights.end());
  sql.clear();
  for (auto& r : to.query("SELECT DISTINCT m.oid, " + holder + each + oids(objects) + ") AND (m.lomacl IS NOT NULL OR m.oid = ANY (" + oids(with_rights) + "))", deadline)) {
    sql += "REVOKE ALL ON LARGE OBJECT " + *r[0] + " FROM " + *r[1] + " CASCADE; ";
    again.insert(std::stoll(*r[0]));
  }
  if (again.empty()) return;
  for (auto& r : from.query("SELECT m.oid, x.privilege_type, " + holder + ", x.is_grantable" + each + oids({again.begin(), again.end()}) + ")", deadline))
    sql += "GRANT " + *r[1] + " ON LARGE OBJECT " + *r[0] + " TO " + *r[2] + (*r[3] == "t" ? " WITH GRANT OPTION; " : "; ");
  to.exec(sql, deadline);
}

// The pages of these objects behind `after` in order; of one object no more than kPages.
std::vector<Page> pages(PgSession& s, const std::vector<std::int64_t>& objects, std::int64_t after, Deadline deadline) {
  std::string page = "SELECT loid, pageno, hashtextextended(encode(data, 'hex'), pageno) AS hash FROM pg_catalog.pg_largeobject WHERE loid = ";
  std::string sql = objects.size() == 1 ? page + std::to_string(objects[0]) + " AND pageno > " + std::to_string(after) + " ORDER BY loid, pageno LIMIT " + std::to_string(kPages)
                                        : "SELECT l.* FROM unnest(" + oids(objects) + ") o, LATERAL (" + page + "o OFFSET 0) l ORDER BY loid, pageno";
  std::vector<Page> all;
  for (auto& r : s.query(sql, deadline)) all.push_back({std::stoll(*r[0]), std::stoll(*r[1]), *r[2]});
  return all;
}

// The rows of these pages, found by the index whatever the planner knows of the table: neighbours together.
std::string rows_of(const std::vector<Page>& list, const char* columns) {
  std::vector<std::int64_t> object, first, last;
  for (const auto& p : list) {
    if (!object.empty() && object.back() == p.oid && last.back() + 1 == p.number) {
      last.back() = p.number;
      continue;
    }
    object.push_back(p.oid);
    first.push_back(p.number);
    last.push_back(p.number);
  }
  return std::string("SELECT l.* FROM unnest(") + oids(object) + ", " + array(first, "int") + ", " + array(last, "int") + ") x(o, a, b), LATERAL (SELECT " + columns +
         " FROM pg_catalog.pg_largeobject WHERE loid = x.o AND pageno BETWEEN x.a AND x.b OFFSET 0) l";
}

// In a transaction of `to`, which it commits between the parts of a large object. Returns how many pages were brought.
std::int64_t bring_content(PgSession& from, PgSession& to, const std::vector<std::int64_t>& objects, Deadline deadline, const std::function<void(std::int64_t)>& moved) {
  std::int64_t brought = 0;
  for (std::int64_t after = -1;;) {
    std::vector<Page> here, there;
    both([&] { here = pages(from, objects, after, deadline); }, [&] { there = pages(to, objects, after, deadline); });
    std::int64_t end = std::numeric_limits<std::int64_t>::max();
    if (objects.size() == 1)
      for (const auto* side : {&here, &there})
        if (side->size() == kPages) end = std::min(end, side->back().number);
    std::vector<Page> bring, remove;
    for (auto a = here.begin(), b = there.begin();;) {
      bool left = a != here.end() && a->number <= end, right = b != there.end() && b->number <= end;
      if (!left && !right) break;
      if (left && right && a->place() == b->place()) {
        if (a->hash != b->hash) {
          bring.push_back(*a);
          remove.push_back(*b);
        }
        a++, b++;
      } else if (left && (!right || a->place() < b->place())) {
        bring.push_back(*a++);
      } else {
        remove.push_back(*b++);
      }
    }
    if (!remove.empty()) to.exec("DELETE FROM pg_catalog.pg_largeobject WHERE ctid = ANY (ARRAY(" + rows_of(remove, "ctid") + "))", deadline);
    if (!bring.empty())
      from.copy_to("COPY (" + rows_of(bring, "loid, pageno, data") + ") TO STDOUT (FORMAT binary)", to, "COPY pg_catalog.pg_largeobject(loid, pageno, data) FROM STDIN (FORMAT binary)", moved);
    brought += static_cast<std::int64_t>(bring.size());
    if (end == std::numeric_limits<std::int64_t>::max()) return brought;
    to.exec("COMMIT; BEGIN", deadline);
    after = end;
  }
}

}  // namespace

std::string large_object_rights() {
  return "CASE WHEN m.lomacl IS NULL OR m.lomacl = acldefault('L', m.lomowner) THEN '' ELSE 'rights ' || coalesce((SELECT string_agg(DISTINCT concat_ws(' ', "
         "CASE x.grantee WHEN 0 THEN 'public' ELSE quote_ident(pg_get_userbyid(x.grantee)) END, x.privilege_type, x.is_grantable) COLLATE \"C\", ', ') FROM aclexplode(m.lomacl) x), '') END";
}

std::string large_object_bytes() { return "((pg_relation_size('pg_catalog.pg_largeobject_loid_pn_index') - 8192) / 22 * (current_setting('block_size')::int / 4))"; }

LargeObjectsCarried carry_large_objects(PgSession& from, PgSession& to, Deadline deadline, const std::function<void(std::int64_t)>& moved) {
  const char* any = "SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_largeobject_metadata)";
  if (from.value(any, deadline) != "t" && to.value(any, deadline) != "t") return {};
  std::string block = from.value("SHOW block_size", deadline), block_there = to.value("SHOW block_size", deadline);
  if (block != block_there)
    throw Error(Code::store, "large objects cannot be carried between servers that are built with blocks of " + block + " and of " + block_there + " bytes", "take a server with the same block_size");
  auto heard = [&](std::int64_t bytes) {
    if (deadline.passed()) throw Error(Code::timeout, to.address().label + ": large objects took too long", "raise max_pause", true);
    if (moved) moved(bytes);
  };
  LargeObjectsCarried carried;
  std::vector<Changed> changed;
  std::vector<std::int64_t> gone;
  try {
    find_changed(from, to, deadline, changed, gone);
    for (std::size_t i = 0; i < changed.size();) {
      std::vector<std::int64_t> make, rights, content;
      std::int64_t size = 0;
      for (std::size_t n = 0; i < changed.size() && n < kObjects; i++, n++) {
        const Changed& c = changed[i];
        if (n > 0 && size + c.pages > static_cast<std::int64_t>(kPages)) break;
        size += c.pages;
        if (c.make) make.push_back(c.oid);
        if (c.rights) rights.push_back(c.oid);
        if (c.content) content.push_back(c.oid);
        carried.objects++;
      }
      to.exec("BEGIN", deadline);
      if (!make.empty()) to.exec("SELECT lo_create(o) FROM unnest(" + oids(make) + ") o", deadline);
      if (!rights.empty()) bring_rights(from, to, rights, deadline);
      if (!content.empty()) carried.pages += bring_content(from, to, content, deadline, heard);
      to.exec("COMMIT", deadline);
    }
    for (std::size_t i = 0; i < gone.size(); i += kObjects) {
      std::vector<std::int64_t> some(gone.begin() + static_cast<std::ptrdiff_t>(i), gone.begin() + static_cast<std::ptrdiff_t>(std::min(gone.size(), i + kObjects)));
      to.exec("SELECT lo_unlink(o) FROM unnest(" + oids(some) + ") o", deadline);
      carried.objects += static_cast<std::int64_t>(some.size());
    }
  } catch (const Error&) {
    for (PgSession* s : {&from, &to})
      if (!s->broken()) s->exec("ROLLBACK");
    throw;
  }
  return carried;
}

}  // namespace rehome
