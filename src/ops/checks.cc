#include "ops/checks.h"

#include <algorithm>
#include <charconv>
#include <thread>

#include "base/text.h"
#include "gate/proxy.h"

namespace rehome::ops {
namespace {

// The gate gives the application such a header with each connection, so that it waits for one. It names this host.
std::string proxy_header(int version) {
  const std::string line = "PROXY TCP4 127.0.0.1 127.0.0.1 65535 80\r\n";
  return version == 0 ? "" : version == 1 ? line : proxy_version_2(line);
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

HttpCanary::HttpCanary(const Deployment& deployment, Site& site, const CheckConfig& check, bool past_gate)
    : site_(site), check_(check), place_(http_place(deployment, check, site.side(), past_gate)) {}

std::vector<CheckResult> ask_at_once(const Deployment& deployment, Site& site, const CheckConfig& check, int n, Deadline most) {
  std::vector<CheckResult> results(static_cast<std::size_t>(n));
  std::vector<std::jthread> clients;
  for (auto& r : results)
    clients.emplace_back([&] {
      try {
        r = HttpCanary(deployment, site, check, true).ask(most);
      } catch (const std::exception& e) {
        r = {.name = check.name, .side = site.side(), .said = e.what()};
      }
    });
  clients.clear();
  return results;
}

void HttpCanary::open() { fd_ = site_.open_relay(place_.address); }

CheckResult HttpCanary::ask(Deadline most) {
  Deadline deadline = Deadline::in(most.left(check_.timeout));
  Ticks from = system_clock().now();
  CheckResult r{.name = check_.name, .side = site_.side()};
  try {
    if (!fd_) open();
    // HTTP/1.0: the end of the connection is the end of the answer, and nothing is chunked.
    send_all(fd_, proxy_header(place_.proxy_protocol) + "GET " + place_.path + " HTTP/1.0\r\nHost: " + place_.host + "\r\nUser-Agent: rehome\r\nConnection: close\r\n\r\n", deadline);
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

CheckResult ask_http(const Deployment& deployment, Site& site, const CheckConfig& check, bool before_switch, Deadline most) {
  const TrafficConfig* t = traffic_of(deployment, check, site.side());
  if (!before_switch || !t) return HttpCanary(deployment, site, check, false).ask(most);
  std::string why;
  if (t->take != TrafficConfig::Take::listen) {
    why = "the application's own address leads to the gate there";
  } else {
    HttpCanary canary(deployment, site, check, true);
    try {
      canary.open();
      return canary.ask(most);
    } catch (const Error& e) {
      const bool cold = deployment.services.empty() || std::any_of(deployment.services.begin(), deployment.services.end(), [](const ServiceConfig& s) { return !s.warm; });
      if (!cold) return {.name = check.name, .side = site.side(), .said = "the application: " + std::string(e.what())};
      why = "nobody listens at " + t->on[site.side()].application + " before the switch, or whoever does it, starts it";
    }
  }
  CheckResult r = HttpCanary(deployment, site, check, false).ask(most);
  const std::string answered = why + ", so it was the " + std::string(side_name(other(site.side()))) + " that answered, through the gate";
  r.said += (r.said.empty() ? "" : "; ") + answered + (r.ok ? ": canary: write asks after the switch" : "");
  return r;
}

CheckResult ask_sql(Store& store, StoreContext& context, const CheckConfig& check, Side side) {
  Ticks from = system_clock().now();
  CheckResult r{.name = check.name, .side = side};
  try {
    auto value = store.ask(context, side, check.database, check.sql, check.timeout, check.write_canary);
    r.ok = !check.expect || value == check.expect;
    if (!r.ok) r.said = (value ? "answered '" + value->substr(0, 120) + "'" : "did not answer with one value") + " instead of '" + *check.expect + "'";
  } catch (const Error& e) {
    r.said = e.what();
  }
  r.ms = ms_between(from, system_clock().now());
  return r;
}

namespace {

CheckResult try_check(Run& run, const CheckConfig& check, Side side, bool before_switch, Deadline deadline) {
  Ticks from = system_clock().now();
  CheckResult r{.name = check.name, .side = side};
  try {
    switch (check.kind) {
      case CheckConfig::Kind::http:
        return ask_http(run.deployment(), run.site(side), check, before_switch, deadline);
      case CheckConfig::Kind::sql:
        for (auto& store : run.stores())
          if (store->name() == check.store) return ask_sql(*store, run.stores_context(), check, side);
        break;
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

}  // namespace

CheckResult run_check(Run& run, const CheckConfig& check, Side side, bool before_switch) {
  const Deadline until = Deadline::in(check.timeout);
  for (Millis wait(50);; wait = std::min(2 * wait, Millis(500))) {
    CheckResult r = try_check(run, check, side, before_switch, until);
    if (r.ok || until.left(check.timeout) <= wait) return r;
    system_clock().sleep(wait);
  }
}

bool meant_for(const CheckConfig& check, Side side) {
  return check.where == CheckConfig::Where::both || (check.where == CheckConfig::Where::source) == (side == Side::source);
}

std::vector<CheckResult> run_checks(Run& run, Side side) {
  std::vector<CheckResult> results;
  for (const auto& check : run.deployment().checks) {
    if (check.write_canary) continue;
    if (meant_for(check, side)) results.push_back(run_check(run, check, side, true));
  }
  return results;
}

}  // namespace rehome::ops
