// An extension of a test's own in the share directories of servers; gone when it is destroyed. Servers of one major share theirs, so
// its name is one that no other test has, in whatever process.
#pragma once

#include <map>
#include <set>
#include <string>

#include "stores/postgres/testing/pg_server.h"

namespace rehome::testing {

class TestExtension {
 public:
  explicit TestExtension(const std::string& word, bool relocatable = false);
  ~TestExtension();
  TestExtension(const TestExtension&) = delete;
  TestExtension& operator=(const TestExtension&) = delete;

  const std::string& name() const { return name_; }
  // Its files at that server: scripts by what stands in their names, "1" or "1--2". Again: these instead.
  void put(const PgServer& server, const std::string& default_version, const std::map<std::string, std::string>& scripts);

 private:
  std::string name_;
  bool relocatable_;
  std::set<std::string> files_;
};

}  // namespace rehome::testing
