// The driver's whole life through two real agents of one host, judged by rsync.
#include <gtest/gtest.h>
#include <sys/mount.h>

#include <map>

#include "agent/client.h"
#include "stores/files/files.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// An agent process, and the Site through which a controller sees it.
class TestSite : public Site {
 public:
  TestSite(Side side, std::string state) : side_(side), state_(std::move(state)) {
    make_directories(state_);
    start();
  }
  void start() {
    agent_.emplace(Command{.argv = {REHOME_AGENT, "serve", "--state", state_, "--side", std::string(side_name(side_)), "--name", "t"}},
                   Child::Pipes{});
    Deadline deadline = Deadline::in(Millis(20'000));
    while (true) {
      try {
        AgentClient(state_ + "/run/agent.sock").call("hello");
        return;
      } catch (const Error&) {
        if (deadline.passed()) throw;
        system_clock().sleep(Millis(20));
      }
    }
  }
  void kill() { agent_->kill(SIGKILL), agent_.reset(); }
  Side side() const override { return side_; }
  std::string label() const override { return std::string(side_name(side_)); }
  std::string state() const override { return state_; }
  std::int64_t generation() const override { return generation_; }
  Json call(const std::string& op, Json args = Json::object(), Deadline deadline = Deadline::in(Millis(30000))) override {
    if (!op.starts_with("generation.")) args["gen"] = generation_;
    return AgentClient(state_ + "/run/agent.sock").call(op, args, deadline);
  }
  Fd open_relay(const std::string&, const std::string&, const std::string&) override { return Fd(); }
  std::string local_socket_for(const std::string&, const std::string&, const std::string&) override { return {}; }
  std::int64_t generation_ = 0;

 private:
  Side side_;
  std::string state_;
  std::optional<Child> agent_;
};

class Life : public ::testing::Test {
 protected:
  Life() : from(dir.path() + "/from"), to(dir.path() + "/to"), source(Side::source, dir.path() + "/s/t/source"),
           target(Side::target, dir.path() + "/s/t/target") {
    make_directories(from);
    config.name = "uploads";
    config.files.path = {from, to};
    source.generation_ = target.generation_ = get_int(source.call("generation.new"), "gen");
    target.call("generation.adopt", {{"gen", target.generation_}});
    source.call("link.set", {{"socket", target.state() + "/run/agent.sock"}});
    target.call("link.set", {{"socket", source.state() + "/run/agent.sock"}});
    store = make_files_store(config, deployment);
  }
  ~Life() override {
    if (HasFailure()) fprintf(stderr, "%s\n%s\n", read_file(source.state() + "/log/agent.log").c_str(), read_file(target.state() + "/log/agent.log").c_str());
    source.kill();
    target.kill();
    for (const auto& at : {from, to, source.state() + "/run/tree-uploads", target.state() + "/run/tree-uploads"})
      ::umount2(at.c_str(), MNT_DETACH);
  }
  void sh(const std::string& where, const std::string& script) {
    Outcome o = run({.argv = {"bash", "-c", "set -e; " + script}, .directory = where});
    ASSERT_TRUE(o.ok()) << script << "\n" << o.err;
  }
  std::string differences(const std::string& a, const std::string& b) {
    Outcome o = run({.argv = {"rsync", "-aHAXc", "--delete", "-ni", "--modify-window=-1", a + "/", b + "/"}});
    return o.out + o.err;
  }
  void begin() {
    store->prepare(context);
    store->copy(context);
    store->follow(context);
  }
  // As the agents run them: in order.
  void act(const std::vector<Action>& actions) {
    for (const auto& a : actions) {
      Command c{.argv = a.argv, .input = a.input};
      c.argv[0] = REHOME_AGENT;
      run_ok(c, Deadline::in(a.timeout), a.name.c_str());
    }
  }
  // The pause and the agents' part of the commit; returns the pause's own part in milliseconds.
  double cut_over(Direction d) {
    store->prepare_reverse(context, d);
    ActionSets sets = store->actions(context, d);
    auto cut = store->open_cut(context, d);
    Deadline deadline = Deadline::in(Millis(20'000));
    Ticks began = system_clock().now();
    cut->soft_fence(deadline);
    cut->marker(deadline);
    cut->catch_up(deadline);
    cut->compare(deadline);
    cut->arm_reverse(deadline);
    cut->hard_fence(deadline);
    double ms = ms_between(began, system_clock().now());
    act(sets.open);
    act(sets.tail_takes);
    act(sets.tail_yields);
    return ms;
  }
  void wait_clean() {
    Deadline deadline = Deadline::in(Millis(60'000));
    while (true) {
      FollowStatus f = store->follow_status(context);
      if (f.following && f.trouble.empty() && f.lag.count() == 0) return;
      ASSERT_FALSE(deadline.passed()) << f.trouble << f.detail.dump(1);
      system_clock().sleep(Millis(50));
    }
  }

  TempDir dir;
  std::string from, to;
  TestSite source, target;
  StoreConfig config;
  Deployment deployment;
  std::unique_ptr<Store> store;
  std::map<std::string, Json> facts;
  std::atomic<bool> cancelled{false};
  StoreContext context{.deployment = deployment, .source = source, .target = target, .progress = [](const Progress&) {},
                       .note = [](const std::string&, const Json&) {},
                       .recall = [this](const std::string& k) { return facts.contains(k) ? facts[k] : Json(); },
                       .remember = [this](const std::string& k, const Json& v) { facts[k] = v; },
                       .log = [](const std::string&) {}, .cancelled = cancelled};
};

TEST_F(Life, ThereAndBackAgain) {
  sh(from, "mkdir -p a/b; for i in $(seq 300); do echo $i > a/b/$i; done; ln a/b/1 one; chown -R 33:33 a");
  for (const auto& f : store->preflight(context)) EXPECT_NE(f.level, Finding::Level::error) << f.object << ": " << f.message;
  begin();
  wait_clean();
  EXPECT_EQ(differences(from, to), "");
  EXPECT_TRUE(store->verify(context).equal);
  // The side that does not serve takes no write but the agent's.
  EXPECT_NE(run({.argv = {"touch", to + "/x"}}).status, 0);

  sh(from, "echo late >> a/b/7; mv a/b a/c; rm a/c/9");
  double ms = cut_over({Side::source});
  EXPECT_EQ(run({.argv = {"touch", from + "/x"}}).status, 1);
  EXPECT_LT(ms, 5000);
  sh(to, "echo new > new; rm a/c/8; mkdir z; ln a/c/1 z/1");
  wait_clean();
  EXPECT_EQ(differences(to, from), "");

  sh(to, "echo more >> new");
  cut_over({Side::target});
  sh(from, "echo back > back");
  wait_clean();
  EXPECT_EQ(differences(from, to), "");
  EXPECT_EQ(read_file(from + "/new"), "new\nmore\n");

  store->finish(context, Side::source);
  EXPECT_TRUE(store->leftovers(context).empty());
  sh(to, "touch x");
}

TEST_F(Life, AnOldSideThatComesBackOverwritesNothing) {
  sh(from, "echo 1 > 1");
  begin();
  // Y's agent dies after the commit: T opens, and Y, started again, reads everything and would send it.
  store->prepare_reverse(context, {Side::source});
  ActionSets sets = store->actions(context, {Side::source});
  {
    auto cut = store->open_cut(context, {Side::source});
    cut->catch_up(Deadline::in(Millis(20'000)));
    cut->arm_reverse(Deadline::in(Millis(20'000)));
  }
  source.kill();
  act(sets.open);
  sh(to, "echo 2 > 2; echo changed > 1");
  source.start();
  system_clock().sleep(Millis(2000));
  EXPECT_EQ(read_file(to + "/1"), "changed\n");
  EXPECT_TRUE(exists(to + "/2"));
  act(sets.tail_takes);
  act(sets.tail_yields);
  wait_clean();
  EXPECT_EQ(differences(to, from), "");
}

TEST_F(Life, AWriterThatIsNotFrozenBacksOut) {
  sh(from, "echo 1 > 1");
  begin();
  Child writer({.argv = {"bash", "-c", "exec 3>>1; sleep 60"}, .directory = from}, {});
  system_clock().sleep(Millis(300));
  auto cut = store->open_cut(context, {Side::source});
  try {
    cut->catch_up(Deadline::in(Millis(20'000)));
    FAIL();
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("process " + std::to_string(writer.pid())), std::string::npos) << e.what();
  }
}

TEST_F(Life, CancelLeavesNothing) {
  sh(from, "mkdir d; echo 1 > d/1");
  begin();
  store->abandon(context);
  EXPECT_FALSE(exists(to));
  EXPECT_TRUE(store->leftovers(context).empty());
  EXPECT_EQ(read_file(from + "/d/1"), "1\n");
  store->abandon(context);
}

TEST_F(Life, PreflightNamesWhatIsWrong) {
  sh(from, "echo 1 > 1; chown 54321 1");
  make_directories(to);
  sh(to, "echo mine > mine");
  auto found = store->preflight(context);
  auto has = [&](const std::string& id) { return std::any_of(found.begin(), found.end(), [&](const Finding& f) { return f.id == id; }); };
  EXPECT_TRUE(has("files.not_empty"));
  EXPECT_THROW(store->prepare(context), Error);
  EXPECT_EQ(read_file(to + "/mine"), "mine\n");
}

}  // namespace
}  // namespace rehome
