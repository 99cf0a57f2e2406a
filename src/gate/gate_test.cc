#include "gate/gate_running.h"

namespace rehome {
namespace {

using namespace testing;

TEST(Gate, StartsSealedAndServesOnceReleased) {
  Running g;
  App app(g.app(), answering("local"));
  EXPECT_EQ(g.state(), "SEALED");
  Fd c = g.client();
  send_all(c, "one\n");
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 1; }));
  EXPECT_EQ(app.connections, 0);
  EXPECT_EQ(g.release("local")["state"], "OPEN_LOCAL");
  Reader reader(c);
  EXPECT_EQ(reader.line(soon()).value(), "local:one");
  EXPECT_EQ(ask_line(c, "two"), "local:two");
  Json s = g.ask("status");
  EXPECT_EQ(s["in_flight"], 1);
  EXPECT_EQ(s["waiting"], 0);
  EXPECT_EQ(s["routes"][0]["accepted"], 1);
}

TEST(Gate, HoldSealAndTimerRules) {
  Running g;
  // Sealed since the start, an agent may have it held again; unheard, it is sealed as before, and opens for nobody.
  EXPECT_EQ(g.hold(1, 50)["state"], "HELD");
  EXPECT_TRUE(eventually([&] { return g.state() == "SEALED"; }));
  g.release("peer");
  EXPECT_EQ(g.seal(1)["error"]["code"], "state");  // not held
  EXPECT_EQ(g.hold(1, 150)["state"], "HELD");
  EXPECT_EQ(g.seal(2)["error"]["code"], "conflict");
  // Heard, it stays.
  for (int i = 0; i < 8; i++) {
    system_clock().sleep(Millis(50));
    EXPECT_EQ(g.ask("alive")["state"], "HELD");
  }
  // Not heard, it goes back to where it was.
  system_clock().sleep(Millis(300));
  EXPECT_EQ(g.state(), "OPEN_PEER");
  EXPECT_EQ(g.seal(1)["error"]["code"], "state");
  EXPECT_EQ(g.hold(2, 100)["state"], "HELD");
  EXPECT_EQ(g.hold(2, 100)["state"], "HELD");
  EXPECT_EQ(g.seal(2)["state"], "SEALED");
  EXPECT_EQ(g.seal(2)["state"], "SEALED");
  EXPECT_EQ(g.seal(3)["error"]["code"], "state");
  EXPECT_EQ(g.hold(3)["error"]["code"], "state");
  EXPECT_EQ(g.hold(2)["state"], "SEALED");
  system_clock().sleep(Millis(250));
  EXPECT_EQ(g.state(), "SEALED");  // no timer
  EXPECT_EQ(g.release("local")["state"], "OPEN_LOCAL");
  EXPECT_EQ(g.ask("nonsense")["error"]["code"], "usage");
}

TEST(Gate, HoldPullsBackWhatHasNotSpokenAndDrainsTheRest) {
  Running g;
  App app(g.app(), answering("local"));
  g.release("local");
  Fd quiet = g.client(), busy = g.client();
  EXPECT_EQ(ask_line(busy, "a"), "local:a");
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 2; }));
  g.ask("ledger.reset");
  g.hold(1);
  Json s = g.ask("status");
  EXPECT_EQ(s["in_flight"], 1);
  EXPECT_EQ(s["waiting"], 1);
  EXPECT_EQ(s["ledger"]["held"], 1);
  EXPECT_GE(s["oldest_ms"].get<int>(), 0);
  EXPECT_EQ(ask_line(busy, "b"), "local:b");  // in flight goes on
  send_all(quiet, "c\n");
  system_clock().sleep(Millis(60));
  busy.reset();
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 0; }));
  g.release("local");
  Reader reader(quiet);
  EXPECT_EQ(reader.line(soon()).value(), "local:c");
  EXPECT_GE(g.ask("status")["ledger"]["longest_wait_ms"].get<double>(), 60);
  EXPECT_EQ(app.connections, 3);  // the pulled-back one came twice
}

