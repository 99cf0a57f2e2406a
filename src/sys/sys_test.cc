#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "base/error.h"
#include "sys/account.h"
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

TEST(Process, AnOutcomeCrossesTheWireWhole) {
  Outcome o = outcome_from_json(outcome_to_json(run({.argv = {"printf", "\\377\\000x"}})));
  EXPECT_EQ(o.out, std::string("\xff\0x", 3));
  EXPECT_EQ(o.err, "");
  EXPECT_FALSE(o.truncated);
  o = outcome_from_json(outcome_to_json(run({.argv = {"head", "-c", "17000000", "/dev/zero"}})));
  EXPECT_EQ(o.out.size(), 16u << 20);
  EXPECT_TRUE(o.truncated);
  EXPECT_THROW(outcome_from_json({{"status", 0}}), Error);
}

TEST(Accounts, AreFoundByManyThreadsAtOnce) {
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> askers;
    for (const char* name : {"root", "nobody", "root", "nobody"})
      askers.emplace_back([&wrong, name] {
        for (int i = 0; i < 500; i++)
          if (account_named(name).name != name || find_account([&](const Account& a) { return a.uid == (*name == 'r' ? 0 : 65534); })->name != name) wrong++;
      });
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_THROW(account_named("nobody-of-that-name"), Error);
}

TEST(Process, WhoIsTheAccountAlreadyNeedsNoRightToBecomeIt) {
  auto as_nobody = [](const char* account) {
    pid_t pid = ::fork();
    if (pid == 0) {
      if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) ::_exit(3);
      try {
        ::_exit(run({.argv = {"true"}, .user = account}).ok() ? 0 : 1);
      } catch (const Error&) {
        ::_exit(2);
      }
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    return WEXITSTATUS(status);
  };
  EXPECT_EQ(as_nobody("nobody"), 0);
  EXPECT_EQ(as_nobody("www-data"), 2);
}

TEST(Process, ProgramsGetTheFileLimitOfTheStart) {
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  auto limit = [](bool many) {
    Child c({.argv = {"sh", "-c", "ulimit -S -n"}}, {.out = true, .many_files = many});
    char buf[64];
    auto n = ::read(c.out.get(), buf, sizeof buf);
    c.wait();
    return static_cast<rlim_t>(std::stoull(std::string(buf, n > 0 ? static_cast<std::size_t>(n) : 0u)));
  };
  EXPECT_EQ(limit(false), before.rlim_cur);
  raise_file_limit();
  EXPECT_EQ(file_limit(), before.rlim_max);
  EXPECT_EQ(limit(false), before.rlim_cur);
  EXPECT_EQ(limit(true), before.rlim_max);
  restore_file_limit();
  EXPECT_EQ(file_limit(), before.rlim_cur);
}

TEST(Process, AnEndLetsTakeBackAndKillsWhatStays) {
  TempDir dir;
  auto started = [&] {
    for (Deadline d = Deadline::in(Millis(5000)); !exists(dir.path() + "/up") && !d.passed();) system_clock().sleep(Millis(5));
    remove_tree(dir.path() + "/up");
  };
  Child polite({.argv = {"sh", "-c", "trap 'echo x >\"$1/back\"' EXIT; trap 'exit 1' TERM; sleep 30 & echo x >\"$1/up\"; wait $!", "sh", dir.path()}}, {});
  started();
  polite.end(Millis(2000));
  EXPECT_EQ(polite.wait(), 1);
  EXPECT_TRUE(exists(dir.path() + "/back"));
  Child deaf({.argv = {"sh", "-c", "trap '' TERM; echo x >\"$1/up\"; sleep 30", "sh", dir.path()}}, {});
  started();
  Ticks from = system_clock().now();
  deaf.end(Millis(200));
  EXPECT_EQ(deaf.wait(), 128 + SIGKILL);
  EXPECT_LT(ms_between(from, system_clock().now()), 1500);
}

}  // namespace rehome
