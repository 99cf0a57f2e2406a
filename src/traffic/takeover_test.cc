// The gate in the application's own place: under its address, its port, or its socket's name.
#include <gtest/gtest.h>

#include <sched.h>
#include <signal.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/error.h"
#include "traffic/testing/web.h"
#include "traffic/testing/world.h"

namespace rehome {
namespace {

using namespace testing;

Deployment between(TrafficConfig::Take take, const BySide<std::string>& listen, const BySide<std::string>& application) {
  Deployment d;
  d.name = "test";
  TrafficConfig t;
  t.name = "app";
  t.take = take;
  for (Side s : {Side::source, Side::target}) {
    t.on[s].listen = listen[s];
    t.on[s].application = application[s];
  }
  d.traffic.push_back(t);
  d.drain_deadline = Millis(1500);
  return d;
}

void drain(LocalSite& site) {
  Deadline deadline = Deadline::in(Millis(5000));
  while (get_int(site.gate({{"op", "status"}}), "in_flight") > 0) {
    ASSERT_FALSE(deadline.passed()) << site.gate({{"op", "status"}}).dump();
    system_clock().sleep(Millis(2));
  }
}

// A hold of 300 ms, a switch to the target and one back; clients stay at the source's address.
void hold_switch_and_return(World& world, Application& target) {
  world.hold();
  drain(world.source);
  system_clock().sleep(Millis(300));
  world.release(Side::source);
  system_clock().sleep(Millis(150));
  Json ledger = world.source.gate({{"op", "status"}}).at("ledger");
  EXPECT_GT(get_int(ledger, "held"), 0);
  EXPECT_EQ(get_int(ledger, "dropped"), 0);
  std::printf("  hold of 300 ms: %s\n", ledger.dump().c_str());
  std::int64_t before = target.requests;
  world.hold();
  drain(world.source);
  world.release(Side::target);
  system_clock().sleep(Millis(300));
  EXPECT_GT(target.requests, before);
  world.hold();
  drain(world.target);
  world.release(Side::source);
}

void nothing_failed(Load& load) {
  load.stop();
  EXPECT_EQ(load.bad, 0) << load.first_bad();
  EXPECT_EQ(load.broken, 0);
  EXPECT_GT(load.good, 50);
  std::printf("  %ld requests, longest %.1f ms\n", load.good.load(), static_cast<double>(load.longest_us) / 1000);
}

struct ListenTraffic : ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Both, ListenTraffic, ::testing::Values("127.0.0.1:", "[::1]:"));

TEST_P(ListenTraffic, ClientsAtTheGateSeeNothingOfASwitch) {
  BySide<std::string> listen{GetParam() + std::to_string(free_port()), GetParam() + std::to_string(free_port())};
  BySide<std::string> at{GetParam() + std::to_string(free_port()), GetParam() + std::to_string(free_port())};
  Application source("source", Address::parse(at.source)), target("target", Address::parse(at.target));
  World world(between(TrafficConfig::Take::listen, listen, at));
  auto traffic = std::move(make_traffic(world.deployment).at(0));
  EXPECT_TRUE(traffic->preflight(world.context()).empty());
  traffic->prepare(world.context());
  traffic->prepare(world.context());
  Load load(Address::parse(listen.source), 6, false);
  system_clock().sleep(Millis(100));
  // Who knows the application's own port is counted, and nobody who came through the gate is.
  Fd direct = connect_to(Address::parse(at.source), Deadline::in(Millis(5000)));
  system_clock().sleep(Millis(50));
  EXPECT_EQ(past_gate(world.deployment, world.source).count, 1);
  hold_switch_and_return(world, target);
  system_clock().sleep(Millis(100));
  traffic->withdraw(world.context());
  nothing_failed(load);
}

TEST(Gates, NobodyIsLedToAnAddressWhereNobodyAnswers) {
  const std::string gate = "127.0.0.1:" + std::to_string(free_port()), app = "127.0.0.1:" + std::to_string(free_port());
  World world(between(TrafficConfig::Take::listen, {gate, gate}, {app, app}));
  const TrafficConfig& t = world.deployment.traffic[0];
  auto traffic = std::move(make_traffic(world.deployment).at(0));
  auto found = traffic->preflight(world.context());
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].id, "traffic.application");
  EXPECT_NE(found[0].message.find(t.on.source.application), std::string::npos) << found[0].message;
  EXPECT_THROW(traffic->prepare(world.context()), Error);
  EXPECT_THROW(connect_to(Address::parse(gate), Deadline::in(Millis(500))), Error) << "a gate listens there";
  EXPECT_THROW(require_application(world.target, t, Millis(0)), Error);
  Application application("source", Address::parse(t.on.source.application));
  EXPECT_TRUE(traffic->preflight(world.context()).empty());
  EXPECT_NO_THROW(require_application(world.target, t, Millis(0)));
}

