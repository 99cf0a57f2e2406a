#include "stores/postgres/testing/life.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "base/text.h"
#include "sys/process.h"

namespace rehome::testing {

static std::string dump(const PgServer& server, const std::string& database) {
  Outcome o = run_ok({.argv = {"pg_dump", "-N", "rehome", "--no-publications", "--no-subscriptions", "-d", server.conninfo(database)}}, Deadline::in(Millis(60000)), "pg_dump");
  std::vector<std::string> lines;
  for (auto& line : split(o.out, '\n')) {
    if (trim(line).empty() || line.starts_with("--") || line.starts_with("\\restrict") || line.starts_with("\\unrestrict") || line.find("rehome") != std::string::npos) continue;
    if (line.find("setval") != std::string::npos) continue;
    if (line.find("SET transaction_timeout") != std::string::npos) continue;
    // The rights that the side which refuses has taken from everybody.
    if (line.starts_with("REVOKE ALL ON FUNCTION pg_catalog.lo")) continue;
    lines.push_back(line);
  }
  // Rows come in heap order, which is not the same on both sides: compared as a set of lines.
  std::sort(lines.begin(), lines.end());
  return join(lines, "\n");
}

// The same question in SQL, for servers that are newer than this machine's pg_dump.
static std::string describe(const PgServer& server, const std::string& database) {
  auto s = server.session(database);
  s->exec("SET quote_all_identifiers = on");   // a word that is reserved in one major only
  const char* ours = " n.nspname NOT IN ('pg_catalog', 'information_schema', 'rehome') AND n.nspname NOT LIKE 'pg\\_toast%' ";
  std::vector<std::string> lines;
  auto add = [&](const std::string& sql) {
    for (auto& r : s->query(sql)) {
      std::string line;
      for (auto& v : r) line += v.value_or("NULL") + " | ";
      lines.push_back(line);
    }
  };
  for (auto& r : s->query(std::string("SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'm') AND ") + ours))
    add("SELECT " + pg_literal(*r[0]) + ", count(*), md5(string_agg(t::text, '\n' ORDER BY t::text COLLATE \"C\")) FROM ONLY " + *r[0] + " t");
  add(std::string("SELECT n.nspname, c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated, pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid "
                  "JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'p', 'v', 'm') AND ") + ours);
  add(std::string("SELECT pg_get_indexdef(i.indexrelid), i.indisvalid FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE ") + ours);
  add(std::string("SELECT n.nspname, k.conname, pg_get_constraintdef(k.oid), k.convalidated FROM pg_constraint k JOIN pg_namespace n ON n.oid = k.connamespace WHERE k.contype <> 'n' AND ") + ours);
  add(std::string("SELECT pg_get_triggerdef(t.oid), t.tgenabled FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace WHERE NOT t.tgisinternal AND t.tgname NOT LIKE 'rehome%' AND ") + ours);
  add(std::string("SELECT n.nspname, c.relname, c.relkind, pg_get_userbyid(c.relowner), (SELECT string_agg(replace(x::text, 'arwdDxtm', 'arwdDxt'), ',' ORDER BY x::text COLLATE \"C\") FROM unnest(coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", c.relowner))) x) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S') AND ") + ours);
  std::sort(lines.begin(), lines.end());
  return join(lines, "\n");
}

static std::string diff(const std::string& a, const std::string& b) {
  auto x = split(a, '\n'), y = split(b, '\n');
  std::vector<std::string> only_a, only_b;
  std::set_difference(x.begin(), x.end(), y.begin(), y.end(), std::back_inserter(only_a));
  std::set_difference(y.begin(), y.end(), x.begin(), x.end(), std::back_inserter(only_b));
  if (only_a.size() > 8) only_a.resize(8);
  if (only_b.size() > 8) only_b.resize(8);
  if (only_a.empty() && only_b.empty() && x.size() == y.size()) return {};
  return "only source:\n" + join(only_a, "\n") + "\nonly target:\n" + join(only_b, "\n");
}

static LocalSite& at(World& w, Side side) { return side == Side::source ? w.source : w.target; }

std::unique_ptr<PgSession> shop_with(const PgServer& server, const std::string& sql) {
  server.session("postgres")->exec("CREATE DATABASE shop");
  auto s = server.session("shop");
  s->exec(sql);
  return s;
}

Shop::Shop(const std::string& sql, int from, int to)
    : source(from), target(to), s(shop_with(source, sql)), w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"})),
      store(w.deployment.stores[0], w.deployment) {}

