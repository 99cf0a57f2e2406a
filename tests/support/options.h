// Command lines of the test tools: --name value..., and --name for switches. Unknown names are errors, so that a
// misspelt option cannot make a test check less than it says.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/error.h"

namespace rehome::testing {

class Options {
 public:
  // `valued` take one or more values (until the next --name), `switches` none. Throws Error(usage).
  Options(int argc, char** argv, const std::vector<std::string>& valued, const std::vector<std::string>& switches = {});
  bool has(const std::string& name) const { return values_.count(name) > 0; }
  std::string get(const std::string& name, const std::string& fallback) const;
  std::string need(const std::string& name) const;
  std::vector<std::string> all(const std::string& name) const;
  long long number(const std::string& name, long long fallback) const;

 private:
  std::map<std::string, std::vector<std::string>> values_;
};

}  // namespace rehome::testing
