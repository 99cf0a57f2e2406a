// The commands on two sites of this host, with real agents and a store of files.
#include "ops/run.h"

#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <csignal>
#include <map>
#include <thread>

#include "config/config.h"
#include "ops/life.h"
#include "ops/ops.h"
#include "ops/plan.h"
#include "sys/fs.h"

namespace rehome::ops {
namespace {

class Commands : public ::testing::Test {
 protected:
  Commands() {
    // The programs stand beside the one that runs.
    for (const char* program : {"rehome-agent", "rehome-gate"})
      if (::symlink((std::string(REHOME_PROGRAMS) + "/" + program).c_str(), (program_directory() + "/" + program).c_str()) != 0 && errno != EEXIST)
        throw errno_error(errno, "link", program);
    make_directories(dir.path() + "/from");
    write_durably(dir.path() + "/from/a", "what is to be moved\n");
    write();
  }
  ~Commands() override {
    // What a test that failed has left.
    for (const char* side : {"/source", "/target"}) ::umount2((dir.path() + side + "/mounted").c_str(), MNT_DETACH);
    for (Side side : {Side::source, Side::target}) {
      ::umount2((state(std::string(side_name(side))) + "/run/tree-uploads").c_str(), MNT_DETACH);
      try {
        auto site = AgentSite::open(load_deployment(common().file), side, AgentSite::How::observe);
        site->set_generation(get_int(site->call("hello"), "gen"));
        site->uninstall(false);
      } catch (const Error&) {
        // It is gone already.
      }
    }
    for (const char* tree : {"/from", "/to"}) ::umount2((dir.path() + tree).c_str(), MNT_DETACH);
    for (std::string f = newest_archive(name()); !f.empty(); f = newest_archive(name())) ::unlink(f.c_str());
  }

  static std::string name() { return "ops-test-" + std::to_string(::getpid()); }
  std::string state(const std::string& side) const { return dir.path() + "/" + side; }
  void write(const std::string& more = {}, const std::string& source = {}, const std::string& services = {}) const {
    write_durably(dir.path() + "/rehome.yaml", "name: " + name() + "\nsource: " + (source.empty() ? "{local: true, boot: none, state: " + state("source") + "}" : source) +
                                                   "\ntarget: {local: true, boot: none, state: " + state("target") + "}\nstores:\n" + more + "  - name: uploads\n    files: {source: " + dir.path() +
                                                   "/from, target: " + dir.path() + "/to}\n" + services + "max_pause: 5s\n");
  }
  Common common() { return {.file = dir.path() + "/rehome.yaml", .emit = [this](const Json& e) { said.push_back(e); }}; }
  // What the command throws; Code::internal and no message where it throws nothing.
  template <class Options>
  Error thrown(int (*command)(const Options&), Options options) {
    try {
      command(options);
    } catch (const Error& e) {
      return e;
    }
    return Error(Code::internal, "");
  }
  bool anything_at(const std::string& side) const { return exists(state(side)) && !list_directory(state(side)).empty(); }

