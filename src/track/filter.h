// rsync's include and exclude patterns, so that the delta, the manifest and rsync itself agree on what belongs to a store.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace rehome::track {

class Filter {
 public:
  Filter() = default;
  // All `include` patterns stand before all `exclude` patterns; the first that matches decides, none means included: what
  // `rsync --include=A … --exclude=B …` does. Throws Error(config) for what this does not know (per-directory merge
  // files, modifiers, a "!" list reset).
  Filter(const std::vector<std::string>& include, const std::vector<std::string>& exclude);
  // Whether `path` (relative, no leading slash; "" is the root) belongs to the transfer: neither it nor a directory above
  // it is excluded.
  bool includes(std::string_view path, bool is_directory) const;
  // The same where every directory above is known to be included.
  bool includes_child(std::string_view path, bool is_directory) const;
  bool empty() const { return rules_.empty(); }

 private:
  struct Rule {
    bool include;
    bool anchored, directory_only, whole_path, wild;
    bool with_content;  // "dir/***"
    std::string pattern;
  };
  static bool matches(const Rule& rule, std::string_view path, bool is_directory);
  void add(std::string_view text, bool include);
  std::vector<Rule> rules_;
};

// rsync's wildcards: * and ? stop at '/', ** does not, [..] is a class, \ quotes.
bool wild_match(std::string_view pattern, std::string_view text);

}  // namespace rehome::track
