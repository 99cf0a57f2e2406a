#include "config/yaml.h"

#include <algorithm>
#include <charconv>
#include <regex>

#include "base/error.h"
#include "sys/net.h"

namespace rehome {
namespace {

bool quoted(const YAML::Node& n) { return n.Tag() == "!"; }

// What a plain scalar is by YAML's core schema: a number or true is no text unless it stands in quotes.
enum class Core { null, boolean, number, text };
Core core_type(const YAML::Node& n) {
  static const std::regex number(R"([-+]?(\d+|0x[0-9a-fA-F]+|0o[0-7]+|(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))");
  if (n.IsNull()) return Core::null;
  if (quoted(n)) return Core::text;
  const std::string& s = n.Scalar();
  for (auto word : {"true", "True", "TRUE", "false", "False", "FALSE"})
    if (s == word) return Core::boolean;
  return std::regex_match(s, number) ? Core::number : Core::text;
}

std::string kind_of(const YAML::Node& n) {
  if (n.IsMap()) return "a mapping (key: value)";
  if (n.IsSequence()) return "a list";
  switch (core_type(n)) {
    case Core::null: return "nothing";
    case Core::boolean: return n.Scalar();
    case Core::number: return "the number " + n.Scalar();
    case Core::text: break;
  }
  return "'" + n.Scalar() + "'";
}

// Continuation bytes are no columns.
int columns(std::string_view line, std::size_t bytes) {
  int count = 0;
  for (std::size_t i = 0; i < std::min(bytes, line.size()); i++)
    if ((static_cast<unsigned char>(line[i]) & 0xC0) != 0x80) count++;
  return count + static_cast<int>(bytes - std::min(bytes, line.size()));
}

// The offset of the first byte that is not UTF-8, or that no text file holds.
std::optional<std::size_t> not_text(std::string_view s) {
  for (std::size_t i = 0; i < s.size();) {
    auto c = static_cast<unsigned char>(s[i]);
    std::size_t more = c < 0x80 ? 0 : c >= 0xC2 && c < 0xE0 ? 1 : c >= 0xE0 && c < 0xF0 ? 2 : c >= 0xF0 && c < 0xF5 ? 3 : 9;
    if (more == 9 || i + more >= s.size() || (c < 0x20 && c != '\n' && c != '\r' && c != '\t')) return i;
    for (std::size_t k = 1; k <= more; k++)
      if ((static_cast<unsigned char>(s[i + k]) & 0xC0) != 0x80) return i;
    i += more + 1;
  }
  return std::nullopt;
}

bool parses(const std::string& text) {
  try {
    YAML::LoadAll(text);
    return true;
  } catch (const YAML::Exception&) {
    return false;
  }
}

// Where a quote begins that the text does not close. yaml-cpp takes the end of the text behind a newline for the end of a
// quoted scalar; behind the start of a comment it does not.
std::optional<std::size_t> unclosed_quote(std::string_view text) {
  std::string whole(text);
  if (parses(whole + "\n#")) return std::nullopt;
  char quote = parses(whole + "\"\n#") ? '"' : '\'';
  std::size_t at = whole.rfind(quote);
  while (quote == '"' && at != std::string::npos && at > 0 && whole[at - 1] == '\\') at = whole.rfind(quote, at - 1);
  return at == std::string::npos ? whole.size() : at;
}

std::string in_words(const std::vector<std::string>& of) {
  std::string out;
  for (std::size_t i = 0; i < of.size(); i++) out += (i == 0 ? "" : i + 1 == of.size() ? " or " : ", ") + of[i];
  return out;
}

}  // namespace

YamlText::YamlText(std::string_view text, std::vector<ConfigProblem>& problems) : text_(text), problems_(problems) {
  std::size_t from = 0;
  while (true) {
    auto at = text_.find('\n', from);
    lines_.push_back(text_.substr(from, at == std::string_view::npos ? at : at - from));
    if (at == std::string_view::npos) break;
    from = at + 1;
  }
}

void YamlText::problem(const YAML::Mark& at, std::string message, std::string meant) {
  ConfigProblem p;
  if (!at.is_null()) {
    p.line = at.line + 1;
    auto bytes = static_cast<std::size_t>(std::max(at.column, 0));
    p.column = static_cast<std::size_t>(at.line) < lines_.size() ? columns(lines_[static_cast<std::size_t>(at.line)], bytes) + 1
                                                                 : at.column + 1;
  }
  p.message = std::move(message);
  p.meant = std::move(meant);
  problems_.push_back(std::move(p));
}

bool YamlText::readable() {
  if (auto at = not_text(text_)) {
    YAML::Mark m;
    for (std::size_t i = 0; i < *at; i++) {
      if (text_[i] == '\n') m.line++, m.column = 0;
      else m.column++;
    }
    problem(m, "this is not text: a byte that is not UTF-8, or a control character");
    return false;
  }
  return true;
}

bool YamlText::tabs() {
  bool any = false;
  for (std::size_t i = 0; i < lines_.size(); i++) {
    auto content = lines_[i].find_first_not_of(" \t\r");
    auto tab = lines_[i].find('\t');
    if (content == std::string_view::npos || lines_[i][content] == '#' || tab >= content) continue;
    YAML::Mark m;
    m.line = static_cast<int>(i);
    m.column = static_cast<int>(tab);
    problem(m, "a tab in the indentation; YAML wants spaces");
    any = true;
  }
  return any;
}

YAML::Node YamlText::load() {
  YAML::Node none(YAML::NodeType::Undefined);
  if (!readable()) return none;
  try {
    auto documents = YAML::LoadAll(std::string(text_));
    if (auto quote = unclosed_quote(text_)) {
      YAML::Mark m;
      std::string_view before = text_.substr(0, *quote);
      m.line = static_cast<int>(std::count(before.begin(), before.end(), '\n'));
      m.column = static_cast<int>(before.size() - (before.rfind('\n') == std::string_view::npos ? 0 : before.rfind('\n') + 1));
      problem(m, "not YAML: this quote is never closed");
      return none;
    }
    if (documents.empty() || documents[0].IsNull()) {
      problem(YAML::Mark(), "the file is empty");
      return none;
    }
    if (documents.size() > 1) problem(documents[1], "a second document; one file describes one deployment");
    return documents[0];
  } catch (const YAML::Exception& e) {
    if (!tabs()) problem(e.mark, "not YAML: " + e.msg);
  }
  return none;
}

std::optional<std::string> YamlText::text(const YAML::Node& n, const std::string& what) {
  if (!n.IsDefined()) return std::nullopt;
  if (!n.IsScalar() || core_type(n) == Core::null) {
    problem(n, what + " must be text, not " + kind_of(n));
    return std::nullopt;
  }
  if (core_type(n) != Core::text) {
    problem(n, what + " must be text, not " + kind_of(n), "\"" + n.Scalar() + "\"");
    return std::nullopt;
  }
  if (n.Scalar().empty()) {
    problem(n, what + " is empty");
    return std::nullopt;
  }
  return n.Scalar();
}

std::optional<std::string> YamlText::any_scalar(const YAML::Node& n, const std::string& what) {
  if (!n.IsDefined()) return std::nullopt;
  if (n.IsScalar()) return n.Scalar();
  problem(n, what + " must be one value, not " + kind_of(n));
  return std::nullopt;
}

std::optional<std::int64_t> YamlText::integer(const YAML::Node& n, const std::string& what, std::int64_t least,
                                              std::int64_t most) {
  if (!n.IsDefined()) return std::nullopt;
  std::int64_t value = 0;
  std::string wanted = what + " must be a whole number from " + std::to_string(least) + " to " + std::to_string(most);
  if (n.IsScalar()) {
    const std::string& s = n.Scalar();
    auto [end, err] = std::from_chars(s.data(), s.data() + s.size(), value);
    bool number = err == std::errc() && end == s.data() + s.size();
    if (number && quoted(n)) {
      problem(n, wanted + ", without quotes", s);
      return std::nullopt;
    }
    if (number && value >= least && value <= most) return value;
  }
  problem(n, wanted + ", not " + kind_of(n));
  return std::nullopt;
}

std::optional<bool> YamlText::boolean(const YAML::Node& n, const std::string& what) {
  if (!n.IsDefined()) return std::nullopt;
  std::string meant;
  if (n.IsScalar()) {
    std::string s = n.Scalar();
    std::transform(s.begin(), s.end(), s.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (!quoted(n) && core_type(n) == Core::boolean) return s == "true";
    if (s == "yes" || s == "on" || s == "true" || s == "1") meant = "true";
    if (s == "no" || s == "off" || s == "false" || s == "0") meant = "false";
  }
  problem(n, what + " must be true or false, not " + kind_of(n), meant);
  return std::nullopt;
}

std::optional<Millis> YamlText::duration(const YAML::Node& n, const std::string& what, Millis least, Millis most) {
  if (!n.IsDefined()) return std::nullopt;
  if (n.IsScalar() && !n.IsNull()) {
    if (auto d = parse_duration(n.Scalar())) {
      if (*d >= least && *d <= most) return d;
      problem(n, what + " must be from " + human_duration(least) + " to " + human_duration(most) + ", not " + human_duration(*d));
      return std::nullopt;
    }
    if (core_type(n) == Core::number) {
      problem(n, what + " is a duration and needs a unit (ms, s, min, h)", n.Scalar() + "s or " + n.Scalar() + "ms");
      return std::nullopt;
    }
  }
  problem(n, what + " must be a duration like 500ms, 10s or 5min, not " + kind_of(n));
  return std::nullopt;
}

std::optional<std::int64_t> YamlText::bytes(const YAML::Node& n, const std::string& what, std::int64_t least) {
  if (!n.IsDefined()) return std::nullopt;
  if (n.IsScalar() && !n.IsNull()) {
    if (auto b = parse_bytes(n.Scalar())) {
      if (*b >= least) return b;
      problem(n, what + " must be at least " + (least > 0 && least % (1 << 20) == 0 ? std::to_string(least >> 20) + " MiB" : human_bytes(least)) + ", not " + human_bytes(*b));
      return std::nullopt;
    }
  }
  problem(n, what + " must be a size like 10GB, 512MiB or 4096, not " + kind_of(n));
  return std::nullopt;
}

std::optional<std::string> YamlText::choice(const YAML::Node& n, const std::string& what,
                                            const std::vector<std::string>& of) {
  if (!n.IsDefined()) return std::nullopt;
  if (n.IsScalar() && std::find(of.begin(), of.end(), n.Scalar()) != of.end()) return n.Scalar();
  problem(n, what + " must be " + in_words(of) + ", not " + kind_of(n),
          n.IsScalar() ? nearest(n.Scalar(), of).value_or("") : "");
  return std::nullopt;
}

std::optional<std::string> YamlText::absolute_path(const YAML::Node& n, const std::string& what, bool home_allowed) {
  auto s = text(n, what);
  if (!s) return s;
  if (home_allowed && s->rfind("~/", 0) == 0) return s;
  if (s->front() != '/') {
    problem(n, what + " must be an absolute path, not '" + *s + "'",
            s->rfind("~/", 0) == 0 ? "" : "/" + (s->rfind("./", 0) == 0 ? s->substr(2) : *s));
    return std::nullopt;
  }
  for (const auto& part : split(*s, '/'))
    if (part == ".." || part == ".") {
      problem(n, what + " must not contain '" + part + "' as a part of the path");
      return std::nullopt;
    }
  // One spelling of one place, so that equal places compare equal.
  std::string clean;
  for (char c : *s)
    if (c != '/' || clean.empty() || clean.back() != '/') clean += c;
  if (clean.size() > 1 && clean.back() == '/') clean.pop_back();
  return clean;
}

std::optional<std::string> YamlText::address(const YAML::Node& n, const std::string& what) {
  if (n.IsDefined() && n.IsScalar() && core_type(n) == Core::number) {
    problem(n, what + " must be host:port or unix:/path, not " + kind_of(n), "127.0.0.1:" + n.Scalar());
    return std::nullopt;
  }
  auto s = text(n, what);
  if (!s) return s;
  try {
    Address a = Address::parse(*s);
    if (a.is_unix() ? a.path.front() == '/' : a.port != 0) return a.text();
  } catch (const Error&) {
    // Reported below, with the forms that are understood here.
  }
  problem(n, what + " must be host:port, [v6]:port or unix:/path, not '" + *s + "'",
          s->front() == '/' ? "unix:" + *s : s->front() == ':' ? "0.0.0.0" + *s : "");
  return std::nullopt;
}

std::optional<std::string> YamlText::url(const YAML::Node& n, const std::string& what) {
  auto s = text(n, what);
  if (!s) return s;
  static const std::regex form(R"(https?://([^/?#@\s]+)([/?#]\S*)?)");
  static const std::regex with_user("[^/?#]*//[^/?#]*@.*");
  if (std::regex_match(*s, with_user)) {
    problem(n, what + " carries a user or a password in the URL; this file is no place for a secret");
    return std::nullopt;
  }
  // What has a '@' is not repeated: a password may be before it.
  const bool secret = s->find('@') != std::string::npos;
  const std::string shown = secret ? "" : ", not '" + *s + "'";
  std::smatch m;
  if (!std::regex_match(*s, m, form)) {
    problem(n, what + " must be a URL that starts with http://" + shown,
            !secret && s->find("://") == std::string::npos && s->front() != '/' ? "http://" + *s : "");
    return std::nullopt;
  }
  if (std::string host = m[1]; host.find(':') != std::string::npos && !host.ends_with(']')) {
    try {
      Address::parse(host);
    } catch (const Error&) {
      problem(n, what + " must be a URL whose port is a number up to 65535" + shown);
      return std::nullopt;
    }
  }
  if (s->starts_with("https")) {
    problem(n, what + " must start with http://: rehome speaks no TLS; for https use a check with 'command' that runs curl");
    return std::nullopt;
  }
  return s;
}

std::vector<std::string> YamlText::texts(const YAML::Node& n, const std::string& what) {
  std::vector<std::string> out;
  if (!n.IsDefined()) return out;
  if (!n.IsSequence()) {
    problem(n, what + " must be a list, not " + kind_of(n), n.IsScalar() && !n.IsNull() ? "[" + n.Scalar() + "]" : "");
    return out;
  }
  if (n.size() == 0) problem(n, what + " is an empty list");
  for (const auto& item : n)
    if (auto s = text(item, "each of " + what)) out.push_back(*s);
  return out;
}

std::vector<std::string> YamlText::words(const YAML::Node& n, const std::string& what) {
  static const std::regex secret(R"((-*[a-z0-9_-]*(password|passwd|secret|token)=.+)|(.*://[^/@\s:]*:[^/@\s]+@.*))",
                                 std::regex::icase);
  if (n.IsDefined() && n.IsScalar() && core_type(n) == Core::text) {
    problem(n, what + " must be a list of words: no shell reads it", "[" + join(split(std::string(trim(n.Scalar())), ' '), ", ") + "]");
    return {};
  }
  auto out = texts(n, what);
  if (n.IsDefined() && n.IsSequence())
    for (const auto& item : n)
      if (item.IsScalar() && std::regex_match(item.Scalar(), secret))
        problem(item, "a word of " + what + " carries a secret; anybody could read it here and in the list of processes",
                "a file with mode 0600 that the program reads");
  return out;
}

std::optional<std::string> YamlText::name(const YAML::Node& n, const std::string& what) {
  auto s = text(n, what);
  if (!s) return s;
  static const std::regex form("[a-z0-9][a-z0-9_-]{0,31}");
  if (std::regex_match(*s, form)) return s;
  std::string meant;
  for (char c : *s) {
    c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    meant += (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-' ? c : '-';
  }
  meant = meant.substr(0, 32);
  problem(n, what + " must be 1 to 32 of a-z, 0-9, _ and -, and start with a letter or digit, not '" + *s + "'",
          std::regex_match(meant, form) ? meant : "");
  return std::nullopt;
}

YamlMap::YamlMap(YamlText& text, const YAML::Node& node, std::string what)
    : text_(text), node_(node), what_(std::move(what)) {
  if (!node.IsDefined()) return;
  if (!node.IsMap()) {
    text_.problem(node, what_ + " must be a mapping (key: value), not " + kind_of(node));
    return;
  }
  valid_ = true;
  for (const auto& pair : node) {
    if (!pair.first.IsScalar()) {
      text_.problem(pair.first, "a key of " + what_ + " must be a word");
      continue;
    }
    std::string key = pair.first.Scalar();
    auto same = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
    if (same != entries_.end())
      text_.problem(pair.first, "'" + key + "' is written twice in " + what_ + "; the first is in line " +
                                    std::to_string(same->key_node.Mark().line + 1));
    else
      entries_.push_back({key, pair.first, pair.second});
  }
}

YAML::Node YamlMap::take(const std::string& key) {
  known_.insert(key);
  for (const auto& e : entries_) {
    if (e.key != key) continue;
    if (!e.value.IsNull()) return e.value;
    text_.problem(e.key_node, "'" + key + "' has no value");
  }
  return YAML::Node(YAML::NodeType::Undefined);
}

YAML::Node YamlMap::need(const std::string& key) {
  if (valid_ && !has(key)) text_.problem(node_, what_ + " needs '" + key + "'");
  return take(key);
}

bool YamlMap::has(const std::string& key) const {
  return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& e) { return e.key == key; });
}

YAML::Mark YamlMap::key_mark(const std::string& key) const {
  for (const auto& e : entries_)
    if (e.key == key) return e.key_node.Mark();
  return node_.Mark();
}

void YamlMap::misplaced(const std::string& key, const std::string& why) {
  known_.insert(key);
  if (has(key)) text_.problem(key_mark(key), "'" + key + "' " + why);
}

std::string YamlMap::one_of(const std::vector<std::string>& keys) {
  std::vector<std::string> there;
  for (const auto& k : keys) {
    known_.insert(k);
    if (has(k)) there.push_back(k);
  }
  if (there.size() == 1) return there[0];
  if (!valid_) return {};
  if (there.empty()) {
    // A misspelt kind is said once, as the unknown key that it is.
    for (const auto& e : entries_)
      if (!known_.count(e.key))
        if (auto near = nearest(e.key, keys)) return {};
    text_.problem(node_, what_ + " needs one of " + in_words(keys));
  } else {
    text_.problem(key_mark(there[1]), what_ + " has both '" + there[0] + "' and '" + there[1] + "'; one of them is one too many");
  }
  return {};
}

void YamlMap::done() {
  std::vector<std::string> known(known_.begin(), known_.end()), open;
  // A key that is already there was not what a misspelt one stood for.
  for (const auto& k : known)
    if (!has(k)) open.push_back(k);
  for (const auto& e : entries_) {
    if (known_.count(e.key)) continue;
    if (e.key == "<<") {
      text_.problem(e.key_node, "merge keys (<<) are not read; write the keys out");
      continue;
    }
    auto meant = nearest(e.key, open);
    text_.problem(e.key_node, "unknown key '" + e.key + "' in " + what_ + (meant ? "" : "; known: " + join(known, ", ")),
                  meant.value_or(""));
  }
}

}  // namespace rehome
