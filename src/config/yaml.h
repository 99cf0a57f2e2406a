// A strict reading of YAML: every value is asked for by key and type, what was not asked for is a mistake, and every
// mistake is kept with its place. Only the files of this folder include it.
#pragma once

#include <yaml-cpp/yaml.h>

#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/text.h"
#include "config/config.h"

namespace rehome {

// The text being read and the list its mistakes go to; both belong to the caller.
class YamlText {
 public:
  YamlText(std::string_view text, std::vector<ConfigProblem>& problems);

  // The one document; an undefined node after a mistake that leaves nothing to read.
  YAML::Node load();

  void problem(const YAML::Mark& at, std::string message, std::string meant = {});
  void problem(const YAML::Node& at, std::string message, std::string meant = {}) {
    problem(at.Mark(), std::move(message), std::move(meant));
  }

  // Each returns the value, or reports that `what` is not of its kind.
  std::optional<std::string> text(const YAML::Node& n, const std::string& what);
  std::optional<std::string> any_scalar(const YAML::Node& n, const std::string& what);
  std::optional<std::int64_t> integer(const YAML::Node& n, const std::string& what, std::int64_t least, std::int64_t most);
  std::optional<bool> boolean(const YAML::Node& n, const std::string& what);
  std::optional<Millis> duration(const YAML::Node& n, const std::string& what, Millis least, Millis most);
  std::optional<std::int64_t> bytes(const YAML::Node& n, const std::string& what, std::int64_t least);
  std::optional<std::string> choice(const YAML::Node& n, const std::string& what, const std::vector<std::string>& of);
  std::optional<std::string> absolute_path(const YAML::Node& n, const std::string& what, bool home_allowed = false);
  std::optional<std::string> address(const YAML::Node& n, const std::string& what);
  std::optional<std::string> url(const YAML::Node& n, const std::string& what);
  // A list of at least one text.
  std::vector<std::string> texts(const YAML::Node& n, const std::string& what);
  // A list of the words of a command, refused when a word carries a password.
  std::vector<std::string> words(const YAML::Node& n, const std::string& what);
  // A name of ours: what becomes part of file, slot and role names.
  std::optional<std::string> name(const YAML::Node& n, const std::string& what);

  std::size_t mistakes() const { return problems_.size(); }

 private:
  bool readable();
  bool tabs();      // reports tabs before the content of a line; a block scalar may have them
  std::string_view text_;
  std::vector<std::string_view> lines_;
  std::vector<ConfigProblem>& problems_;
};

// A mapping whose keys are taken one by one. done() reports the keys that nobody took.
class YamlMap {
 public:
  // `what` names the mapping in messages ("store 'db'"). Reports a node that is no mapping, and duplicate keys.
  YamlMap(YamlText& text, const YAML::Node& node, std::string what);

  bool valid() const { return valid_; }
  const YAML::Node& node() const { return node_; }
  // The value of `key`; undefined when the key is missing or (reported) has no value.
  YAML::Node take(const std::string& key);
  // The same, and a missing key is reported.
  YAML::Node need(const std::string& key);
  bool has(const std::string& key) const;
  YAML::Mark key_mark(const std::string& key) const;
  // `key` is known, but only makes sense in another case: reported when it is there.
  void misplaced(const std::string& key, const std::string& why);
  // Exactly one of `keys`: returns it, or reports; empty then.
  std::string one_of(const std::vector<std::string>& keys);
  void done();

 private:
  struct Entry {
    std::string key;
    YAML::Node key_node, value;
  };
  YamlText& text_;
  YAML::Node node_;
  std::string what_;
  bool valid_ = false;
  std::vector<Entry> entries_;
  std::set<std::string> known_;
};

// What was not said, or not understood, leaves the default.
template <class T, class V>
void set(T& into, const std::optional<V>& value) {
  if (value) into = *value;
}
inline void set(int& into, const std::optional<std::int64_t>& value) {
  if (value) into = static_cast<int>(*value);
}

}  // namespace rehome