TEST(Gate, CapsAnswerShortlyAndAreCounted) {
  Running g(Json{{"max_waiting", 2}, {"max_wait_ms", 300}});
  Fd a = g.client(), b = g.client();
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == 2; }));
  Fd c = g.client();
  send_all(c, "GET / HTTP/1.1\r\n\r\n");
  EXPECT_TRUE(read_to_end(c).starts_with("HTTP/1.1 503 "));
  EXPECT_TRUE(read_to_end(a).starts_with("HTTP/1.1 503 "));  // after max_wait_ms
  EXPECT_TRUE(read_to_end(b).starts_with("HTTP/1.1 503 "));
  Json s = g.ask("status");
  EXPECT_EQ(s["ledger"]["dropped"], 3);
  EXPECT_EQ(s["routes"][0]["refused"], 3);
  EXPECT_EQ(s["waiting"], 0);
}

TEST(Gate, WaitsForAnApplicationThatRefusesForAMoment) {
  Running g(Json{{"local", "127.0.0.1:" + std::to_string(free_port())}});
  g.release("local");
  Address at = Address::parse(parse_json(read_file(g.dir.path() + "/gate.json"), "")["routes"][0]["local"].get<std::string>());
  Fd c = g.client();
  send_all(c, "x\n");
  system_clock().sleep(Millis(150));
  App app(at, answering("late"));
  Reader reader(c);
  EXPECT_EQ(reader.line(soon()).value(), "late:x");
}

TEST(Gate, PassesHalfCloseBothWays) {
  Running g;
  App app(g.app(), [](const Fd& fd) {
    std::string all = read_to_end(fd);
    send_all(fd, "got " + std::to_string(all.size()), soon());
  });
  g.release("local");
  Fd c = g.client();
  send_all(c, std::string(300000, 'x'), soon());
  ::shutdown(c.get(), SHUT_WR);
  EXPECT_EQ(read_to_end(c), "got 300000");
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 0; }));
}

TEST(Gate, ARefusedUploadHearsItsAnswer) {
  Running g;
  App app(g.app(), [](const Fd& fd) {
    Reader(fd).exactly(10, soon());
    send_all(fd, "413 too large", soon());
    ::shutdown(fd.get(), SHUT_WR);
    system_clock().sleep(Millis(200));   // and then it reads no more
  });
  g.release("local");
  Fd c = g.client();
  std::thread upload([&] {
    try {
      send_all(c, std::string(16u << 20, 'x'), soon());
    } catch (const Error&) {
      // The answer is what matters.
    }
  });
  EXPECT_TRUE(eventually([&] { return app.connections > 0 && g.count("in_flight") == 0; }));
  EXPECT_EQ(read_to_end(c), "413 too large");
  ::shutdown(c.get(), SHUT_RDWR);
  upload.join();
}

TEST(Gate, MovesMuchThroughSlowReaders) {
  Running g;
  constexpr std::size_t kMuch = 64u << 20;
  App app(g.app(), [](const Fd& fd) {
    std::string block(1 << 20, 'z');
    for (std::size_t sent = 0; sent < kMuch; sent += block.size()) send_all(fd, block, soon());
  });
  g.release("local");
  Fd c = g.client();
  system_clock().sleep(Millis(200));  // nobody reads: the gate must not gather it all
  Ticks t = system_clock().now();
  EXPECT_EQ(read_to_end(c).size(), kMuch);
  std::printf("64 MiB in %.0f ms\n", ms_between(t, system_clock().now()));
}