TEST(UnixSocketTraffic, TakesTheNameAndGivesItBackUnderLoad) {
  TempDir dir("rehome-app");
  BySide<std::string> at{"unix:" + dir.path() + "/source.sock", "unix:" + dir.path() + "/target.sock"};
  BySide<std::string> listen{"unix:" + dir.path() + "/source.gate", "unix:" + dir.path() + "/target.gate"};
  auto source = std::make_unique<Application>("source", Address::parse(at.source));
  Application target("target", Address::parse(at.target));
  World world(between(TrafficConfig::Take::unix_socket, listen, at));
  auto traffic = std::move(make_traffic(world.deployment).at(0));
  EXPECT_TRUE(traffic->preflight(world.context()).empty());
  struct stat original, now;
  ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &original), 0);
  Load load(Address::parse(at.source), 6, false);
  system_clock().sleep(Millis(100));
  traffic->prepare(world.context());
  EXPECT_EQ(traffic->leftovers(world.context()).size(), 2u);
  traffic->prepare(world.context());
  hold_switch_and_return(world, target);
  system_clock().sleep(Millis(100));
  traffic->withdraw(world.context());
  traffic->withdraw(world.context());
  nothing_failed(load);
  ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &now), 0);
  EXPECT_EQ(now.st_ino, original.st_ino);
  EXPECT_TRUE(traffic->leftovers(world.context()).empty());
  EXPECT_FALSE(exists(dir.path() + "/source.sock.rehome"));

  // An application that starts again while its name is taken.
  traffic->prepare(world.context());
  source.reset();
  source = std::make_unique<Application>("again", Address::parse(at.source));
  Deadline deadline = Deadline::in(Millis(5000));
  struct stat gate;
  do {
    system_clock().sleep(Millis(50));
    ASSERT_EQ(::stat((dir.path() + "/source.gate").c_str(), &gate), 0);
    ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &now), 0);
  } while (now.st_ino != gate.st_ino && !deadline.passed());
  EXPECT_EQ(now.st_ino, gate.st_ino);
  EXPECT_EQ(ask_once(Address::parse(at.source)).body.substr(0, 5), "again");

  // An application whose name goes with it: while it may not serve, and only then, the gate has the name all the same.
  source.reset();
  ASSERT_EQ(::unlink((dir.path() + "/source.sock").c_str()), 0);
  system_clock().sleep(Millis(1100));
  EXPECT_FALSE(exists(dir.path() + "/source.sock"));
  write_durably(world.source.state() + "/not-serving", "");
  for (deadline = Deadline::in(Millis(5000)); !exists(dir.path() + "/source.sock") && !deadline.passed();) system_clock().sleep(Millis(20));
  ASSERT_EQ(::stat((dir.path() + "/source.gate").c_str(), &gate), 0);
  ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &now), 0);
  EXPECT_EQ(now.st_ino, gate.st_ino);
  ASSERT_EQ(::unlink((world.source.state() + "/not-serving").c_str()), 0);
  source = std::make_unique<Application>("again", Address::parse(at.source));
  for (deadline = Deadline::in(Millis(5000)); !deadline.passed(); system_clock().sleep(Millis(50))) {
    ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &now), 0);
    if (now.st_ino == gate.st_ino) break;
  }
  EXPECT_EQ(now.st_ino, gate.st_ino);

  // A gate's socket that is made anew: only the name is put to it, and the application's socket stays the kept one.
  struct stat kept;
  ASSERT_EQ(::stat((dir.path() + "/source.sock.rehome").c_str(), &original), 0);
  std::vector<Fd> anew;
  for (int i = 0; i < 2; i++) {
    anew.push_back(listen_on(Address::parse(listen.source)));
    ASSERT_EQ(::stat((dir.path() + "/source.gate").c_str(), &gate), 0);
    deadline = Deadline::in(Millis(5000));
    do {
      system_clock().sleep(Millis(50));
      ASSERT_EQ(::stat((dir.path() + "/source.sock").c_str(), &now), 0);
    } while (now.st_ino != gate.st_ino && !deadline.passed());
    EXPECT_EQ(now.st_ino, gate.st_ino);
    ASSERT_EQ(::stat((dir.path() + "/source.sock.rehome").c_str(), &kept), 0);
    EXPECT_EQ(kept.st_ino, original.st_ino);
  }
  // And once more, just before the name is given back.
  anew.push_back(listen_on(Address::parse(listen.source)));
  traffic->withdraw(world.context());
  EXPECT_EQ(ask_once(Address::parse(at.source)).body.substr(0, 5), "again");
  EXPECT_TRUE(traffic->leftovers(world.context()).empty());
  EXPECT_EQ(run_ok({.argv = {"sh", "-c", "ls \"$1\" | grep source.sock", "sh", dir.path()}}).out, "source.sock\n");
}

