// nginx in front of two gates, with clients that never stop asking.
#include <gtest/gtest.h>

#include <sys/stat.h>

#include "base/error.h"
#include "traffic/testing/two_sites.h"

namespace rehome {
namespace {

using namespace testing;

void nothing_failed(Load& load) {
  load.stop();
  EXPECT_EQ(load.bad, 0) << load.first_bad();
  EXPECT_EQ(load.broken, 0);
  EXPECT_GT(load.good, 50);
}

void drain(LocalSite& site) {
  Deadline deadline = Deadline::in(Millis(3000));
  while (get_int(site.gate({{"op", "status"}}), "in_flight") > 0) {
    ASSERT_FALSE(deadline.passed()) << site.gate({{"op", "status"}}).dump();
    system_clock().sleep(Millis(2));
  }
}

TEST(NginxTraffic, PreflightFindsNothingWhereNothingIsWrong) {
  TwoSites t;
  for (const auto& f : t.traffic->preflight(t.world->context())) ADD_FAILURE() << f.object << ": " << f.message;
  EXPECT_TRUE(t.world->notes.empty());
}

TEST(NginxTraffic, BeginHoldSwitchAndCompleteUnderLoadFailNoRequest) {
  TwoSites t;
  std::string original = read_file(t.nginx.source->site());
  Load load(t.front(Side::source), 8, false);
  system_clock().sleep(Millis(200));
  t.traffic->prepare(t.world->context());
  EXPECT_NE(read_file(t.nginx.source->site()), original);
  EXPECT_NE(read_file(t.nginx.source->site()).find("# the shop"), std::string::npos);

  // A hold of 300 ms, to the same side: longest wait measured by the gate.
  t.world->hold();
  drain(t.world->source);
  system_clock().sleep(Millis(300));
  t.world->release(Side::source);
  system_clock().sleep(Millis(200));
  Json ledger = t.world->source.gate({{"op", "status"}}).at("ledger");
  EXPECT_GT(get_int(ledger, "held"), 0);
  EXPECT_EQ(get_int(ledger, "dropped"), 0);
  EXPECT_GE(ledger.at("longest_wait_ms").get<double>(), 250);
  EXPECT_LT(ledger.at("longest_wait_ms").get<double>(), 1500);
  std::printf("  hold of 300 ms: %s\n", ledger.dump().c_str());

  // The switch itself: clients stay at the source's address.
  std::int64_t before = t.applications.target->requests;
  t.world->hold();
  drain(t.world->source);
  t.world->release(Side::target);
  system_clock().sleep(Millis(300));
  EXPECT_GT(t.applications.target->requests, before);
  std::int64_t at_source = t.applications.source->requests;
  system_clock().sleep(Millis(200));
  EXPECT_EQ(t.applications.source->requests, at_source);
  EXPECT_GT(t.traffic->from_old_address(t.world->context(), Side::source), 0);

  // Back, then complete.
  t.world->hold();
  drain(t.world->target);
  t.world->release(Side::source);
  t.traffic->withdraw(t.world->context());
  system_clock().sleep(Millis(200));
  nothing_failed(load);
  EXPECT_EQ(read_file(t.nginx.source->site()), original);
  EXPECT_TRUE(t.traffic->leftovers(t.world->context()).empty());
  struct stat st;
  ASSERT_EQ(::stat(t.nginx.source->site().c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777u, 0640u);
  std::printf("  %ld requests, longest %.1f ms\n%s", load.good.load(), static_cast<double>(load.longest_us) / 1000, t.lines().c_str());
}

TEST(NginxTraffic, OneRequestIsOneConnectionThoughClientsKeepTheirs) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  Browser browser(t.front(Side::source));
  std::int64_t connections = t.applications.source->connections;
  for (int i = 0; i < 20; i++) EXPECT_EQ(browser.ask("/").status, 200);
  EXPECT_EQ(t.applications.source->connections - connections, 20);
  // Nothing is in flight between two requests, and the client's own connection lives through a switch.
  drain(t.world->source);
  t.world->hold();
  t.world->release(Side::target);
  ASSERT_TRUE(browser.connected());
  Answer a = browser.ask("/");
  EXPECT_EQ(a.status, 200);
  EXPECT_EQ(a.body.substr(0, 6), "target") << a.body;
}

TEST(NginxTraffic, KeepAliveClientsUnderReloadsAreCounted) {
  TwoSites t;
  Load load(t.front(Side::source), 8, true);
  system_clock().sleep(Millis(100));
  t.traffic->prepare(t.world->context());
  t.traffic->withdraw(t.world->context());
  load.stop();
  EXPECT_EQ(load.bad, 0) << load.first_bad();
  EXPECT_NE(t.lines().find("TCP resets sent by this host meanwhile"), std::string::npos);
  std::printf("  keep-alive clients over two reloads: %ld answers, %ld connections ended before one\n", load.good.load(), load.broken.load());
}

TEST(NginxTraffic, AWebsocketPassesNginxAndGateAndIsCutWhenAsked) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  Browser socket(t.front(Side::source));
  EXPECT_EQ(socket.ask("/ws", "Connection: Upgrade\r\nUpgrade: websocket\r\n").status, 101);
  send_all(socket.fd(), "ping");
  EXPECT_EQ(socket.in().exactly(4, Deadline::in(Millis(2000))), "ping");
  t.world->hold();
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "status"}}), "in_flight"), 1);
  // It still works while new connections wait: it is drained, not held.
  send_all(socket.fd(), "pong");
  EXPECT_EQ(socket.in().exactly(4, Deadline::in(Millis(2000))), "pong");
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "cut"}}), "cut"), 1);
  EXPECT_FALSE(socket.in().line(Deadline::in(Millis(2000))).has_value());
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "status"}}).at("ledger"), "cut"), 1);
  t.world->release(Side::source);
}

