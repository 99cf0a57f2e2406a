// What a controller reads of an agent's answers, and how it comes to one.
#include "site/site.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "site/agent_site.h"
#include "sys/testing/sshd.h"
#include "site/here.h"

namespace rehome {
namespace {

TEST(Site, OutputIsBytes) {
  Here site;
  // Pieces that split a character.
  std::string text = "gr\xc3\xbc\xc3\x9f", all;
  for (std::size_t i = 0; i < text.size(); i++)
    all += site.exec_ok({.argv = {"sh", "-c", "printf %s \"$1\" | dd bs=1 skip=" + std::to_string(i) + " count=1 status=none", "sh", text}}).out;
  EXPECT_EQ(all, text);
  try {
    site.exec({.argv = {"head", "-c", "17000000", "/dev/zero"}});
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(e.message.find("head printed more"), std::string::npos) << e.what();
  }
}

TEST(Ssh, ALineMeansTheSameToEveryLoginShell) {
  const std::string line = "printf '%s|' 'a b' \"c'd\" 'e!f' 'g\\h' '$HOME' \"i\\\\j\"; [ ! -e /nowhere ] && echo $((1+1))";
  EXPECT_EQ(in_sh("a 'b' !c \\d"), "exec sh -c 'a '\\''b'\\'' '\\!'c '\\\\'d'");
  const std::string wanted = run_ok({.argv = {"sh", "-c", line}}).out;
  int tried = 0;
  for (const char* shell : {"sh", "bash", "dash", "tcsh", "csh", "fish", "zsh"}) {
    if (!run({.argv = {"sh", "-c", std::string("command -v ") + shell}}).ok()) continue;
    tried++;
    EXPECT_EQ(run({.argv = {shell, "-c", in_sh(line)}}).out, wanted) << shell;
  }
  EXPECT_GE(tried, 2);
}

// An agent that is started again closes every connection that it had.
class FakeAgent {
 public:
  explicit FakeAgent(const std::string& path) : listener_(listen_on({.path = path})) {
    thread_ = std::thread([this] {
      std::vector<std::thread> sessions;
      while (auto fd = accept_from(listener_, {}, &stop_)) {
        sessions.emplace_back([this, fd = std::make_shared<Fd>(std::move(*fd))] {
          Reader in(*fd);
          while (!stop_) {
            try {
              if (!in.line(Deadline::in(Millis(50)))) return;
              send_all(*fd, "{\"ok\": true}\n");
            } catch (const Error& e) {
              if (e.code != Code::timeout) return;
            }
          }
        });
      }
      for (auto& s : sessions) s.join();
    });
  }
  ~FakeAgent() {
    stop_ = true;
    thread_.join();
  }

 private:
  Fd listener_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

Deployment deployment(const std::string& state) {
  Deployment d;
  d.name = "test";
  for (Side s : {Side::source, Side::target}) {
    d.site[s].local = true;
    d.site[s].state = state;
  }
  return d;
}

TEST(AgentSite, ConnectionsOfAnAgentThatWasStartedAgainAreNotUsed) {
  TempDir dir;
  make_directories(dir.path() + "/run");
  const std::string socket = dir.path() + "/run/agent.sock";
  auto agent = std::make_unique<FakeAgent>(socket);
  auto site = AgentSite::open(deployment(dir.path()), Side::source, AgentSite::How::observe);
  // Several at once, so that several are pooled.
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++) callers.emplace_back([&] { site->call("hello"); });
  for (auto& c : callers) c.join();
  agent.reset();
  agent = std::make_unique<FakeAgent>(socket);
  for (int i = 0; i < 4; i++) EXPECT_NO_THROW(site->call("hello"));
}

// Kills the masters whose control socket is below `directory`: it is in the name that they give themselves.
void kill_ssh(const std::string& directory) {
  int killed = 0;
  for (const auto& pid : list_directory("/proc")) {
    std::string said;
    try {
      said = read_file("/proc/" + pid + "/cmdline");
    } catch (const Error&) {
      continue;  // no process, or gone
    }
    if (said.starts_with("ssh: ") && said.find(directory) != std::string::npos && ::kill(std::atoi(pid.c_str()), SIGKILL) == 0) killed++;
  }
  EXPECT_GE(killed, 1);
}

TEST(AgentSite, AConnectionOfSshThatWasKilledIsMadeAgain) {
  TempDir dir;
  make_directories(dir.path() + "/state/run");
  testing::Sshd sshd(dir.path() + "/sshd");
  FakeAgent agent(dir.path() + "/state/run/agent.sock");
  Deployment d = deployment(dir.path() + "/state");
  d.site.source.local = false;
  d.site.source.ssh = {.host = sshd.host(), .port = sshd.port(), .key = sshd.key(), .options = sshd.options()};
  ::setenv("TMPDIR", dir.path().c_str(), 1);
  auto site = AgentSite::open(d, Side::source, AgentSite::How::observe);
  ::unsetenv("TMPDIR");
  EXPECT_NO_THROW(site->call("hello"));
  kill_ssh(dir.path());
  system_clock().sleep(Millis(200));   // what is pooled ends with it
  // Several find it out at once, and one of them dials.
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; i++)
    callers.emplace_back([&] {
      try {
        site->call("hello");
      } catch (const Error& e) {
        ADD_FAILURE() << e.what();
      }
    });
  for (auto& c : callers) c.join();
  sshd.stop();
  // The end of a connection that was there, and why there is no new one.
  EXPECT_THROW(site->call("hello"), Error);
  try {
    site->call("hello");
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code, Code::unreachable) << e.what();
    EXPECT_NE(e.message.find("ssh"), std::string::npos) << e.what();
  }
  sshd.start();
  EXPECT_NO_THROW(site->call("hello"));
}

