// One agent in this process, asked through its socket.
#include "agent/agent.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>

#include "agent/actions.h"
#include "agent/boot.h"
#include "agent/client.h"
#include "agent/reserve.h"
#include "base/bytes.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {
namespace {

class Running {
 public:
  explicit Running(const std::string& state, bool ephemeral = false) : state_(state) {
    agent_ = std::make_unique<Agent>(AgentOptions{state, "source", "x", ephemeral});
    thread_ = std::thread([this] { status = agent_->serve(stop_); });
    Deadline deadline = Deadline::in(Millis(5000));
    while (!exists(state + "/run/agent.sock") && !deadline.passed()) system_clock().sleep(Millis(1));
    REHOME_CHECK(exists(state + "/run/agent.sock"));
  }
  ~Running() { end(); }
  void end() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
    agent_.reset();
  }
  void wait() { thread_.join(); }
  std::string socket() const { return state_ + "/run/agent.sock"; }
  Json call(const std::string& op, Json args = Json::object()) {
    return AgentClient(socket()).call(op, args, Deadline::in(Millis(20'000)));
  }
  std::atomic<int> status{-1};

 private:
  std::string state_;
  std::atomic<bool> stop_{false};
  std::unique_ptr<Agent> agent_;
  std::thread thread_;
};

Code code_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.code;
  }
  return Code::internal;
}

TEST(LagSeries, ThinsAndOutlivesAnAgent) {
  TempDir dir;
  std::string path = dir.path() + "/lag.jsonl";
  {
    LagSeries series(path, 100, 0);
    for (int i = 0; i < 150; i++) series.add("db", i, 0);
  }
  LagSeries again(path, 100, 0);
  Json all = again.read(0, 1000);
  EXPECT_LE(all.size(), 100u);
  EXPECT_GE(all.size(), 50u);
  EXPECT_EQ(get_int(all.back(), "bytes"), 149);
  EXPECT_LE(again.read(0, 10).size(), 11u);
  EXPECT_EQ(get_int(again.read(0, 10).back(), "bytes"), 149);
  EXPECT_TRUE(again.read(get_int(all.back(), "at"), 10).empty());
  // A short peak of one store of two is what is looked for.
  LagSeries two(dir.path() + "/two.jsonl", 200, 0);
  for (int i = 0; i < 300; i++) two.add("db", i == 151 ? 1'000'000 : 10, 0), two.add("files", 20, 0);
  std::map<std::string, std::int64_t> most, times;
  for (const Json& s : two.read(0, 20)) most[get_string(s, "store")] = std::max(most[get_string(s, "store")], get_int(s, "bytes")), times[get_string(s, "store")]++;
  EXPECT_EQ(most, (std::map<std::string, std::int64_t>{{"db", 1'000'000}, {"files", 20}}));
  EXPECT_NEAR(static_cast<double>(times["db"]), static_cast<double>(times["files"]), 2);
  // The other site's agent takes it over, each sample once.
  LagSeries other(dir.path() + "/other.jsonl", 100, 0);
  again.add("db", 4711, 3);
  for (int i = 0; i < 3; i++) other.take(again.newest());
  ASSERT_EQ(other.read(0, 10).size(), 1u);
  EXPECT_EQ(get_int(other.read(0, 10)[0], "bytes"), 4711);
}

TEST(Agent, AChildsLagIsASampleAndNoOutput) {
  TempDir dir;
  Running a(dir.path());
  a.call("record.init", {{"side", "source"}, {"name", "x"}, {"serves", "source"}});
  a.call("child.set", {{"name", "w"}, {"argv", {"sh", "-c", "echo lag db 4711 12; echo lag of another kind; sleep 60"}}, {"restart_ms", 60000}});
  Json samples;
  for (int i = 0; i < 200 && samples.empty(); i++) {
    samples = a.call("lag.read").at("samples");
    system_clock().sleep(Millis(20));
  }
  ASSERT_EQ(samples.size(), 1u);
  EXPECT_EQ(get_int(samples[0], "bytes"), 4711);
  EXPECT_EQ(a.call("child.status", {{"name", "w"}}).at("tail"), Json({"lag of another kind"}));
}

TEST(Agent, ProgramsAndFiles) {
  TempDir dir;
  Running a(dir.path());
  Json r = a.call("exec", {{"argv", {"sh", "-c", "cat; echo $X >&2; exit 3"}}, {"env", {{"X", "y"}}}, {"input", "in"}});
  EXPECT_EQ(r["status"], 3);
  EXPECT_EQ(r["out"], "in");
  EXPECT_EQ(r["err"], "y\n");
  EXPECT_EQ(from_base64(get_string(a.call("exec", {{"argv", {"printf", "\\377\\000x"}}}), "out_base64")), std::string("\xff\0x", 3));
  std::string bytes;
  for (int i = 0; i < 1000; i++) bytes += static_cast<char>(i * 7);
  a.call("put", {{"path", dir.path() + "/sub/f"}, {"base64", to_base64(bytes)}, {"mode", "0640"}});
  EXPECT_EQ(from_base64(get_string(a.call("get", {{"path", dir.path() + "/sub/f"}}), "base64")), bytes);
  EXPECT_TRUE(get_bool(a.call("get", {{"path", dir.path() + "/none"}}), "missing"));
  EXPECT_EQ(code_of([&] { a.call("exec", {{"argv", {"sleep", "9"}}, {"timeout_ms", 50}}); }), Code::timeout);
  EXPECT_EQ(code_of([&] { a.call("no-such-op"); }), Code::usage);
  EXPECT_EQ(code_of([&] { a.call("exec", {{"argv", "sh"}}); }), Code::usage);
}

TEST(Agent, AProgramDiesWithItsCallerAndItsGeneration) {
  TempDir dir;
  Running a(dir.path());
  auto start = [&](AgentClient& c, Json extra) {
    Json request{{"op", "exec"}, {"argv", {"sh", "-c", "echo $$ > " + dir.path() + "/pid; exec sleep 30"}}};
    request.update(extra);
    send_json(c.fd(), request, Deadline::in(Millis(1000)));
    Deadline deadline = Deadline::in(Millis(5000));
    std::string pid;
    while (pid.empty() && !deadline.passed()) {
      if (exists(dir.path() + "/pid")) pid = trim(read_file(dir.path() + "/pid"));
      system_clock().sleep(Millis(2));
    }
    remove_tree(dir.path() + "/pid");
    return static_cast<pid_t>(std::stol(pid));
  };
  auto gone = [](pid_t pid) {
    Deadline deadline = Deadline::in(Millis(2000));
    while (::kill(pid, 0) == 0 && !deadline.passed()) system_clock().sleep(Millis(5));
    return ::kill(pid, 0) != 0;
  };
  pid_t first;
  {
    AgentClient c(a.socket());
    first = start(c, Json::object());
  }
  EXPECT_TRUE(gone(first));
  ASSERT_EQ(a.call("generation.new")["gen"], 1);
  AgentClient c(a.socket());
  pid_t second = start(c, {{"gen", 1}});
  ASSERT_EQ(a.call("generation.new")["gen"], 2);
  EXPECT_TRUE(gone(second));
  EXPECT_EQ(code_of([&] { a.call("put", {{"path", "/x"}, {"content", ""}, {"gen", 1}}); }), Code::conflict);
  EXPECT_EQ(code_of([&] { a.call("put", {{"path", "/x"}, {"content", ""}}); }), Code::usage);
  EXPECT_NO_THROW(a.call("hello"));
}

// A server that greets and echoes, for relays.
class Echo {
 public:
  explicit Echo(const std::string& path) : listener_(listen_on({.path = path})) {
    thread_ = std::thread([this] {
      while (!stop_) {
        auto fd = accept_from(listener_, Deadline::in(Millis(100)), &stop_);
        if (!fd) continue;
        open++;
        auto shared = std::make_shared<Fd>(std::move(*fd));
        threads_.run([this, shared] {
          try {
            send_all(*shared, "hello\n");
            Reader in(*shared);
            while (!stop_) {
              try {
                auto l = in.line(Deadline::in(Millis(100)));
                if (!l) break;
                send_all(*shared, *l + "\n");
              } catch (const Error& e) {
                if (e.code != Code::timeout) break;
              }
            }
          } catch (const Error&) {
            // gone
          }
          open--;
        });
      }
    });
  }
  ~Echo() {
    stop_ = true;
    thread_.join();
  }
  std::atomic<int> open{0};

