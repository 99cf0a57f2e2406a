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

}  // namespace
}  // namespace rehome