TEST(UnixSocketTraffic, PreflightSeesAMissingSocketAndAnotherFileSystem) {
  TempDir dir("rehome-app");
  BySide<std::string> at{"unix:" + dir.path() + "/none.sock", "unix:" + dir.path() + "/target.sock"};
  BySide<std::string> listen{"unix:/proc/gate", "unix:" + dir.path() + "/none/gate"};
  World world(between(TrafficConfig::Take::unix_socket, listen, at));
  std::string ids;
  for (const auto& f : make_traffic(world.deployment).at(0)->preflight(world.context())) ids += f.id + " ";
  EXPECT_EQ(ids, "unix_socket.file_system unix_socket.application unix_socket.directory ");
}

// `systemctl show` answers what a unit with such a directory has.
TEST(UnixSocketTraffic, PreflightSeesADirectoryThatGoesWithItsService) {
  TempDir dir("rehome-app"), programs;
  const std::string name = dir.path().substr(1), path = std::getenv("PATH");
  BySide<std::string> at{"unix:/run/" + name + "/a/source.sock", "unix:" + dir.path() + "/target.sock"};
  BySide<std::string> listen{"unix:/run/" + name + "/a/gate", "unix:" + dir.path() + "/gate"};
  World world(between(TrafficConfig::Take::unix_socket, listen, at));
  ServiceConfig service;
  service.name = "shop";
  service.runtime = ServiceConfig::Runtime::systemd;
  service.on.source.unit = service.on.target.unit = "shop.service";
  world.deployment.services.push_back(service);
  ::setenv("PATH", (programs.path() + ":" + path).c_str(), 1);
  auto ids = [&](const std::string& preserve) {
    write_durably(programs.path() + "/systemctl", "#!/bin/sh\necho 'RuntimeDirectory=other " + name + "'\necho RuntimeDirectoryPreserve=" + preserve + "\n", 0755);
    std::string all;
    for (const auto& f : make_traffic(world.deployment).at(0)->preflight(world.context()))
      if (f.id == "unix_socket.runtime_directory") all += f.object + " ";
    return all;
  };
  // A restart keeps it; that the service of before is killed after a switch does not.
  EXPECT_EQ(ids("no") + ids("restart"), "source: traffic app source: traffic app ");
  EXPECT_EQ(ids("yes"), "");
  ::setenv("PATH", path.c_str(), 1);
}

