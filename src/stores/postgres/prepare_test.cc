// What the phase prepare makes of the source's roles, databases and tables, judged by the target's catalogues and its log.
#include <gtest/gtest.h>

#include "base/text.h"
#include "stores/postgres/postgres.h"
#include "stores/postgres/testing/life.h"

namespace rehome {
namespace {

using namespace testing;   // NOLINT: the whole of it is this test's

std::string settings_of(const PgServer& server, const std::string& role) {
  return server.session("postgres")->value("SELECT coalesce(string_agg(x, '; ' ORDER BY x), '') FROM pg_db_role_setting s JOIN pg_roles r ON r.oid = s.setrole, unnest(s.setconfig) x WHERE r.rolname = " + pg_literal(role));
}

TEST(PostgresRoles, SettingsListsAndPasswordsWithoutAWordInTheLog) {
  PgServer source(15), target(17, {"log_statement = all", "log_min_duration_statement = 0", "log_duration = on", "log_transaction_sample_rate = 1", "log_min_error_statement = debug5"});
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("postgres");
  s->exec("CREATE ROLE shopkeeper LOGIN PASSWORD 'geheim' VALID UNTIL '2030-01-01'; CREATE ROLE half LOGIN PASSWORD 'geheim' CREATEDB; CREATE ROLE before LOGIN PASSWORD 'geheim'; CREATE ROLE staff; "
          "ALTER ROLE shopkeeper SET search_path TO app, \"$user\", \"od,d \"\"one\", public; ALTER ROLE half SET search_path TO ''; ALTER ROLE half SET work_mem TO '8MB'; "
          "ALTER ROLE before SET work_mem TO '8MB'; ALTER ROLE shopkeeper IN DATABASE shop SET search_path TO ''; ALTER DATABASE shop SET search_path TO app, public; GRANT staff TO half WITH ADMIN OPTION");
  // An interrupted try has made the one; the other was there before.
  target.session("postgres")->exec("CREATE ROLE half; CREATE ROLE before LOGIN");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  w.facts["postgres.db.roles"] = Json::array({"half"});
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  for (const char* role : {"shopkeeper", "half"}) {
    EXPECT_EQ(settings_of(source, role), settings_of(target, role));
    std::string question = "SELECT (rolcanlogin, rolcreatedb, rolvaliduntil, rolpassword)::text FROM pg_authid WHERE rolname = " + pg_literal(role);
    EXPECT_EQ(s->value(question), target.session("postgres")->value(question));
  }
  EXPECT_EQ(settings_of(target, "before"), "");
  EXPECT_EQ(target.session("postgres")->value("SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'before'"), "t");
  const char* of_database = "SELECT setconfig::text FROM pg_db_role_setting WHERE setrole = 0 AND setdatabase <> 0";
  EXPECT_EQ(s->value(of_database), target.session("postgres")->value(of_database));
  EXPECT_EQ(target.session("postgres")->value("SELECT admin_option FROM pg_auth_members WHERE member = 'half'::regrole"), "t");
  EXPECT_NE(target.log().find("CREATE DATABASE"), std::string::npos);
  EXPECT_EQ(target.log().find("SCRAM-SHA-256"), std::string::npos);
}

TEST(PostgresRoles, MembershipsKeepTheirOptions) {
  PgServer source(17), target(17);
  source.session("postgres")->exec("CREATE DATABASE shop; ");
  source.session("postgres")->exec("CREATE ROLE staff; CREATE ROLE one; CREATE ROLE two; GRANT staff TO one WITH INHERIT FALSE, SET TRUE; GRANT staff TO two WITH ADMIN TRUE, INHERIT TRUE, SET FALSE");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  store.prepare(w.context());
  const char* question = "SELECT string_agg(concat_ws(' ', roleid::regrole, member::regrole, admin_option, inherit_option, set_option), ', ' ORDER BY member::regrole::text) FROM pg_auth_members WHERE roleid = 'staff'::regrole";
  EXPECT_EQ(source.session("postgres")->value(question), target.session("postgres")->value(question));
}

// A published table whose rows nothing identifies refuses UPDATE and DELETE: that must not meet the application.
TEST(PostgresPublish, EveryTableCanBeChangedAndIsPutBackAsItWas) {
  PgServer source(15), target(15);
  source.session("postgres")->exec("CREATE DATABASE shop");
  auto s = source.session("shop");
  const char* names[] = {"keyed", "bare", "nothing", "postponed", "by_index", "index_gone", "whole"};
  s->exec("SET search_path = public; CREATE TABLE keyed(id int PRIMARY KEY, a int); CREATE TABLE bare(id int, a int); CREATE TABLE nothing(id int PRIMARY KEY, a int); ALTER TABLE nothing REPLICA IDENTITY NOTHING; "
          "CREATE TABLE postponed(id int PRIMARY KEY DEFERRABLE, a int); CREATE TABLE by_index(id int NOT NULL, a int); CREATE UNIQUE INDEX i ON by_index(id); ALTER TABLE by_index REPLICA IDENTITY USING INDEX i; "
          "CREATE TABLE index_gone(id int NOT NULL, a int); CREATE UNIQUE INDEX g ON index_gone(id); ALTER TABLE index_gone REPLICA IDENTITY USING INDEX g; DROP INDEX g; "
          "CREATE TABLE whole(id int, a int); ALTER TABLE whole REPLICA IDENTITY FULL");
  for (const char* t : names) s->exec("INSERT INTO public." + std::string(t) + " VALUES (1, 1), (2, 2)");
  World w(deployment_between(source.socket_directory(), target.socket_directory(), {"shop"}));
  PostgresStore store(w.deployment.stores[0], w.deployment);
  std::string keyless;
  for (const auto& f : store.preflight(w.context()))
    if (f.id == "postgres.keyless") keyless = f.message;
  EXPECT_EQ(keyless.substr(0, 8), "4 tables") << keyless;
  store.prepare(w.context());
  store.copy(w.context());
  store.follow(w.context());
  wait_until_following(w, store);
  for (const char* t : names) s->exec("UPDATE public." + std::string(t) + " SET a = 7 WHERE id = 1; DELETE FROM public." + t + " WHERE id = 2");
  Verdict verdict = store.verify(w.context());
  EXPECT_TRUE(verdict.equal) << (verdict.differences.empty() ? "" : verdict.differences[0].object + " " + verdict.differences[0].what);
  switch_over(w, store, {Side::source});
  auto t = target.session("shop");
  for (const char* name : names) t->exec("UPDATE public." + std::string(name) + " SET a = 8 WHERE id = 1");
  store.finish(w.context(), Side::target);
  // An identity whose index is gone comes to nothing, and cannot be said otherwise.
  for (const PgServer* server : {&source, &target})
    EXPECT_EQ(server->session("shop")->value("SELECT string_agg(relname || ' ' || relreplident::text, ', ' ORDER BY relname) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"),
              "bare d, by_index i, index_gone n, keyed d, nothing n, postponed d, whole f");
}

}  // namespace
}  // namespace rehome