TEST(Gate, CutEndsStreamsSoThatClientsSeeIt) {
  Running g(Json{{"local", "127.0.0.1:" + std::to_string(free_port())}});
  Address at = Address::parse(parse_json(read_file(g.dir.path() + "/gate.json"), "")["routes"][0]["local"].get<std::string>());
  std::atomic<bool> stop{false};
  App app(at, [&](const Fd& fd) {
    Reader reader(fd);
    reader.line(soon());
    while (!stop) {
      send_all(fd, "data: tick\n\n", soon());
      system_clock().sleep(Millis(5));
    }
  });
  g.release("local");
  Fd stream = g.client();
  send_all(stream, "GET /events\n");
  char buf[64];
  EXPECT_GT(::recv(stream.get(), buf, sizeof buf, 0), 0);
  g.ask("ledger.reset");
  g.hold(1);
  // Long streams keep the drain waiting, and go on meanwhile.
  system_clock().sleep(Millis(100));
  Json s = g.ask("status");
  EXPECT_EQ(s["in_flight"], 1);
  EXPECT_GE(s["oldest_ms"].get<int>(), 100);
  EXPECT_EQ(g.ask(Json{{"op", "cut"}, {"idle_ms", 1000}})["cut"], 0);
  EXPECT_EQ(g.ask("cut")["cut"], 1);
  s = g.ask("status");
  EXPECT_EQ(s["in_flight"], 0);
  EXPECT_EQ(s["ledger"]["cut"], 1);
  std::string rest = read_to_end(stream);
  EXPECT_NE(rest.find("tick"), std::string::npos);
  stop = true;
}

TEST(Gate, CutOfIdleConnectionsSparesTheBusy) {
  Running g;
  App app(g.app(), answering("local"));
  g.release("local");
  Fd idle = g.client(), busy = g.client();
  EXPECT_EQ(ask_line(idle, "a"), "local:a");
  send_all(busy, "half a que");
  EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 2; }));
  system_clock().sleep(Millis(120));
  EXPECT_EQ(g.ask("status")["idle"], 1);
  EXPECT_EQ(g.ask(Json{{"op", "cut"}, {"idle_ms", 100}})["cut"], 1);
  EXPECT_EQ(read_to_end(idle), "");
  EXPECT_EQ(ask_line(busy, "stion"), "local:half a question");
}

TEST(TwoGates, ClientsOfTheOldAddressAreServedByThePeer) {
  Pair p;
  App app(p.b.app(), answering("b"));
  p.b.release("local");
  p.a.release("peer");
  Fd c = p.a.client();
  EXPECT_EQ(ask_line(c, "x"), "b:x");
  EXPECT_EQ(ask_line(c, std::string(200000, 'y')).size(), 200002u);
  Json a = p.a.ask("status")["routes"][0], b = p.b.ask("status")["routes"][0];
  EXPECT_EQ(a["to_peer"], 1);
  EXPECT_EQ(a["to_peer_last_minute"], 1);
  EXPECT_EQ(a["in_flight_to_peer"], 1);
  EXPECT_EQ(b["in_flight_to_peer"], 0);
  EXPECT_EQ(b["from_peer"], 1);
  EXPECT_EQ(b["accepted"], 1);
}

TEST(TwoGates, AMarkedConnectionIsHandedBackNotSentInACircle) {
  Pair p;
  App at_a(p.a.app(), answering("a")), at_b(p.b.app(), answering("b"));
  p.a.release("peer");
  p.b.release("local");
  p.b.hold(1);
  // More than is kept, so that the client's bytes stop in the middle until somebody takes them.
  std::string big(300000, 'q');
  Fd c = p.a.client(), d = p.a.client(), quiet = p.a.client();
  send_all(c, "small\n");
  std::thread writer([&] { send_all(d, big + "\n", soon()); });
  EXPECT_TRUE(eventually([&] { return p.b.count("waiting") == 3; }));
  system_clock().sleep(Millis(50));
  // b turns to a, and a, a moment later, to itself.
  EXPECT_EQ(p.b.seal(1)["state"], "SEALED");
  p.b.release("peer");
  system_clock().sleep(Millis(50));
  EXPECT_EQ(at_a.connections, 0);
  p.a.hold(2);
  p.a.release("local");
  Reader rc(c), rd(d);
  EXPECT_EQ(rc.line(soon()).value(), "a:small");
  EXPECT_EQ(rd.line(soon()).value(), "a:" + big);
  EXPECT_EQ(ask_line(quiet, "z"), "a:z");
  writer.join();
  EXPECT_EQ(at_b.connections, 0);
  EXPECT_EQ(p.a.ask("status")["ledger"]["dropped"], 0);
}