// Runs `inside` in a network namespace of its own, and gives it the id of a second one that reaches it: clients from
// outside are in 10.77.9.2, the server is 10.77.9.1.
using Outside = std::function<void(const std::function<void()>&)>;
class Namespaces {
 public:
  void run(const std::function<void(const Outside& outside)>& inside) {
    std::thread([&] {
      ASSERT_EQ(::unshare(CLONE_NEWNET), 0) << "needs root";
      run_ok({.argv = {"ip", "link", "set", "lo", "up"}});
      std::atomic<pid_t> other{0};
      std::mutex mutex;
      std::function<void()> work;
      std::atomic<bool> busy{false}, stop{false};
      std::thread outside([&] {
        REHOME_CHECK(::unshare(CLONE_NEWNET) == 0);
        other = ::gettid();
        while (!stop) {
          if (busy) {
            work();
            busy = false;
          }
          system_clock().sleep(Millis(1));
        }
      });
      while (!other) system_clock().sleep(Millis(1));
      auto in_outside = [&](const std::function<void()>& f) {
        work = f;
        busy = true;
        while (busy) system_clock().sleep(Millis(1));
      };
      run_ok({.argv = {"ip", "link", "add", "in0", "type", "veth", "peer", "name", "out0"}});
      run_ok({.argv = {"ip", "link", "set", "out0", "netns", std::to_string(other)}});
      run_ok({.argv = {"sh", "-c", "ip addr add 10.77.9.1/24 dev in0 && ip link set in0 up"}});
      in_outside([] { run_ok({.argv = {"sh", "-c", "ip addr add 10.77.9.2/24 dev out0 && ip link set out0 up && ip link set lo up"}}); });
      // A thread's exception would end the program, and the other tests with it.
      try {
        inside(in_outside);
      } catch (const Error& e) {
        ADD_FAILURE() << e.what();
      }
      stop = true;
      outside.join();
    }).join();
  }
};

// This host's rules: of both sites, which are one host here.
std::string rules() {
  return run_ok({.argv = {"sh", "-c", "for i in iptables ip6tables; do $i -t mangle -S PREROUTING; done | grep -v -- '^-P' || [ $? = 1 ]"}}).out;
}
std::size_t count_rules() {
  std::string all = rules();
  return static_cast<std::size_t>(std::count(all.begin(), all.end(), '\n'));
}
// All are used again within seconds, with the rule and without it, also while the last connection is in TIME_WAIT.
void few_ports() { run_ok({.argv = {"sh", "-c", "echo 40000 43999 >/proc/sys/net/ipv4/ip_local_port_range; echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse"}}); }

struct Redirected {
  BySide<std::string> at{"0.0.0.0:8000", "0.0.0.0:8100"}, listen{"127.0.0.1:8001", "127.0.0.1:8101"};
  Application source{"source", Address::parse(at.source)}, target{"target", Address::parse(at.target)};
  World world{between(TrafficConfig::Take::redirect, listen, at)};
  std::unique_ptr<Traffic> traffic = std::move(make_traffic(world.deployment).at(0));
  Address from_outside = Address::parse("10.77.9.1:8000"), here = Address::parse("127.0.0.1:8000");
  std::int64_t accepted() { return get_int(world.source.gate({{"op", "status"}}).at("routes")[0], "accepted"); }
};

