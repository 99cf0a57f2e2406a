// Every fault at every step of the pause, on real agents: two sites of this host, a store of files, and a service that writes
// numbered lines and keeps apart what it has been told is written. Deployments run side by side, for most of the time is waited.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <mutex>
#include <set>
#include <thread>

#include "base/json.h"
#include "base/text.h"
#include "config/config.h"
#include "ops/ops.h"
#include "ops/run.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome::ops {
namespace {

constexpr const char* kPhases[] = {"hold", "drain", "soft fence", "freeze", "marker", "catch up", "compare", "arm reverse", "read canary", "seal", "hard fence", "open"};
constexpr const char* kFaults[] = {"controller killed", "controller stopped", "second controller", "yielding agent killed", "taking agent killed", "both agents killed"};

// It goes on from the last line of its tree. A line counts as told once it stands in the file `told`, outside the tree.
constexpr const char* kWriter = R"sh(#!/bin/sh
tree=$1 pid_file=$2 told=$3
[ "${4:-}" = run ] || { setsid sh "$0" "$1" "$2" "$3" run </dev/null >/dev/null 2>&1 & while [ "$(cat "$pid_file" 2>/dev/null)" != $! ]; do sleep 0.01; done; exit 0; }
echo $$ >"$pid_file"
i=
while :; do
  # A tree that takes no writes is another's: once it does, what that one wrote last counts.
  if ! true >>"$tree/log"; then
    i=
  else
    i=$((${i:-$(tail -n 1 "$tree/log" | cut -d' ' -f1)} + 1))
    echo "$i $$" >>"$tree/log" && echo "$i $$" >>"$told" || i=
  fi 2>/dev/null
  sleep 0.02
done
)sh";

struct Pair {
  std::string fault, when, phase;
};

class Place {
 public:
  explicit Place(int number) : name_("pause-test-" + std::to_string(::getpid()) + "-" + std::to_string(number)) {
    for (const char* d : {"/from", "/to"}) make_directories(dir_.path() + d);
    write_durably(dir_.path() + "/writer", kWriter);
    write_durably(dir_.path() + "/hook", "#!/bin/sh\n. " + dir_.path() + "/strike\n", 0755);
    auto side = [&](const std::string& s, const std::string& tree) {
      const std::string pid = dir_.path() + "/pid." + s;
      return "    " + s + ": {command: {start: [sh, " + dir_.path() + "/writer, " + dir_.path() + tree + ", " + pid + ", " + dir_.path() + "/told], stop: [sh, -c, \"kill $(cat " + pid + ")\"], pid_file: " + pid + "}}\n";
    };
    auto site = [&](const std::string& s) { return s + ": {local: true, boot: none, state: " + dir_.path() + "/state." + s + "}\n"; };
    write_durably(file(), "name: " + name_ + "\n" + site("source") + site("target") + "stores:\n  - name: uploads\n    files: {source: " + dir_.path() + "/from, target: " + dir_.path() +
                              "/to}\nservices:\n  - name: writer\n" + side("source", "/from") + side("target", "/to") + "max_pause: 10s\n");
  }
  void begin() {
    run_ok({.argv = {"sh", dir_.path() + "/writer", dir_.path() + "/from", dir_.path() + "/pid.source", dir_.path() + "/told"}}, Deadline::in(Millis(5000)));
    ok("begin");
  }
  ~Place() {
    for (const char* s : {"source", "target"}) {
      try {
        auto site = AgentSite::open(load_deployment(file()), s[0] == 's' ? Side::source : Side::target, AgentSite::How::observe);
        site->set_generation(get_int(site->call("hello"), "gen"));
        ::umount2((dir_.path() + "/state." + s + "/run/tree-uploads").c_str(), MNT_DETACH);
        site->uninstall(false);
      } catch (const std::exception&) {
        // The test has ended it already.
      }
      const std::string pid(trim(exists(dir_.path() + "/pid." + s) ? read_file(dir_.path() + "/pid." + s) : ""));
      if (!pid.empty() && exists("/proc/" + pid) && read_file("/proc/" + pid + "/cmdline").find(dir_.path()) != std::string::npos) ::kill(std::stoi(pid), SIGKILL);
    }
    for (std::string f = newest_archive(name_); !f.empty(); f = newest_archive(name_)) ::unlink(f.c_str());
  }

