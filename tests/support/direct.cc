#include "support/direct.h"

#include <algorithm>
#include <set>

#include "base/json.h"

namespace rehome::testing {

const std::vector<std::string>& direct_kinds() {
  static const std::vector<std::string> kinds = {"repeatable-read", "long",          "superuser",
                                                 "replica-role",    "large-objects", "ddl"};
  return kinds;
}

DirectSeen parse_direct(std::string_view line) {
  const Json j = parse_json(line, "a direct writer's history");
  DirectSeen s{get_string(j, "key"), get_string(j, "kind"), get_string(j, "writer")};
  if (std::find(direct_kinds().begin(), direct_kinds().end(), s.kind) == direct_kinds().end())
    throw Error(Code::io, "no kind of writer: " + s.kind);
  const std::string outcome = get_string(j, "outcome");
  if (outcome != "ok" && outcome != "failed" && outcome != "unknown")
    throw Error(Code::io, "no outcome of a write: " + outcome);
  s.outcome = outcome == "ok" ? Outcome::ok : outcome == "failed" ? Outcome::failed : Outcome::unknown;
  return s;
}

DirectVerdict judge_direct(const std::vector<DirectSeen>& seen, const DirectStored& serving) {
  DirectVerdict v;
  struct Count {
    std::string kind;
    std::int64_t sure = 0, perhaps = 0;
  };
  std::map<std::string, Count> writers;
  std::set<std::string> faulty;  // writers whose counter would only say a second time what a row said
  for (auto& s : seen) {
    Count& count = writers[s.writer];
    count.kind = s.kind;
    auto found = serving.written.find(s.key);
    const bool there = found != serving.written.end();
    auto lost = [&](const char* how) {
      ++v.lost[s.kind];
      faulty.insert(s.writer);
      v.findings.push_back("lost: " + s.key + how);
    };
    switch (s.outcome) {
      case Outcome::ok:
        ++v.acknowledged[s.kind];
        ++count.sure;
        if (!there) lost("");
        else if (!found->second) lost(" is there in part");
        break;
      case Outcome::unknown:
        ++v.unknown;
        ++count.perhaps;
        if (there && !found->second) lost(" is there in part");
        break;
      case Outcome::failed:
        ++v.failed;
        if (there) {
          // Told that it failed, the writer does it again: the work is done twice.
          ++v.doubled;
          faulty.insert(s.writer);
          v.findings.push_back("doubled: " + s.key + " was refused, and is there");
        }
        break;
    }
  }
  for (auto& [writer, count] : writers) {
    if (faulty.count(writer)) continue;
    auto found = serving.counted.find(writer);
    const std::int64_t n = found == serving.counted.end() ? 0 : found->second;
    if (n >= count.sure && n <= count.sure + count.perhaps) continue;
    ++(n < count.sure ? v.lost[count.kind] : v.doubled);
    v.findings.push_back((n < count.sure ? "lost: " : "doubled: ") + writer + " counts " + std::to_string(n) + ", not " +
                         std::to_string(count.sure) +
                         (count.perhaps ? " to " + std::to_string(count.sure + count.perhaps) : ""));
  }
  return v;
}

}  // namespace rehome::testing
