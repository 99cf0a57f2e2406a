// What stays of a start that is ended.
#include <gtest/gtest.h>

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

}  // namespace
}  // namespace rehome
