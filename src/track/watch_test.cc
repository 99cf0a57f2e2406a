// What the watch does when it cannot tell where a change happened: it asks for a rescan, and never drops the change.
#include "track/watch.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "sys/fs.h"
#include "sys/process.h"

namespace rehome::track {
namespace {

class Watching : public ::testing::Test {
 protected:
  Watching() {
    make_directories(at + "/d");
    write_durably(at + "/d/file", "1", 0644);
    write_durably(dir.path() + "/elsewhere", "1", 0644);
    tree.emplace(Fd(::open(at.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), at);
    watch.emplace(*tree, filter, dirty);
  }
  ~Watching() override {
    watch.reset();
    run({.argv = {"rm", "-rf", at}});
  }
  // With no descriptor to be had while the events are read.
  template <class F>
  void without_descriptors(F act) {
    Fd lowest(::open("/", O_PATH | O_CLOEXEC));
    rlimit old{}, low{};
    ::getrlimit(RLIMIT_NOFILE, &old);
    low = old;
    low.rlim_cur = static_cast<rlim_t>(lowest.get());
    lowest.reset();
    ::setrlimit(RLIMIT_NOFILE, &low);
    act();
    watch->drain();
    ::setrlimit(RLIMIT_NOFILE, &old);
  }
  TempDir dir;
  std::string at = dir.path() + "/tree";
  std::optional<Tree> tree;
  Filter filter;
  DirtySet dirty;
  std::optional<Watch> watch;
};

TEST_F(Watching, ADirectoryThatCannotBeOpenedNowIsARescanAndIsFoundLater) {
  without_descriptors([&] { ::chmod((at + "/d/file").c_str(), 0600); });
  EXPECT_NE(dirty.rescan_reason().find("could not be found"), std::string::npos) << dirty.rescan_reason();
  dirty.take();
  ::chmod((at + "/d/file").c_str(), 0640);
  watch->drain();
  EXPECT_EQ(dirty.rescan_reason(), "");
  EXPECT_TRUE(dirty.take().paths.contains("d/file"));
}

TEST_F(Watching, AFileWhoseOtherNamesCannotBeFoundIsARescan) {
  // Whoever renames a directory of the file system beside us makes the places unknown: then it is the directory that is not found.
  for (int i = 0; i < 20 && dirty.rescan_reason().find("other names") == std::string::npos; i++) {
    ::chmod((at + "/d/file").c_str(), 0600);
    watch->drain();
    dirty.take();
    // The directory's place is known now, the file's inode is asked for with every change.
    without_descriptors([&] { ::chmod((at + "/d/file").c_str(), 0640); });
  }
  EXPECT_NE(dirty.rescan_reason().find("other names"), std::string::npos) << dirty.rescan_reason();
}

TEST_F(Watching, APathTooLongForProcIsARescan) {
  Fd fd(::open((at + "/d").c_str(), O_PATH | O_CLOEXEC));
  const std::string name(200, 'n');
  for (int i = 0; i < 25; i++) {
    ASSERT_EQ(::mkdirat(fd.get(), name.c_str(), 0755), 0);
    fd = Fd(::openat(fd.get(), name.c_str(), O_PATH | O_CLOEXEC));
    ASSERT_TRUE(fd);
  }
  watch->drain();
  dirty.take();
  ASSERT_EQ(::mkdirat(fd.get(), "new", 0755), 0);
  watch->drain();
  EXPECT_NE(dirty.rescan_reason(), "");
}

// As when a tree is tracked while its closing mount is over it.
TEST_F(Watching, WhatIsOutsideAMountOfThePartIsNoRescan) {
  for (bool detached : {false, true}) {
    watch.reset();
    ASSERT_EQ(::mount(at.c_str(), at.c_str(), nullptr, MS_BIND, nullptr), 0);
    tree.emplace(Fd(::open(at.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), at);
    watch.emplace(*tree, filter, dirty);
    if (detached) ::umount2(at.c_str(), MNT_DETACH);
    run_ok({.argv = {"bash", "-c", "mkdir -p o/p; echo 1 > o/p/1; rm -r o; echo 2 >> tree/d/file"}, .directory = dir.path()});
    watch->drain();
    EXPECT_EQ(dirty.rescan_reason(), "");
    EXPECT_TRUE(dirty.take().paths.contains("d/file"));
    ::umount2(at.c_str(), MNT_DETACH);
  }
}

TEST_F(Watching, WhatIsOutsideOrRemovedIsNoRescan) {
  ::chmod((dir.path() + "/elsewhere").c_str(), 0600);
  Fd held(::open((at + "/d").c_str(), O_RDONLY | O_CLOEXEC));
  run_ok({.argv = {"bash", "-c", "mkdir -p a/b/c; touch a/b/c/f; rm -rf a; rm -r d"}, .directory = at});
  watch->drain();
  EXPECT_EQ(dirty.rescan_reason(), "");
}

}  // namespace
}  // namespace rehome::track
