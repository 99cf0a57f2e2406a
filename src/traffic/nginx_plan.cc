// How one application's traffic is led elsewhere by an edit of nginx's configuration.
#include <fnmatch.h>

#include <algorithm>
#include <cctype>
#include <set>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "traffic/nginx_conf.h"

namespace rehome {
namespace {

bool passes(const std::string& name) {
  return name == "proxy_pass" || name == "fastcgi_pass" || name == "uwsgi_pass" || name == "scgi_pass" || name == "grpc_pass";
}

std::string nginx_address(const Address& a) { return a.text(); }

// "unix:/path" ends with ':' where a URI may follow.
std::string pass_address(const Address& a, const std::string& uri) {
  return a.text() + (a.is_unix() && !uri.empty() ? ":" : "");
}

// What $proxy_host is for a proxy_pass without an upstream block: the Host that the application has seen so far.
std::string proxy_host(const NginxTarget& t) {
  if (t.address.starts_with("unix:")) return "localhost";
  std::string standard = t.scheme == "https" ? ":443" : ":80";
  return t.address.ends_with(standard) ? t.address.substr(0, t.address.size() - standard.size()) : t.address;
}

struct Edit {
  std::size_t begin, end;
  std::string text;
  bool operator<(const Edit& o) const { return std::tie(begin, end, text) < std::tie(o.begin, o.end, o.text); }
};

// One block that is open during the walk, with its includes put in.
struct Level {
  const NginxDirective* block;  // null for the file's own level
  std::vector<const NginxDirective*> directives;
};

class Planner {
 public:
  Planner(const NginxFiles& files, const std::vector<std::string>& editable, const Address& application, const Address& gate,
          Millis longest_wait, bool keeps)
      : files_(files), editable_(editable.begin(), editable.end()), application_(application), gate_(gate), longest_wait_(longest_wait), keeps_(keeps) {}

  NginxPlan plan() {
    for (const auto& [path, text] : files_.text) {
      auto other = files_.same_as.find(path);
      const std::string& file = other == files_.same_as.end() ? path : other->second;
      parsed_[path] = parse_nginx(file, files_.text.at(file));
    }
    for (const auto& path : editable_)
      if (!parsed_.contains(path))
        problem(true, "nginx.not_read", path, "nginx does not read this file", "correct `files`, or include the file");
    std::vector<Level> levels;
    enter(levels, nullptr, parsed_.at(files_.main));
    bool told = std::any_of(plan_.problems.begin(), plan_.problems.end(), [](const NginxProblem& p) { return p.fatal; });
    if (led_ == 0 && !told)
      problem(true, "nginx.no_way", join({editable_.begin(), editable_.end()}, ", "),
              "no upstream and no proxy_pass leads to " + application_.text() +
                  (by_variable_.empty() ? "" : "; " + by_variable_.front()->where() + " uses a variable, which is not edited"),
              seen_.empty() ? "correct `application` or `files`"
                            : "correct `application`: these files lead to " + join({seen_.begin(), seen_.end()}, ", "));
    for (const auto* d : by_variable_) variable_pass(*d);
    for (const auto* d : no_timeout_) default_timeout(*d);
    for (const auto& [path, edits] : edits_) {
      std::string text = files_.text.at(path);
      for (auto e = edits.rbegin(); e != edits.rend(); ++e) text.replace(e->begin, e->end - e->begin, e->text);
      plan_.edited[path] = text;
    }
    return std::move(plan_);
  }

 private:
  void problem(bool fatal, std::string id, std::string where, std::string message, std::string mend) {
    for (const auto& p : plan_.problems)
      if (p.id == id && p.where == where) return;  // a file that is included twice is looked at twice
    plan_.problems.push_back({fatal, std::move(id), std::move(where), std::move(message), std::move(mend)});
  }

  void expand(const std::vector<NginxDirective>& from, std::vector<const NginxDirective*>& out, int depth = 0) {
    for (const auto& d : from) {
      if (d.name() != "include" || d.words.size() != 2) {
        out.push_back(&d);
        continue;
      }
      if (depth > 20) throw Error(Code::config, d.where() + ": includes go in circles", "nginx -t says where");
      std::string pattern = d.words[1].text;
      if (!pattern.starts_with('/')) pattern = parent_path(files_.main) + "/" + pattern;
      for (const auto& [path, tree] : parsed_)
        if (::fnmatch(pattern.c_str(), path.c_str(), FNM_PATHNAME) == 0) expand(tree, out, depth + 1);
    }
  }

