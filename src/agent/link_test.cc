// The link's side that is reached: which socket leads back, when hellos come late or in another order than they were said.
#include "agent/link.h"

#include <gtest/gtest.h>

#include <thread>

#include "sys/fs.h"
#include "sys/net.h"

namespace rehome {
namespace {

// The other agent behind one start of its ssh: answers every line.
class Answering {
 public:
  explicit Answering(const std::string& path) : listener_(listen_on({.path = path}, 0600)), thread_([this] { loop(); }) {}
  ~Answering() {
    stop_ = true;
    thread_.join();
  }

 private:
  void loop() {
    std::vector<std::jthread> connections;
    while (!stop_) {
      std::optional<Fd> fd;
      try {
        fd = accept_from(listener_, Deadline::in(Millis(50)), &stop_);
      } catch (const Error&) {
        continue;  // nobody came in this time
      }
      if (!fd) continue;
      connections.emplace_back([this, f = std::make_shared<Fd>(std::move(*fd))] {
        Reader in(*f);
        try {
          while (!stop_)
            if (in.line(Deadline::in(Millis(3000)))) send_all(*f, "{\"ok\": true}\n", Deadline::in(Millis(1000)));
            else return;
        } catch (const Error&) {
          return;  // the test is over
        }
      });
    }
  }
  std::atomic<bool> stop_{false};
  Fd listener_;
  std::thread thread_;
};

TEST(Link, AHelloThatComesLateTakesNothingAway) {
  TempDir dir;
  make_directories(dir.path() + "/run");
  const std::string old_way = dir.path() + "/run/from-peer.1.1.sock", new_way = dir.path() + "/run/from-peer.1.2.sock";
  { Fd left_behind = listen_on({.path = old_way}, 0600); }  // its sshd has died: the file stays, and refuses
  if (!exists(old_way)) write_durably(old_way, "");
  Answering peer(new_way);
  Link link({dir.path(), [] { return Json::object(); }, [](const Json&) {}, [] {}, [](const std::string&) {}});
  link.start();
  link.peer_came({{"reverse", new_way}});
  // The cable was cut when this one was said, and TCP delivered it afterwards.
  link.peer_came({{"reverse", old_way}});
  EXPECT_TRUE(exists(new_way)) << "a hello of an earlier life removed the way of the present one";
  link.peer_came({{"reverse", new_way}});
  Deadline deadline = Deadline::in(Millis(5000));
  while (!link.up() && !deadline.passed()) system_clock().sleep(Millis(10));
  EXPECT_TRUE(link.up()) << link.status().dump();
  EXPECT_FALSE(exists(old_way)) << "what earlier lives left is cleared away";
  link.stop();
}

}  // namespace
}  // namespace rehome
