// The deployment's checks against a real listener and a real PostgreSQL.
#include "ops/checks.h"

#include <gtest/gtest.h>

#include <thread>

#include "stores/postgres/testing/local_site.h"
#include "stores/postgres/testing/pg_server.h"
#include "stores/registry.h"

namespace rehome::ops {
namespace {

using testing::PgServer;
using testing::World;

// Answers one request after `delay`, and keeps what came before the answer.
class OneAnswer {
 public:
  explicit OneAnswer(Millis delay = Millis(0), const char* at = "127.0.0.1:0")
      : listener_(listen_on(Address::parse(at))), port(local_port(listener_)), thread_([this, delay] {
          auto fd = accept_from(listener_, Deadline::in(Millis(10000)));
          if (!fd) return;
          Reader in(*fd);
          try {
            for (auto line = in.line(Deadline::in(Millis(10000))); line; line = in.line(Deadline::in(Millis(10000)))) {
              received += *line + "\n";
              if (received.ends_with("close\r\n\r\n")) break;
            }
            system_clock().sleep(delay);
            send_all(*fd, "HTTP/1.0 200 OK\r\n\r\nok");
          } catch (const Error&) {
            // The one who asked has left.
          }
        }) {}
  std::string seen() { return thread_.join(), received; }

 private:
  Fd listener_;

 public:
  const std::uint16_t port;
  std::string received;

 private:
  std::jthread thread_;
};

Deployment with_application(std::uint16_t port, int proxy_protocol) {
  Deployment d;
  TrafficConfig first, second;
  first.on.source.application = first.on.target.application = "127.0.0.1:1";
  second.on.source.application = second.on.target.application = "127.0.0.1:" + std::to_string(port);
  second.on.source.front = second.on.target.front = "http://front.example:8080/health";
  second.proxy_protocol = proxy_protocol;
  d.traffic = {first, second};
  CheckConfig check;
  check.name = "health";
  check.url = "http://front.example:8080/ready";
  check.body = "ok";
  d.checks = {check};
  return d;
}

CheckResult canary(World& w, Millis most = Millis(5000)) {
  HttpCanary canary(w.deployment, w.target, w.deployment.checks[0], true);
  canary.open();
  return canary.ask(Deadline::in(most));
}

TEST(Checks, ACanaryAsksTheSecondApplicationAsItsGateWould) {
  for (int version : {0, 1, 2}) {
    OneAnswer application;
    World w(with_application(application.port, version));
    CheckResult r = canary(w);
    EXPECT_TRUE(r.ok) << r.said;
    std::string seen = application.seen();
    const std::string request = "GET /ready HTTP/1.0\r\nHost: front.example:8080\r\n";
    auto at = seen.find(request);
    ASSERT_NE(at, std::string::npos) << seen;
    const std::string headers[] = {"", "PROXY TCP4 127.0.0.1 127.0.0.1 65535 80\r\n",
                                   std::string("\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x7f\0\0\1\x7f\0\0\1\xff\xff\0\x50", 28)};
    EXPECT_EQ(seen.substr(0, at), headers[version]);
  }
}

TEST(Checks, AServiceOfIpv6IsAsked) {
  for (bool past_gate : {false, true}) {
    OneAnswer application(Millis(0), "[::1]:0");
    Deployment d = with_application(application.port, 1);
    const std::string at = "[::1]:" + std::to_string(application.port);
    d.traffic[1].on.source.application = d.traffic[1].on.target.application = at;
    if (!past_gate) d.checks[0].url = "http://" + at + "/ready";
    World w(d);
    CheckResult r = HttpCanary(w.deployment, w.target, w.deployment.checks[0], past_gate).ask(Deadline::in(Millis(5000)));
    EXPECT_TRUE(r.ok) << r.said;
    EXPECT_NE(application.seen().find(past_gate ? "Host: front.example:8080\r\n" : "Host: " + at + "\r\n"), std::string::npos) << application.received;
  }
}

// Answers every request with one status, as the source does through the target's gate while it serves.
class Answers {
 public:
  explicit Answers(int status) : listener_(listen_on(Address::parse("127.0.0.1:0"))), port(local_port(listener_)), thread_([this, status](std::stop_token) {
      while (auto fd = accept_from(listener_, {}, &stop_)) {
        try {
          Reader in(*fd);
          while (auto line = in.line(Deadline::in(Millis(5000))))
            if (*line == "\r") break;
          send_all(*fd, "HTTP/1.0 " + std::to_string(status) + " Said\r\n\r\nok");
        } catch (const Error&) {
          // Who only looked whether somebody listens.
        }
      }
    }) {}
  ~Answers() { stop_ = true; }

 private:
  Fd listener_;
  std::atomic<bool> stop_{false};

 public:
  const std::uint16_t port;

