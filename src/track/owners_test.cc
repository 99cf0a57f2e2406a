// Accounts that are made while the agent runs. /etc/passwd is this test's own, in a mount namespace of one thread.
#include "track/owners.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <thread>

#include "sys/fs.h"
#include "track/delta.h"

namespace rehome::track {
namespace {

class Owners : public ::testing::Test {
 protected:
  Owners() {
    write("root:x:0:0::/:/bin/sh\n");
  }
  void write(const std::string& text) {
    Fd fd(::open(passwd.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    write_all(fd.get(), text, passwd);
  }
  void enter() {
    ASSERT_EQ(::unshare(CLONE_NEWNS), 0);
    ASSERT_EQ(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
    ASSERT_EQ(::mount(passwd.c_str(), "/etc/passwd", nullptr, MS_BIND, nullptr), 0);
  }
  TempDir dir;
  std::string passwd = dir.path() + "/passwd";
};

TEST_F(Owners, AChangedFileIsReadAgain) {
  std::thread([&] {
    enter();
    Accounts accounts;
    std::uint64_t first = accounts.renew();
    EXPECT_EQ(accounts.id(Accounts::Kind::user, "rehome-new"), std::nullopt);
    EXPECT_EQ(accounts.name(Accounts::Kind::user, 424242), "");
    EXPECT_EQ(accounts.renew(), first);
    write("root:x:0:0::/:/bin/sh\nrehome-new:x:424242:0::/:/bin/sh\n");
    EXPECT_NE(accounts.renew(), first);
    EXPECT_EQ(accounts.id(Accounts::Kind::user, "rehome-new"), 424242u);
    EXPECT_EQ(accounts.name(Accounts::Kind::user, 424242), "rehome-new");
  }).join();
}

TEST_F(Owners, AnAccountThatIsMadeDuringAConnectionOwnsWhatComesNext) {
  int s[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
  Fd ours(s[0]), theirs(s[1]);
  const std::string at = dir.path() + "/tree";
  make_directories(at);
  std::thread receiving([&] {
    enter();
    Tree tree(Fd(::open(at.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), at);
    Filter filter;
    Accounts accounts;
    Channel channel(theirs.get());
    Receiver(tree, filter, accounts, {}).serve(channel, std::atomic<bool>{false});
  });
  Channel channel(ours.get());
  channel.send(FrameType::owner, Packer().u8(0).u32(777).bytes("rehome-new").out());
  auto owner_of = [&](const std::string& name) {
    Entry e;
    e.path = name;
    e.meta.mode = S_IFREG | 0644;
    e.meta.uid = 777;
    e.content = Content::whole;
    channel.send(FrameType::entry, pack(e));
    channel.send(FrameType::ask, {});
    channel.flush();
    while (channel.receive().type != FrameType::ready) {
    }
    channel.send(FrameType::commit, Packer().u8(0).out());
    channel.flush();
    EXPECT_EQ(channel.receive().type, FrameType::done);
    struct stat st{};
    ::stat((at + "/" + name).c_str(), &st);
    return st.st_uid;
  };
  EXPECT_EQ(owner_of("before"), 777u);
  write("root:x:0:0::/:/bin/sh\nrehome-new:x:424242:0::/:/bin/sh\n");
  EXPECT_EQ(owner_of("after"), 424242u);
  ours.reset();
  receiving.join();
}

}  // namespace
}  // namespace rehome::track