  void enter(std::vector<Level>& levels, const NginxDirective* block, const std::vector<NginxDirective>& body) {
    Level level{block, {}};
    expand(body, level.directives);
    levels.push_back(std::move(level));
    // By index: the vector of levels grows below.
    for (std::size_t i = 0; i < levels.back().directives.size(); i++) {
      const NginxDirective& d = *levels.back().directives[i];
      if (d.is_block) {
        if (d.name() == "upstream") upstream(d);
        if ((d.name() == "map" || d.name() == "geo" || d.name() == "split_clients") && d.words.size() > 1) {
          std::vector<const NginxDirective*> entries;
          expand(d.block, entries);
          for (const auto* entry : entries)
            if (entry->words.size() == 2) values_[d.words.back().text].insert(entry->words[1].text);
        }
        enter(levels, &d, d.block);
      } else if (d.name() == "set" && d.words.size() == 3) {
        values_[d.words[1].text].insert(d.words[2].text);
      } else if (passes(d.name()) && d.words.size() >= 2) {
        pass(levels, d);
        if (!nearest(levels, read_timeout(d))) no_timeout_.push_back(&d);
      } else if (d.name() == "pid" && d.words.size() == 2) {
        plan_.pid_file = d.words[1].text;
      } else if (d.name().ends_with("_read_timeout") && passes(d.name().substr(0, d.name().find('_')) + "_pass") && d.words.size() == 2) {
        auto t = parse_nginx_time(d.words[1].text);
        if (t && *t < longest_wait_)
          problem(false, "nginx.timeout", d.where(),
                  d.name() + " " + d.words[1].text + ": a request that is held longer is answered 504, before max_wait (" +
                      human_duration(longest_wait_) + ")",
                  "raise it for the time of the move, or make max_pause shorter");
      }
    }
    levels.pop_back();
  }

  bool may_edit(const NginxDirective& d) {
    if (editable_.contains(d.file)) return true;
    problem(true, "nginx.other_file", d.where(), "this file leads to " + application_.text() + " too, past the gate", "add " + d.file + " to `files`");
    return false;
  }

  void edit(const NginxDirective& d, std::size_t begin, std::size_t end, std::string text, const std::string& change) {
    auto [it, fresh] = edits_[d.file].insert({begin, end, std::move(text)});
    if (fresh) plan_.changes.push_back(d.where() + ": " + change);
  }

  // Puts every value that the files give to a variable in its place. A word that still has a '$' is one that nobody here can know.
  void values_of(const std::string& word, std::vector<std::string>& out, int depth = 0) const {
    std::size_t at = word.find('$');
    if (at == std::string::npos || depth > 4 || out.size() > 100) return out.push_back(word);
    bool braces = word[at + 1] == '{';
    std::size_t from = at + (braces ? 2 : 1), end = from;
    while (end < word.size() && (std::isalnum(static_cast<unsigned char>(word[end])) || word[end] == '_')) end++;
    auto known = values_.find("$" + word.substr(from, end - from));
    if (known == values_.end()) return out.push_back(word);
    for (const auto& value : known->second) values_of(word.substr(0, at) + value + word.substr(end + (braces ? 1 : 0)), out, depth + 1);
  }

  // A variable behind an upstream's name is the URI.
  static std::string upstream_name(const NginxTarget& t) { return t.address.substr(0, t.address.find('$')); }

  void variable_pass(const NginxDirective& d) {
    std::vector<std::string> values;
    values_of(d.words[1].text, values);
    bool harmless = true;  // upstreams only, which are edited where they lead to the application
    for (const auto& value : values) {
      NginxTarget t = split_nginx_target(value);
      if (nginx_reaches(t.address, t.scheme, application_))
        return problem(true, "nginx.variable", d.where(),
                       d.name() + " " + d.words[1].text + " may lead to " + application_.text() + ", past the gate: a variable's value is not edited",
                       "let it name an upstream block that leads to " + application_.text() + ", and give its file in `files`");
      harmless = harmless && upstreams_.contains(upstream_name(t));
    }
    if (!harmless && editable_.contains(d.file))
      problem(false, "nginx.variable", d.where(), d.name() + " " + d.words[1].text + " uses a variable: whether it leads to " + application_.text() + ", past the gate, cannot be seen",
              "make sure that it does not, or let it name an upstream block");
  }

  static std::string read_timeout(const NginxDirective& pass) { return pass.name().substr(0, pass.name().find('_')) + "_read_timeout"; }

