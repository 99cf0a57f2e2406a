// What a gate does at its limits, what it writes into its ledger, and what it tells of its clients.
#include "gate/gate_running.h"
#include "gate/proxy.h"

namespace rehome {
namespace {

using namespace testing;

void end_with_reset(const Fd& fd) {
  linger now{1, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
}

Address local_of(const Running& g) {
  return Address::parse(parse_json(read_file(g.dir.path() + "/gate.json"), "")["routes"][0]["local"].get<std::string>());
}

TEST(GateLimits, WhatIsNotHttpIsClosedWithoutAWord) {
  Running g(Json{{"max_waiting", 1}, {"max_wait_ms", 200}, {"refuse_with", "close"}});
  Fd a = g.client();
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 1; }));
  Fd b = g.client();
  EXPECT_EQ(read_to_end(b), "");  // too many
  EXPECT_EQ(read_to_end(a), "");  // too long
  Json s = g.ask("status");
  EXPECT_EQ(s["ledger"]["dropped"], 2);
  EXPECT_EQ(s["ledger"]["still_held"], 0);
  EXPECT_GE(s["ledger"]["longest_wait_ms"].get<double>(), 200);  // it waited, though in vain
}

TEST(GateLimits, TheHeldAreAnsweredOnceTheyWaitedTooLongAndTheHoldGoesOn) {
  Running g(Json{{"max_waiting", 3}, {"max_wait_ms", 300}});
  App app(g.app(), answering("local"));
  g.release("local");
  g.hold(1);
  std::vector<Fd> clients;
  for (int i = 0; i < 5; i++) clients.push_back(g.client());
  // Two at once, for there are too many; three when they have waited.
  Ticks t = system_clock().now();
  EXPECT_TRUE(eventually([&] { return g.ask("status")["ledger"]["dropped"] == 2; }));
  EXPECT_LT(ms_between(t, system_clock().now()), 250);
  for (Fd& c : clients) EXPECT_TRUE(read_to_end(c).starts_with("HTTP/1.1 503 "));
  EXPECT_EQ(g.ask("status")["ledger"]["dropped"], 5);
  EXPECT_EQ(g.state(), "HELD");
  // Room again.
  Fd later = g.client();
  send_all(later, "x\n");
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 1; }));
  g.release("local");
  Reader reader(later);
  EXPECT_EQ(reader.line(soon()).value(), "local:x");
  EXPECT_EQ(app.connections, 1);
}

// Whose application takes no connections any more waits for itself alone.
TEST(GateLimits, ARouteWhoseApplicationHangsHoldsUpNoOther) {
  Running g;
  const std::uint16_t port = free_port();
  Fd deaf = listen_on(loopback(port), 0600, 1);
  const std::string in = g.dir.path() + "/deaf.sock";
  Json j = parse_json(read_file(g.dir.path() + "/gate.json"), "gate.json");
  j["routes"].push_back({{"name", "deaf"}, {"listen", "unix:" + in}, {"local", loopback(port).text()}});
  write_durably(g.dir.path() + "/gate.json", j.dump());
  EXPECT_EQ(g.ask("reload")["ok"], true);
  App app(g.app(), answering("local"));
  g.release("local");
  std::vector<Fd> stuck;
  for (int i = 0; i < 200; i++) {
    stuck.push_back(connect_to(unix_at(in), soon()));
    send_all(stuck.back(), "x\n");
  }
  EXPECT_TRUE(eventually([&] { return g.count("waiting") > 150; }));
  Ticks t = system_clock().now();
  EXPECT_EQ(ask_line(g.client(), "x"), "local:x");
  // Those who waited at a hold too, which are not started by their arrival.
  g.hold(1);
  Fd held = g.client();
  send_all(held, "y\n");
  EXPECT_TRUE(eventually([&] { return g.ask("status")["routes"][0]["waiting"] == 1; }));
  g.release("local");
  Reader reader(held);
  EXPECT_EQ(reader.line(soon()).value(), "local:y");
  EXPECT_LT(ms_between(t, system_clock().now()), 2000);
}

// Forwarded to a gate that is held, it is handed back when it has waited too long there, and must not go round for ever.
TEST(GateLimits, AClientHeldByTheOtherGateIsAnsweredToo) {
  Pair p;
  for (Running* g : {&p.a, &p.b}) {
    Json j = parse_json(read_file(g->dir.path() + "/gate.json"), "gate.json");
    j["routes"][0]["max_wait_ms"] = 1500;
    write_durably(g->dir.path() + "/gate.json", j.dump());
    g->ask("reload");
  }
  App app(p.b.app(), answering("b"));
  p.b.release("local");
  p.a.release("peer");
  // One that has said nothing yet waits for nothing: it is not refused for the time that it was open.
  Fd quiet = p.a.client();
  EXPECT_TRUE(eventually([&] { return p.b.count("in_flight") == 1; }));
  p.b.hold(1);
  Ticks t = system_clock().now();
  Fd c = p.a.client();
  send_all(c, "x\n");
  EXPECT_TRUE(read_to_end(c).starts_with("HTTP/1.1 503 "));
  EXPECT_GT(ms_between(t, system_clock().now()), 1400);
  EXPECT_LT(ms_between(t, system_clock().now()), 3500);
  system_clock().sleep(Millis(300));
  p.b.release("local");
  EXPECT_EQ(ask_line(quiet, "y"), "b:y");
  EXPECT_EQ(p.a.ask("status")["ledger"]["dropped"], 1);
}