TEST(RedirectTraffic, TakesThePortAndGivesItBackUnderLoad) {
  Namespaces().run([](const Outside& outside) {
    Redirected r;
    for (const auto& f : r.traffic->preflight(r.world.context())) ADD_FAILURE() << f.object << ": " << f.message;
    std::unique_ptr<Load> far;
    std::unique_ptr<Browser> old;
    outside([&] {
      far = std::make_unique<Load>(r.from_outside, 3, false);
      old = std::make_unique<Browser>(r.from_outside);
      EXPECT_EQ(old->ask("/").status, 200);
    });
    Load near(r.here, 3, false);
    system_clock().sleep(Millis(100));
    r.traffic->prepare(r.world.context());
    r.traffic->prepare(r.world.context());
    EXPECT_EQ(count_rules(), 2u) << rules();
    EXPECT_FALSE(r.traffic->leftovers(r.world.context()).empty());
    // A connection of before goes on, and with the application.
    EXPECT_EQ(old->ask("/").body.substr(0, 6), "source");
    EXPECT_TRUE(old->connected());
    // It is the only one that did not come through the gate, however many come and go, to and from the same ports.
    for (int i = 0; i < 20; i++) EXPECT_EQ(past_gate(r.world.deployment, r.world.source).count, 1);
    EXPECT_EQ(past_gate(r.world.deployment, r.world.target).count, 0);
    // Nobody passes the gate by: while it holds, the application hears nothing new.
    r.world.hold();
    drain(r.world.source);
    std::int64_t before = r.source.requests;
    system_clock().sleep(Millis(200));
    EXPECT_EQ(r.source.requests, before);
    r.world.release(Side::source);
    hold_switch_and_return(r.world, r.target);
    system_clock().sleep(Millis(100));
    r.traffic->withdraw(r.world.context());
    EXPECT_TRUE(r.traffic->leftovers(r.world.context()).empty());
    system_clock().sleep(Millis(50));
    std::int64_t through_gate = r.accepted();
    r.traffic->withdraw(r.world.context());
    system_clock().sleep(Millis(100));
    EXPECT_EQ(r.accepted(), through_gate);
    EXPECT_EQ(old->ask("/").status, 200);
    EXPECT_TRUE(old->connected());
    nothing_failed(near);
    nothing_failed(*far);
  });
}

// Begin and complete, again and again: every kind of connection that is older than a rule, and the same addresses and ports
// used again within seconds.
TEST(RedirectTraffic, ComingAndGoingLosesNoConnection) {
  Namespaces().run([](const Outside& outside) {
    few_ports();
    Redirected r;
    r.world.deployment.drain_deadline = Millis(200);
    std::unique_ptr<Load> far, far_kept;
    outside([&] {
      few_ports();
      far = std::make_unique<Load>(r.from_outside, 2, false);
      far_kept = std::make_unique<Load>(r.from_outside, 1, true);
    });
    Load near(r.here, 2, false), near_kept(r.here, 1, true);
    for (int cycle = 0; cycle < 8; cycle++) {
      r.traffic->prepare(r.world.context());
      Load kept_through_gate(r.here, 1, true);
      std::int64_t before = r.accepted();
      system_clock().sleep(Millis(150));
      EXPECT_GT(r.accepted(), before + 10);
      r.traffic->withdraw(r.world.context());
      // Who came through the gate stays with it, though the rule is gone.
      system_clock().sleep(Millis(100));
      nothing_failed(kept_through_gate);
      system_clock().sleep(Millis(50));
    }
    for (Load* l : {&near, &near_kept, far.get(), far_kept.get()}) nothing_failed(*l);
    EXPECT_GT(near.good + far->good, 1000);
  });
}

// Clients far away: their connections are half made when the rule goes, and the last packet that makes them must still find
// the gate.
TEST(RedirectTraffic, AGateThatEndsAfterItsWithdrawalLosesNobodyFarAway) {
  Namespaces().run([](const Outside& outside) {
    Redirected r;
    r.world.deployment.drain_deadline = Millis(5000);
    r.traffic->prepare(r.world.context());
    std::unique_ptr<Load> far;
    outside([&] { far = std::make_unique<Load>(r.from_outside, 10, false); });
    system_clock().sleep(Millis(300));
    EXPECT_GT(r.accepted(), 40);
    auto far_away = [](const char* what) {
      run_ok({.argv = {"iptables", what, "INPUT", "-i", "in0", "-p", "tcp", "!", "--syn", "--dport", "8000", "-j", "DROP"}});
    };
    far_away("-A");
    system_clock().sleep(Millis(20));
    std::thread arrival([&] {
      system_clock().sleep(Millis(500));
      far_away("-D");
    });
    r.traffic->withdraw(r.world.context());
    for (LocalSite* s : {&r.world.source, &r.world.target}) ::kill(s->gate_pid(), SIGTERM);
    arrival.join();
    system_clock().sleep(Millis(1500));
    nothing_failed(*far);
  });
}