 private:
  Fd listener_;
  std::atomic<bool> stop_{false};
  Threads threads_;
  std::thread thread_;
};

bool becomes(const std::atomic<int>& value, int wanted) {
  Deadline deadline = Deadline::in(Millis(3000));
  while (value != wanted && !deadline.passed()) system_clock().sleep(Millis(5));
  return value == wanted;
}

TEST(Agent, RelaysAreCutAndKept) {
  TempDir dir;
  Running a(dir.path() + "/s");
  Echo echo(dir.path() + "/echo");
  a.call("generation.new");
  Json to{{"op", "relay"}, {"to", "unix:" + dir.path() + "/echo"}, {"gen", 1}};
  Json kept = to;
  kept["keep"] = "snapshot";
  Fd plain = open_agent_stream(a.socket(), to, Deadline::in(Millis(5000)));
  Reader in(plain);
  EXPECT_EQ(in.line(Deadline::in(Millis(2000))), "hello");
  send_all(plain, "one\n");
  EXPECT_EQ(in.line(Deadline::in(Millis(2000))), "one");
  {
    Fd k = open_agent_stream(a.socket(), kept, Deadline::in(Millis(5000)));
    EXPECT_TRUE(becomes(echo.open, 2));
    EXPECT_EQ(code_of([&] { open_agent_stream(a.socket(), kept, Deadline::in(Millis(5000))); }), Code::conflict);
  }
  Ticks from = system_clock().now();
  a.call("generation.new");  // cuts the plain one; the kept one outlives its controller
  EXPECT_EQ(in.line(Deadline::in(Millis(2000))), std::nullopt);
  EXPECT_LT(ms_between(from, system_clock().now()), 1000);
  EXPECT_TRUE(becomes(echo.open, 1));
  Json list = a.call("keep.list")["kept"];
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0]["alive"], true);
  EXPECT_EQ(a.call("keep.drop", {{"name", "snapshot"}, {"gen", 2}})["dropped"], true);
  EXPECT_TRUE(becomes(echo.open, 0));
  // While somebody has it too: the name is free at once, for who dropped it.
  kept["gen"] = 2;
  Fd attached = open_agent_stream(a.socket(), kept, Deadline::in(Millis(5000)));
  for (int i = 0; i < 20; i++) {
    EXPECT_EQ(a.call("keep.drop", {{"name", "snapshot"}, {"gen", 2}})["dropped"], true);
    EXPECT_NO_THROW(attached = open_agent_stream(a.socket(), kept, Deadline::in(Millis(5000))));
  }
  a.call("keep.drop", {{"name", "snapshot"}, {"gen", 2}});
  EXPECT_EQ(a.call("keep.list")["kept"].size(), 0u);
  EXPECT_TRUE(becomes(echo.open, 0));
  EXPECT_EQ(code_of([&] { open_agent_stream(a.socket(), to, Deadline::in(Millis(5000))); }), Code::conflict);
  to["gen"] = 2;
  to["to"] = "unix:" + dir.path() + "/nobody";
  EXPECT_EQ(code_of([&] { open_agent_stream(a.socket(), to, Deadline::in(Millis(5000))); }), Code::unreachable);
}

