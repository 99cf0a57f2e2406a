// What the sender makes of a tree that it cannot read for a moment: nothing of that is a removal at the other side.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/fsuid.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <set>
#include <thread>

#include "base/error.h"
#include "sys/fs.h"
#include "track/delta.h"

namespace rehome::track {
namespace {

// Another end that opens nothing: it writes down what it is told, and answers that all went well.
class Recorder {
 public:
  Recorder() {
    int s[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
    ours_ = Fd(s[0]);
    theirs_ = Fd(s[1]);
    channel.emplace(ours_.get());
    thread_ = std::thread([this] {
      Channel c(theirs_.get());
      Frame f;
      while (c.receive_or_end(f)) {
        Unpacker u(f.payload);
        if (f.type == FrameType::remove) removed.insert(std::string(u.bytes()));
        if (f.type == FrameType::entry) entries.insert(unpack_entry(f.payload).path);
        if (f.type == FrameType::names) listed.insert(std::string(u.bytes()));
        if (f.type == FrameType::ask) c.send(FrameType::ready, {});
        if (f.type == FrameType::commit) c.send(FrameType::done, Packer().u32(0).u32(0).out());
        c.flush();
      }
    });
  }
  void end() {
    ours_.reset();
    if (thread_.joinable()) thread_.join();
  }
  ~Recorder() { end(); }
  std::optional<Channel> channel;
  std::set<std::string> removed, entries, listed;  // to be read after end()

 private:
  Fd ours_, theirs_;
  std::thread thread_;
};

class Sending : public ::testing::Test {
 protected:
  Sending() {
    for (const char* d : {"/x/y", "/shut"}) make_directories(dir.path() + d, 0755);
    for (const char* f : {"/x/1", "/x/y/2", "/shut/in", "/open"}) write_durably(dir.path() + f, "content", 0644);
    ::chmod(dir.path().c_str(), 0755);
    ::chmod((dir.path() + "/shut").c_str(), 0700);
  }
  Sent send(Dirty dirty) { return send(sender, std::move(dirty)); }
  Sent send(Sender& by, Dirty dirty) {
    return by.send(*peer.channel, std::move(dirty), again, {.durable = true, .deadline = Deadline::in(Millis(10'000))});
  }
  std::uint8_t kept(const std::string& path) {
    Dirty d = again.take();
    auto it = d.paths.find(path);
    std::uint8_t why = it == d.paths.end() ? std::uint8_t{0} : it->second;
    again.put_back(std::move(d));
    return why;
  }
  TempDir dir;
  Tree tree{Fd(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), dir.path()};
  Filter filter;
  Accounts accounts;
  LinkIndex links{tree, filter};
  Sender sender{tree, filter, links, accounts};
  DirtySet again;
  Recorder peer;
};

TEST_F(Sending, ADirectoryThatMayNotBeReadRemovesNothing) {
  // Of this thread alone, and with it the right to read everything.
  ::setfsuid(65534);
  Sent sent = send({.paths = {{"shut/in", why_content}, {"open", why_content}, {"shut", why_tree}, {"gone", why_name}}});
  ::setfsuid(0);
  peer.end();
  EXPECT_EQ(peer.removed, std::set<std::string>{"gone"});
  EXPECT_FALSE(peer.listed.contains("shut"));
  EXPECT_TRUE(peer.entries.contains("open"));
  EXPECT_EQ(sent.failed.size(), 2u);
  EXPECT_EQ(kept("shut/in"), why_content);
  EXPECT_TRUE(kept("shut") & why_tree);
  EXPECT_EQ(kept("gone"), 0);
}

TEST_F(Sending, TooManyOpenFilesRemoveNothing) {
  accounts.name(Accounts::Kind::user, 0);
  for (int free : {0, 1, 2}) {
    // Descriptors from this number on cannot be made.
    Fd lowest(::open("/", O_PATH | O_CLOEXEC));
    rlimit old{}, low{};
    ::getrlimit(RLIMIT_NOFILE, &old);
    low = old;
    low.rlim_cur = static_cast<rlim_t>(lowest.get() + free);
    lowest.reset();
    ::setrlimit(RLIMIT_NOFILE, &low);
    // With nothing open from the round before.
    Sender fresh(tree, filter, links, accounts);
    Sent sent = send(fresh, {.paths = {{"x", why_tree}, {"x/y/2", why_content}, {"shut/in", why_content}}});
    ::setrlimit(RLIMIT_NOFILE, &old);
    EXPECT_FALSE(sent.failed.empty()) << free;
    EXPECT_TRUE(kept("x") & why_tree) << free;
    again.take();
  }
  peer.end();
  EXPECT_TRUE(peer.removed.empty()) << *peer.removed.begin();
  EXPECT_FALSE(peer.listed.contains("x"));
}

TEST_F(Sending, TheBandwidthLimitHoldsForSmallAndForLargeFiles) {
  for (int i = 0; i < 40; i++) write_durably(dir.path() + "/small" + std::to_string(i), std::string(10'000, 's'), 0644);
  Dirty dirty;
  for (int i = 0; i < 40; i++) dirty.paths["small" + std::to_string(i)] = why_content;
  Ticks began = system_clock().now();
  Sent sent = sender.send(*peer.channel, std::move(dirty), again, {.bandwidth = 200'000});
  // 400 KB at 200 KB a second: what is sent last need not be waited for.
  EXPECT_GT(ms_between(began, system_clock().now()), 1'500);
  EXPECT_GT(sent.bytes, 400'000);
}

TEST_F(Sending, ALimitedSendStopsAtOnce) {
  // One frame that is worth ten seconds: more than one step of waiting.
  write_durably(dir.path() + "/large", std::string(100'000, 'l'), 0644);
  std::atomic<bool> stop{false};
  std::thread stopper([&] {
    system_clock().sleep(Millis(1'200));
    stop = true;
  });
  Ticks began = system_clock().now();
  EXPECT_THROW(sender.send(*peer.channel, {.paths = {{"large", why_content}}}, again, {.bandwidth = 10'000, .stop = &stop}), Error);
  stopper.join();
  double ms = ms_between(began, system_clock().now());
  EXPECT_GT(ms, 1'000);
  EXPECT_LT(ms, 4'000);
  EXPECT_EQ(kept("large"), why_content);
}

}  // namespace
}  // namespace rehome::track
