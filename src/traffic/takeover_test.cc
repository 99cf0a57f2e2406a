// The gate in the application's own place: under its address, its port, or its socket's name.
#include <gtest/gtest.h>

#include <sched.h>
#include <sys/stat.h>

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

TEST(ListenTraffic, ClientsAtTheGateSeeNothingOfASwitch) {
  BySide<std::string> listen{"127.0.0.1:" + std::to_string(free_port()), "127.0.0.1:" + std::to_string(free_port())};
  BySide<std::string> at{"127.0.0.1:" + std::to_string(free_port()), "127.0.0.1:" + std::to_string(free_port())};
  Application source("source", Address::parse(at.source)), target("target", Address::parse(at.target));
  World world(between(TrafficConfig::Take::listen, listen, at));
  auto traffic = std::move(make_traffic(world.deployment).at(0));
  EXPECT_TRUE(traffic->preflight(world.context()).empty());
  traffic->prepare(world.context());
  traffic->prepare(world.context());
  Load load(Address::parse(listen.source), 6, false);
  system_clock().sleep(Millis(100));
  hold_switch_and_return(world, target);
  system_clock().sleep(Millis(100));
  traffic->withdraw(world.context());
  nothing_failed(load);
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
  traffic->withdraw(world.context());
  EXPECT_EQ(ask_once(Address::parse(at.source)).body.substr(0, 5), "again");
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

}  // namespace
}  // namespace rehome