TEST(Agent, JournalKeepsOrderAndDropsATornLine) {
  TempDir dir;
  {
    Running a(dir.path());
    EXPECT_EQ(a.call("journal.append", {{"from", 0}, {"lines", {"{\"a\":1}", "{\"b\":2}"}}})["next"], 2);
    EXPECT_EQ(code_of([&] { a.call("journal.append", {{"from", 1}, {"lines", {"x"}}}); }), Code::conflict);
    EXPECT_EQ(code_of([&] { a.call("journal.append", {{"from", 2}, {"lines", {"x\ny"}}}); }), Code::usage);
  }
  {
    std::ofstream torn(dir.path() + "/journal.jsonl", std::ios::app);
    torn << "{\"half";
  }
  Running a(dir.path());
  Json r = a.call("journal.read", {{"from", 1}});
  EXPECT_EQ(r["lines"], Json({"{\"b\":2}"}));
  EXPECT_EQ(r["next"], 2);
  EXPECT_EQ(a.call("journal.append", {{"from", 2}, {"lines", {"c"}}})["next"], 3);
  EXPECT_EQ(read_file(dir.path() + "/journal.jsonl"), "{\"a\":1}\n{\"b\":2}\nc\n");
}

TEST(Agent, ResidentsComeBackWithTheAgent) {
  TempDir dir;
  Echo echo(dir.path() + "/echo");
  auto starts = [](Running& a) { return a.call("child.status", {{"name", "k"}}); };
  {
    Running a(dir.path() + "/s");
    a.call("child.set", {{"name", "k"}, {"argv", {"sh", "-c", "echo line; sleep 0.05; exit 4"}}, {"restart_ms", 20}});
    a.call("service.set", {{"name", "echo"}, {"to", "unix:" + dir.path() + "/echo"}});
    // Its own peer: what goes out by the link comes in again.
    a.call("link.set", {{"socket", a.socket()}});
    a.call("listen.set", {{"name", "l"}, {"at", "unix:" + dir.path() + "/s/run/l/x/.s"}, {"service", "echo"}});
    // For one account: here daemon's, whose number is 1 everywhere.
    a.call("listen.set", {{"name", "one"}, {"at", "unix:" + dir.path() + "/one/.s"}, {"service", "echo"}, {"mode", 0666}, {"account", 1}});
    for (const auto& path : {dir.path(), dir.path() + "/one"}) ASSERT_EQ(::chmod(path.c_str(), 0711), 0);
    Deadline deadline = Deadline::in(Millis(5000));
    while (starts(a)["starts"] < 3 && !deadline.passed()) system_clock().sleep(Millis(10));
    Json s = starts(a);
    EXPECT_GE(s["starts"], 3);
    EXPECT_EQ(s["last_status"], 4);
    EXPECT_EQ(s["tail"][0], "line");
  }
  Running a(dir.path() + "/s");
  Deadline deadline = Deadline::in(Millis(5000));
  while (starts(a)["starts"] < 1 && !deadline.passed()) system_clock().sleep(Millis(10));
  EXPECT_GE(starts(a)["starts"], 1);
  Fd fd = connect_to({.path = dir.path() + "/s/run/l/x/.s"}, Deadline::in(Millis(2000)));
  Reader in(fd);
  EXPECT_EQ(in.line(Deadline::in(Millis(2000))), "hello");
  send_all(fd, "through the link\n");
  EXPECT_EQ(in.line(Deadline::in(Millis(2000))), "through the link");
  auto greets = [&](const char* account) {
    Fd caller = connect_to({.path = dir.path() + "/one/.s"}, Deadline::in(Millis(2000)), account);
    return Reader(caller).line(Deadline::in(Millis(2000))).value_or("");
  };
  EXPECT_EQ(greets("daemon"), "hello");
  EXPECT_EQ(greets("root"), "hello");
  EXPECT_EQ(greets("nobody"), "");
  a.call("child.drop", {{"name", "k"}});
  EXPECT_EQ(code_of([&] { starts(a); }), Code::state);
  a.call("listen.drop", {{"name", "l"}});
  EXPECT_FALSE(exists(dir.path() + "/s/run/l/x/.s"));
}

