// Judges what writers were told who talk to the database itself, past the service: a superuser's open session, one
// whose triggers are off, long and REPEATABLE READ transactions, large objects, new tables. Pure, like history.h.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "support/history.h"

namespace rehome::testing {

struct DirectSeen {
  std::string key;
  std::string kind;    // one of direct_kinds()
  std::string writer;  // one session; it also counts its commits in a row of its own
  Outcome outcome = Outcome::ok;
};

// What the serving side holds.
struct DirectStored {
  std::map<std::string, bool> written;          // key to whether all of it is there (an object's bytes, a table's row)
  std::map<std::string, std::int64_t> counted;  // writer to its counter
};

struct DirectVerdict {
  std::map<std::string, std::int64_t> acknowledged;  // by kind
  std::map<std::string, std::int64_t> lost;          // by kind
  std::int64_t doubled = 0, failed = 0, unknown = 0;
  std::vector<std::string> findings;
  bool clean() const { return lost.empty() && doubled == 0; }
};

const std::vector<std::string>& direct_kinds();

// Throws Error(io) naming what is wrong with the line.
DirectSeen parse_direct(std::string_view line);

DirectVerdict judge_direct(const std::vector<DirectSeen>& seen, const DirectStored& serving);

}  // namespace rehome::testing
