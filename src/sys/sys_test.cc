#include <gtest/gtest.h>

#include <csignal>
#include <thread>

#include "base/error.h"
#include "sys/fs.h"
#include "sys/process.h"
#include "sys/net.h"

namespace rehome {

TEST(Process, CapturesBothOutputsAndTheStatus) {
  Outcome o = run({.argv = {"sh", "-c", "cat; echo bad >&2; exit 3"}, .input = "hello"});
  EXPECT_EQ(o.status, 3);
  EXPECT_EQ(o.out, "hello");
  EXPECT_EQ(o.err, "bad\n");
}

TEST(Process, LargeInputAndOutputDoNotDeadlock) {
  std::string big(3 << 20, 'x');
  EXPECT_EQ(run({.argv = {"cat"}, .input = big}).out.size(), big.size());
}

TEST(Process, DeadlineKillsTheGroup) {
  Ticks from = system_clock().now();
  EXPECT_THROW(run({.argv = {"sh", "-c", "sleep 30 & sleep 30"}}, Deadline::in(Millis(100))), Error);
  EXPECT_LT(ms_between(from, system_clock().now()), 3000);
}

TEST(Process, MissingProgramIsAnErrorWithAHint) {
  try {
    run({.argv = {"no-such-program-here"}});
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("no-such-program-here"), std::string::npos);
    EXPECT_FALSE(e.hint.empty());
  }
}

TEST(Files, DurableWriteReplacesWhole) {
  TempDir dir;
  std::string path = dir.path() + "/f";
  write_durably(path, "one");
  write_durably(path, "two");
  EXPECT_EQ(read_file(path), "two");
  EXPECT_EQ(list_directory(dir.path()), std::vector<std::string>{"f"});
  EXPECT_THROW(write_durably(dir.path() + "/none/f", "x"), Error);
}

TEST(Sockets, LinesAndRelay) {
  TempDir dir;
  Fd front = listen_on(Address::parse("unix:" + dir.path() + "/a"));
  Fd back = listen_on(Address::parse("127.0.0.1:0"));
  std::atomic<bool> stop{false};
  std::thread middle([&] {
    auto a = accept_from(front, Deadline::in(Millis(5000)));
    Fd b = connect_to({.host = "127.0.0.1", .port = local_port(back)}, Deadline::in(Millis(5000)));
    relay(*a, b, stop);
  });
  std::thread server([&] {
    auto s = accept_from(back, Deadline::in(Millis(5000)));
    Reader r(*s);
    while (auto l = r.line(Deadline::in(Millis(5000)))) send_all(*s, "<" + *l + ">\n");
  });
  {
    Fd c = connect_to(Address::parse("unix:" + dir.path() + "/a"), Deadline::in(Millis(5000)));
    send_all(c, "one\ntwo\n");
    Reader r(c);
    EXPECT_EQ(r.line(Deadline::in(Millis(5000))), "<one>");
    EXPECT_EQ(r.line(Deadline::in(Millis(5000))), "<two>");
  }
  middle.join();
  server.join();
}

TEST(Sockets, AddressesSayWhatIsWrong) {
  EXPECT_EQ(Address::parse("[::1]:80").text(), "[::1]:80");
  EXPECT_THROW(Address::parse("localhost"), Error);
  EXPECT_THROW(Address::parse("unix:relative"), Error);
  EXPECT_THROW(connect_to(Address::parse("127.0.0.1:1"), Deadline::in(Millis(1000))), Error);
}

}  // namespace rehome