TEST(AgentSite, APlaceThatRunsNoProgramsIsPassedBy) {
  // The program stands beside the one that runs.
  const std::string beside = program_directory() + "/rehome-agent";
  ::unlink(beside.c_str());
  ASSERT_EQ(::symlink(REHOME_AGENT_PROGRAM, beside.c_str()), 0);
  TempDir dir;
  run_ok({.argv = {"mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", dir.path()}});
  ::setenv("XDG_RUNTIME_DIR", dir.path().c_str(), 1);
  std::string state;
  try {
    auto site = AgentSite::open(deployment(""), Side::source, AgentSite::How::ephemeral);
    state = site->state();
    EXPECT_EQ(site->exec({.argv = {"true"}}).status, 0);
    EXPECT_FALSE(state.starts_with(dir.path())) << state;
    // Who comes to a server that is not there is told so in PostgreSQL's words.
    Fd fd = connect_to({.path = site->local_socket_for("unix:" + dir.path() + "/nobody", "", "") + "/.s.PGSQL.5432"}, Deadline::in(Millis(5000)));
    send_all(fd, "startup");
    Reader in(fd);
    std::string answer = in.exactly(5, Deadline::in(Millis(5000)));
    EXPECT_EQ(answer.substr(0, 3), std::string("E\0\0", 3));
    answer = in.exactly(static_cast<unsigned char>(answer[3]) * 256u + static_cast<unsigned char>(answer[4]) - 4, Deadline::in(Millis(5000)));
    EXPECT_EQ(answer.substr(0, 7), std::string("SFATAL\0", 7));
    EXPECT_NE(answer.find("Mcannot connect to unix:" + dir.path() + "/nobody: "), std::string::npos) << answer;
  } catch (const Error& e) {
    ADD_FAILURE() << e.what();
  }
  EXPECT_FALSE(exists(state)) << state;
  EXPECT_TRUE(list_directory(dir.path()).empty());
  try {
    Deployment d = deployment(dir.path() + "/state");
    d.site.source.boot = "none";
    AgentSite::open(d, Side::source, AgentSite::How::install);
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(e.message.find("noexec"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(exists(dir.path() + "/state"));
  ::unsetenv("XDG_RUNTIME_DIR");
  ::umount2(dir.path().c_str(), MNT_DETACH);
  ::unlink(beside.c_str());
}

// A person's `state` may be a directory that was there before, and be given other files later.
TEST(AgentSite, OnlyWhatRehomeMadeIsRemovedFromItsDirectory) {
  for (const char* name : {"rehome-agent", "rehome-gate"}) {
    const std::string beside = program_directory() + "/" + name;
    ::unlink(beside.c_str());
    ASSERT_EQ(::symlink(REHOME_AGENT_PROGRAM, beside.c_str()), 0);
  }
  TempDir dir;
  const std::string state = dir.path() + "/state";
  make_directories(state, 0755);
  Deployment d = deployment(state);
  d.site.source.boot = "none";
  {
    auto site = AgentSite::open(d, Side::source, AgentSite::How::install);
    struct stat st;
    ASSERT_EQ(::stat(state.c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 07777, 0700u);
    for (const char* f : {"/letters.txt", "/.profile"}) write_durably(state + f, "mine");
    write_durably(state + "/record.new.17", "of a crash");
    site->call("attempt.cancel");
    site->uninstall(false);
  }
  EXPECT_EQ(list_directory(state), (std::vector<std::string>{".profile", "letters.txt"}));
  for (const char* name : {"rehome-agent", "rehome-gate"}) ::unlink((program_directory() + "/" + name).c_str());
}

}  // namespace
}  // namespace rehome