// Those that were refused and go on sending are read for a while, and hold up nobody meanwhile.
TEST(GateLimits, ARefusedClientThatGoesOnSendingHoldsUpNobody) {
  Running g(Json{{"max_waiting", 1}});
  Fd first = g.client();
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 1; }));
  std::atomic<bool> stop{false};
  std::vector<std::thread> senders;
  Fd refused = g.client();
  EXPECT_TRUE(eventually([&] { return g.ask("status")["ledger"]["dropped"] == 1; }));
  // Together they are faster than who reads, with a buffer that is never empty.
  int buffer = 64 << 20;
  ASSERT_EQ(::setsockopt(refused.get(), SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer), 0);
  for (int i = 0; i < 4; i++)
    senders.emplace_back([&] {
      const std::string much(1 << 20, 'x');
      while (!stop && ::send(refused.get(), much.data(), much.size(), MSG_NOSIGNAL) > 0) {
      }
    });
  double slowest = 0;
  Ticks from = system_clock().now();
  while (ms_between(from, system_clock().now()) < 1500) {
    Ticks t = system_clock().now();
    g.ask("status");
    slowest = std::max(slowest, ms_between(t, system_clock().now()));
  }
  EXPECT_LT(slowest, 300);
  // And not for longer than anybody who lingers.
  for (auto& s : senders) s.join();
  EXPECT_LT(ms_between(from, system_clock().now()), 4000);
}

TEST(GateLedger, AWaitCountsAsLongAsItLastsAlsoWhenTheApplicationIsLate) {
  Running g(Json{{"local", "127.0.0.1:" + std::to_string(free_port())}});
  g.release("local");
  g.hold(1);
  g.ask("ledger.reset");
  Fd c = g.client();
  send_all(c, "x\n");
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 1; }));
  system_clock().sleep(Millis(100));
  g.release("local");
  // Released, and not yet served: the ledger must not call this wait over, nor forget it.
  system_clock().sleep(Millis(150));
  Json l = g.ask("status")["ledger"];
  EXPECT_EQ(l["held"], 1);
  EXPECT_EQ(l["still_held"], 1);
  EXPECT_GE(l["longest_wait_ms"].get<double>(), 240);
  App app(local_of(g), answering("late"));
  Reader reader(c);
  EXPECT_EQ(reader.line(soon()).value(), "late:x");
  l = g.ask("status")["ledger"];
  EXPECT_EQ(l["still_held"], 0);
  EXPECT_GE(l["longest_wait_ms"].get<double>(), 240);
}

TEST(GateLedger, OneThatIsHeldTwiceCountsTwice) {
  Running g;
  App app(g.app(), answering("local"));
  Fd quiet = g.client();
  g.release("local");
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 1; }));
  for (int attempt = 1; attempt <= 2; attempt++) {
    g.ask("ledger.reset");
    g.hold(attempt);
    EXPECT_EQ(g.ask("status")["ledger"]["held"], 1) << attempt;
    system_clock().sleep(Millis(30));
    g.release("local");
    EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 1; }));
    Json l = g.ask("status")["ledger"];
    EXPECT_GE(l["longest_wait_ms"].get<double>(), 30);
    EXPECT_LT(l["longest_wait_ms"].get<double>(), 1000);  // since this hold, not since it came
  }
}

TEST(GateLedger, ResetsAreCountedByWhatBroke) {
  TempDir dir;
  Address peer = unix_at(dir.path() + "/peer.sock");
  // TCP: a unix socket knows no reset.
  std::uint16_t port = free_port();
  Running g(Json{{"local", loopback(port).text()}, {"peer", peer.text()}});
  App app(loopback(port), [](const Fd& fd) {
    Reader reader(fd);
    if (!reader.line(soon())) return;
    send_all(fd, "half an ans", soon());
    system_clock().sleep(Millis(30));
    end_with_reset(fd);
  });
  // The other gate's host dies: it took the request, and never says what became of it.
  App dying(peer, [](const Fd& fd) {
    Reader reader(fd);
    reader.line(soon());
    send_all(fd, "T", soon());
    reader.line(soon());
  });
  auto ledger = [&] { return g.ask("status")["ledger"]; };
  g.release("local");
  Fd first = g.client();
  send_all(first, "x\n");
  EXPECT_TRUE(read_to_end(first).starts_with("half an ans"));
  EXPECT_TRUE(eventually([&] { return ledger()["resets"] == 1; }));
  g.release("peer");
  Fd second = g.client();
  send_all(second, "x\n");
  read_to_end(second);
  EXPECT_TRUE(eventually([&] { return ledger()["resets"] == 2; }));
  EXPECT_EQ(ledger()["reset_by"]["application"], 1);
  EXPECT_EQ(ledger()["reset_by"]["peer"], 1);
  EXPECT_EQ(ledger()["cut"], 0);
  g.ask("ledger.reset");
  EXPECT_EQ(ledger()["resets"], 0);
  EXPECT_EQ(g.ask("status")["routes"][0]["resets"], 2);
}