  void default_timeout(const NginxDirective& d) {
    NginxTarget t = split_nginx_target(d.words[1].text);
    if (longest_wait_ <= Millis(60'000) || (!led_upstreams_.contains(upstream_name(t)) && !nginx_reaches(t.address, t.scheme, application_))) return;
    problem(false, "nginx.timeout", d.where(),
            "there is no " + read_timeout(d) + " for " + d.name() + " " + d.words[1].text + ", so it is 60 s: a request that is held longer is answered 504, before max_wait (" +
                human_duration(longest_wait_) + ")",
            "set it for the time of the move, or make max_wait shorter");
  }

  void beside(const std::string& address, const NginxDirective& d) {
    if (!nginx_may_reach(address, application_)) return;
    problem(false, "nginx.same_port", d.where(), address + " has the port of the application at " + application_.text() + ", by another address: where that is this host's own, what goes there passes the gate by, and fails after a switch",
            "write it as " + application_.text() + " where it is the same application; leave it where it is another host's");
  }

  void upstream(const NginxDirective& block) {
    if (block.words.size() > 1) upstreams_.insert(block.words[1].text);
    std::vector<const NginxDirective*> servers, ours, inside;
    expand(block.block, inside);
    for (const auto* d : inside) {
      if (d->name() != "server" || d->words.size() < 2) continue;
      bool down = std::any_of(d->words.begin() + 2, d->words.end(), [](const NginxWord& w) { return w.text == "down"; });
      if (!down) servers.push_back(d), seen_.insert(d->words[1].text);
      if (nginx_reaches(d->words[1].text, "", application_)) ours.push_back(d);
    }
    if (ours.empty()) {
      for (const auto* d : servers) beside(d->words[1].text, *d);
      return;
    }
    if (block.words.size() > 1) led_upstreams_.insert(block.words[1].text);
    std::string name = block.words.size() > 1 ? block.words[1].text : "";
    if (!may_edit(*ours[0])) return;
    for (const auto* d : servers) {
      if (std::find(ours.begin(), ours.end(), d) != ours.end()) continue;
      bool backup = std::any_of(d->words.begin(), d->words.end(), [](const NginxWord& w) { return w.text == "backup"; });
      problem(true, "nginx.several_servers", d->where(),
              "upstream " + name + " also has " + (backup ? "the backup " : "") + "server " + d->words[1].text + ": a switch leads to one application, at " + application_.text(),
              "take it out, or mark it `down`, until the move is complete");
    }
    for (const auto* d : ours) {
      if (!may_edit(*d)) continue;
      led_++;
      edit(*d, d->words[1].begin, d->words[1].end, nginx_address(gate_), "server " + d->words[1].text + " becomes " + nginx_address(gate_));
      for (const auto& w : d->words)
        if (w.text.starts_with("max_conns=") && w.text != "max_conns=0")
          problem(false, "nginx.max_conns", d->where(), w.text + ": while requests are held, more than that are answered 502",
                  "raise it for the time of the move");
    }
    bool said = false;
    for (const auto* d : inside) {
      if (!d->name().starts_with("keepalive") || !may_edit(*d)) continue;
      // A kept connection would carry requests that the gate has not held.
      std::string text = d->name();
      for (std::size_t i = 1; i < d->words.size(); i++) text += " " + d->words[i].text;
      bool off = keeps_ && d->name() == "keepalive";
      edit(*d, d->begin, d->end, off ? "keepalive 0;" : "", text + (off ? " becomes keepalive 0" : " is out"));
      said = said || off;
    }
    // At the end: what chooses the server must come before it.
    if (keeps_ && !said && may_edit(block)) edit(block, block.end - 1, block.end - 1, "keepalive 0; ", "keepalive 0 comes in");
  }

  const Level* nearest(const std::vector<Level>& levels, const std::string& name) const {
    for (auto l = levels.rbegin(); l != levels.rend(); ++l)
      for (const auto* d : l->directives)
        if (d->name() == name) return &*l;
    return nullptr;
  }

  void pass(const std::vector<Level>& levels, const NginxDirective& d) {
    NginxTarget t = split_nginx_target(d.words[1].text);
    if (t.address.find('$') != std::string::npos) {
      by_variable_.push_back(&d);
      return;
    }
    if (!nginx_reaches(t.address, t.scheme, application_)) {
      // A name without a dot or port is an upstream: its servers say more.
      if (t.address.find_first_of(".:") != std::string::npos && editable_.contains(d.file)) seen_.insert(t.address);
      beside(t.address, d);
      return;
    }
    if (!may_edit(d)) return;
    for (const auto& level : levels)
      for (const auto* b : level.directives)
        if (b->name() == "proxy_bind")
          problem(true, "nginx.proxy_bind", b->where(), "proxy_bind: from the gate, the application sees the gate's own address",
                  "take it out for the time of the move");
    led_++;
    // The quotes of a quoted word, if any, stay.
    std::size_t at = d.words[1].begin + t.at + (files_.text.at(d.file)[d.words[1].begin] == d.words[1].text[0] ? 0u : 1u);
    std::size_t end = at + t.address.size();
    if (t.address.starts_with("unix:") && files_.text.at(d.file)[end] == ':') end++;
    edit(d, at, end, pass_address(gate_, t.uri), d.name() + " " + t.address + " becomes " + nginx_address(gate_));
    if (d.name() == "proxy_pass" && !t.scheme.empty()) keep_host(levels, d, t), keep_cache(levels, d);
    if (d.name() == "grpc_pass") keep_host(levels, d, t, "grpc_set_header");
  }

  void keep_cache(const std::vector<Level>& levels, const NginxDirective& d) {
    const Level* cached = nearest(levels, "proxy_cache");
    if (!cached || nearest(levels, "proxy_cache_key")) return;
    for (const auto* c : cached->directives)
      if (c->name() == "proxy_cache" && c->words.size() == 2 && c->words[1].text != "off")
        problem(false, "nginx.cache", d.where(), "without a proxy_cache_key the keys of proxy_cache " + c->words[1].text + " hold the address of proxy_pass: what is cached is not found after begin, and again after complete",
                "write a proxy_cache_key without that address before begin, or begin when the application bears an empty cache");
  }

  // The Host that the application sees, and the redirects that nginx rewrites, come from the address in proxy_pass where
  // nothing else sets them: it is changed for the gate, so they are said in words.
  void keep_host(const std::vector<Level>& levels, const NginxDirective& d, const NginxTarget& t, const std::string& set = "proxy_set_header") {
    std::size_t place = levels.size() - 1;
    while (place > 0 && levels[place].block->name() != "location") place--;
    const NginxDirective* location = levels[place].block;
    if (!location) return;
    std::vector<Level> outer(levels.begin(), levels.begin() + static_cast<std::ptrdiff_t>(place) + 1);
    const Level* headers = nearest(outer, set);
    std::string more;
    bool has_host = false;
    if (headers) {
      for (const auto* h : headers->directives)
        if (h->name() == set && h->words.size() > 1) {
          std::string header = h->words[1].text;
          std::transform(header.begin(), header.end(), header.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
          has_host = has_host || header == "host";
        }
      // One such line here would end the inheritance of the others.
      if (!has_host && headers != &outer.back())
        for (const auto* h : headers->directives)
          if (h->name() == set) more += " " + files_.text.at(h->file).substr(h->begin, h->end - h->begin);
    }
    std::string host = proxy_host(t);
    if (!has_host) more += " " + set + " Host " + host + ";";
    // Where the URI has a variable nginx rewrites none by itself.
    if (set == "proxy_set_header" && t.uri.find('$') == std::string::npos && !nearest(outer, "proxy_redirect") && location->words.size() >= 2) {
      bool prefix = location->words.size() == 2 || location->words[1].text == "=" || location->words[1].text == "^~";
      std::string from = t.scheme + "://" + t.address + (t.address.starts_with("unix:") ? ":" : "");
      if (t.uri.empty())
        more += " proxy_redirect " + from + "/ /;";
      else if (prefix)
        more += " proxy_redirect " + from + t.uri + " " + location->words.back().text + ";";
    }
    if (more.empty()) return;
    std::string change = has_host ? "redirects to " + host + " are rewritten as before" : "Host stays " + host;
    // Inside an `if` no header can be set: the line goes before it.
    const NginxDirective* before = place + 1 < levels.size() ? levels[place + 1].block : nullptr;
    if (before && before->file == d.file)
      edit(d, before->begin, before->begin, more.substr(1) + " ", change);
    else
      edit(d, d.end, d.end, more, change);
  }

  const NginxFiles& files_;
  std::set<std::string> editable_;
  const Address& application_;
  const Address& gate_;
  Millis longest_wait_;
  bool keeps_;
  std::map<std::string, std::vector<NginxDirective>> parsed_;
  std::map<std::string, std::set<Edit>> edits_;
  NginxPlan plan_;
  std::set<std::string> seen_;
  std::set<std::string> upstreams_;
  std::map<std::string, std::set<std::string>> values_;   // of each "$variable", by `set` and `map`
  std::set<std::string> led_upstreams_;
  std::vector<const NginxDirective*> by_variable_, no_timeout_;
  int led_ = 0;
};

}  // namespace

NginxPlan plan_nginx(const NginxFiles& files, const std::vector<std::string>& editable, const Address& application,
                     const Address& gate, Millis longest_wait, bool keeps) {
  return Planner(files, editable, application, gate, longest_wait, keeps).plan();
}

}  // namespace rehome
