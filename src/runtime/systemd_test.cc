// What stays of a start that is ended, and what is found before anything is begun.
#include <gtest/gtest.h>
#include <unistd.h>

#include "base/error.h"
#include "runtime/runtime.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// An agent whose controller goes away as soon as the start condition is lifted; `systemctl` is slow.
class Leaving : public Site {
 public:
  Leaving() { write_durably(dir_.path() + "/systemctl", "#!/bin/sh\nexec sleep 30\n", 0755); }
  Side side() const override { return Side::target; }
  std::string label() const override { return "target"; }
  std::string state() const override { return dir_.path(); }
  std::int64_t generation() const override { return 1; }
  Json call(const std::string&, Json args, Deadline) override {
    Child child({.argv = args.at("argv").get<std::vector<std::string>>(), .env = {{"PATH", dir_.path() + ":/usr/bin:/bin"}}}, {});
    for (Deadline d = Deadline::in(Millis(5000)); exists(condition()) && !d.passed();) system_clock().sleep(Millis(1));
    child.end(Millis(2000));
    throw Error(Code::interrupted, "it was stopped: its controller is gone");
  }
  Fd open_relay(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::string local_socket_for(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::string condition() const { return dir_.path() + "/not-serving"; }

 private:
  TempDir dir_;
};

TEST(SystemdService, AStartThatIsEndedLeavesTheStartCondition) {
  ServiceConfig config;
  config.name = "shop";
  config.start_timeout = Millis(5000);
  config.on.target.unit = "shop.service";
  auto service = make_systemd_service(config);
  Leaving site;
  for (int i = 0; i < 10; i++) {
    write_durably(site.condition(), "");
    EXPECT_THROW(service->start(site), Error);
    EXPECT_TRUE(exists(site.condition()));
  }
}

// `systemctl show` answers what `says` holds.
class Answering : public Site {
 public:
  Side side() const override { return Side::source; }
  std::string label() const override { return "source"; }
  std::string state() const override { return dir_.path(); }
  std::int64_t generation() const override { return 1; }
  Json call(const std::string& op, Json args, Deadline deadline) override {
    if (op == "hello") return {{"capabilities", {{"freeze", true}}}};
    write_durably(dir_.path() + "/systemctl", "#!/bin/sh\nprintf '" + says + "'\n", 0755);
    return outcome_to_json(run({.argv = args.at("argv").get<std::vector<std::string>>(), .env = {{"PATH", dir_.path() + ":/usr/bin:/bin"}}}, deadline));
  }
  Fd open_relay(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::string local_socket_for(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::string says;

 private:
  TempDir dir_;
};

// The freeze comes at the end of a begin, behind the whole copy.
TEST(Services, WhatCannotBeFrozenIsFoundBeforeTheCopy) {
  Answering site;
  Deployment deployment;
  std::atomic<bool> cancelled{false};
  StoreContext context{.deployment = deployment, .source = site, .target = site, .cancelled = cancelled};
  ServiceConfig config;
  config.name = "shop";
  config.on.source.unit = "shop.service";
  config.on.source.pid_file = site.state() + "/pid";
  auto ids = [&](Service& service, const std::string& says) {
    std::string all;
    site.says = says;
    for (const auto& f : service.preflight(context, Side::source))
      if (f.id != "service.rights") all += (f.level == Finding::Level::error ? "error " : "warning ") + f.id + " ";
    return all;
  };
  auto unit = make_systemd_service(config), command = make_command_service(config);
  EXPECT_EQ(ids(*unit, "LoadState=loaded\\nActiveState=inactive\\nControlGroup=\\n"), "error service.down ");
  EXPECT_EQ(ids(*unit, "LoadState=loaded\\nActiveState=active\\nControlGroup=\\n"), "error service.freeze ");
  EXPECT_EQ(ids(*unit, "ControlGroup=/no/such\\nLoadState=loaded\\nActiveState=active\\n"), "error service.freeze ");
  EXPECT_EQ(ids(*command, ""), "error service.down ");
  write_durably(config.on.source.pid_file, std::to_string(::getpid()));
  EXPECT_EQ(ids(*command, ""), "");
}

}  // namespace
}  // namespace rehome
