#include "ops/checks.h"

#include <charconv>

#include "base/text.h"

namespace rehome::ops {
namespace {

struct Url {
  std::string address, host, path;
};

Url parse_url(const std::string& url) {
  std::string_view rest = url;
  if (!rest.starts_with("http://"))
    throw Error(Code::config, "'" + url + "' is not an http:// address", "for https use a command check with curl");
  rest.remove_prefix(7);
  auto slash = rest.find('/');
  Url u;
  u.host = rest.substr(0, slash);
  u.path = slash == std::string_view::npos ? "/" : std::string(rest.substr(slash));
  u.address = u.host.find(':') == std::string::npos || u.host.ends_with(']') ? u.host + ":80" : u.host;
  return u;
}

CheckResult judge(const CheckConfig& check, Side side, const std::string& answer) {
  CheckResult r{.name = check.name, .side = side};
  int status = 0;
  auto space = answer.find(' ');
  if (!answer.starts_with("HTTP/1.") || space == std::string::npos ||
      std::from_chars(answer.data() + space + 1, answer.data() + answer.size(), status).ec != std::errc()) {
    r.said = answer.empty() ? "the server closed the connection without an answer" : "the answer is not HTTP";
    return r;
  }
  auto head = answer.find("\r\n\r\n");
  std::string body = head == std::string::npos ? "" : answer.substr(head + 4);
  if (status != check.status)
    r.said = "status " + std::to_string(status) + " instead of " + std::to_string(check.status) + ": " + body.substr(0, 120);
  else if (!check.body.empty() && body.find(check.body) == std::string::npos)
    r.said = "the body does not hold '" + check.body + "': " + body.substr(0, 120);
  else
    r.ok = true;
  return r;
}

}  // namespace

HttpCanary::HttpCanary(const Deployment& deployment, Site& site, const CheckConfig& check, const std::string& address_override) : site_(site), check_(check) {
  Url u = parse_url(url_at(deployment, check, site.side()));
  address_ = address_override.empty() ? u.address : address_override;
  host_ = u.host;
  path_ = u.path;
}

void HttpCanary::open() { fd_ = site_.open_relay(address_); }

CheckResult HttpCanary::ask(Deadline deadline) {
  Ticks from = system_clock().now();
  CheckResult r{.name = check_.name, .side = site_.side()};
  try {
    if (!fd_) open();
    // HTTP/1.0: the end of the connection is the end of the answer, and nothing is chunked.
    send_all(fd_, "GET " + path_ + " HTTP/1.0\r\nHost: " + host_ + "\r\nUser-Agent: rehome\r\nConnection: close\r\n\r\n", deadline);
    Reader reader(fd_);
    std::string answer;
    try {
      while (auto line = reader.line(deadline, 1 << 20)) {
        answer += *line + "\n";
        if (answer.size() > (1 << 20)) break;
      }
    } catch (const Error& e) {
      // A body need not end in a newline; a deadline is another matter.
      if (e.code == Code::timeout) throw;
      answer += reader.take_buffered();
    }
    r = judge(check_, site_.side(), answer);
  } catch (const Error& e) {
    r.said = e.what();
  }
  fd_.reset();
  r.ms = ms_between(from, system_clock().now());
  return r;
}

CheckResult run_check(Run& run, const CheckConfig& check, Side side, Deadline deadline) {
  Ticks from = system_clock().now();
  CheckResult r{.name = check.name, .side = side};
  try {
    switch (check.kind) {
      case CheckConfig::Kind::http:
        return HttpCanary(run.deployment(), run.site(side), check, "").ask(deadline);
      case CheckConfig::Kind::sql: {
        for (auto& store : run.stores()) {
          if (store->name() != check.store) continue;
          std::string value = store->ask(run.stores_context(), side, check.database, check.sql);
          r.ok = value == check.expect;
          if (!r.ok) r.said = "answered '" + value.substr(0, 120) + "' instead of '" + check.expect + "'";
        }
        break;
      }
      case CheckConfig::Kind::command: {
        Outcome o = run.site(side).exec({.argv = check.command}, deadline);
        r.ok = o.ok();
        if (!r.ok) r.said = "status " + std::to_string(o.status) + ": " + std::string(trim(o.err)).substr(0, 200);
        break;
      }
    }
  } catch (const Error& e) {
    r.said = e.what();
  }
  r.ms = ms_between(from, system_clock().now());
  return r;
}

bool meant_for(const CheckConfig& check, Side side) {
  return check.where == CheckConfig::Where::both || (check.where == CheckConfig::Where::source) == (side == Side::source);
}

std::vector<CheckResult> run_checks(Run& run, Side side) {
  std::vector<CheckResult> results;
  for (const auto& check : run.deployment().checks) {
    if (check.write_canary) continue;
    if (meant_for(check, side)) results.push_back(run_check(run, check, side, Deadline::in(check.timeout)));
  }
  return results;
}

}  // namespace rehome::ops
