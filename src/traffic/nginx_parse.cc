#include <cctype>
#include <cstdlib>

#include "base/error.h"
#include "base/text.h"
#include "traffic/nginx_conf.h"

namespace rehome {
namespace {

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

class Parser {
 public:
  Parser(const std::string& file, std::string_view text) : file_(file), text_(text) {}

  std::vector<NginxDirective> block(bool inside) {
    std::vector<NginxDirective> out;
    while (true) {
      skip_space();
      if (at_ == text_.size()) {
        if (inside) fail("a '}' is missing at the end");
        return out;
      }
      if (text_[at_] == '}') {
        if (!inside) fail("a '}' has no '{'");
        at_++;
        return out;
      }
      out.push_back(directive());
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(Code::config, file_ + ":" + std::to_string(line_) + ": " + what, "nginx -t says what nginx itself makes of it");
  }

  void step() {
    if (text_[at_] == '\n') line_++;
    at_++;
  }

  void skip_space() {
    while (at_ < text_.size()) {
      if (is_space(text_[at_])) {
        step();
      } else if (text_[at_] == '#') {
        while (at_ < text_.size() && text_[at_] != '\n') at_++;
      } else {
        return;
      }
    }
  }

  NginxDirective directive() {
    NginxDirective d;
    d.file = file_;
    d.line = line_;
    d.begin = at_;
    while (true) {
      skip_space();
      if (at_ == text_.size()) fail("a ';' is missing");
      char c = text_[at_];
      if (c == ';' || c == '{') {
        if (d.words.empty()) fail(std::string("'") + c + "' comes before any word");
        at_++;
        if (c == '{') {
          d.is_block = true;
          if (d.name().ends_with("_by_lua_block"))
            skip_foreign();
          else
            d.block = block(true);
        }
        d.end = at_;
        return d;
      }
      if (c == '}') fail("a ';' is missing before '}'");
      d.words.push_back(word());
    }
  }

  NginxWord word() {
    NginxWord w;
    w.begin = at_;
    char quote = text_[at_];
    if (quote == '"' || quote == '\'') {
      step();
      while (at_ < text_.size() && text_[at_] != quote) take(w.text);
      if (at_ == text_.size()) fail("a quote does not end");
      at_++;
      w.end = at_;
      return w;
    }
    while (at_ < text_.size() && !is_space(text_[at_]) && text_[at_] != ';') {
      if (text_[at_] == '{') {
        // "${name}" is a variable, anything else a block.
        if (w.text.empty() || w.text.back() != '$') break;
        while (at_ < text_.size() && text_[at_] != '}') take(w.text);
        if (at_ == text_.size()) fail("a '${' does not end");
      }
      take(w.text);
    }
    w.end = at_;
    return w;
  }

  void take(std::string& out) {
    if (text_[at_] == '\\' && at_ + 1 < text_.size()) {
      char next = text_[at_ + 1];
      if (next != '"' && next != '\'' && next != '\\' && next != ' ') out += '\\';
      step();
    }
    out += text_[at_];
    step();
  }

  // Lua: its braces balance, but for those in strings, long brackets and comments.
  void skip_foreign() {
    for (int depth = 1; depth > 0;) {
      if (at_ == text_.size()) fail("a lua block does not end");
      char c = text_[at_];
      bool comment = text_.substr(at_).starts_with("--");
      if (comment) at_ += 2;
      if (skip_long_bracket()) continue;
      if (comment) {
        while (at_ < text_.size() && text_[at_] != '\n') at_++;
        continue;
      }
      step();
      if (c == '"' || c == '\'') {
        while (at_ < text_.size() && text_[at_] != c) {
          if (text_[at_] == '\\' && at_ + 1 < text_.size()) step();
          step();
        }
        if (at_ == text_.size()) fail("a lua string does not end");
        step();
      }
      if (c == '{') depth++;
      if (c == '}') depth--;
    }
  }

  // "[[ ... ]]", with as many '=' between the brackets at its end as at its begin. False: none begins here.
  bool skip_long_bracket() {
    if (at_ == text_.size() || text_[at_] != '[') return false;
    std::size_t second = text_.find_first_not_of('=', at_ + 1);
    if (second == std::string_view::npos || text_[second] != '[') return false;
    std::string close = "]" + std::string(second - at_ - 1, '=') + "]";
    std::size_t end = text_.find(close, second);
    if (end == std::string_view::npos) fail("a lua block does not end");
    while (at_ < end + close.size()) step();
    return true;
  }

  const std::string& file_;
  std::string_view text_;
  std::size_t at_ = 0;
  int line_ = 1;
};

}  // namespace

std::vector<NginxDirective> parse_nginx(const std::string& file, std::string_view text) {
  return Parser(file, text).block(false);
}

NginxTarget split_nginx_target(std::string_view word) {
  NginxTarget t;
  if (auto scheme = word.find("://"); scheme != std::string_view::npos) {
    t.scheme = word.substr(0, scheme);
    t.at = scheme + 3;
  }
  std::string_view rest = word.substr(t.at);
  std::size_t end;
  if (rest.starts_with("unix:")) {
    end = rest.find(':', 5);
    if (end != std::string_view::npos) t.uri = rest.substr(end + 1);
  } else {
    end = rest.find_first_of("/?");
    // Behind a whole host:port a variable is the URI, or begins with it.
    if (auto dollar = rest.find('$'); dollar < end) {
      auto colon = rest.find_last_not_of("0123456789", dollar - (dollar > 0 ? 1 : 0));
      if (dollar > 0 && colon != std::string_view::npos && colon > 0 && colon + 1 < dollar && rest[colon] == ':') end = dollar;
    }
    if (end != std::string_view::npos) t.uri = rest.substr(end);
  }
  t.address = rest.substr(0, end);
  return t;
}

namespace {
std::optional<Address> tcp_address(std::string_view address, std::string_view scheme, bool& has_port) {
  if (address.starts_with("unix:") || address.find('$') != std::string_view::npos) return {};
  std::string text(address);
  auto colon = text.rfind(':');
  has_port = colon != std::string::npos && (text[0] != '[' || text.find(']') < colon);
  if (!has_port) text += scheme == "https" || scheme == "grpcs" ? ":443" : ":80";
  try {
    return Address::parse(text);
  } catch (const Error&) {
    return {};
  }
}
}  // namespace

bool nginx_reaches(std::string_view address, std::string_view scheme, const Address& application) {
  if (address.starts_with("unix:")) return application.is_unix() && address.substr(5) == application.path;
  if (application.is_unix()) return false;
  bool has_port;
  auto a = tcp_address(address, scheme, has_port);
  return a && reach_the_same(*a, application);
}

bool nginx_may_reach(std::string_view address, const Address& application) {
  if (application.is_unix()) return false;
  bool has_port;
  auto a = tcp_address(address, "", has_port);
  return a && has_port && a->port == application.port && !reach_the_same(*a, application);
}

NginxFiles split_nginx_dump(std::string_view dump) {
  NginxFiles files;
  constexpr std::string_view mark = "# configuration file ";
  std::string* current = nullptr;
  for (std::size_t at = 0; at < dump.size();) {
    auto end = dump.find('\n', at);
    std::string_view line = dump.substr(at, end == std::string_view::npos ? end : end - at);
    if (line.starts_with(mark) && line.ends_with(":")) {
      std::string path(line.substr(mark.size(), line.size() - mark.size() - 1));
      if (files.main.empty()) files.main = path;
      current = &files.text[path];
      current->clear();
    } else if (current) {
      current->append(line).append("\n");
    }
    at = end == std::string_view::npos ? dump.size() : end + 1;
  }
  if (files.main.empty()) throw Error(Code::config, "nginx -T prints no configuration file", "is this program nginx?");
  return files;
}

bool nginx_keeps_upstreams(std::string_view version) {
  // "nginx version: nginx/1.22.1 (Ubuntu)"; openresty's numbers begin with nginx's. Others have numbers of their own.
  for (std::string_view name : {": nginx/", ": openresty/"}) {
    auto at = version.find(name);
    if (at == std::string_view::npos) continue;
    std::vector<int> has;
    for (const auto& part : split(version.substr(at + name.size(), version.find_first_of(" \n", at + name.size()) - at - name.size()), '.')) has.push_back(std::atoi(part.c_str()));
    return has >= std::vector<int>{1, 29, 7};
  }
  return false;
}

std::optional<Millis> parse_nginx_time(std::string_view text) {
  std::int64_t total = 0;
  bool any = false;
  for (std::size_t i = 0; i < text.size();) {
    if (text[i] == ' ') {
      i++;
      continue;
    }
    std::int64_t n = 0;
    std::size_t digits = i;
    for (; i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])); i++) n = n * 10 + (text[i] - '0');
    if (i == digits || i - digits > 9) return std::nullopt;
    std::size_t unit = i;
    while (i < text.size() && std::isalpha(static_cast<unsigned char>(text[i]))) i++;
    std::string_view u = text.substr(unit, i - unit);
    std::int64_t ms = u == "ms" ? 1 : u == "s" || u.empty() ? 1000 : u == "m" ? 60'000 : u == "h" ? 3600'000 : u == "d" ? 86'400'000 : 0;
    if (ms == 0) return std::nullopt;
    total += n * ms;
    any = true;
  }
  if (!any) return std::nullopt;
  return Millis(total);
}

}  // namespace rehome