void wait_until_following(World& w, PostgresStore& store) {
  Deadline deadline = Deadline::in(Millis(60000));
  while (true) {
    FollowStatus s = store.follow_status(w.context());
    if (s.following && s.trouble.empty() && s.lag_bytes < 1'000'000) return;
    if (deadline.passed()) FAIL() << s.trouble << " " << s.lag_bytes;
    system_clock().sleep(Millis(20));
  }
}

void begin(World& w, PostgresStore& store) {
  store.prepare(w.context());
  store.copy(w.context());
  store.follow(w.context());
  wait_until_following(w, store);
}

double switch_over(World& w, PostgresStore& store, Direction d, const std::function<void()>& opened, const std::function<void()>& fenced) {
  store.prepare_reverse(w.context(), d);
  ActionSets sets = store.actions(w.context(), d);
  auto cut = store.open_cut(w.context(), d);
  Deadline deadline = Deadline::in(Millis(20000));
  Ticks from = system_clock().now();
  cut->soft_fence(deadline);
  cut->marker(deadline);
  cut->catch_up(deadline);
  cut->compare(deadline);
  cut->arm_reverse(deadline);
  cut->hard_fence(deadline);
  double ms = ms_between(from, system_clock().now());
  Json timings = cut->timings();
  if (fenced) fenced();
  at(w, d.takes()).run_actions(sets.open);
  if (opened) opened();
  cut.reset();
  at(w, d.takes()).run_actions(sets.tail_takes);
  at(w, d.yields).run_actions(sets.tail_yields);
  std::printf("  cut %s: %.1f ms %s\n", d.yields == Side::source ? "forward" : "back", ms, timings.dump().c_str());
  return ms;
}

void refused_under_the_fence(World& w, PostgresStore& store, const std::function<void()>& change, const std::string& said) {
  store.prepare_reverse(w.context(), {Side::source});
  auto cut = store.open_cut(w.context(), {Side::source});
  change();
  Deadline deadline = Deadline::in(Millis(10000));
  cut->soft_fence(deadline);
  cut->marker(deadline);
  cut->catch_up(deadline);
  try {
    cut->compare(deadline);
    ADD_FAILURE() << "was not refused: " << said;
  } catch (const Error& e) {
    EXPECT_NE(e.message.find(said), std::string::npos) << e.message;
  }
  cut->release();
}

void quiesced_equal(const PgServer& a, const PgServer& b, const std::string& database) {
  Deadline deadline = Deadline::in(Millis(20000));
  std::string d;
  bool dumped = a.major() <= 15 && b.major() <= 15;
  auto look = [&](const PgServer& s) { return dumped ? dump(s, database) : describe(s, database); };
  while (!(d = diff(look(a), look(b))).empty() && !deadline.passed()) system_clock().sleep(Millis(100));
  EXPECT_EQ(d, "");
}

