// nginx's configuration language, as far as it must be read to lead an application's traffic elsewhere: a tree of
// directives with their places in the text, and edits that leave every other byte as it was. No I/O.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sys/net.h"

namespace rehome {

struct NginxWord {
  std::string text;               // without quotes and escapes
  std::size_t begin = 0, end = 0; // in the file, with its quotes
};

struct NginxDirective {
  std::vector<NginxWord> words;   // the name first
  std::size_t begin = 0, end = 0; // up to and with the ';' or '}'
  bool is_block = false;
  std::vector<NginxDirective> block;
  std::string file;
  int line = 0;                   // from 1
  const std::string& name() const { return words.front().text; }
  std::string where() const { return file + ":" + std::to_string(line); }
};

// Throws Error(config) naming file and line where braces, quotes or semicolons do not fit.
std::vector<NginxDirective> parse_nginx(const std::string& file, std::string_view text);

// Where a `server` or a `*_pass` leads: "http://127.0.0.1:8000/a" has scheme "http", address "127.0.0.1:8000", uri "/a".
struct NginxTarget {
  std::string scheme, address, uri;
  std::size_t at = 0;             // where the address starts in the word
};
NginxTarget split_nginx_target(std::string_view word);
// True when nginx, connecting to `address` (as an `upstream` server, or after `scheme`), arrives at `application`:
// localhost and an application on every address count as 127.0.0.1, a missing port as the scheme's own.
bool nginx_reaches(std::string_view address, std::string_view scheme, const Address& application);
// Whether it names the application's port at another address, or by another name, which may be this host's own too.
bool nginx_may_reach(std::string_view address, const Address& application);

// All that nginx reads: path -> text, and the first file.
struct NginxFiles {
  std::string main;
  std::map<std::string, std::string> text;
  std::map<std::string, std::string> same_as{};  // another name of a file (a symbolic link) -> the one that is edited
};
// What `nginx -T` prints, as files. Throws Error(config) when it holds none.
NginxFiles split_nginx_dump(std::string_view dump);

struct NginxProblem {
  bool fatal = true;
  std::string id, where, message, mend;
};

struct NginxPlan {
  std::map<std::string, std::string> edited;  // only files that change
  std::vector<std::string> changes;           // in words, "FILE:LINE: server 127.0.0.1:8000 becomes 127.0.0.1:8001"
  std::vector<NginxProblem> problems;         // with a fatal one, `edited` is not to be used
  std::string pid_file;                       // empty: the built-in one
};

// What must change in `editable` (paths of `files`) so that what goes to `application` goes to `gate`, one connection a
// request, and so that the application sees the same requests as before. What nginx would read from other files is
// looked at too: another way to the application there is a problem, since it would pass the gate by. `keeps`: see below.
NginxPlan plan_nginx(const NginxFiles& files, const std::vector<std::string>& editable, const Address& application,
                     const Address& gate, Millis longest_wait, bool keeps = false);
// Whether the nginx that prints this for -v keeps connections to an `upstream` that does not say `keepalive 0`: from 1.29.7 on. Older
// ones do not take that 0.
bool nginx_keeps_upstreams(std::string_view version);

// Seconds or milliseconds as nginx writes them ("60", "1m 30s", "500ms"); nullopt for anything else.
std::optional<Millis> parse_nginx_time(std::string_view text);

}  // namespace rehome