TEST(TwoGates, ARequestThatReachedThePeersApplicationIsNeverDoneAgain) {
  Pair p;
  std::atomic<int> done{0};
  App at_b(p.b.app(), [&](const Fd& fd) {
    Reader reader(fd);
    if (reader.line(soon())) done++;  // done, and it dies before it answers
    linger now{1, 0};
    ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &now, sizeof now);
  });
  App at_a(p.a.app(), [&](const Fd& fd) {
    Reader reader(fd);
    if (reader.line(soon())) done++;
  });
  p.b.release("local");
  p.a.release("peer");
  Fd c = p.a.client();
  send_all(c, "once\n");
  std::string answer = read_to_end(c);
  p.a.release("local");
  system_clock().sleep(Millis(100));
  EXPECT_EQ(done, 1);
}

TEST(TwoGates, ALinkThatIsAwayForAMomentIsWaitedFor) {
  Pair p;
  App at_b(p.b.app(), answering("b"));
  p.b.release("local");
  // What an agent does while its link is down: it accepts, and closes.
  std::string marked = p.b.marked().path;
  ASSERT_EQ(::rename(marked.c_str(), (marked + ".away").c_str()), 0);
  {
    App closing(unix_at(marked), [](const Fd&) {});
    p.a.release("peer");
    Fd c = p.a.client();
    send_all(c, "x\n");
    EXPECT_TRUE(eventually([&] { return closing.connections >= 2; }));
    ASSERT_EQ(::rename((marked + ".away").c_str(), marked.c_str()), 0);
    Reader reader(c);
    EXPECT_EQ(reader.line(soon()).value(), "b:x");
  }
}

TEST(TwoGates, SwitchThereAndBackUnderLoadFailsNobody) {
  Pair p;
  App at_a(p.a.app(), answering("a")), at_b(p.b.app(), answering("b"));
  p.a.release("local");
  p.b.release("peer");
  std::atomic<bool> stop{false};
  std::atomic<int> ok{0}, failed{0};
  std::atomic<std::int64_t> longest{0};
  auto load = [&](Running& g, int id) {
    for (int i = 0; !stop; i++) {
      Ticks t = system_clock().now();
      std::string q = std::to_string(id) + "-" + std::to_string(i);
      try {
        Fd c = g.client();
        std::string r = ask_line(c, q);
        if (r == "a:" + q || r == "b:" + q) ok++;
        else failed++;
      } catch (const Error& e) {
        failed++;
        std::printf("failed: %s\n", e.what());
      }
      auto ms = static_cast<std::int64_t>(ms_between(t, system_clock().now()));
      if (ms > longest) longest = ms;
    }
  };
  std::vector<std::thread> clients;
  for (int i = 0; i < 6; i++) clients.emplace_back([&, i] { load(i % 3 ? p.a : p.b, i); });
  Running* y = &p.a;
  Running* t = &p.b;
  for (int attempt = 1; attempt <= 10; attempt++) {
    system_clock().sleep(Millis(60));
    ASSERT_EQ(y->hold(attempt)["state"], "HELD");
    ASSERT_TRUE(eventually([&] { return y->count("in_flight") == 0; }));
    ASSERT_EQ(y->seal(attempt)["state"], "SEALED");
    // Either order must do: here the one that takes over opens first, and the other turns to it later.
    t->release("local");
    system_clock().sleep(Millis(5));
    y->release("peer");
    std::swap(y, t);
  }
  stop = true;
  for (auto& c : clients) c.join();
  EXPECT_EQ(failed, 0);
  EXPECT_GT(ok, 200);
  std::printf("10 switches: %d requests, none failed, longest %lld ms\n", ok.load(), static_cast<long long>(longest));
}