TEST(Agent, ActionsSayWhatFailed) {
  TempDir dir;
  Running a(dir.path());
  auto item = [](const char* name, const char* input, bool warm) {
    return Json{{"name", name}, {"argv", {"sh", "-e"}}, {"input", input}, {"try_input", input}, {"warm", warm}, {"timeout_ms", 300}};
  };
  a.call("action.set", {{"set", "undo"}, {"items", {item("good", "true", true), item("bad", "echo broken >&2; false", true)}}});
  EXPECT_NO_THROW(a.call("action.try", {{"set", "undo"}, {"name", "good"}}));
  EXPECT_NO_THROW(a.call("action.try", {{"set", "undo"}, {"name", "good"}}));  // the same program again
  try {
    a.call("action.try", {{"set", "undo"}});
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(e.message.find("'bad'"), std::string::npos);
    EXPECT_NE(e.message.find("broken"), std::string::npos);
  }
  a.call("action.set", {{"set", "undo"}, {"items", {item("slow", "sleep 5", true)}}});
  EXPECT_EQ(code_of([&] { a.call("action.try", {{"set", "undo"}}); }), Code::timeout);
  EXPECT_EQ(code_of([&] { a.call("action.set", {{"set", "nonsense"}, {"items", Json::array()}}); }), Code::usage);
}

TEST(Agent, AStoreThatCannotBeClosedLeavesNoOtherOpen) {
  TempDir dir;
  Actions actions(dir.path() + "/actions.json", [](const std::string&) {});
  const std::string closed = dir.path() + "/closed";
  const Json missing{{"name", "missing"}, {"argv", {"false"}}}, other{{"name", "other"}, {"argv", {"touch", closed}}};
  actions.set(ActionSet::undo, {missing, other});
  actions.set(ActionSet::close, {missing, other});
  EXPECT_THROW(actions.run(ActionSet::undo, 1, 1), Error);
  EXPECT_FALSE(exists(closed)) << "the order of an undo is its meaning";
  EXPECT_THROW(actions.run(ActionSet::close, 1, 1), Error);
  EXPECT_TRUE(exists(closed));
}

TEST(Agent, FreezesThawsAndKills) {
  if (!Freezer::available()) FAIL() << "freezing needs root and a cgroup file system";
  TempDir dir;
  std::string count = dir.path() + "/count";
  Child writer({.argv = {"sh", "-c", "echo $$ > " + dir.path() + "/pid; (while :; do echo x >> " + count + "; done) & wait"}}, {});
  Deadline deadline = Deadline::in(Millis(5000));
  while ((!exists(count) || !exists(dir.path() + "/pid")) && !deadline.passed()) system_clock().sleep(Millis(5));
  Freezer freezer("test-" + std::to_string(::getpid()), [](const std::string&) {});
  freezer.set(Freezer::parse({{{"name", "w"}, {"pid_file", dir.path() + "/pid"}}}));
  auto grows = [&] {
    auto before = read_file(count).size();
    system_clock().sleep(Millis(60));
    return read_file(count).size() > before;
  };
  EXPECT_TRUE(grows());
  Json f = freezer.freeze();
  EXPECT_GE(f[0]["processes"], 2);
  EXPECT_LT(f[0]["ms"].get<double>(), 500);
  EXPECT_FALSE(grows());
  freezer.thaw();
  EXPECT_TRUE(grows());
  EXPECT_EQ(freezer.kill()[0]["processes"], 0);  // not frozen: not ours to kill
  freezer.freeze();
  auto before = read_file(count).size();
  EXPECT_GE(freezer.kill()[0]["processes"], 2);
  EXPECT_EQ(read_file(count).size(), before);  // not one more write on the way out
  EXPECT_EQ(writer.wait(Deadline::in(Millis(2000))), 128 + SIGKILL);
  freezer.forget();
}

// A crashed application is a reason to go back, and nothing that could write.
// Without root, by signals: a pid file that names another process at the second look takes nobody off the list of those that stand still.
TEST(Freezer, BySignalsKeepsThoseThatItHasStopped) {
  pid_t unprivileged = ::fork();
  if (unprivileged == 0) {
    // Not EXPECT: this is another process.
    auto require = [](bool so, int which) { if (!so) ::_exit(which); };
    try {
      require(::setgid(65534) == 0 && ::setuid(65534) == 0, 1);
      char directory[] = "/tmp/rehome-freezer-XXXXXX";
      require(::mkdtemp(directory) != nullptr, 2);
      const std::string pid_file = std::string(directory) + "/pid";
      auto start = [&] {
        pid_t pid = ::fork();
        if (pid == 0) {
          ::setsid();
          ::prctl(PR_SET_PDEATHSIG, SIGKILL);
          while (true) ::pause();
        }
        std::ofstream(pid_file) << pid << std::endl;
        return pid;
      };
      auto stands = [](pid_t pid) { return read_file("/proc/" + std::to_string(pid) + "/stat").find(") T ") != std::string::npos; };
      const pid_t first = start();
      Freezer freezer("test", [](const std::string&) {});
      freezer.set(Freezer::parse({{{"name", "w"}, {"pid_file", pid_file}}}));
      freezer.freeze();
      const pid_t second = start();
      freezer.freeze();
      require(stands(first) && stands(second), 3);
      freezer.thaw();
      require(!stands(first) && !stands(second), 4);
      for (pid_t pid : {first, second}) ::kill(pid, SIGKILL);
      std::filesystem::remove_all(directory);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "%s\n", e.what());
      ::_exit(5);
    }
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(unprivileged, &status, 0), unprivileged);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "step " << WEXITSTATUS(status);
}