TEST(NginxTraffic, EventStreamsAndUploadsAreInFlightUntilTheyEnd) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  Browser events(t.front(Side::source));
  events.connect();
  send_all(events.fd(), "GET /events HTTP/1.1\r\nHost: h\r\n\r\n");
  while (events.in().line(Deadline::in(Millis(2000)))->find("tick") == std::string::npos) {
  }
  std::thread upload([&] {
    Answer a = ask_once(t.front(Side::source), "/slow?1000", "", std::string(3 << 20, 'x'));
    EXPECT_EQ(a.status, 200);
    EXPECT_NE(a.body.find("source POST"), std::string::npos) << a.body;
    EXPECT_NE(a.body.find("body=3145728"), std::string::npos) << a.body;
  });
  // nginx asks the application once it has the whole upload.
  Deadline both = Deadline::in(Millis(3000));
  while (get_int(t.world->source.gate({{"op", "status"}}), "in_flight") < 2 && !both.passed()) system_clock().sleep(Millis(5));
  // Of which nothing is passed on yet, that waits like a new one.
  system_clock().sleep(Millis(200));
  t.world->hold();
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "status"}}), "in_flight"), 2);
  upload.join();
  Deadline one = Deadline::in(Millis(1000));
  while (get_int(t.world->source.gate({{"op", "status"}}), "in_flight") != 1 && !one.passed()) system_clock().sleep(Millis(5));
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "cut"}}), "cut"), 1);
  t.world->release(Side::source);
}

TEST(NginxTraffic, TheApplicationSeesTheSameRequests) {
  TwoSites t([](const Ports& p) {
    return "server { listen " + text(p.front) + "; location / { proxy_pass http://" + text(p.application) + "; } }\n";
  });
  Answer before = ask_once(t.front(Side::source)), moved = ask_once(t.front(Side::source), "/moved");
  t.traffic->prepare(t.world->context());
  EXPECT_EQ(ask_once(t.front(Side::source)).body, before.body);
  EXPECT_EQ(ask_once(t.front(Side::source), "/moved").head.substr(0, 12), moved.head.substr(0, 12));
  auto location = [](const std::string& head) {
    auto at = head.find("Location:");
    return head.substr(at, head.find('\n', at) - at);
  };
  EXPECT_EQ(location(ask_once(t.front(Side::source), "/moved").head), location(moved.head));
  EXPECT_GT(get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted"), 0);
}

TEST(NginxTraffic, PrepareAndWithdrawAreIdempotentAndMeetInTheMiddle) {
  TwoSites t;
  std::string original = read_file(t.nginx.source->site());
  t.traffic->withdraw(t.world->context());
  t.traffic->prepare(t.world->context());
  std::string edited = read_file(t.nginx.source->site());
  t.traffic->prepare(t.world->context());
  EXPECT_EQ(read_file(t.nginx.source->site()), edited);
  EXPECT_EQ(t.traffic->leftovers(t.world->context()).size(), 2u);
  // What leads through the gate passes preflight again: resume asks for it.
  for (const auto& f : t.traffic->preflight(t.world->context())) ADD_FAILURE() << f.object << ": " << f.message;
  t.traffic->withdraw(t.world->context());
  t.traffic->withdraw(t.world->context());
  EXPECT_EQ(read_file(t.nginx.source->site()), original);
  EXPECT_EQ(ask_once(t.front(Side::source)).status, 200);
}

TEST(NginxTraffic, AnEditThatNginxRefusesIsPutBack) {
  TwoSites t;
  std::string original = read_file(t.nginx.source->site());
  TempDir dir;
  std::string program = dir.path() + "/nginx";
  write_durably(program, "#!/bin/sh\ncase \"$*\" in *-t) [ -e " + dir.path() + "/once ] || { touch " + dir.path() + "/once; echo no such luck >&2; exit 1; } ;; esac\nexec nginx \"$@\"\n", 0755);
  t.world->deployment.traffic[0].on.source.nginx = program;
  auto traffic = std::move(make_traffic(t.world->deployment).at(0));
  try {
    traffic->prepare(t.world->context());
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("no such luck"), std::string::npos) << e.what();
  }
  EXPECT_EQ(read_file(t.nginx.source->site()), original);
  EXPECT_EQ(ask_once(t.front(Side::source)).status, 200);
  t.traffic->withdraw(t.world->context());
  EXPECT_TRUE(t.traffic->leftovers(t.world->context()).empty());
}

