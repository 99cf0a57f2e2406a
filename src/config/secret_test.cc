#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "config/config.h"
#include "sys/fs.h"

namespace rehome {
namespace {

SecretRef from(SecretRef::From kind, const std::string& name = "") { return {kind, name}; }
std::string read(const SecretRef& r) { return read_secret(r, "db.example", 5432, "shop", "app"); }

std::string message_of(const SecretRef& r) {
  try {
    read(r);
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::config);
    return e.message;
  }
  return "no error";
}

TEST(Secret, NoneIsEmpty) { EXPECT_EQ(read(SecretRef{}), ""); }

TEST(Secret, ComesFromTheEnvironment) {
  ::setenv("REHOME_TEST_SECRET", "s3 cret", 1);
  EXPECT_EQ(read(from(SecretRef::From::environment, "REHOME_TEST_SECRET")), "s3 cret");
  ::unsetenv("REHOME_TEST_SECRET");
  EXPECT_NE(message_of(from(SecretRef::From::environment, "REHOME_TEST_SECRET")).find("REHOME_TEST_SECRET is not set"), std::string::npos);
}

TEST(Secret, ComesFromTheFirstLineOfAPrivateFile) {
  TempDir dir;
  std::string path = dir.path() + "/pw";
  SecretRef ref = from(SecretRef::From::file, path);
  EXPECT_NE(message_of(ref).find("cannot be read"), std::string::npos);
  write_durably(path, "hunter2\r\nnot this\n", 0600);
  EXPECT_EQ(read(ref), "hunter2");
  for (unsigned mode : {0640u, 0604u, 0620u}) {
    write_durably(path, "hunter2\n", mode);
    std::string m = message_of(ref);
    EXPECT_NE(m.find("can be read by others"), std::string::npos);
    EXPECT_EQ(m.find("hunter2"), std::string::npos);
  }
  write_durably(path, "\nhunter2\n", 0600);
  EXPECT_NE(message_of(ref).find("is empty"), std::string::npos);
}

class Pgpass : public ::testing::Test {
 protected:
  void SetUp() override { ::setenv("PGPASSFILE", path().c_str(), 1); }
  void TearDown() override { ::unsetenv("PGPASSFILE"); }
  std::string path() const { return dir_.path() + "/pgpass"; }
  void file(const std::string& content, unsigned mode = 0600) { write_durably(path(), content, mode); }
  std::string ask(const std::string& host, int port, const std::string& database, const std::string& user) {
    return read_secret(from(SecretRef::From::pgpass), host, port, database, user);
  }
  TempDir dir_;
};

TEST_F(Pgpass, TheFirstLineThatMatchesWins) {
  file("# other\n\nbroken line\nh:5432:shop:app:one\nh:*:shop:app:two\n*:*:*:app:three\r\n");
  EXPECT_EQ(ask("h", 5432, "shop", "app"), "one");
  EXPECT_EQ(ask("h", 5433, "shop", "app"), "two");
  EXPECT_EQ(ask("x", 1, "y", "app"), "three");
  EXPECT_THROW(ask("x", 1, "y", "other"), Error);
}

TEST_F(Pgpass, BackslashesEscape) {
  file("::1:5432:shop:app:wrong\n\\:\\:1:5432:shop:app:a\\:b\\\\c:d\n\\*:1:d:u:star\n");
  EXPECT_EQ(ask("::1", 5432, "shop", "app"), "a:b\\c:d");
  EXPECT_EQ(ask("*", 1, "d", "u"), "star");
  EXPECT_THROW(ask("h", 1, "d", "u"), Error);
}

TEST_F(Pgpass, TheDefaultSocketIsLocalhost) {
  file("localhost:5432:shop:app:one\n/srv/run:5432:shop:app:two\n");
  EXPECT_EQ(ask("/run/postgresql", 5432, "shop", "app"), "one");
  EXPECT_EQ(ask("/srv/run", 5432, "shop", "app"), "two");
  EXPECT_THROW(ask("/srv/other", 5432, "shop", "app"), Error);
}

TEST_F(Pgpass, OthersMustNotReadIt) {
  file("*:*:*:*:hunter2\n", 0644);
  std::string m = message_of(from(SecretRef::From::pgpass));
  EXPECT_NE(m.find("can be read by others"), std::string::npos);
  EXPECT_EQ(m.find("hunter2"), std::string::npos);
}

TEST_F(Pgpass, AMissingLineNamesWhatWasLookedFor) {
  file("h:1:d:u:hunter2\n");
  std::string m = message_of(from(SecretRef::From::pgpass));
  EXPECT_NE(m.find("db.example:5432:shop:app"), std::string::npos);
  EXPECT_EQ(m.find("hunter2"), std::string::npos);
}

}  // namespace
}  // namespace rehome