  void one(const Pair& p) {
    SCOPED_TRACE(p.fault + " " + p.when + " " + p.phase);
    const Side yields = serving_;
    write_durably(dir_.path() + "/strike", strike(p, yields));
    {
      Command command{.argv = {REHOME_PROGRAMS "/rehome", "--file", file(), "-q", yields == Side::source ? "switch" : "reverse"}};
      command.env = {{"REHOME_FAULT_HOOK", dir_.path() + "/hook"}};
      Outcome o = run(command, Deadline::in(Millis(90000)));
      EXPECT_TRUE(exists(dir_.path() + "/struck")) << "nothing was broken: " << o.err;
      ::unlink((dir_.path() + "/struck").c_str());
      said_ = o.err;
    }
    // The agents alone, then a person's resume.
    std::string seen;
    std::optional<Side> now;
    for (Deadline deadline = Deadline::in(Millis(30000)); !now && !deadline.passed(); system_clock().sleep(Millis(100))) now = settled(seen);
    ASSERT_TRUE(now) << "neither side serves: " << seen << "\n" << said_;
    serving_ = *now;
    ok("resume");
    system_clock().sleep(Millis(100));
    judge();
  }
  void end() {
    if (serving_ == Side::target) ok("reverse");
    ok("cancel");
    EXPECT_TRUE(!exists(dir_.path() + "/state.source") && !exists(dir_.path() + "/state.target"));
  }

  // Its tree is read as a whole by an agent that was started again: a person who switches right then waits for that, and is told.
  void one_right_after_a_restart() {
    const std::string slow = dir_.path() + "/slow";
    make_directories(dir_.path() + "/bin");
    write_durably(dir_.path() + "/bin/rsync", "#!/bin/sh\nwhile [ -e " + slow + " ]; do sleep 0.05; done\nPATH=${PATH#*:} exec rsync \"$@\"\n", 0755);
    env_ = {{"PATH", dir_.path() + "/bin:" + ::getenv("PATH")}};
    begin();
    write_durably(slow, "");
    const auto pid = agent(Side::source);
    ::kill(static_cast<pid_t>(pid), SIGKILL);
    for (Deadline deadline = Deadline::in(Millis(20000));; system_clock().sleep(Millis(20))) {
      ASSERT_FALSE(deadline.passed());
      try {
        if (agent(Side::source) != pid) break;
      } catch (const Error&) {
        // It is not up yet.
      }
    }
    Outcome switched;
    std::jthread person([&] { switched = rehome({"switch"}); });
    const std::string journal = dir_.path() + "/state.source/journal.jsonl", told = "not yet: uploads does not follow: its whole tree is read again";
    for (Deadline deadline = Deadline::in(Millis(20000)); read_file(journal).find(told) == std::string::npos && !deadline.passed();) system_clock().sleep(Millis(20));
    ::unlink(slow.c_str());
    person.join();
    EXPECT_NE(read_file(journal).find(told), std::string::npos);
    ASSERT_TRUE(switched.ok()) << switched.out << switched.err;
    serving_ = Side::target;
    judge();
  }