 private:
  std::jthread thread_;
};

TEST(Checks, BeforeASwitchTheApplicationIsAskedAndNotTheSideThatItsGateLeadsTo) {
  Answers front(200);
  std::optional<Answers> application(500);
  Deployment d = with_application(application->port, 0);
  const std::string door = "http://127.0.0.1:" + std::to_string(front.port) + "/health";
  d.traffic[1].on.source.front = d.traffic[1].on.target.front = door;
  d.checks[0].url = door;
  World w(d);
  auto ask = [&](bool before) { return ask_http(w.deployment, w.target, w.deployment.checks[0], before, Deadline::in(Millis(5000))); };
  CheckResult r = ask(true);
  EXPECT_FALSE(r.ok);
  EXPECT_TRUE(r.said.starts_with("status 500")) << r.said;
  EXPECT_TRUE(ask(false).ok);
  application.reset();
  w.deployment.services = {ServiceConfig{.name = "web", .warm = true}};
  EXPECT_FALSE(ask(true).ok);
  // One that only the switch starts, and one whose address the gate has taken: the front door is asked, and the result says whose it is.
  w.deployment.services = {ServiceConfig{.name = "web", .warm = false}};
  r = ask(true);
  EXPECT_TRUE(r.ok);
  EXPECT_NE(r.said.find("it was the source that answered"), std::string::npos) << r.said;
  w.deployment.services.clear();
  w.deployment.traffic[1].take = TrafficConfig::Take::redirect;
  r = ask(true);
  EXPECT_TRUE(r.ok);
  EXPECT_NE(r.said.find("leads to the gate"), std::string::npos) << r.said;
}

// Answers nobody until `n` have asked.
TEST(Checks, ManyAskAtOnce) {
  constexpr std::size_t n = 8;
  Fd listener = listen_on(Address::parse("127.0.0.1:0"));
  World w(with_application(local_port(listener), 0));
  std::jthread application([&] {
    std::vector<Fd> clients;
    while (clients.size() < n) {
      auto fd = accept_from(listener, Deadline::in(Millis(5000)));
      if (!fd) return;
      Reader in(*fd);
      for (auto line = in.line(Deadline::in(Millis(5000))); line && *line != "\r"; line = in.line(Deadline::in(Millis(5000)))) continue;
      clients.push_back(std::move(*fd));
    }
    for (auto& fd : clients) send_all(fd, "HTTP/1.0 200 OK\r\n\r\nok");
  });
  const auto results = ask_at_once(w.deployment, w.target, w.deployment.checks[0], n, Deadline::in(Millis(5000)));
  ASSERT_EQ(results.size(), n);
  for (const auto& r : results) EXPECT_TRUE(r.ok) << r.said;
}

TEST(Checks, TheTimeoutHoldsInsideThePauseToo) {
  OneAnswer application(Millis(3000));
  World w(with_application(application.port, 0));
  w.deployment.checks[0].timeout = Millis(100);
  CheckResult r = canary(w);
  EXPECT_FALSE(r.ok);
  EXPECT_LT(r.ms, 2000);
}

struct Sql : ::testing::Test {
  Sql() : server(15), w(testing::deployment_between(server.socket_directory(), server.socket_directory(), {"shop"})) {
    server.session("postgres")->exec("CREATE DATABASE shop");
    server.session("shop")->exec("CREATE TABLE public.orders(id int)");
    stores = make_stores(w.deployment);
  }
  CheckResult ask(const std::string& sql, std::optional<std::string> expect, bool write = false, Millis timeout = Millis(5000)) {
    CheckConfig c;
    c.name = "orders";
    c.kind = CheckConfig::Kind::sql;
    c.store = "db", c.database = "shop", c.sql = sql, c.expect = expect, c.write_canary = write, c.timeout = timeout;
    return ask_sql(*stores[0], w.context(), c, Side::target);
  }
  std::int64_t orders() { return server.session("shop")->number("SELECT count(*) FROM public.orders"); }
  PgServer server;
  World w;
  std::vector<std::unique_ptr<Store>> stores;
};

TEST_F(Sql, AnyAnswerWillDoWhereNoneIsExpected) {
  for (const char* sql : {"SELECT 42", "SELECT 42;", "SELECT id FROM public.orders", "SELECT 1, 2 -- two"}) {
    CheckResult r = ask(sql, std::nullopt);
    EXPECT_TRUE(r.ok) << sql << ": " << r.said;
  }
  EXPECT_FALSE(ask("SELECT id FROM nothing", std::nullopt).ok);
  EXPECT_TRUE(ask("SELECT 42", "42").ok);
  EXPECT_TRUE(ask("SELECT NULL", "").ok);
  EXPECT_EQ(ask("SELECT 42", "").said, "answered '42' instead of ''");
  EXPECT_EQ(ask("SELECT 1, 2", "1").said, "did not answer with one value instead of '1'");
  // Each of several is asked in turn, and what is asked alone need not stand in a transaction.
  EXPECT_TRUE(ask("SELECT 1; SELECT 42", "42").ok);
  EXPECT_TRUE(ask("VACUUM public.orders", std::nullopt, true).ok);
}

TEST_F(Sql, OnlyAWriteCanaryWrites) {
  CheckResult r = ask("INSERT INTO public.orders VALUES (1)", std::nullopt);
  EXPECT_FALSE(r.ok);
  EXPECT_NE(r.said.find("read-only"), std::string::npos) << r.said;
  r = ask("INSERT INTO public.orders VALUES (1) RETURNING id", "1", true);
  EXPECT_TRUE(r.ok) << r.said;
  r = ask("INSERT INTO public.orders VALUES (2)", std::nullopt, true);
  EXPECT_TRUE(r.ok) << r.said;
  EXPECT_EQ(orders(), 2);
}

TEST_F(Sql, TheTimeoutEndsTheStatement) {
  CheckResult r = ask("SELECT pg_sleep(20)", std::nullopt, false, Millis(200));
  EXPECT_FALSE(r.ok);
  EXPECT_NE(r.said.find("timeout"), std::string::npos) << r.said;
  EXPECT_LT(r.ms, 10000);
}

}  // namespace
}  // namespace rehome::ops