TEST(RedirectTraffic, CancelAfterHalfABeginLeavesNothing) {
  Namespaces().run([](const Outside&) {
    Redirected r;
    // The source's packet filter fails after the target's rule is in.
    r.world.source.failing = "sh";
    EXPECT_THROW(r.traffic->prepare(r.world.context()), Error);
    r.world.source.failing.clear();
    EXPECT_EQ(count_rules(), 1u) << rules();
    EXPECT_EQ(ask_once(r.here).body.substr(0, 6), "source");
    r.traffic->withdraw(r.world.context());
    EXPECT_TRUE(r.traffic->leftovers(r.world.context()).empty());
    EXPECT_EQ(rules(), "");
  });
}

TEST(RedirectTraffic, ARuleThatARebootTookAwayComesBack) {
  Namespaces().run([](const Outside&) {
    Redirected r;
    r.traffic->prepare(r.world.context());
    for (Side s : {Side::source, Side::target}) EXPECT_TRUE(r.traffic->astray(r.world.context(), s).empty());
    run_ok({.argv = {"iptables", "-t", "mangle", "-F"}});
    // That is waited for.
    EXPECT_TRUE(r.traffic->astray(r.world.context(), Side::source).empty());
    Deadline deadline = Deadline::in(Millis(8000));
    while (count_rules() < 2 && !deadline.passed()) system_clock().sleep(Millis(50));
    std::int64_t before = r.accepted();
    EXPECT_EQ(ask_once(r.here).status, 200);
    EXPECT_EQ(r.accepted(), before + 1);
    r.traffic->withdraw(r.world.context());
    EXPECT_EQ(r.traffic->astray(r.world.context(), Side::source).size(), 1u);
    // And not after it was taken out on purpose.
    system_clock().sleep(Millis(2500));
    EXPECT_TRUE(r.traffic->leftovers(r.world.context()).empty());
  });
}

TEST(RedirectTraffic, BothProtocolsGoThroughAGateThatListensToBoth) {
  Namespaces().run([](const Outside&) {
    BySide<std::string> at{"[::]:8000", "127.0.0.1:8100"}, listen{"[::]:8001", "127.0.0.1:8101"};
    Application source("source", Address::parse(at.source)), target("target", Address::parse(at.target));
    World world(between(TrafficConfig::Take::redirect, listen, at));
    auto traffic = std::move(make_traffic(world.deployment).at(0));
    for (const auto& f : traffic->preflight(world.context())) ADD_FAILURE() << f.object << ": " << f.message;
    traffic->prepare(world.context());
    EXPECT_EQ(count_rules(), 3u) << rules();
    for (const char* to : {"127.0.0.1:8000", "[::1]:8000"}) EXPECT_EQ(ask_once(Address::parse(to)).body.substr(0, 6), "source") << to;
    EXPECT_EQ(get_int(world.source.gate({{"op", "status"}}).at("routes")[0], "accepted"), 2);
    traffic->withdraw(world.context());
    EXPECT_TRUE(traffic->leftovers(world.context()).empty());
    for (const char* to : {"127.0.0.1:8000", "[::1]:8000"}) EXPECT_EQ(ask_once(Address::parse(to)).status, 200) << to;
  });
}

TEST(RedirectTraffic, PreflightSeesWhatWouldPassTheGateBy) {
  Namespaces().run([](const Outside&) {
    BySide<std::string> at{"0.0.0.0:8000", "127.0.0.1:8100"}, listen{"127.0.0.1:8001", "127.0.0.1:8101"};
    Fd v6 = listen_on(Address::parse("[::]:8000"));
    run_ok({.argv = {"iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8100", "-j", "DNAT", "--to-destination", "172.17.0.2:80"}});
    World world(between(TrafficConfig::Take::redirect, listen, at));
    auto preflight = [&] {
      std::string ids;
      for (const auto& f : make_traffic(world.deployment).at(0)->preflight(world.context())) ids += f.id + " ";
      return ids;
    };
    EXPECT_EQ(preflight(), "redirect.ipv6 redirect.dnat ");
    world.source.failing = "unshare";
    EXPECT_EQ(preflight(), "redirect.ipv6 redirect.iptables redirect.dnat ");
  });
}

}  // namespace
}  // namespace rehome