TEST(Gate, TellsTheApplicationTheClientsAddressAlsoThroughThePeer) {
  Pair p;
  std::uint16_t port = free_port();
  for (Running* g : {&p.a, &p.b}) {
    Json j = parse_json(read_file(g->dir.path() + "/gate.json"), "gate.json");
    j["routes"][0]["proxy_protocol"] = true;
    if (g == &p.a) j["routes"][0]["listen"] = loopback(port).text();
    write_durably(g->dir.path() + "/gate.json", j.dump());
    EXPECT_EQ(g->ask("reload")["ok"], true);
  }
  auto headed = [](const Fd& fd) {
    Reader reader(fd);
    std::string head = reader.line(soon()).value();
    reader.line(soon());
    send_all(fd, head + "\n");
  };
  App at_a(p.a.app(), headed), at_b(p.b.app(), headed);
  p.b.release("local");
  for (const char* to : {"peer", "local"}) {
    p.a.release(to);
    Fd c = connect_to(loopback(port), soon());
    std::string expected =
        "PROXY TCP4 127.0.0.1 127.0.0.1 " + std::to_string(local_port(c)) + " " + std::to_string(port) + "\r";
    EXPECT_EQ(ask_line(c, "hello"), expected) << to;
  }
}

TEST(Gate, ReloadAddsAndRemovesRoutes) {
  Running g;
  App app(g.app(), answering("local"));
  g.release("local");
  Fd old = g.client();
  EXPECT_EQ(ask_line(old, "a"), "local:a");
  Json other{{"routes",
              {{{"name", "other"}, {"listen", "unix:" + g.dir.path() + "/other.sock"}, {"local", g.app().text()}}}}};
  write_durably(g.dir.path() + "/gate.json", other.dump());
  EXPECT_EQ(g.ask("reload")["ok"], true);
  Fd c = connect_to(unix_at(g.dir.path() + "/other.sock"), soon());
  EXPECT_EQ(ask_line(c, "b"), "local:b");
  EXPECT_THROW(g.client(), Error);
  EXPECT_EQ(ask_line(old, "c"), "local:c");  // goes on to its end
  write_durably(g.dir.path() + "/gate.json", "{");
  EXPECT_TRUE(g.ask("reload").contains("error"));
  EXPECT_EQ(g.ask("status")["routes"][0]["name"], "other");
}

TEST(Gate, ThousandsWaitAndAreServedPaced) {
  Running g;
  App app(g.app(), [](const Fd& fd) { send_all(fd, "ok\n"); });
  g.release("local");
  g.hold(1);
  constexpr int kMany = 1500;
  std::vector<Fd> clients;
  for (int i = 0; i < kMany; i++) clients.push_back(g.client());
  EXPECT_TRUE(eventually([&] { return g.count("waiting") == kMany; }));
  Ticks t = system_clock().now();
  g.release("local");
  for (Fd& c : clients) EXPECT_EQ(read_to_end(c), "ok\n");
  std::printf("%d waiting connections served in %.0f ms\n", kMany, ms_between(t, system_clock().now()));
  Json s = g.ask("status");
  EXPECT_EQ(s["ledger"]["held"], kMany);
  EXPECT_EQ(s["ledger"]["dropped"], 0);
}

TEST(Gate, HeldUnderLoadFailsNobody) {
  Running g;
  App app(g.app(), answering("local"));
  g.release("local");
  std::atomic<bool> stop{false};
  std::atomic<int> ok{0}, failed{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; i++)
    clients.emplace_back([&] {
      while (!stop) {
        try {
          Fd c = g.client();
          (ask_line(c, "q") == "local:q" ? ok : failed)++;
        } catch (const Error&) {
          failed++;
        }
      }
    });
  for (int attempt = 1; attempt <= 20; attempt++) {
    g.hold(attempt);
    EXPECT_TRUE(eventually([&] { return g.count("in_flight") == 0; }));
    system_clock().sleep(Millis(5));
    g.release("local");
    system_clock().sleep(Millis(20));
  }
  stop = true;
  for (auto& c : clients) c.join();
  EXPECT_EQ(failed, 0);
  std::printf("20 holds: %d requests, none failed\n", ok.load());
}

}  // namespace
}  // namespace rehome