// What a schema may hold beside plain tables; every row of it must arrive.
static const char* const kVariety = R"(
  CREATE EXTENSION IF NOT EXISTS pgcrypto;
  CREATE ROLE %role% LOGIN PASSWORD 'not a secret';
  CREATE SCHEMA stock AUTHORIZATION %role%;
  CREATE TYPE stock.color AS ENUM ('red', 'green');
  CREATE DOMAIN stock.positive AS int CHECK (VALUE > 0);
  CREATE TABLE stock.part(id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, c stock.color DEFAULT 'red', n stock.positive, twice int GENERATED ALWAYS AS (n * 2) STORED,
    doc jsonb, tags text[], at timestamptz DEFAULT '2026-01-01 00:00:00+00', price numeric(10,2), f float8, b bytea, "odd ""name" text);
  INSERT INTO stock.part(n, c, doc, tags, price, f, b, "odd ""name") SELECT i, 'green', jsonb_build_object('i', i, 't', E'a\tb\nc\\'), ARRAY['x', NULL, 'y"z'], i * 1.25,
    1.0 / i, decode(md5(i::text), 'hex'), CASE WHEN i % 7 = 0 THEN NULL ELSE E'\\N' END FROM generate_series(1, 500) i;
  CREATE INDEX ON stock.part USING gin (doc);
  CREATE UNIQUE INDEX part_upper ON stock.part (upper(tags[1]), id) WHERE n > 3;
  CREATE TABLE stock.use(part int REFERENCES stock.part ON DELETE CASCADE, what text, EXCLUDE USING btree (part WITH =));
  INSERT INTO stock.use SELECT i, 'u' || i FROM generate_series(1, 100) i;
  CREATE TABLE stock.event(at date NOT NULL, id bigint NOT NULL, body text, PRIMARY KEY (at, id)) PARTITION BY RANGE (at);
  CREATE TABLE stock.event_1 PARTITION OF stock.event FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
  CREATE TABLE stock.event_2 PARTITION OF stock.event FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
  INSERT INTO stock.event SELECT date '2026-01-01' + (i % 50), i, 'e' || i FROM generate_series(1, 300) i;
  CREATE INDEX ON stock.event (body);
  CREATE TABLE stock.empty();
  CREATE TABLE stock.base(id int PRIMARY KEY); CREATE TABLE stock.child(extra text) INHERITS (stock.base);
  INSERT INTO stock.base VALUES (1); INSERT INTO stock.child VALUES (2, 'c');
  CREATE UNLOGGED TABLE stock.cache(k text PRIMARY KEY, v text); INSERT INTO stock.cache VALUES ('a', '1');
  CREATE VIEW stock.v AS SELECT p.id, p.doc, count(*) FROM stock.part p JOIN stock.use u ON u.part = p.id GROUP BY p.id;
  CREATE MATERIALIZED VIEW stock.mv AS SELECT c, count(*) AS n FROM stock.part GROUP BY c; CREATE UNIQUE INDEX ON stock.mv (c);
  CREATE FUNCTION stock.touch() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN NEW.what := coalesce(NEW.what, '; -- ''not'' a comment'); RETURN NEW; END $body$;
  CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON stock.use FOR EACH ROW EXECUTE FUNCTION stock.touch();
  CREATE RULE quiet AS ON DELETE TO stock.cache DO ALSO NOTHING;
  ALTER TABLE stock.base ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON stock.base USING (id > 0);
  CREATE TABLE stock.tenant("system_user" int PRIMARY KEY, "select" text); INSERT INTO stock.tenant VALUES (1, 'x'); CREATE SEQUENCE stock."system_user";
  ALTER TABLE stock.tenant OWNER TO %role%; ALTER TABLE stock.tenant ENABLE ROW LEVEL SECURITY; ALTER TABLE stock.tenant FORCE ROW LEVEL SECURITY;
  GRANT SELECT ON stock.part TO %role%; ALTER TABLE stock.use OWNER TO %role%;
  ALTER DEFAULT PRIVILEGES IN SCHEMA stock GRANT SELECT ON TABLES TO %role%;
  COMMENT ON TABLE stock.part IS 'it''s; a part'; CREATE STATISTICS stock.st (dependencies) ON c, n FROM stock.part;
  CREATE SEQUENCE stock.down INCREMENT -2 MAXVALUE 1000 START 100; SELECT nextval('stock.down');
  CREATE SEQUENCE stock.fresh START 42;
  SELECT lo_from_bytea(424242, 'first large object'); SELECT lo_from_bytea(0, decode(repeat('ab', 5000), 'hex'));
  ALTER LARGE OBJECT 424242 OWNER TO %role%;
)";

std::string variety(const std::string& role) {
  std::string sql = kVariety;
  for (std::size_t at; (at = sql.find("%role%")) != std::string::npos;) sql.replace(at, 6, role);
  return sql;
}

std::string large_objects(const PgServer& server) {
  return server.session("shop")->value("SELECT string_agg(m.oid || ' ' || pg_get_userbyid(lomowner) || ' ' || md5(lo_get(m.oid)), ', ' ORDER BY m.oid) FROM pg_largeobject_metadata m");
}

std::vector<std::string> sequences(const PgServer& server, const std::string& database) {
  auto s = server.session(database);
  std::vector<std::string> all;
  for (auto& r : s->query("SELECT quote_ident(schemaname) || '.' || quote_ident(sequencename) FROM pg_sequences WHERE schemaname <> 'rehome' ORDER BY 1"))
    all.push_back(*r[0] + " " + s->value("SELECT last_value || CASE WHEN is_called THEN ' called' ELSE '' END FROM " + *r[0]));
  return all;
}

void sequences_cover(const PgServer& a, const PgServer& b) {
  auto read = [](const PgServer& server) {
    auto s = server.session("shop");
    std::map<std::string, std::pair<std::int64_t, std::int64_t>> all;
    for (auto& r : s->query("SELECT '\"' || replace(schemaname, '\"', '\"\"') || '\".\"' || replace(sequencename, '\"', '\"\"') || '\"', increment_by FROM pg_sequences WHERE schemaname <> 'rehome'"))
      all[*r[0]] = {s->number("SELECT last_value + CASE WHEN is_called THEN " + *r[1] + " ELSE 0 END FROM " + *r[0]), std::stoll(*r[1])};
    return all;
  };
  auto x = read(a), y = read(b);
  ASSERT_EQ(x.size(), y.size());
  for (auto& [name, v] : x) EXPECT_TRUE(v.second > 0 ? y.at(name).first >= v.first : y.at(name).first <= v.first) << name << " " << v.first << " " << y.at(name).first;
}

}  // namespace rehome::testing
