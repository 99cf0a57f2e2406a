// rehome-gate as its supervisor runs it: signals, sockets that are handed on, nobody who speaks to it.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gate/gate_running.h"
#include "sys/process.h"

namespace rehome {
namespace {

using namespace testing;

// The program with `listeners` from descriptor 3 on, under these names.
class Program {
 public:
  Program(const std::string& state, const std::vector<const Fd*>& listeners = {}, const std::string& names = {}) {
    std::vector<int> high;
    for (const Fd* l : listeners) high.push_back(::fcntl(l->get(), F_DUPFD_CLOEXEC, 100));
    std::string count = "LISTEN_FDS=" + std::to_string(high.size()), named = "LISTEN_FDNAMES=" + names;
    char *with[] = {count.data(), named.data(), nullptr}, *none[] = {nullptr};
    pid_ = ::fork();
    if (pid_ == 0) {
      int next = 3;
      for (int fd : high) ::dup2(fd, next++);
      ::execle(REHOME_GATE, "rehome-gate", "--state", state.c_str(), nullptr, high.empty() ? none : with);
      ::_exit(127);
    }
    for (int fd : high) ::close(fd);
    EXPECT_TRUE(eventually([&] {
      try {
        ask_gate(state, {{"op", "status"}});
        return true;
      } catch (const Error&) {
        return false;
      }
    }));
  }
  ~Program() { end(SIGKILL); }
  int end(int signal) {
    if (pid_ <= 0) return -1;
    ::kill(pid_, signal);
    int status = 0;
    ::waitpid(std::exchange(pid_, -1), &status, 0);
    return status;
  }
  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
};

struct State {
  TempDir dir;
  Address in = unix_at(dir.path() + "/in.sock"), app = unix_at(dir.path() + "/app.sock");
  void routes(const Json& route) {
    Json one{{"name", "app"}, {"listen", in.text()}, {"local", app.text()}};
    one.update(route);
    write_durably(dir.path() + "/gate.json", Json{{"routes", {one}}}.dump());
  }
  Json ask(const Json& request) { return ask_gate(dir.path(), request); }
  Json status() { return ask({{"op", "status"}}); }
};

TEST(GateProgram, SighupReadsTheRoutesAgainAndLosesNobody) {
  State s;
  s.routes({{"max_waiting", 5}});
  Program gate(s.dir.path());
  App app(s.app, answering("local"));
  EXPECT_TRUE(eventually([&] { return exists(s.in.path); }));
  s.ask({{"op", "release"}, {"to", "local"}});
  Fd c = connect_to(s.in, soon());
  EXPECT_EQ(ask_line(c, "x"), "local:x");
  std::string second = s.dir.path() + "/second.sock";
  Json j = parse_json(read_file(s.dir.path() + "/gate.json"), "");
  j["routes"].push_back({{"name", "second"}, {"listen", "unix:" + second}, {"local", s.app.text()}});
  write_durably(s.dir.path() + "/gate.json", j.dump());
  ::kill(gate.pid(), SIGHUP);
  EXPECT_TRUE(eventually([&] { return exists(second); }));
  EXPECT_EQ(ask_line(connect_to(unix_at(second), soon()), "y"), "local:y");
  EXPECT_EQ(ask_line(c, "z"), "local:z");
  // A file that is wrong is said in the log, and changes nothing.
  write_durably(s.dir.path() + "/gate.json", "{\"routes\": 7}");
  ::kill(gate.pid(), SIGHUP);
  EXPECT_TRUE(eventually([&] { return read_file(s.dir.path() + "/log/gate.log").find("no list of routes") != std::string::npos; }));
  EXPECT_EQ(s.status()["routes"].size(), 2u);
  EXPECT_EQ(gate.end(SIGTERM), 0);
}

TEST(GateProgram, SocketsThatAreHandedOnOutliveAGateThatIsKilled) {
  State s;
  std::uint16_t port = free_port();
  s.routes({{"listen", loopback(port).text()}, {"marked", "unix:" + s.dir.path() + "/marked.sock"}});
  Fd in = listen_on(loopback(port)), marked = listen_on(unix_at(s.dir.path() + "/marked.sock"));
  App app(s.app, answering("local"));
  auto gate = std::make_unique<Program>(s.dir.path(), std::vector<const Fd*>{&in, &marked}, "app:app.marked");
  s.ask({{"op", "release"}, {"to", "local"}});
  EXPECT_EQ(ask_line(connect_to(loopback(port), soon()), "x"), "local:x");
  // From another gate, at the socket that was handed on for it.
  Fd peer = connect_to(unix_at(s.dir.path() + "/marked.sock"), soon());
  send_all(peer, "PROXY UNKNOWN\r\n");
  Reader from_gate(peer);
  EXPECT_EQ(from_gate.exactly(1, soon()), "T");
  send_all(peer, "y\n");
  EXPECT_EQ(from_gate.line(soon()).value(), "Glocal:y");
  gate.reset();
  // Nobody is refused while there is no gate.
  Fd meanwhile = connect_to(loopback(port), soon());
  send_all(meanwhile, "z\n");
  gate = std::make_unique<Program>(s.dir.path(), std::vector<const Fd*>{&in, &marked}, "app:app.marked");
  EXPECT_EQ(s.status()["state"], "SEALED");
  s.ask({{"op", "release"}, {"to", "local"}});
  Reader reader(meanwhile);
  EXPECT_EQ(reader.line(soon()).value(), "local:z");
}

TEST(GateProgram, WithoutAnAgentItServesNobodyAndTellsThemInTheEnd) {
  State s;
  s.routes({{"max_wait_ms", 400}});
  App app(s.app, answering("local"));
  Program gate(s.dir.path());
  EXPECT_TRUE(eventually([&] { return exists(s.in.path); }));
  Ticks t = system_clock().now();
  Fd c = connect_to(s.in, soon());
  send_all(c, "x\n");
  EXPECT_TRUE(read_to_end(c).starts_with("HTTP/1.1 503 "));
  EXPECT_GE(ms_between(t, system_clock().now()), 390);
  EXPECT_EQ(app.connections, 0);
  EXPECT_EQ(s.status()["state"], "SEALED");
}

TEST(GateProgram, AnAgentThatFallsSilentInAHoldLeavesTheSideThatServed) {
  State s;
  s.routes(Json::object());
  App app(s.app, answering("local"));
  Program gate(s.dir.path());
  EXPECT_TRUE(eventually([&] { return exists(s.in.path); }));
  s.ask({{"op", "release"}, {"to", "local"}});
  s.ask({{"op", "hold"}, {"attempt", 1}, {"timer_ms", 300}});
  Ticks t = system_clock().now();
  EXPECT_EQ(ask_line(connect_to(s.in, soon()), "x"), "local:x");
  double waited = ms_between(t, system_clock().now());
  EXPECT_GT(waited, 200);
  EXPECT_LT(waited, 2000);
  EXPECT_EQ(s.status()["state"], "OPEN_LOCAL");
}

TEST(GateProgram, ItsOwnConnectionsToTheApplicationCarryTheMark) {
  State s;
  std::uint16_t port = free_port();
  s.routes({{"local", loopback(port).text()}, {"mark", 0x1234}});
  App app(loopback(port), answering("local"));
  Program gate(s.dir.path());
  EXPECT_TRUE(eventually([&] { return exists(s.in.path); }));
  s.ask({{"op", "release"}, {"to", "local"}});
  Fd c = connect_to(s.in, soon());
  EXPECT_EQ(ask_line(c, "x"), "local:x");
  Outcome o = run_ok({.argv = {"ss", "-Htne", "dst", "127.0.0.1:" + std::to_string(port)}});
  EXPECT_NE(o.out.find("fwmark:0x1234"), std::string::npos) << o.out;
}

}  // namespace
}  // namespace rehome