  TempDir dir;
  std::vector<Json> said;
};

TEST_F(Commands, WhoOnlyLooksWritesNothing) {
  begin({common()});
  ops::Run at_work(load_deployment(common().file), ops::Run::Mode::control);
  const std::size_t lines = at_work.journal().entries().size();
  PlanOptions o{common()};
  o.out = dir.path() + "/plan";
  plan(o);
  status({common()});
  report_entries({common()});
  at_work.journal().append("message", {{"text", "still at work"}});
  EXPECT_EQ(ops::Run(load_deployment(common().file), ops::Run::Mode::observe).journal().entries().size(), lines + 1);
  refuse_stale_plan(at_work, o.out);
  auto looking = existing_run(load_deployment(common().file));
  EXPECT_THROW(looking->set_phase("switched"), Error);
  looking.reset();
  EXPECT_EQ(at_work.phase(), "following");
  cancel({common()});
}

TEST_F(Commands, AFileThatLostAPartOfTheRunIsRefused) {
  make_directories(dir.path() + "/more");
  const std::string more = "  - name: more\n    files: {source: " + dir.path() + "/more, target: " + dir.path() + "/more-there}\n";
  begin({common()});
  // One that came after begin is begun by resume.
  write(more);
  resume({common()});
  write();
  for (const Error& e : {thrown(switch_over, {common()}), thrown(complete, {common()}), thrown(cancel, {common()})}) {
    EXPECT_EQ(e.code, Code::config) << e.what();
    EXPECT_NE(e.message.find("store more is not there any more"), std::string::npos) << e.what();
  }
  EXPECT_NO_THROW(status({common()}));
  write(more);
  cancel({common()});
  EXPECT_FALSE(exists(dir.path() + "/more-there"));
}

TEST_F(Commands, ATargetThatCountedAheadWhileTheSourceWasAwayIsFollowed) {
  begin({common()});
  {
    auto target = AgentSite::open(load_deployment(common().file), Side::target, AgentSite::How::observe);
    target->set_generation(get_int(target->call("hello"), "gen") + 3);
    target->call("generation.adopt");
  }
  EXPECT_EQ(thrown(verify, {common()}).message, "");
  cancel({common()});
}

TEST_F(Commands, CancelStopsOnlyWhatTheRunStarted) {
  const std::string pid_of = dir.path() + "/service.";
  auto runs = [&](const char* side) {
    return run({.argv = {"sh", "-c", "grep -q '^State:.[^ZX]' /proc/$(cat \"$1\")/status", "sh", pid_of + side}}).ok();
  };
  auto side = [&](const std::string& s) {
    return "{command: {start: [sh, -c, \"echo $$ >" + pid_of + s + "; exec sleep 100\"], stop: [sh, -c, \"kill $(cat " + pid_of + s + ")\"], pid_file: " + pid_of + s + "}}";
  };
  write({}, {}, "services:\n  - name: web\n    source: " + side("source") + "\n    target: " + side("target") + "\n");
  auto begun_and_cancelled = [&] {
    begin({common()});
    EXPECT_TRUE(runs("target"));
    cancel({common()});
  };
  Child serves({.argv = {"sleep", "100"}}, Child::Pipes{});
  write_durably(pid_of + "source", std::to_string(serves.pid()) + "\n");
  begun_and_cancelled();
  EXPECT_FALSE(runs("target"));
  Child was_there({.argv = {"sleep", "100"}}, Child::Pipes{});
  write_durably(pid_of + "target", std::to_string(was_there.pid()) + "\n");
  begun_and_cancelled();
  EXPECT_TRUE(runs("source") && runs("target"));
}

TEST_F(Commands, CancelTakesAwayABeginThatInstalledOneAgentOnly) {
  AgentSite::open(load_deployment(common().file), Side::source, AgentSite::How::install);
  cancel({common()});
  EXPECT_FALSE(anything_at("source"));
  EXPECT_EQ(newest_archive(name()), "");
}

TEST_F(Commands, WhatAHostThatWentDownHasKeptOfAnEndedRunIsTakenAwayByWhoControls) {
  begin({common()});
  {
    auto target = AgentSite::open(load_deployment(common().file), Side::target, AgentSite::How::observe);
    const std::int64_t agent = get_int(target->call("hello"), "pid");
    const std::string stat = read_file("/proc/" + std::to_string(agent) + "/stat");
    const std::int64_t supervisor = std::stoll(stat.substr(stat.rfind(')') + 4));
    for (std::int64_t pid : {supervisor, agent}) ::kill(static_cast<pid_t>(pid), SIGKILL);
  }
  ::umount2((state("target") + "/run/tree-uploads").c_str(), MNT_DETACH);   // as its host's end does
  write_durably(state("target") + "/run/remove", "all");
  // Below what would be removed lies somebody's tree.
  make_directories(state("target") + "/mounted");
  if (::mount("none", (state("target") + "/mounted").c_str(), "tmpfs", 0, nullptr) != 0) throw errno_error(errno, "mount", "a tmpfs");
  EXPECT_NE(thrown(begin, {common()}).message.find("was being taken away from there when its host went down"), std::string::npos);
  EXPECT_NO_THROW(status({common()}));
  EXPECT_NE(thrown(cancel, {common()}).message.find("something is mounted at"), std::string::npos);
  EXPECT_TRUE(exists(state("target") + "/agent.json"));
  ::umount2((state("target") + "/mounted").c_str(), 0);
  ::rmdir((state("target") + "/mounted").c_str());
  Error gone = thrown(cancel, {common()});
  EXPECT_FALSE(anything_at("target")) << gone.what();
}

TEST_F(Commands, ThePlanListsWhatIsDoneAndNothingElse) {
  auto planned = [&] {
    plan({common()});
    std::map<std::string, std::vector<std::string>> titles;
    for (const auto& s : said.back().at("steps")) titles[get_string(s, "command")].push_back(get_string(s, "title"));
    return titles;
  };
  const std::vector<std::string> complete{"take away what follows uploads", "take away both agents, and keep the journal for the report"},
      there{"prepare the way back of uploads: changes on the target are tracked", "store with both agents what they must be able to do alone, and try it",
            "see every last change on the target", "compare", "position the followers of the way back", "seal, hard fence, record: from here on the target serves",
            "open the target", "the source follows the target"};
  auto all = planned();
  EXPECT_EQ(all["switch"], there);
  EXPECT_EQ(all["complete"], complete);
  EXPECT_EQ(all["begin"].size(), 7u);

  write({}, {}, "services:\n  - {name: web, source: {systemd: old.service}, target: {systemd: new.service}, warm: false, start_time: 1s}\n"
                "traffic:\n  - name: api\n    gate: {source: {application: \"127.0.0.1:18000\", listen: \"127.0.0.1:18001\"}, target: {application: \"127.0.0.1:18002\", listen: \"127.0.0.1:18003\"}}\n"
                "checks:\n  - {name: health, http: \"http://127.0.0.1:18002/\", canary: read}\n"
                "  - {name: here, command: [\"true\"], where: source}\n  - {name: cart, command: [\"true\"], canary: write}\n");
  all = planned();
  EXPECT_EQ(all["switch"], (std::vector<std::string>{there[0], there[1], "check health on the target", "warm up the target: what health asks, asked by up to 32 at once", "hold new requests at the source's gate", "let requests in flight finish",
                                                     "freeze web on the source", there[2], there[3], there[4], "read canary health", there[5],
                                                     "open the target, start web there, release the gate", "end web on the source, frozen as they are", there[7],
                                                     "write canary cart on the target; if it fails, the run goes back"}));
  EXPECT_EQ(all["complete"], (std::vector<std::string>{"refuse while clients still come to the old address, and take the gates of api out of their way", complete[0],
                                                       "take the start condition of web from the side that serves", complete[1]}));

  write();
  begin({common()});
  EXPECT_EQ(planned()["switch"], there);
  switch_over({common()});
  all = planned();
  EXPECT_EQ(all.size(), 2u);
  EXPECT_EQ(all["reverse"].back(), "the target follows the source");
  EXPECT_EQ(all["complete"], complete);
  ops::complete({common()});
}

TEST_F(Commands, ACompleteThatWasInterruptedGoesOnWhereItWas) {
  begin({common()});
  switch_over({common()});
  CompleteOptions o{common()};
  o.anyway = true;
  // As if it had been killed between the two sites: the source's cannot be taken away yet.
  make_directories(state("source") + "/mounted");
  ASSERT_EQ(::mount("tmpfs", (state("source") + "/mounted").c_str(), "tmpfs", 0, nullptr), 0);
  EXPECT_NE(thrown(complete, o).message.find("something is mounted at"), std::string::npos);
  EXPECT_FALSE(anything_at("target"));
  o.unfence_source = true;
  EXPECT_NE(thrown(complete, o).message.find("something is mounted at"), std::string::npos);
  ::umount2((state("source") + "/mounted").c_str(), MNT_DETACH);
  ::rmdir((state("source") + "/mounted").c_str());
  complete(o);
  EXPECT_FALSE(anything_at("source"));
  EXPECT_FALSE(anything_at("target"));
  EXPECT_EQ(run_ok({.argv = {"cat", dir.path() + "/to/a"}}).out, "what is to be moved\n");

  // The old server is off now, and what the run wrote down is here.
  write({}, "{ssh: root@127.0.0.1, port: 1, state: " + state("source") + "}\nlink: {from: target, to: root@127.0.0.1}");
  status({common()});
  EXPECT_EQ(get_string(said.back(), "last_journal"), newest_archive(name()));
  EXPECT_FALSE(report_entries({common()}).empty());
}

TEST_F(Commands, ATakeoverThatIsRefusedLateIsBackedOut) {
  begin({common()});
  auto look = [&](Side side) { return AgentSite::open(load_deployment(common().file), side, AgentSite::How::observe); };
  auto pids = [&](Side side) {
    const std::int64_t agent = get_int(look(side)->call("hello"), "pid");
    const std::string stat = read_file("/proc/" + std::to_string(agent) + "/stat");
    return std::pair{static_cast<pid_t>(agent), static_cast<pid_t>(std::stoll(stat.substr(stat.rfind(')') + 4)))};
  };
  const auto [agent, supervisor] = pids(Side::target);
  // The target's agent is away when it is asked, and when it comes back it cannot tell what it would have to do.
  const std::string asks = dir.path() + "/asks", hook = dir.path() + "/hook";
  write_durably(hook, "#!/bin/sh\n[ \"$1 $2\" = 'before open' ] || exit 0\nkill -STOP " + std::to_string(supervisor) + "; kill -9 " + std::to_string(agent) +
                          "; echo broken >" + state("target") + "/actions.json; touch " + asks + "\n", 0755);
  ::setenv("REHOME_FAULT_HOOK", hook.c_str(), 1);
  std::jthread breaker([&](std::stop_token stop) {
    auto at_source = look(Side::source);
    while (!stop.stop_requested() && get_string(at_source->call("attempt.status"), "decision") != "COMMIT") system_clock().sleep(Millis(5));
    // With it goes the answer that the controller waits for.
    ::kill(pids(Side::source).first, SIGKILL);
    system_clock().sleep(Millis(500));
    ::kill(supervisor, SIGCONT);
  });
  const Error e = thrown(switch_over, {common()});
  breaker.request_stop();
  breaker.join();
  ::unsetenv("REHOME_FAULT_HOOK");
  EXPECT_TRUE(exists(asks));
  EXPECT_EQ(e.code, Code::backed_out) << e.what();
  EXPECT_NE(e.message.find("the other site refused"), std::string::npos) << e.what();
  EXPECT_EQ(existing_run(load_deployment(common().file))->serves(), Side::source);
  cancel({common()});
}

TEST_F(Commands, WhatIsRefusedTakesTheRunFromNobody) {
  begin({common()});
  ops::Run at_work(load_deployment(common().file), ops::Run::Mode::control);
  VerifyOptions of{common()};
  of.store = "upload";
  EXPECT_EQ(thrown(verify, of).code, Code::usage);
  EXPECT_EQ(thrown(complete, {common()}).code, Code::state);
  ResumeOptions gone{common()};
  gone.source_is_gone = true;
  EXPECT_EQ(thrown(resume, gone).code, Code::state);
  CancelOptions lost{common()};
  lost.target_is_gone = true;
  EXPECT_EQ(thrown(cancel, lost).code, Code::state);
  EXPECT_NO_THROW(at_work.journal().append("message", {{"text", "still at work"}}));
  EXPECT_FALSE(at_work.superseded());
  cancel({common()});
}

TEST_F(Commands, ADifferenceThatVerifyFoundStopsASwitch) {
  begin({common()});
  ops::Run(load_deployment(common().file), ops::Run::Mode::control).journal().append("verify", {{"store", "uploads"}, {"equal", false}});
  EXPECT_EQ(thrown(switch_over, {common()}).code, Code::verify);
  verify({common()});
  EXPECT_EQ(thrown(switch_over, {common()}).message, "");
  reverse({common()});
  cancel({common()});
}

TEST_F(Commands, CompleteAsksTheWriteCanaryThatNobodyHasAsked) {
  const std::string mended = dir.path() + "/mended", hook = dir.path() + "/hook";
  write({}, {}, "checks:\n  - {name: sell, command: [test, -e, " + mended + "], where: target, canary: write, timeout: 1s}\n");
  begin({common()});
  write_durably(hook, "#!/bin/sh\n[ \"$1 $2\" != 'after open' ] || kill -9 $PPID\n", 0755);
  Command killed{.argv = {REHOME_PROGRAMS "/rehome", "--file", common().file, "switch"}};
  killed.env = {{"REHOME_FAULT_HOOK", hook}};
  EXPECT_FALSE(run(killed, Deadline::in(Millis(60000))).ok());
  const Error e = thrown(complete, {common()});
  EXPECT_EQ(e.code, Code::check_failed) << e.what();
  EXPECT_NE(e.hint.find("rehome reverse"), std::string::npos) << e.hint;
  EXPECT_EQ(existing_run(load_deployment(common().file))->phase(), "switched");
  write_durably(mended, "");
  EXPECT_EQ(thrown(complete, {common()}).message, "");
  EXPECT_FALSE(anything_at("target"));
}

TEST_F(Commands, WhatIsStillThereAfterTheEndIsNamed) {
  begin({common()});
  const std::string program = state("target") + "/bin/rehome-left";
  run_ok({.argv = {"cp", "/bin/sleep", program}});
  Child stays({.argv = {program, "100"}}, Child::Pipes{});
  const Error e = thrown(cancel, {common()});
  EXPECT_EQ(e.code, Code::io) << e.what();
  EXPECT_NE(e.message.find("process /proc/" + std::to_string(stays.pid()) + "/exe"), std::string::npos) << e.what();
  EXPECT_EQ(e.message.find(','), std::string::npos) << e.what();
  EXPECT_TRUE(anything_at("source"));
  stays.kill(SIGKILL);
  cancel({common()});
  EXPECT_FALSE(anything_at("source"));
}

TEST(MicroFences, AreNeverMoreThanThreeInFiveMinutes) {
  struct Waiting : Clock {
    Ticks now() override { return ms * 1'000'000; }
    std::int64_t wall_us() override { return 0; }
    void sleep(Millis d) override { ms += d.count(); }
    std::int64_t ms = 0;
  } clock;
  MicroFences fences(clock);
  std::vector<std::int64_t> at;
  for (; clock.ms < 3'600'000; clock.sleep(Millis(1'000)))
    if (fences.allowed()) {
      at.push_back(clock.ms);
      fences.count();
    }
  ASSERT_GE(at.size(), 10u);
  // Within the five seconds that a switch waits without --when-ready, and within what a reverse waits.
  EXPECT_LT(at[1], 5'000);
  EXPECT_LT(at[2], 60'000);
  for (std::size_t i = 3; i < at.size(); i++) EXPECT_GE(at[i] - at[i - 3], 300'000) << i;
  EXPECT_LE(at[3] - at[2], 300'000);
}

TEST_F(Commands, AGoneSourceHasNoFenceToLift) {
  CompleteOptions o{common()};
  o.unfence_source = o.source_is_gone = true;
  EXPECT_EQ(thrown(complete, o).code, Code::usage);
}

TEST_F(Commands, WhatIsNoPlanIsSaidToBeNone) {
  BeginOptions o{common()};
  for (const char* text : {"[1]", "{\"kind\": \"plan\"}", "{\"facts\": 7}"}) {
    write_durably(o.plan = dir.path() + "/plan", text);
    EXPECT_EQ(thrown(begin, o).code, Code::usage) << text;
  }
  EXPECT_FALSE(anything_at("source"));
}

}  // namespace
}  // namespace rehome::ops
