// A store's path that is not the store's directory: before its volume is mounted, or after somebody replaced it.
#include "track/root.h"

#include <sys/mount.h>
#include <sys/stat.h>

#include "track/two_modules.h"

namespace rehome {
namespace {

using testing::Files;
using track::RootId;

TEST(Root, IsTheDirectoryAndNotThePath) {
  TempDir dir;
  const std::string a = dir.path() + "/a", b = dir.path() + "/b";
  make_directories(a);
  RootId id = track::root_from(parse_json(track::to_json(track::root_at(a)).dump(), "root"));
  EXPECT_NO_THROW(track::require_root(a, id));
  ASSERT_EQ(::rename(a.c_str(), b.c_str()), 0);
  EXPECT_THROW(track::require_root(a, id), Error);
  make_directories(a);
  EXPECT_THROW(track::require_root(a, id), Error);
  EXPECT_NO_THROW(track::require_root(b, id));
  ASSERT_EQ(::mount(b.c_str(), a.c_str(), nullptr, MS_BIND | MS_RDONLY, nullptr), 0);
  EXPECT_NO_THROW(track::require_root(a, id));
  ::umount2(a.c_str(), MNT_DETACH);
}

TEST(Root, WithoutABirthTheFileSystemDecides) {
  RootId a{.ino = 7, .file_system = 1, .fsid = 5}, b = a;
  EXPECT_TRUE(same_root(a, b));
  b.fsid = 6;
  EXPECT_FALSE(same_root(a, b));
  b.fsid = 0;
  EXPECT_TRUE(same_root(a, b));
  a.born = b.born = 1;
  EXPECT_TRUE(same_root(a, b));
  b.born = 2;
  EXPECT_FALSE(same_root(a, b));
}

// Each tree on a volume of its own: a bind mount of a directory elsewhere.
class Volumes : public Files {
 protected:
  Volumes() {
    for (const auto& at : {from, to}) {
      make_directories(at, 0755);
      make_directories(at + "-volume", 0755);
      mount(at);
    }
  }
  void mount(const std::string& at) {
    ASSERT_EQ(::mount((at + "-volume").c_str(), at.c_str(), nullptr, MS_BIND, nullptr), 0) << at;
  }
  void unmount(const std::string& at) {
    while (::umount2(at.c_str(), MNT_DETACH) == 0) {
    }
  }
  std::string trouble() { return status().value("trouble", ""); }
};

TEST_F(Volumes, AServingSideWithoutItsVolumeRemovesNothingAtTheOther) {
  sh("mkdir d; echo 1 > d/1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  source.down();
  unmount(from);
  source.up(target);
  EXPECT_EQ(status()["state"], "waiting");
  EXPECT_EQ(status()["following"], true);
  EXPECT_NE(trouble().find("another directory"), std::string::npos) << trouble();
  EXPECT_THROW(flush(), Error);
  EXPECT_THROW(source.call("files.track", settings(from)), Error);
  system_clock().sleep(Millis(3500));
  EXPECT_EQ(read_file(to + "/d/1"), "1\n");
  mount(from);
  sh("echo 2 > d/2");
  wait([&] { return exists(to + "/d/2"); });
  EXPECT_EQ(trouble(), "");
  wait([&] { return status()["copied"] == true; });
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Volumes, AReceivingSideWithoutItsVolumeIsNotWritten) {
  sh("echo 1 > 1");
  begin();
  target.call("files.close", {{"store", "files"}});
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  target.down();
  unmount(to);
  target.up(source);
  sh("echo 2 > 2");
  EXPECT_THROW(flush(), Error);
  source.call("files.rescan", {{"store", "files"}});
  EXPECT_THROW(flush(), Error);
  wait([&] { return trouble().find("another directory") != std::string::npos; });
  EXPECT_THROW(target.call("files.receive", receive(to)), Error);
  EXPECT_TRUE(list_directory(to).empty());
  mount(to);
  wait([&] { return exists(to + "/2"); });
  EXPECT_NE(run({.argv = {"touch", to + "/x"}}).status, 0);
  wait([&] { return trouble().empty(); });
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, ADirectoryThatIsReplacedDuringTheRunIsToldAndNotSent) {
  sh("echo 1 > 1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  ASSERT_EQ(::rename(from.c_str(), (from + "-aside").c_str()), 0);
  make_directories(from, 0755);
  wait([&] { return status().contains("trouble"); });
  source.call("files.rescan", {{"store", "files"}});
  EXPECT_THROW(flush(), Error);
  EXPECT_EQ(read_file(to + "/1"), "1\n");
  ASSERT_EQ(::rmdir(from.c_str()), 0);
  ASSERT_EQ(::rename((from + "-aside").c_str(), from.c_str()), 0);
  wait([&] { return !status().contains("trouble"); });
  // The other side's.
  ASSERT_EQ(::rename(to.c_str(), (to + "-aside").c_str()), 0);
  sh("echo 2 > 2");
  wait([&] { return status().contains("trouble"); });
  EXPECT_THROW(target.call("files.receive", receive(to)), Error);
  EXPECT_FALSE(exists(to));
  ASSERT_EQ(::rename((to + "-aside").c_str(), to.c_str()), 0);
  wait([&] { return exists(to + "/2"); });
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Volumes, AVolumeThatIsMountedAgainWhileItIsFollowedIsReadAgain) {
  // Another instance of the file system: what is watched is not what the path shows.
  unmount(from);
  const std::string image = dir.path() + "/image";
  run_ok({.argv = {"bash", "-c", "truncate -s 8M " + image + " && mkfs.ext4 -q -F " + image + " && mount -o loop " + image + " " + from}});
  sh("echo 1 > 1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  run_ok({.argv = {"bash", "-c", "sync; cp " + image + " " + image + "2; umount -l " + from + "; mount -o loop " + image + "2 " + from}});
  sh("echo 2 > 2");
  wait([&] { return exists(to + "/2"); });
  wait([&] { return !status().contains("trouble"); });
  sh("echo 3 > 3");
  wait([&] { return exists(to + "/3"); });
  source.down();
  unmount(from);
}

TEST_F(Volumes, AReceivingVolumeThatIsMountedAgainIsTakenUpAgain) {
  unmount(to);
  std::string image = dir.path() + "/image";
  run_ok({.argv = {"bash", "-c", "truncate -s 8M " + image + " && mkfs.ext4 -q -F " + image + " && mount -o loop " + image + " " + to + " && rmdir " + to + "/lost+found"}});
  sh("echo 1 > 1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  wait([&] { return exists(to + "/1"); });
  for (const char* closed : {"", "closed"}) {
    if (*closed) target.call("files.close", {{"store", "files"}});
    run_ok({.argv = {"bash", "-c", "sync -f " + to + "; cp " + image + " " + image + "2"}});
    image += "2";
    unmount(to);
    sh(std::string("echo 2 > 2") + closed);
    EXPECT_THROW(flush(), Error);
    // Another instance of the same file system.
    run_ok({.argv = {"mount", "-o", "loop", image, to}});
    wait([&] { return exists(to + "/2" + closed); });
    wait([&] { return trouble().empty(); });
    EXPECT_EQ(run({.argv = {"touch", to + "/x"}}).ok(), !*closed);
    if (!*closed) run_ok({.argv = {"bash", "-c", "rm " + to + "/x; touch -r " + from + " " + to}});
    flush();
    EXPECT_EQ(differences(), "");
  }
  target.down();
  unmount(to);
}

}  // namespace
}  // namespace rehome