TEST(Agent, AServiceThatDoesNotRunIsNothingToFreeze) {
  if (!Freezer::available()) FAIL() << "freezing needs root and a cgroup file system";
  TempDir dir;
  const std::string pid_file = dir.path() + "/pid";
  std::string said;
  Freezer freezer("test-" + std::to_string(::getpid()), [&](const std::string& line) { said += line + "\n"; });
  auto set = [&] { freezer.set(Freezer::parse({{{"name", "web"}, {"pid_file", pid_file}}})); };
  set();   // no file
  EXPECT_EQ(freezer.freeze()[0]["processes"], 0);
  pid_t ended = ::fork();
  if (ended == 0) ::_exit(0);
  siginfo_t info;
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(ended), &info, WEXITED | WNOWAIT), 0);
  write_durably(pid_file, std::to_string(ended) + "\n");
  EXPECT_EQ(freezer.freeze()[0]["processes"], 0);   // nobody has waited for it
  ::waitpid(ended, nullptr, 0);
  set();
  EXPECT_EQ(freezer.freeze()[0]["processes"], 0);   // a stale file
  EXPECT_NE(said.find("service web does not run: nothing to freeze"), std::string::npos) << said;
  // It was started again meanwhile: the next look finds and freezes it.
  Child service({.argv = {"sleep", "600"}}, {});
  write_durably(pid_file, std::to_string(service.pid()) + "\n");
  EXPECT_EQ(freezer.freeze()[0]["processes"], 1);
  EXPECT_EQ(freezer.kill()[0]["processes"], 1);
  EXPECT_EQ(service.wait(Deadline::in(Millis(2000))), 128 + SIGKILL);
  // A worker that outlived its master, found by the group that both were in.
  Child worker({.argv = {"sh", "-c", "sleep 600 & echo $$ >\"$0\"", pid_file}}, {});
  EXPECT_EQ(worker.wait(Deadline::in(Millis(2000))), 0);
  EXPECT_EQ(freezer.freeze()[0]["processes"], 1);
  EXPECT_EQ(freezer.kill()[0]["processes"], 1);
  // What is no pid file is still a mistake, and so is one of another life of the host, or of rehome's own.
  Child stranger({.argv = {"sleep", "600"}}, {});
  timespec long_ago[2] = {{.tv_sec = 1'000'000'000, .tv_nsec = 0}, {.tv_sec = 1'000'000'000, .tv_nsec = 0}};
  for (const std::string& wrong : {std::string("running"), std::string("1"), std::to_string(::getpid()), std::to_string(stranger.pid())}) {
    write_durably(pid_file, wrong + "\n");
    ASSERT_EQ(::utimensat(AT_FDCWD, pid_file.c_str(), wrong == std::to_string(stranger.pid()) ? long_ago : nullptr, 0), 0);
    EXPECT_THROW(set(), Error) << wrong;
    EXPECT_THROW(freezer.freeze(), Error) << wrong;
  }
  EXPECT_EQ(::kill(stranger.pid(), SIGKILL), 0);
  EXPECT_EQ(stranger.wait(Deadline::in(Millis(2000))), 128 + SIGKILL);
  // An empty one is none.
  write_durably(pid_file, "");
  EXPECT_EQ(freezer.freeze()[0]["processes"], 0);
  freezer.forget();
}

TEST(Agent, WhatCannotBeFoundKeepsNoOtherServiceFrozen) {
  if (!Freezer::available()) FAIL() << "freezing needs root and a cgroup file system";
  TempDir dir;
  Child sleeper({.argv = {"sleep", "600"}}, {});
  write_durably(dir.path() + "/pid", std::to_string(sleeper.pid()) + "\n");
  const std::string tag = "test-" + std::to_string(::getpid());
  const Json gone{{"name", "gone"}, {"cgroup", dir.path() + "/cgroup"}}, service{{"name", "w"}, {"pid_file", dir.path() + "/pid"}};
  auto frozen = [&] { return trim(read_file("/proc/" + std::to_string(sleeper.pid()) + "/cgroup")).find("rehome-" + tag) != std::string::npos; };
  Freezer before(tag, [](const std::string&) {});
  before.set(Freezer::parse(Json::array({service})));
  EXPECT_EQ(before.freeze()[0]["processes"], 1);
  EXPECT_TRUE(frozen());
  // The agent's next life: a container's cgroup went with it.
  std::string said;
  Freezer after(tag, [&](const std::string& line) { said += line; });
  EXPECT_THROW(after.set(Freezer::parse(Json::array({gone, service}))), Error);
  after.set(Freezer::parse(Json::array({gone, service})), true);
  EXPECT_NE(said.find("is not a cgroup"), std::string::npos) << said;
  Json thawed = after.thaw();
  ASSERT_EQ(thawed.size(), 2u);
  EXPECT_EQ(thawed[1]["processes"], 1);
  EXPECT_EQ(after.kill()[1]["processes"], 0) << "it was not thawed";
  after.forget();
  EXPECT_FALSE(frozen());
}