TEST(GateLedger, AClientThatBreaksIsNobodysReset) {
  std::uint16_t port = free_port();
  Running g;
  Json j = parse_json(read_file(g.dir.path() + "/gate.json"), "gate.json");
  j["routes"][0]["listen"] = loopback(port).text();
  write_durably(g.dir.path() + "/gate.json", j.dump());
  EXPECT_EQ(g.ask("reload")["ok"], true);
  App app(g.app(), answering("local"));
  g.release("local");
  Fd c = connect_to(loopback(port), soon());
  EXPECT_EQ(ask_line(c, "x"), "local:x");
  end_with_reset(c);
  c.reset();
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 0; }));
  EXPECT_EQ(g.ask("status")["ledger"]["resets"], 0);
}

TEST(GateStatus, CountsThoseThatAreOlderThanAsked) {
  Running g;
  App app(g.app(), answering("local"));
  g.release("local");
  Fd old = g.client();
  EXPECT_EQ(ask_line(old, "x"), "local:x");
  system_clock().sleep(Millis(120));
  Fd young = g.client();
  EXPECT_EQ(ask_line(young, "x"), "local:x");
  auto older = [&](int ms) { return g.ask(Json{{"op", "status"}, {"older_than_ms", ms}})["older"]; };
  EXPECT_EQ(older(100), 1);
  EXPECT_EQ(older(60000), 0);
}

// A proxy in front says who the client is; the application is told in the version that it wants.
TEST(GateProxy, TakesEitherVersionAndTellsEither) {
  std::string one = "PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n", two = proxy_version_2(one);
  for (const char* version : {"v1", "v2"}) {
    Running g(Json{{"accept_proxy", true}, {"proxy_protocol", version}});
    std::string wanted = version == std::string("v1") ? one : two;
    App app(g.app(), [&](const Fd& fd) {
      Reader reader(fd);
      std::string head = reader.exactly(wanted.size(), soon());
      send_all(fd, (head == wanted ? "told " : "told something else ") + reader.line(soon()).value() + "\n");
    });
    g.release("local");
    for (const std::string& header : {one, two}) {
      Fd c = g.client();
      // In pieces, as a network may.
      send_all(c, header.substr(0, 10));
      system_clock().sleep(Millis(20));
      send_all(c, header.substr(10));
      EXPECT_EQ(ask_line(c, "x"), "told x") << version;
    }
  }
}

TEST(GateProxy, HoldsWhoHasAHeaderAndEndsWhoHasNone) {
  Running g(Json{{"accept_proxy", true}});
  App app(g.app(), answering("local"));
  g.release("local");
  g.hold(1);
  Fd with = g.client(), without = g.client();
  send_all(with, "PROXY UNKNOWN\r\nx\n");
  send_all(without, "GET / HTTP/1.1\r\n\r\n");
  EXPECT_EQ(read_to_end(without).find("HTTP"), std::string::npos);
  EXPECT_EQ(g.count("waiting"), 1);
  g.release("local");
  Reader reader(with);
  EXPECT_EQ(reader.line(soon()).value(), "local:x");
  EXPECT_NE(read_file(g.dir.path() + "/log/gate.log").find("without a PROXY header"), std::string::npos);
}

TEST(GateProxy, WhatTheProxySaidReachesTheOtherSitesApplication) {
  Pair p;
  for (Running* g : {&p.a, &p.b}) {
    Json j = parse_json(read_file(g->dir.path() + "/gate.json"), "gate.json");
    j["routes"][0]["accept_proxy"] = true;
    j["routes"][0]["proxy_protocol"] = "v1";
    write_durably(g->dir.path() + "/gate.json", j.dump());
    g->ask("reload");
  }
  App at_b(p.b.app(), answering("b"));
  p.b.release("local");
  p.a.release("peer");
  Fd c = p.a.client();
  send_all(c, proxy_version_2("PROXY TCP6 2001:db8::1 2001:db8::2 7 8\r\n"));
  EXPECT_EQ(ask_line(c, "x"), "b:PROXY TCP6 2001:db8::1 2001:db8::2 7 8\r");
}

}  // namespace
}  // namespace rehome
