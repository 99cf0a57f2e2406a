// What the tests of the driver's life share: one switch as ops does it, and oracles that are not our own code.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/local_site.h"
#include "stores/postgres/testing/pg_server.h"

namespace rehome::testing {

// Makes a database "shop" and runs `sql` in it, in the session that is returned.
std::unique_ptr<PgSession> shop_with(const PgServer& server, const std::string& sql);
// Two servers, a database "shop" that `sql` has made on the source's, a session there, and a store between them.
struct Shop {
  explicit Shop(const std::string& sql, int from = 15, int to = 15);
  PgServer source, target;
  std::unique_ptr<PgSession> s;
  World w;
  PostgresStore store;
};

// Fails the test after a minute.
void wait_until_following(World& w, PostgresStore& store);
// All that `begin` does of a store, until it follows.
void begin(World& w, PostgresStore& store);
// `fenced` is called when the yielding side refuses, `opened` when the other is open. Returns the milliseconds between the
// soft fence's request and the hard fence.
double switch_over(World& w, PostgresStore& store, Direction d, const std::function<void()>& opened = {}, const std::function<void()>& fenced = {});
// A cut from the source that has looked at everything before `change` is made: under the fence it refuses, with `said` in its error.
void refused_under_the_fence(World& w, PostgresStore& store, const std::function<void()>& change, const std::string& said);
// The database is the same on both, schema and rows: by pg_dump, or in SQL for servers newer than this machine's. Waits
// 20 s for the last rows to arrive.
void quiesced_equal(const PgServer& a, const PgServer& b, const std::string& database = "shop");
// A schema `stock` of everything that is not a plain table, with rows, owned by `role`, which it makes.
std::string variety(const std::string& role);
std::string large_objects(const PgServer& server);
// "schema.name position[ called]", as a dump would say by setval.
std::vector<std::string> sequences(const PgServer& server, const std::string& database = "shop");
// What every sequence of `b` gives next is at least as far as in `a`.
void sequences_cover(const PgServer& a, const PgServer& b);

}  // namespace rehome::testing
