// What the plan says beforehand, for every kind of client.
#include <gtest/gtest.h>

#include "base/text.h"
#include "traffic/gates.h"

namespace rehome {
namespace {

Deployment deployment(TrafficConfig::Kind kind, TrafficConfig::Longer longer) {
  Deployment d;
  TrafficConfig t;
  t.name = "web";
  t.kind = kind;
  t.longer_requests = longer;
  t.on.source = t.on.target = {.listen = "127.0.0.1:1", .application = "127.0.0.1:2"};
  d.traffic.push_back(t);
  d.max_pause = Millis(2000);
  d.drain_deadline = Millis(10000);
  return d;
}

// The one sentence of the plan about a kind of client.
std::string about(const Deployment& d, const std::string& kind) {
  std::string found;
  for (const auto& note : make_traffic(d).at(0)->plan_notes())
    if (note.starts_with(kind)) found += note;
  return found;
}

TEST(PlanNotes, SayWhatHappensToEachKindOfClient) {
  using T = TrafficConfig;
  for (auto kind : {T::Kind::nginx, T::Kind::gate})
    for (auto longer : {T::Longer::back_out, T::Longer::cut}) {
      Deployment d = deployment(kind, longer);
      bool cut = longer == T::Longer::cut;
      for (const char* who : {"keep-alive clients", "long requests", "uploads", "event streams", "websockets"}) EXPECT_NE(about(d, who), "") << who;
      for (const char* who : {"event streams", "websockets"})
        EXPECT_NE(about(d, who).find(cut ? "they are cut after 1.0 s" : "makes the switch refuse to begin, or back out"), std::string::npos) << about(d, who);
      EXPECT_NE(about(d, "long requests").find(cut ? "have 1.0 s to finish (half of max_pause" : "have 2.0 s to finish (max_pause)"), std::string::npos) << about(d, "long requests");
      EXPECT_NE(about(d, "keep-alive").find(kind == T::Kind::nginx ? "see no error" : cut ? "it is closed, cleanly" : "makes the switch back out"), std::string::npos);
    }
}

TEST(PlanNotes, SayWhatTheLimitsAnswer) {
  Deployment d = deployment(TrafficConfig::Kind::gate, TrafficConfig::Longer::cut);
  EXPECT_NE(make_traffic(d).at(0)->plan_notes()[0].find("are answered 503"), std::string::npos);
  d.traffic[0].refuse_with_503 = false;
  EXPECT_NE(make_traffic(d).at(0)->plan_notes()[0].find("are closed without an answer"), std::string::npos);
}

TEST(DrainTime, LeavesRoomForTheRestOfThePauseWhereItCuts) {
  Deployment d = deployment(TrafficConfig::Kind::gate, TrafficConfig::Longer::back_out);
  EXPECT_EQ(drain_time(d), Millis(2000));
  d.traffic[0].longer_requests = TrafficConfig::Longer::cut;
  EXPECT_EQ(drain_time(d), Millis(1000));
  d.drain_deadline = Millis(300);
  EXPECT_EQ(drain_time(d), Millis(300));
  // The gates cut all or nothing.
  d.traffic.push_back(d.traffic[0]);
  d.traffic[1].longer_requests = TrafficConfig::Longer::back_out;
  EXPECT_FALSE(cuts_longer(d));
}

TEST(LongConnections, SaysWhatASwitchDoesWithThem) {
  Deployment d = deployment(TrafficConfig::Kind::nginx, TrafficConfig::Longer::back_out);
  EXPECT_EQ(long_connections(d, 2), "2 connections are open for longer than requests have to finish (2.0 s): websockets, event streams, long requests, or idle keep-alive clients; a switch would back out (longer_requests: cut cuts them instead)");
  d.traffic[0].longer_requests = TrafficConfig::Longer::cut;
  EXPECT_NE(long_connections(d, 1).find("1 connection is open"), std::string::npos);
  EXPECT_NE(long_connections(d, 1).find("it is cut at the switch, and counted"), std::string::npos);
}

}  // namespace
}  // namespace rehome
