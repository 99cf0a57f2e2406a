// What each kind of client sees of a switch: through a real nginx and the gates, and through a gate alone.
#include <gtest/gtest.h>

#include <poll.h>
#include <sys/socket.h>

#include <future>

#include "base/error.h"
#include "traffic/gates.h"
#include "traffic/testing/two_sites.h"

namespace rehome {
namespace {

using namespace testing;

// The gates are in the way, and a drain takes at most `drain`.
struct Shop : TwoSites {
  explicit Shop(TrafficConfig::Longer longer, Millis drain = Millis(700)) {
    Deployment& d = world->deployment;
    d.traffic[0].longer_requests = longer;
    d.drain_deadline = drain;
    d.max_pause = Millis(10000);
    traffic = std::move(make_traffic(d).at(0));
    traffic->prepare(world->context());
  }
  Address door() { return front(Side::source); }
  Json source_gate(std::int64_t older_than_ms = 0) { return world->source.gate({{"op", "status"}, {"older_than_ms", older_than_ms}}); }
  // The source's application has begun so many requests. (One that has only come to the gate would wait, and go to the target.)
  bool begun(int count) {
    Deadline deadline = Deadline::in(Millis(5000));
    while (applications.source->requests != count && !deadline.passed()) system_clock().sleep(Millis(2));
    return applications.source->requests == count;
  }
  std::int64_t cut() { return get_int(source_gate().at("ledger"), "cut"); }
};
using Longer = TrafficConfig::Longer;

std::string who(const Answer& a) { return a.body.substr(0, a.body.find(' ')); }
std::future<Answer> asking(const Address& at, const std::string& target, std::size_t body = 0) {
  return std::async(std::launch::async, [=] { return ask_once(at, target, "", std::string(body, 'x')); });
}

// A stream of events: its next line that names an application; empty when it has ended.
struct Events {
  explicit Events(const Address& at) : browser(at) {
    browser.connect();
    send_all(browser.fd(), "GET /events HTTP/1.1\r\nHost: h\r\n\r\n");
  }
  std::string next() {
    try {
      while (auto line = browser.in().line(Deadline::in(Millis(3000))))
        if (auto at = line->find("tick "); at != std::string::npos) return line->substr(at + 5);
    } catch (const Error&) {
    }
    return "";
  }
  // To the end of what has already come.
  std::string last() {
    std::string name = next();
    Ticks until = system_clock().now() + 200'000'000;
    while (!name.empty() && system_clock().now() < until) name = next();
    return name;
  }
  Browser browser;
};

struct Socket {
  explicit Socket(const Address& at) : browser(at) { EXPECT_EQ(browser.ask("/ws", "Connection: Upgrade\r\nUpgrade: websocket\r\n").status, 101); }
  bool echoes() {
    try {
      send_all(browser.fd(), "ping", Deadline::in(Millis(2000)));
      return browser.in().exactly(4, Deadline::in(Millis(2000))) == "ping";
    } catch (const Error&) {
      return false;
    }
  }
  Browser browser;
};

TEST(KeepAliveClients, SeeNoErrorOfSwitchesThereAndBack) {
  Shop s(Longer::back_out);
  Load load(s.door(), 6, true);
  Browser one(s.door());
  EXPECT_EQ(who(one.ask("/")), "source");
  for (Side to : {Side::target, Side::source, Side::target}) {
    system_clock().sleep(Millis(100));
    EXPECT_TRUE(s.world->switch_to(to));
    // The same connection, which nginx never closed.
    ASSERT_TRUE(one.connected());
    EXPECT_EQ(who(one.ask("/")), side_name(to));
  }
  load.stop();
  EXPECT_EQ(load.bad, 0) << load.first_bad();
  EXPECT_EQ(load.broken, 0);
  EXPECT_GT(load.by_name()["source"], 10);
  EXPECT_GT(load.by_name()["target"], 10);
  EXPECT_EQ(s.cut(), 0);
  std::printf("  %ld requests on 6 connections over 3 switches, none failed, longest %.0f ms\n", load.good.load(), static_cast<double>(load.longest_us) / 1000);
}

TEST(LongRequests, FinishWhereTheyBeganWhileOthersWait) {
  Shop s(Longer::back_out, Millis(4000));
  auto slow = asking(s.door(), "/slow?2000");
  ASSERT_TRUE(s.begun(1));
  auto switched = std::async(std::launch::async, [&] { return s.world->switch_to(Side::target); });
  system_clock().sleep(Millis(100));
  Ticks from = system_clock().now();
  auto other = asking(s.door(), "/");
  EXPECT_EQ(who(other.get()), "target");
  EXPECT_GT(ms_between(from, system_clock().now()), 1000);
  EXPECT_TRUE(switched.get());
  Answer a = slow.get();
  EXPECT_EQ(a.status, 200);
  EXPECT_EQ(who(a), "source");
  EXPECT_EQ(s.cut(), 0);
}

TEST(LongRequests, TooLongOnesMakeTheSwitchBackOutAndFailNobody) {
  Shop s(Longer::back_out);
  auto slow = asking(s.door(), "/slow?2000");
  ASSERT_TRUE(s.begun(1));
  auto other = std::async(std::launch::async, [&] {
    system_clock().sleep(Millis(100));
    return ask_once(s.door(), "/");
  });
  EXPECT_FALSE(s.world->switch_to(Side::target));
  EXPECT_EQ(who(other.get()), "source");
  EXPECT_EQ(who(slow.get()), "source");
  EXPECT_EQ(s.cut(), 0);
}

TEST(LongRequests, TooLongOnesAreCutByChoiceAndTold) {
  Shop s(Longer::cut);
  auto slow = asking(s.door(), "/slow?3000");
  ASSERT_TRUE(s.begun(1));
  EXPECT_TRUE(s.world->switch_to(Side::target));
  EXPECT_EQ(slow.get().status, 502);  // not a short answer that looks whole, and not done again by the other side
  EXPECT_EQ(s.applications.target->requests, 0);
  EXPECT_EQ(s.cut(), 1);
  EXPECT_EQ(who(ask_once(s.door(), "/")), "target");
}

// nginx has half of an upload when the switch begins: it goes on arriving, and is asked of whoever serves then.
TEST(Uploads, ThatAreArrivingWaitInNginxAndReachTheNewSideWhole) {
  Shop s(Longer::back_out);
  constexpr std::size_t kHalf = 3 << 20;
  Browser browser(s.door());
  browser.connect();
  send_all(browser.fd(), "POST /up HTTP/1.1\r\nHost: h\r\nContent-Length: " + std::to_string(2 * kHalf) + "\r\n\r\n" + std::string(kHalf, 'x'), Deadline::in(Millis(5000)));
  auto switched = std::async(std::launch::async, [&] { return s.world->switch_to(Side::target, Millis(300)); });
  system_clock().sleep(Millis(100));
  send_all(browser.fd(), std::string(kHalf, 'y'), Deadline::in(Millis(5000)));
  std::string head, body;
  while (auto line = browser.in().line(Deadline::in(Millis(5000)))) {
    head += *line;
    if (*line == "\r" || line->empty()) break;
  }
  EXPECT_NE(head.find(" 200 "), std::string::npos) << head;
  body = browser.in().exactly(11, Deadline::in(Millis(2000)));
  EXPECT_EQ(body, "target POST");
  EXPECT_TRUE(switched.get());
  EXPECT_EQ(s.applications.source->requests, 0);
}

TEST(Uploads, ThatTheApplicationHasAreFinishedThere) {
  Shop s(Longer::back_out, Millis(4000));
  auto upload = asking(s.door(), "/slow?600", 6 << 20);
  ASSERT_TRUE(s.begun(1));
  EXPECT_TRUE(s.world->switch_to(Side::target));
  Answer a = upload.get();
  EXPECT_EQ(a.status, 200);
  EXPECT_EQ(who(a), "source");
  EXPECT_NE(a.body.find("body=" + std::to_string(6 << 20)), std::string::npos) << a.body;
  EXPECT_EQ(s.applications.target->requests, 0);
}

// proxy_request_buffering off: the application has the beginning, so the rest must go there too.
TEST(Uploads, ThatAreStreamedAreInFlightFromTheirBeginning) {
  Shop s(Longer::back_out, Millis(4000));
  constexpr std::size_t kHalf = 2 << 20;
  Browser browser(s.door());
  browser.connect();
  send_all(browser.fd(), "POST /streamed HTTP/1.1\r\nHost: h\r\nContent-Length: " + std::to_string(2 * kHalf) + "\r\n\r\n" + std::string(kHalf, 'x'), Deadline::in(Millis(5000)));
  ASSERT_TRUE(s.begun(1));
  auto switched = std::async(std::launch::async, [&] { return s.world->switch_to(Side::target); });
  system_clock().sleep(Millis(200));
  send_all(browser.fd(), std::string(kHalf, 'y'), Deadline::in(Millis(5000)));
  EXPECT_NE(browser.in().line(Deadline::in(Millis(5000)))->find(" 200 "), std::string::npos);
  EXPECT_TRUE(switched.get());
  EXPECT_EQ(s.applications.source->requests, 1);
  EXPECT_EQ(s.applications.target->requests, 0);
}

TEST(EventStreams, AreCutByChoiceAndTheClientComesBackToTheNewSide) {
  Shop s(Longer::cut);
  Events stream(s.door());
  EXPECT_EQ(stream.next(), "source");
  auto switched = std::async(std::launch::async, [&] { return s.world->switch_to(Side::target); });
  // Until the drain ends it goes on, and then it ends where the client sees it.
  Ticks from = system_clock().now();
  while (!stream.next().empty()) {
  }
  EXPECT_GT(ms_between(from, system_clock().now()), 500);
  EXPECT_TRUE(switched.get());
  EXPECT_EQ(s.cut(), 1);
  Events again(s.door());
  EXPECT_EQ(again.next(), "target");
}

TEST(EventStreams, AreSeenBeforehandAndKeptWhereNothingMayBeCut) {
  Shop s(Longer::back_out);
  Events stream(s.door());
  EXPECT_EQ(stream.next(), "source");
  system_clock().sleep(drain_time(s.world->deployment));
  // What switch looks at before it holds anybody.
  std::int64_t older = get_int(s.source_gate(drain_time(s.world->deployment).count()), "older");
  EXPECT_EQ(older, 1);
  EXPECT_NE(long_connections(s.world->deployment, older).find("a switch would back out"), std::string::npos);
  // Tried all the same.
  EXPECT_FALSE(s.world->switch_to(Side::target));
  EXPECT_EQ(stream.last(), "source");
  EXPECT_EQ(s.cut(), 0);
}

TEST(Websockets, AreCutByChoiceAndTheClientComesBackToTheNewSide) {
  Shop s(Longer::cut);
  Socket one(s.door()), two(s.door());
  EXPECT_TRUE(one.echoes() && two.echoes());
  auto switched = std::async(std::launch::async, [&] { return s.world->switch_to(Side::target); });
  system_clock().sleep(Millis(200));
  EXPECT_TRUE(one.echoes());  // alive while others wait
  EXPECT_TRUE(switched.get());
  EXPECT_FALSE(one.echoes());
  EXPECT_FALSE(two.echoes());
  EXPECT_EQ(s.cut(), 2);
  std::int64_t before = s.applications.target->requests;
  Socket again(s.door());
  EXPECT_TRUE(again.echoes());
  EXPECT_EQ(s.applications.target->requests, before + 1);
}

TEST(Websockets, AreSeenBeforehandAndKeptWhereNothingMayBeCut) {
  Shop s(Longer::back_out);
  Socket one(s.door()), two(s.door());
  EXPECT_TRUE(one.echoes() && two.echoes());
  system_clock().sleep(drain_time(s.world->deployment));
  EXPECT_EQ(get_int(s.source_gate(drain_time(s.world->deployment).count()), "older"), 2);
  EXPECT_FALSE(s.world->switch_to(Side::target));
  EXPECT_TRUE(one.echoes() && two.echoes());
  EXPECT_EQ(s.cut(), 0);
}

// No proxy: the gate owns the address, and a connection that is kept open is in flight.
struct Bare {
  explicit Bare(Longer longer) : world(deployment(longer)) {
    traffic = std::move(make_traffic(world.deployment).at(0));
    traffic->prepare(world.context());
  }
  Deployment deployment(Longer longer) {
    Deployment d;
    d.name = "test";
    TrafficConfig t;
    t.name = "app";
    t.longer_requests = longer;
    for (Side side : {Side::source, Side::target}) {
      t.on[side].listen = text(ports[side].gate);
      t.on[side].application = text(ports[side].application);
    }
    d.traffic.push_back(t);
    d.drain_deadline = Millis(500);
    d.max_pause = Millis(10000);
    return d;
  }
  Address door() { return loopback(ports.source.gate); }
  BySide<Ports> ports;
  Application source{"source", loopback(ports.source.application)}, target{"target", loopback(ports.target.application)};
  World world;
  std::unique_ptr<Traffic> traffic;
};

TEST(BareKeepAliveClients, AreClosedCleanlyByChoice) {
  Bare b(Longer::cut);
  Browser browser(b.door());
  EXPECT_EQ(who(browser.ask("/")), "source");
  EXPECT_TRUE(b.world.switch_to(Side::target));
  pollfd p{browser.fd().get(), POLLIN, 0};
  ASSERT_EQ(::poll(&p, 1, 2000), 1);
  char c;
  EXPECT_EQ(::recv(browser.fd().get(), &c, 1, 0), 0);  // an end, and no reset: a client tries again by itself
  browser.close();
  EXPECT_EQ(who(browser.ask("/")), "target");
}

TEST(BareKeepAliveClients, MakeASwitchBackOutAndKeepTheirConnection) {
  Bare b(Longer::back_out);
  Browser browser(b.door());
  EXPECT_EQ(who(browser.ask("/")), "source");
  EXPECT_FALSE(b.world.switch_to(Side::target));
  ASSERT_TRUE(browser.connected());
  EXPECT_EQ(who(browser.ask("/")), "source");
}

TEST(OldAddress, AClientThatComesSeldomIsSeen) {
  Bare b(Longer::back_out);
  EXPECT_TRUE(b.world.switch_to(Side::target));
  EXPECT_EQ(who(ask_once(b.door(), "/")), "target");
  // One request, long past: as a client that asks every 20 s.
  system_clock().sleep(Millis(2500));
  EXPECT_EQ(b.traffic->from_old_address(b.world.context(), Side::source), 1);
}

TEST(OldAddress, NobodyIsBelievedOnlyAfterWatching) {
  Bare b(Longer::back_out);
  EXPECT_EQ(who(ask_once(b.door(), "/")), "source");  // of before the switch: nobody's business
  EXPECT_TRUE(b.world.switch_to(Side::target));
  Ticks from = system_clock().now();
  EXPECT_EQ(clients_at(b.world.context(), Side::source, "app", Millis(700)), 0);
  EXPECT_GE(ms_between(from, system_clock().now()), 650);
  ASSERT_FALSE(b.world.lines.empty());
  EXPECT_NE(b.world.lines.back().find("watching it for"), std::string::npos);
  // Who comes while it watches is seen at once.
  auto seldom = std::async(std::launch::async, [&] {
    system_clock().sleep(Millis(200));
    return ask_once(b.door(), "/");
  });
  EXPECT_EQ(clients_at(b.world.context(), Side::source, "app", Millis(60000)), 1);
  seldom.get();
}

}  // namespace
}  // namespace rehome