TEST(NginxTraffic, AFileThatSomebodyElseChangedIsNotOverwritten) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  std::string theirs = read_file(t.nginx.source->site()) + "# theirs\n";
  write_durably(t.nginx.source->site(), theirs);
  try {
    t.traffic->withdraw(t.world->context());
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("by somebody else"), std::string::npos);
    EXPECT_FALSE(e.hint.empty());
  }
  EXPECT_EQ(read_file(t.nginx.source->site()), theirs);
  EXPECT_EQ(t.traffic->leftovers(t.world->context()).size(), 1u);  // the target's is back all the same
}

// What a tool that installs configurations does, in the days of a run that follows: its own file again, as it was or as it is now.
TEST(NginxTraffic, WhatWasLedPastTheGateIsToldAndLedThroughItAgain) {
  TwoSites t;
  const std::string original = read_file(t.nginx.source->site());
  auto astray = [&](Side s) { return t.traffic->astray(t.world->context(), s); };
  auto asked_through = [&] {
    std::int64_t before = get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted");
    EXPECT_EQ(ask_once(t.front(Side::source)).status, 200);
    return get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted") > before;
  };
  EXPECT_EQ(astray(Side::source).size(), 1u);
  t.traffic->prepare(t.world->context());
  for (const std::string& theirs : {original, original + "# theirs\n"}) {
    for (Side s : {Side::source, Side::target}) EXPECT_TRUE(astray(s).empty()) << astray(s)[0];
    write_durably(t.nginx.source->site(), theirs);
    run_ok({.argv = {"nginx", "-c", t.nginx.source->conf(), "-s", "reload"}});
    Deadline reloaded = Deadline::in(Millis(5000));
    while (asked_through() && !reloaded.passed()) system_clock().sleep(Millis(20));
    ASSERT_EQ(astray(Side::source).size(), 1u);
    EXPECT_NE(astray(Side::source)[0].find(t.nginx.source->site() + " was changed since begin"), std::string::npos) << astray(Side::source)[0];
    EXPECT_TRUE(astray(Side::target).empty());
    t.traffic->prepare(t.world->context());
    EXPECT_TRUE(asked_through());
  }
  // Another way to the application, in a file that is not ours.
  const std::string conf = read_file(t.nginx.source->conf());
  write_durably(t.nginx.source->conf(), conf.substr(0, conf.rfind('}')) + "  server { listen " + text(free_port()) + "; location / { proxy_pass http://" + text(t.ports.source.application) + "; } }\n}\n");
  ASSERT_EQ(astray(Side::source).size(), 1u);
  EXPECT_NE(astray(Side::source)[0].find("past the gate"), std::string::npos) << astray(Side::source)[0];
  EXPECT_THROW(t.traffic->prepare(t.world->context()), Error);
  write_durably(t.nginx.source->conf(), conf);
  EXPECT_TRUE(astray(Side::source).empty());
  // Changed where it leads through the gate: what it was without that is for a person to say.
  const std::string edited = read_file(t.nginx.source->site());
  write_durably(t.nginx.source->site(), edited + "upstream direct { server " + text(t.ports.source.application) + "; }\n");
  try {
    t.traffic->prepare(t.world->context());
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_NE(e.hint.find("bring that change into"), std::string::npos) << e.hint;
  }
  write_durably(t.nginx.source->site(), original + "# theirs\n# more\n");
  t.traffic->prepare(t.world->context());
  t.traffic->withdraw(t.world->context());
  EXPECT_EQ(read_file(t.nginx.source->site()), original + "# theirs\n# more\n");
  EXPECT_TRUE(t.traffic->leftovers(t.world->context()).empty());
}

TEST(NginxTraffic, AFileThatSomebodyRemovedIsToldLikeOneThatWasChanged) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  std::string site = t.nginx.source->site();
  ASSERT_EQ(::rename(site.c_str(), (site + ".off").c_str()), 0);
  try {
    t.traffic->withdraw(t.world->context());
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::state);
    EXPECT_NE(e.hint.find("/0.original"), std::string::npos) << e.hint;
  }
  ASSERT_EQ(::rename((site + ".off").c_str(), site.c_str()), 0);
  t.traffic->withdraw(t.world->context());
  EXPECT_TRUE(t.traffic->leftovers(t.world->context()).empty());
}