 private:
  std::string file() const { return dir_.path() + "/rehome.yaml"; }
  Outcome rehome(std::vector<std::string> words) {
    words.insert(words.begin(), {REHOME_PROGRAMS "/rehome", "--file", file()});
    return run({.argv = words, .env = env_}, Deadline::in(Millis(90000)));
  }
  void ok(const std::string& command) {
    // An agent that was killed a moment ago is asked again, as a person would.
    Outcome o = rehome({"-q", command});
    for (int tries = 0; !o.ok() && command == "resume" && tries < 3; tries++) {
      system_clock().sleep(Millis(1000));
      o = rehome({"-q", command});
    }
    if (!o.ok()) ADD_FAILURE() << command << " ended with " << o.status << ": " << o.err << "\nbefore: " << said_;
  }
  std::int64_t agent(Side side) { return get_int(AgentSite::open(load_deployment(file()), side, AgentSite::How::observe)->call("hello"), "pid"); }
  // Its parent is the controller.
  std::string strike(const Pair& p, Side yields) {
    std::string strike;
    if (p.fault == "controller killed") strike = "kill -9 $PPID";
    if (p.fault == "controller stopped") strike = "c=$PPID; (sleep 4; kill -CONT $c) </dev/null >/dev/null 2>&1 & kill -STOP $c";
    if (p.fault == "second controller") strike = REHOME_PROGRAMS "/rehome --file " + file() + " -q resume >/dev/null 2>&1 || [ $? -lt 100 ]";
    if (p.fault.starts_with("yielding") || p.fault.starts_with("both")) strike += "kill -9 " + std::to_string(agent(yields)) + "; ";
    if (p.fault.starts_with("taking") || p.fault.starts_with("both")) strike += "kill -9 " + std::to_string(agent(other(yields)));
    return "[ \"$1 $2\" = '" + p.when + " " + p.phase + "' ] && [ ! -e '" + dir_.path() + "/struck' ] || exit 0\ntouch '" + dir_.path() + "/struck'\n" + strike + "\n";
  }
  std::optional<Side> settled(std::string& seen) {
    Outcome o = rehome({"--json", "status"});
    seen = o.out + o.err;
    if (!o.ok()) return {};
    Json s = parse_json(o.out.substr(0, o.out.find('\n')), "status");
    for (const char* side : {"source", "target"}) {
      const Json& a = s.at(side);
      if (!a.contains("record") || !get_bool(a.at("link"), "up", false)) return {};
      const std::string phase = get_string(a.at("attempt"), "phase", "");
      if (!std::set<std::string>{"serving", "closed", "refused", "prepared"}.contains(phase) || !get_bool(a.at("attempt"), "settled", true)) return {};
    }
    const std::string serves = get_string(s, "serves");
    return serves == "source" ? std::optional(Side::source) : serves == "target" ? std::optional(Side::target) : std::nullopt;
  }
  // Every line that was told is there, and lines are numbered without a gap: a second writer, or a write that was taken by the side
  // that does not serve, would have made one or doubled a number.
  void judge() {
    // In this order: it is written while we read.
    const std::string told = read_file(dir_.path() + "/told");
    const std::string log = read_file(dir_.path() + (serving_ == Side::source ? "/from" : "/to") + "/log");
    std::set<std::string> there;
    std::int64_t n = 0;
    for (const auto& line : split(log, '\n')) {
      if (line.empty()) continue;
      ASSERT_EQ(line.substr(0, line.find(' ')), std::to_string(++n)) << "in " << serving_name();
      there.insert(line);
    }
    for (const auto& line : split(told, '\n')) ASSERT_TRUE(line.empty() || there.contains(line)) << line << " was written, and is not in " << serving_name();
    EXPECT_GT(n, written_) << "nothing was written since the fault before";
    written_ = n;
  }
  std::string serving_name() const { return "the tree of the " + std::string(side_name(serving_)) + ", which serves"; }

  TempDir dir_;
  std::string name_, said_;
  std::vector<std::pair<std::string, std::string>> env_;
  Side serving_ = Side::source;
  std::int64_t written_ = 0;
};

TEST(Pause, EveryFaultAtEveryStep) {
  std::vector<Pair> pairs;
  for (const char* fault : kFaults) {
    for (const char* phase : kPhases) pairs.push_back({fault, "before", phase});
    pairs.push_back({fault, "after", "open"});
  }
  std::mutex mutex;
  std::size_t next = 0;
  auto work = [&](Place& place) {
    place.begin();
    while (!::testing::Test::HasFailure()) {
      std::size_t mine;
      {
        std::lock_guard lock(mutex);
        mine = next++;
      }
      if (mine >= pairs.size()) break;
      place.one(pairs[mine]);
    }
    place.end();
  };
  // Made before anything is started: a program that is being written while another thread forks cannot be run.
  std::vector<std::unique_ptr<Place>> places;
  for (int number = 0; number < 6; number++) places.push_back(std::make_unique<Place>(number));
  std::vector<std::jthread> threads;
  for (auto& place : places)
    threads.emplace_back([&] {
      try {
        work(*place);
      } catch (const std::exception& e) {
        ADD_FAILURE() << e.what();
      }
    });
}

TEST(Pause, ATreeThatIsReadAgainIsWaitedFor) {
  Place place(6);
  place.one_right_after_a_restart();
  place.end();
}

}  // namespace
}  // namespace rehome::ops
