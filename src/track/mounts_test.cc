// Closing, opening and the private mount, as root, where a path has a symbolic link in it.
#include "track/mounts.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include "base/error.h"
#include "sys/fs.h"
#include "track/two_modules.h"

namespace rehome::track {
namespace {

bool can_write(const std::string& directory) {
  const std::string file = directory + "/written";
  Fd fd(::open(file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  return static_cast<bool>(fd);
}

class Mounts : public ::testing::Test {
 protected:
  Mounts() {
    make_directories(real + "/in");
    EXPECT_EQ(::symlink(real.c_str(), link.c_str()), 0);
  }
  ~Mounts() override {
    for (const auto& m : mounts_below(resolve_path(dir.path()))) ::umount2(m.point.c_str(), MNT_DETACH);
  }
  TempDir dir;
  std::string real = dir.path() + "/real", link = dir.path() + "/link";
};

TEST_F(Mounts, PathsAreResolvedAsFarAsTheyExist) {
  std::string base = resolve_path(dir.path());
  EXPECT_EQ(resolve_path(link + "/in/"), base + "/real/in");
  EXPECT_EQ(resolve_path(link + "/new/deep/"), base + "/real/new/deep");
  EXPECT_EQ(resolve_path("/"), "/");
  EXPECT_EQ(resolve_path("/no-such-thing-here"), "/no-such-thing-here");
}

TEST_F(Mounts, ATreeThatIsReachedByALinkIsClosedAndOpenedAgain) {
  close_tree(link);
  EXPECT_TRUE(is_closed(link));
  EXPECT_TRUE(is_closed(real));
  EXPECT_FALSE(can_write(real));
  close_tree(link);
  open_tree(link);
  EXPECT_FALSE(is_closed(real));
  EXPECT_TRUE(can_write(link));
  EXPECT_TRUE(mounts_below(resolve_path(dir.path())).empty());
}

TEST_F(Mounts, ATreeThatStaysReadOnlyIsNotCalledOpen) {
  ASSERT_EQ(::mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=64k"), 0);
  make_directories(real + "/in");
  ASSERT_EQ(::mount(nullptr, dir.path().c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr), 0);
  EXPECT_THROW(open_tree(real + "/in"), Error);
  ::umount2(dir.path().c_str(), MNT_DETACH);
  EXPECT_NO_THROW(open_tree(dir.path() + "/gone"));
}

TEST_F(Mounts, EveryMountAtThePrivatePlaceIsTakenAway) {
  const std::string place = resolve_path(dir.path()) + "/place";
  make_directories(place);
  for (int i = 0; i < 3; i++) ASSERT_EQ(::mount(real.c_str(), place.c_str(), nullptr, MS_BIND, nullptr), 0);
  EXPECT_THROW(remove_tree(dir.path()), Error);
  {
    WritableRoot root(real, place);
    EXPECT_THROW(remove_tree(dir.path()), Error);
  }
  EXPECT_FALSE(exists(place));
  unmount_all(place);
}

// The agents' STATE and both trees by way of links.
class LinkedFiles : public testing::Files {
 protected:
  LinkedFiles() {
    const std::string moved = dir.path() + "/moved-state";
    target.down();
    EXPECT_EQ(::rename(target.state().c_str(), moved.c_str()), 0);
    EXPECT_EQ(::symlink(moved.c_str(), target.state().c_str()), 0);
    make_directories(dir.path() + "/real-to");
    EXPECT_EQ(::symlink((dir.path() + "/real-to").c_str(), to.c_str()), 0);
    target.up(source);
  }
  std::size_t private_mounts() {
    std::size_t n = 0;
    for (const auto& m : read_mounts()) n += m.point.starts_with(resolve_path(dir.path())) && m.point.ends_with("/run/tree-files");
    return n;
  }
};

TEST_F(LinkedFiles, ALeftoverMountIsReplacedAndForgetTakesItAway) {
  sh("echo 1 > 1");
  begin();
  target.call("files.close", {{"store", "files"}});
  EXPECT_FALSE(can_write(to));
  EXPECT_EQ(private_mounts(), 1u);
  target.down();
  // What a killed agent leaves.
  ASSERT_EQ(::mkdir((target.state() + "/run/tree-files").c_str(), 0700), 0);
  ASSERT_EQ(::mount(to.c_str(), (target.state() + "/run/tree-files").c_str(), nullptr, MS_BIND, nullptr), 0);
  target.up(source);
  EXPECT_EQ(private_mounts(), 1u);
  EXPECT_FALSE(target.call("files.mounts")["below_state"].empty());
  sh("echo 2 > 2");
  flush();
  EXPECT_EQ(read_file(to + "/2"), "2\n");
  target.call("files.open", {{"store", "files"}});
  EXPECT_TRUE(can_write(to));
  target.call("files.forget", {{"store", "files"}});
  EXPECT_EQ(private_mounts(), 0u);
  EXPECT_TRUE(target.call("files.mounts")["below_state"].empty());
}

TEST_F(LinkedFiles, AMountInsideIsNamedAsTheAskerNamesTheTree) {
  make_directories(to + "/sub");
  ASSERT_EQ(::mount("tmpfs", (to + "/sub").c_str(), "tmpfs", 0, "size=64k"), 0);
  Json p = target.call("files.probe", {{"path", to}});
  EXPECT_EQ(p["mounts_below"], Json::array({to + "/sub"}));
  ::umount2((to + "/sub").c_str(), MNT_DETACH);
}

}  // namespace
}  // namespace rehome::track