// A controller may die between the files and the reload, both ways.
TEST(NginxTraffic, AReloadThatAnEarlierTryDidNotComeToIsMadeUpFor) {
  TwoSites t;
  t.traffic->prepare(t.world->context());
  std::string kept = t.world->source.state() + "/traffic/web/";
  Json m = parse_json(read_file(kept + "manifest.json"), "manifest");
  m["reloaded"] = false;
  write_durably(kept + "manifest.json", m.dump());
  write_durably(t.nginx.source->site(), read_file(kept + "0.original"));
  t.traffic->withdraw(t.world->context());
  std::int64_t accepted = get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted");
  EXPECT_EQ(ask_once(t.front(Side::source)).status, 200);
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted"), accepted);
}

// What keeps nginx's files from being understood as a whole must not keep it from its reload.
TEST(NginxTraffic, IsReloadedWhateverBecameOfItsOtherFiles) {
  TwoSites t;
  std::string other = parent_path(t.nginx.source->conf()) + "/other/x.conf", real = read_file(t.nginx.source->conf());
  make_directories(parent_path(other));
  write_durably(other, "# nothing\n");
  t.world->deployment.traffic[0].on.source.files.push_back(other);
  write_durably(t.nginx.source->conf(), real.substr(0, real.rfind('}')) + "  include other/*.conf;\n}\n");
  auto traffic = std::move(make_traffic(t.world->deployment).at(0));
  traffic->prepare(t.world->context());
  remove_tree(parent_path(other));
  traffic->withdraw(t.world->context());
  std::int64_t accepted = get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted");
  EXPECT_EQ(ask_once(t.front(Side::source)).status, 200);
  EXPECT_EQ(get_int(t.world->source.gate({{"op", "status"}}).at("routes")[0], "accepted"), accepted);
}

TEST(NginxTraffic, TwoEntriesInOneFileAreTakenBackTheOtherWayRound) {
  const std::uint16_t second = free_port();
  TwoSites t([&](const Ports& p) { return usual_site(p) + "upstream other { server " + text(second) + "; }\n"; });
  Application other("other", loopback(second));
  std::string original = read_file(t.nginx.source->site());
  TrafficConfig more = t.world->deployment.traffic[0];
  more.name = "other";
  for (Side s : {Side::source, Side::target}) more.on[s].application = text(second), more.on[s].listen = text(free_port());
  t.world->deployment.traffic.push_back(more);
  auto all = make_traffic(t.world->deployment);
  auto lead = [&] {
    for (auto& traffic : all) traffic->prepare(t.world->context());
    const std::string led = read_file(t.nginx.source->site());
    for (auto& traffic : all) traffic->prepare(t.world->context());
    EXPECT_EQ(read_file(t.nginx.source->site()), led);
    for (auto& traffic : all)
      for (Side s : {Side::source, Side::target}) EXPECT_TRUE(traffic->astray(t.world->context(), s).empty());
  };
  lead();
  write_durably(t.nginx.source->site(), original + "# theirs\n");
  for (auto& traffic : all) EXPECT_EQ(traffic->astray(t.world->context(), Side::source).size(), 1u);
  lead();
  withdraw_all(all, t.world->context());
  EXPECT_EQ(read_file(t.nginx.source->site()), original + "# theirs\n");
  for (auto& traffic : all) EXPECT_TRUE(traffic->leftovers(t.world->context()).empty());
}

// As a full disk would, or a file that may not be replaced.
TEST(NginxTraffic, AReplacementThatFailsLeavesNothingBeside) {
  TwoSites t;
  std::string site = t.nginx.source->site();
  t.traffic->prepare(t.world->context());
  run_ok({.argv = {"mount", "--bind", site, site}});
  try {
    t.traffic->withdraw(t.world->context());
    ADD_FAILURE();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("site.conf"), std::string::npos) << e.what();
  }
  run_ok({.argv = {"umount", site}});
  EXPECT_FALSE(exists(parent_path(site) + "/.rehome-new.site.conf"));
  t.traffic->withdraw(t.world->context());
}

TEST(NginxTraffic, FindsAStoppedNginxAndAFileThatItDoesNotRead) {
  TwoSites t;
  t.world->deployment.traffic[0].on.target.files = {t.nginx.target->site() + ".other"};
  auto found = make_traffic(t.world->deployment).at(0)->preflight(t.world->context());
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].id, "nginx.not_read");
  EXPECT_EQ(found[1].id, "nginx.other_file");
  write_durably(t.nginx.source->conf(), read_file(t.nginx.source->conf()) + "broken");
  found = t.traffic->preflight(t.world->context());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_NE(found[0].message.find("not valid"), std::string::npos);
}

}  // namespace
}  // namespace rehome
