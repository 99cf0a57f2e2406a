#include "track/filter.h"

#include <algorithm>

#include "base/error.h"

namespace rehome::track {
namespace {

// One [class] at pattern[0] == '['. Returns how much of the pattern it takes, 0 when it is not closed.
std::size_t match_class(std::string_view pattern, unsigned char c, bool& hit) {
  std::size_t i = 1;
  bool negated = i < pattern.size() && (pattern[i] == '!' || pattern[i] == '^');
  if (negated) i++;
  hit = false;
  bool first = true;
  for (; i < pattern.size(); first = false) {
    if (pattern[i] == ']' && !first) {
      if (negated) hit = !hit;
      if (c == '/') hit = false;
      return i + 1;
    }
    if (pattern.substr(i).starts_with("[:")) {
      auto end = pattern.find(":]", i + 2);
      if (end != std::string_view::npos) {
        auto name = pattern.substr(i + 2, end - i - 2);
        struct Kind {
          std::string_view name;
          int (*test)(int);
        };
        static constexpr Kind kinds[] = {{"alpha", ::isalpha}, {"digit", ::isdigit}, {"alnum", ::isalnum},
                                         {"upper", ::isupper}, {"lower", ::islower}, {"space", ::isspace},
                                         {"punct", ::ispunct}, {"print", ::isprint}, {"graph", ::isgraph},
                                         {"cntrl", ::iscntrl}, {"blank", ::isblank}, {"xdigit", ::isxdigit}};
        for (const auto& k : kinds)
          if (k.name == name && k.test(c)) hit = true;
        i = end + 2;
        continue;
      }
    }
    auto take = [&]() -> unsigned char {
      if (pattern[i] == '\\' && i + 1 < pattern.size()) i++;
      return static_cast<unsigned char>(pattern[i++]);
    };
    unsigned char low = take(), high = low;
    if (i + 1 < pattern.size() && pattern[i] == '-' && pattern[i + 1] != ']') {
      i++;
      high = take();
    }
    if (c >= low && c <= high) hit = true;
  }
  return 0;
}

}  // namespace

bool wild_match(std::string_view p, std::string_view t) {
  while (!p.empty()) {
    if (p[0] == '*') {
      bool any = p.size() > 1 && p[1] == '*';
      while (!p.empty() && p[0] == '*') p.remove_prefix(1);
      if (p.empty()) return any || t.find('/') == std::string_view::npos;
      for (std::size_t i = 0; i <= t.size(); i++) {
        if (wild_match(p, t.substr(i))) return true;
        if (i < t.size() && t[i] == '/' && !any) return false;
      }
      return false;
    }
    if (t.empty()) return false;
    auto c = static_cast<unsigned char>(t[0]);
    if (p[0] == '?') {
      if (c == '/') return false;
      p.remove_prefix(1);
    } else if (p[0] == '[') {
      bool hit;
      std::size_t n = match_class(p, c, hit);
      if (n == 0 || !hit) return false;
      p.remove_prefix(n);
    } else {
      if (p[0] == '\\' && p.size() > 1) p.remove_prefix(1);
      if (p[0] != t[0]) return false;
      p.remove_prefix(1);
    }
    t.remove_prefix(1);
  }
  return t.empty();
}

Filter::Filter(const std::vector<std::string>& include, const std::vector<std::string>& exclude) {
  for (const auto& p : include) add(p, true);
  for (const auto& p : exclude) add(p, false);
}

void Filter::add(std::string_view text, bool include) {
  if (text == "!")
    throw Error(Code::config, "the pattern \"!\" (list reset) is not supported", "leave it out");
  // rsync takes "+ x" and "- x" as rules of their own, also behind --include and --exclude.
  if (text.starts_with("+ ") || text.starts_with("- ")) {
    include = text[0] == '+';
    text.remove_prefix(2);
  }
  if (text.empty()) throw Error(Code::config, "an include or exclude pattern is empty", "leave it out");
  Rule r{};
  r.include = include;
  if (text[0] == '/') {
    r.anchored = true;
    text.remove_prefix(1);
  }
  if (text.ends_with("/***")) {
    r.with_content = true;
    text.remove_suffix(4);
  } else if (text.size() > 1 && text.ends_with('/')) {
    r.directory_only = true;
    text.remove_suffix(1);
  }
  r.wild = text.find_first_of("*?[") != std::string_view::npos;
  r.whole_path = text.find('/') != std::string_view::npos || text.find("**") != std::string_view::npos || r.with_content;
  r.pattern = text;
  rules_.push_back(std::move(r));
}

bool Filter::matches(const Rule& r, std::string_view path, bool is_directory) {
  if (r.directory_only && !is_directory) return false;
  auto equal = [&](std::string_view t) { return r.wild ? wild_match(r.pattern, t) : r.pattern == t; };
  auto one = [&](std::string_view t) {
    if (r.with_content) {
      // The directory itself, and everything below it.
      if (is_directory && equal(t)) return true;
      for (auto at = t.find('/'); at != std::string_view::npos; at = t.find('/', at + 1))
        if (equal(t.substr(0, at))) return true;
      return false;
    }
    return equal(t);
  };
  if (!r.whole_path && !r.anchored) {
    auto slash = path.rfind('/');
    return equal(slash == std::string_view::npos ? path : path.substr(slash + 1));
  }
  if (one(path)) return true;
  if (r.anchored) return false;
  // As in rsync, what ** stands for at the top of the tree ends with a slash too.
  if (r.pattern.starts_with("**") && one("/" + std::string(path))) return true;
  // Not anchored: the pattern may begin at any component. One that begins with ** already reaches everywhere.
  for (auto at = path.find('/'); at != std::string_view::npos; at = path.find('/', at + 1))
    if (one(path.substr(at + 1))) return true;
  return false;
}

bool Filter::includes_child(std::string_view path, bool is_directory) const {
  if (path.empty()) return true;
  for (const auto& r : rules_)
    if (matches(r, path, is_directory)) return r.include;
  return true;
}

bool Filter::includes(std::string_view path, bool is_directory) const {
  if (rules_.empty()) return true;
  for (auto at = path.find('/'); at != std::string_view::npos; at = path.find('/', at + 1))
    if (!includes_child(path.substr(0, at), true)) return false;
  return includes_child(path, is_directory);
}

}  // namespace rehome::track
