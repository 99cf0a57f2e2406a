// What a service that rehome starts takes over from the agent that starts it.
#include <gtest/gtest.h>
#include <signal.h>

#include "base/text.h"
#include "runtime/runtime.h"
#include "site/here.h"
#include "sys/fs.h"

namespace rehome {
namespace {

TEST(CommandService, IsNoHarderToEndThanOthers) {
  TempDir dir;
  ServiceConfig config;
  config.name = "shop";
  config.runtime = ServiceConfig::Runtime::command;
  config.start_timeout = Millis(5000);
  config.on.source.pid_file = dir.path() + "/pid";
  config.on.source.start = {"sh", "-c", "echo $$ >\"$1\"; exec sleep 60", "sh", dir.path() + "/pid"};
  auto service = make_command_service(config);
  Here here;
  // The agent's unit has -900; to raise it needs no right.
  const std::string own = "/proc/self/oom_score_adj";
  std::string before(trim(read_file(own)));
  auto set = [&](const std::string& value) { run_ok({.argv = {"sh", "-c", "echo \"$1\" >/proc/$PPID/oom_score_adj", "sh", value}}); };
  set("500");
  auto adjusted = [&] { return std::string(trim(read_file("/proc/" + std::string(trim(read_file(dir.path() + "/pid"))) + "/oom_score_adj"))); };
  service->start(here);
  EXPECT_EQ(adjusted(), "0");
  service->stop(here);
  // And started by the agent alone.
  ::unlink((dir.path() + "/pid").c_str());
  Action a = service->start_action(Side::source);
  run_ok({.argv = a.argv});
  for (Deadline d = Deadline::in(Millis(5000)); !service->running(here) && !d.passed();) system_clock().sleep(Millis(10));
  EXPECT_EQ(adjusted(), "0");
  service->stop(here);
  set(before);
}

}  // namespace
}  // namespace rehome