TEST(Agent, AFreezeThatComesLateIsRefused) {
  TempDir dir;
  Running a(dir.path());
  a.call("record.init", {{"side", "source"}, {"name", "x"}, {"serves", "source"}});
  pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  write_durably(dir.path() + "/pid", std::to_string(child) + "\n");
  a.call("freeze.set", {{"items", {{{"name", "w"}, {"pid_file", dir.path() + "/pid"}}}}});
  // No attempt is open: a cut held this request up, and its attempt was undone meanwhile.
  EXPECT_EQ(code_of([&] { a.call("freeze", {{"attempt", 1}}); }), Code::state);
  EXPECT_EQ(code_of([&] { a.call("gate", {{"request", {{"op", "cut"}, {"attempt", 1}}}}); }), Code::state);
  std::string status = read_file("/proc/" + std::to_string(child) + "/status");
  EXPECT_NE(status.find("State:\tS"), std::string::npos) << status.substr(0, 200);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(Agent, WhatAProgramPrintsIsReadAsItIs) {
  TempDir dir;
  Running a(dir.path());
  Outcome o = outcome_from_json(a.call("exec", {{"argv", {"sh", "-c", "printf '\\303'; printf '\\377' >&2"}}}));
  EXPECT_EQ(o.out, "\xc3");
  EXPECT_EQ(o.err, "\xff");
  EXPECT_TRUE(outcome_from_json(a.call("exec", {{"argv", {"head", "-c", "17000000", "/dev/zero"}}})).truncated);
}

TEST(Agent, AProgramThatIsEndedTakesBackWhatItDid) {
  TempDir dir;
  Running a(dir.path() + "/s");
  const std::string condition = dir.path() + "/condition";
  write_durably(condition, "");
  {
    AgentClient c(a.socket());
    Json line{"sh", "-c", "trap 'mv -f \"$1.lifted\" \"$1\"' EXIT; trap 'exit 1' TERM; mv \"$1\" \"$1.lifted\"; sleep 30 & wait $!", "sh", condition};
    send_json(c.fd(), {{"op", "exec"}, {"argv", line}}, Deadline::in(Millis(1000)));
    for (Deadline d = Deadline::in(Millis(5000)); exists(condition) && !d.passed();) system_clock().sleep(Millis(5));
    ASSERT_FALSE(exists(condition));
  }
  for (Deadline d = Deadline::in(Millis(5000)); !exists(condition) && !d.passed();) system_clock().sleep(Millis(5));
  EXPECT_TRUE(exists(condition));
}

// A state directory on a file system of 1 MB, which can be filled.
class SmallDisk {
 public:
  SmallDisk() { run_ok({.argv = {"mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", dir_.path()}}); }
  ~SmallDisk() { run({.argv = {"umount", "-l", dir_.path()}}); }
  std::string state() const { return dir_.path() + "/source"; }
  void fill() { run({.argv = {"sh", "-c", "cat /dev/zero >>\"$1/fill\" 2>/dev/null", "sh", dir_.path()}}); }
  void empty() { remove_tree(dir_.path() + "/fill"); }

 private:
  TempDir dir_;
};

TEST(Agent, StartsOnAFullDiskAndUndoes) {
  SmallDisk disk;
  make_directories(disk.state());
  Record open;
  open.attempt = 3;
  open.decision = Decision::attempt;
  open.settled = false;
  create_record_file(disk.state() + "/record", open);
  write_durably(disk.state() + "/agent.json", "{\"began\": true, \"boot_id\": \"another\", \"name\": \"x\", \"side\": \"source\"}");
  disk.fill();
  Running a(disk.state());
  Json status = Json::object();
  for (Deadline d = Deadline::in(Millis(8000)); !d.passed() && status.value("phase", "") != "serving"; system_clock().sleep(Millis(20)))
    status = a.call("attempt.status");
  EXPECT_EQ(status["phase"], "serving");
  EXPECT_EQ(status["attempt"], 3);
}

// What an agent has to ask the other site after a reboot is not lost with its first life.
TEST(Agent, IsReturningUntilItHasWaited) {
  TempDir dir;
  create_record_file(dir.path() + "/record", {});
  write_durably(dir.path() + "/agent.json", "{\"began\": true, \"boot_id\": \"another\", \"name\": \"x\", \"side\": \"source\"}");
  for (int life = 0; life < 2; life++) {
    Running a(dir.path());
    EXPECT_EQ(a.call("hello")["returning"], true) << life;
    if (life == 0) continue;
    for (Deadline d = Deadline::in(Millis(8000)); !d.passed() && read_file(dir.path() + "/agent.json").find("another") != std::string::npos;) system_clock().sleep(Millis(20));
    EXPECT_EQ(a.call("hello")["returning"], false);
  }
  Running a(dir.path());
  EXPECT_EQ(a.call("hello")["returning"], false);
}

TEST(Agent, KeepsRoomForWhatFollowsADecision) {
  SmallDisk disk;
  Running a(disk.state());
  a.call("record.init", {{"side", "source"}, {"name", "x"}, {"serves", "source"}});
  ASSERT_TRUE(exists(disk.state() + "/reserve"));
  TempDir tree;
  a.call("files.receive", {{"store", "data"}, {"path", tree.path()}, {"active", true}});
  disk.fill();
  EXPECT_EQ(code_of([&] { a.call("put", {{"path", disk.state() + "/f"}, {"content", std::string(10'000, 'x')}}); }), Code::io);
  // An open store is written down even so.
  EXPECT_NO_THROW(a.call("files.open", {{"store", "data"}}));
  EXPECT_EQ(read_file(disk.state() + "/files.json").find("active"), std::string::npos) << read_file(disk.state() + "/files.json");
  EXPECT_FALSE(exists(disk.state() + "/reserve"));
  disk.fill();
  // And the next attempt does not begin, here or as the one that takes over.
  for (const char* op : {"attempt.open", "peer.ready"}) {
    try {
      a.call(op, {{"attempt", 1}, {"epoch", 0}});
      ADD_FAILURE() << op;
    } catch (const Error& e) {
      EXPECT_NE(e.message.find("too full for a switch"), std::string::npos) << e.what();
    }
  }
  disk.empty();
  EXPECT_NE(code_of([&] { a.call("peer.ready", {{"attempt", 1}, {"epoch", 0}}); }), Code::io);
  EXPECT_TRUE(exists(disk.state() + "/reserve"));
}

TEST(Reserve, IsGivenUpForAWriteThatMustBe) {
  SmallDisk disk;
  make_directories(disk.state());
  Reserve reserve(disk.state() + "/reserve", [](const std::string&) {});
  reserve.keep();
  disk.fill();
  reserve.make_room();
  EXPECT_FALSE(exists(disk.state() + "/reserve"));
  EXPECT_NO_THROW(reserve.keep());
  auto write = [&] { write_durably(disk.state() + "/not-serving", "x"); };
  EXPECT_EQ(code_of(write), Code::io);
  EXPECT_NO_THROW(reserve.with(write));
  disk.fill();
  EXPECT_EQ(code_of([&] { reserve.with([&] { write_durably(disk.state() + "/more", "x"); }); }), Code::io);
  EXPECT_EQ(code_of([&] { reserve.keep(); }), Code::state);
}

TEST(Agent, StreamsOfTheOtherSiteLeaveDescriptorsForItsOwnWork) {
  TempDir dir;
  Echo echo(dir.path() + "/echo");
  make_directories(dir.path() + "/s");
  Child program({.argv = {"sh", "-c", "ulimit -S -n 64 && ulimit -H -n 128 && exec \"$@\"", "sh", REHOME_AGENT_PROGRAM, "serve", "--state", dir.path() + "/s", "--side", "source", "--name", "x"}}, {});
  const std::string socket = dir.path() + "/s/run/agent.sock";
  for (Deadline d = Deadline::in(Millis(5000)); !exists(socket) && !d.passed();) system_clock().sleep(Millis(5));
  auto call = [&](const std::string& op, const Json& args) { return AgentClient(socket).call(op, args, Deadline::in(Millis(5000))); };
  call("service.set", {{"name", "echo"}, {"to", "unix:" + dir.path() + "/echo"}});
  EXPECT_EQ(trim(outcome_from_json(call("exec", {{"argv", {"sh", "-c", "ulimit -S -n"}}})).out), "64");
  std::vector<Fd> streams;
  const Json request{{"op", "peer.service"}, {"name", "echo"}};
  // A quarter of 128: the soft limit is raised.
  while (streams.size() < 32) streams.push_back(open_agent_stream(socket, request, Deadline::in(Millis(5000))));
  EXPECT_EQ(code_of([&] { open_agent_stream(socket, request, Deadline::in(Millis(5000))); }), Code::state);
  EXPECT_EQ(call("exec", {{"argv", {"true"}}})["status"], 0);
  streams.pop_back();
  Deadline again = Deadline::in(Millis(5000));
  while (streams.size() < 32 && !again.passed()) {
    try {
      streams.push_back(open_agent_stream(socket, request, Deadline::in(Millis(5000))));
    } catch (const Error&) {
      system_clock().sleep(Millis(20));
    }
  }
  EXPECT_EQ(streams.size(), 32u);
  streams.clear();
  program.kill(SIGTERM);
  program.wait(Deadline::in(Millis(8000)));
}

TEST(Agent, EphemeralLeavesNothing) {
  TempDir dir;
  std::string state = dir.path() + "/e";
  Running a(state, true);
  {
    AgentClient c(a.socket());
    EXPECT_EQ(c.call("hello")["ephemeral"], true);
    EXPECT_EQ(c.call("exec", {{"argv", {"true"}}})["status"], 0);
  }
  a.wait();
  EXPECT_FALSE(exists(state));
}

TEST(Agent, OneAgentAState) {
  TempDir dir;
  Running a(dir.path());
  EXPECT_EQ(code_of([&] { Agent second(AgentOptions{dir.path(), "source", "x", false}); }), Code::conflict);
  EXPECT_TRUE(a.call("hello")["record_error"].is_string());
  a.call("record.init", {{"side", "source"}, {"name", "x"}, {"serves", "source"}});
  EXPECT_NO_THROW(a.call("record.init", {{"side", "source"}, {"name", "x"}, {"serves", "source"}}));
  EXPECT_EQ(a.call("attempt.status")["phase"], "serving");
  a.call("shutdown");
  a.wait();
  EXPECT_EQ(a.status, kEndedByShutdown);
}

// A gate goes on when its supervisor is killed or restarted; the next one has it from then on, to its end.
TEST(Supervisor, EndsAGateThatAnEarlierOneHasStarted) {
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  for (bool dies : {false, true}) {
    TempDir dir;
    const std::string& state = dir.path();
    create_record_file(state + "/record", {});
    write_durably(state + "/agent.json", "{\"began\": true, \"name\": \"x\", \"side\": \"source\"}");
    write_durably(state + "/gate.json", Json{{"routes", {{{"name", "app"}, {"listen", "unix:" + state + "/in.sock"}, {"local", "unix:" + state + "/app.sock"}}}}}.dump());
    auto gate = [&]() -> pid_t {
      try {
        return static_cast<pid_t>(get_int(AgentClient(state + "/run/gate.sock").call("status", Json::object(), Deadline::in(Millis(2000))), "pid"));
      } catch (const Error&) {
        return 0;
      }
    };
    auto until = [&](const std::function<bool()>& right) {
      for (Deadline d = Deadline::in(Millis(8000)); !right() && !d.passed();) system_clock().sleep(Millis(10));
      EXPECT_TRUE(right());
    };
    Command supervise{.argv = {REHOME_AGENT_PROGRAM, "supervise", "--state", state}};
    pid_t first = 0, agent = 0;
    auto agents = [&]() -> pid_t {
      try {
        return static_cast<pid_t>(get_int(AgentClient(state + "/run/agent.sock").call("hello", Json::object(), Deadline::in(Millis(2000))), "pid"));
      } catch (const Error&) {
        return 0;
      }
    };
    {
      Child one(supervise, Child::Pipes{});
      until([&] { return (first = gate()) > 0 && (agent = agents()) > 0; });
      one.kill(SIGKILL);
      one.wait(Deadline::in(Millis(5000)));
    }
    Child two(supervise, Child::Pipes{});
    until([&] { return agents() > 0 && agents() != agent; });
    EXPECT_EQ(gate(), first);
    if (dies) {
      system_clock().sleep(Millis(300));
      ::kill(first, SIGKILL);
      until([&] { return gate() > 0 && gate() != first; });
    }
    AgentClient(state + "/run/agent.sock").call("shutdown", Json::object(), Deadline::in(Millis(5000)));
    EXPECT_EQ(two.wait(Deadline::in(Millis(10'000))), kEndedByShutdown);
    EXPECT_EQ(gate(), 0);
    if (!dies) ::kill(first, SIGKILL);
    ::waitpid(first, nullptr, 0);
  }
  ::prctl(PR_SET_CHILD_SUBREAPER, 0);
}

TEST(Agent, WhatComesBackAfterAReboot) {
  TempDir dir;
  Boot boot{"directory:" + dir.path(), "shop", "source", "/s", {"app.service"}};
  EXPECT_EQ(install_boot(boot, "/bin/rehome-agent"), dir.path() + "/00-rehome-shop-source");
  EXPECT_NE(read_file(dir.path() + "/00-rehome-shop-source").find("supervise --detach --state /s"), std::string::npos);
  remove_boot(boot);
  EXPECT_TRUE(list_directory(dir.path()).empty());
  std::string unit = unit_text(boot, "/bin/rehome-agent");
  for (const char* line : {"Before=nginx.service app.service\n", "StartLimitIntervalSec=0\n", "RequiresMountsFor=/s\n", "Restart=always\n", "RestartSec=100ms\n", "OOMScoreAdjust=-900\n"})
    EXPECT_NE(unit.find(line), std::string::npos) << line;
  EXPECT_EQ(code_of([&] { install_boot({"magic", "shop", "source", "/s", {}}, "/x"); }), Code::config);
}

TEST(Agent, AnAccountsCrontabKeepsItsOwnJobs) {
  TempDir dir;
  // Keeps its table in a file; the file `broken` is what it says instead, with status 1.
  write_durably(dir.path() + "/crontab", R"(#!/bin/sh
cd "${0%/*}"
[ "$LC_ALL" = C ] || [ "$1" != -l ] || exit 9
[ ! -e broken ] || { cat broken >&2; exit 1; }
case $1 in
  -l) cat table 2>/dev/null || { echo "no crontab for shop" >&2; exit 1; } ;;
  -) [ ! -e deaf ] || { cat >/dev/null; exit 0; }; cat >table ;;
  -r) [ -e deaf ] || rm table ;;
esac
)", 0755);
  const std::string path = ::getenv("PATH"), table = dir.path() + "/table";
  ::setenv("PATH", (dir.path() + ":" + path).c_str(), 1);
  const Boot boot{"cron", "shop", "source", "/s", {}};
  auto set = [&](const char* file) { write_durably(dir.path() + file, "crontab: cannot read /var/spool/cron: I/O error\n"); };
  auto unset = [&](const char* file) { ::unlink((dir.path() + file).c_str()); };

  install_boot(boot, "/bin/rehome-agent");
  EXPECT_NE(read_file(table).find("@reboot /bin/rehome-agent supervise"), std::string::npos);
  remove_boot(boot);
  EXPECT_FALSE(exists(table));
  EXPECT_NO_THROW(remove_boot(boot));

  const std::string jobs = "# jobs\n\nMAILTO=me\n\n5 4 * * * backup\n\n";
  write_durably(table, jobs);
  set("/broken");
  EXPECT_EQ(code_of([&] { install_boot(boot, "/bin/rehome-agent"); }), Code::store);
  unset("/broken");
  EXPECT_EQ(read_file(table), jobs);
  for (int twice = 0; twice < 2; twice++) install_boot(boot, "/bin/rehome-agent");
  const std::string with = read_file(table);
  EXPECT_TRUE(with.starts_with(jobs)) << with;
  EXPECT_EQ(split(with, '\n').size(), split(jobs, '\n').size() + 2) << with;
  for (const char* failing : {"/broken", "/deaf"}) {
    set(failing);
    EXPECT_EQ(code_of([&] { remove_boot(boot); }), Code::store) << failing;
    unset(failing);
    EXPECT_EQ(read_file(table), with);
  }
  remove_boot(boot);
  EXPECT_EQ(read_file(table), jobs);
  set("/deaf");
  EXPECT_EQ(code_of([&] { install_boot(boot, "/bin/rehome-agent"); }), Code::store);
  ::setenv("PATH", path.c_str(), 1);
}

}  // namespace
}  // namespace rehome
