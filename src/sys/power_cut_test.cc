// The layer itself: what it keeps, what it drops, and that durable writes need their fsyncs.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cstdlib>
#include <set>

#include "base/error.h"
#include "sys/fd.h"
#include "sys/fs.h"
#include "sys/testing/power_cut.h"

namespace rehome {
namespace {

using testing::PowerCut;

struct Place {
  TempDir dir;
  std::string at(const std::string& name) const { return dir.path() + "/" + name; }
};

void put(const std::string& path, const std::string& content, bool sync) {
  Fd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644));
  ASSERT_TRUE(fd);
  write_all(fd.get(), content, path);
  if (sync) {
    ASSERT_EQ(::fsync(fd.get()), 0);
  }
}

TEST(PowerCut, DropsWhatWasNotSynced) {
  Place p;
  put(p.at("old"), "old", false);
  PowerCut cut({p.dir.path()});
  put(p.at("old"), "newer", false);
  put(p.at("named"), "content", false);
  fsync_directory(p.dir.path());
  put(p.at("nameless"), "content", true);
  ASSERT_EQ(::mkdir(p.at("d").c_str(), 0755), 0);
  cut.crash();
  EXPECT_EQ(read_file(p.at("old")), "old");
  EXPECT_EQ(read_file(p.at("named")), "");
  EXPECT_EQ(list_directory(p.dir.path()), (std::vector<std::string>{"named", "old"}));
}

TEST(PowerCut, KeepsWhatWasSynced) {
  Place p;
  PowerCut cut({p.dir.path()});
  make_directories(p.at("d/e"), 0755);
  put(p.at("d/e/f"), std::string(100'000, 'x'), false);
  ASSERT_EQ(::link(p.at("d/e/f").c_str(), p.at("d/g").c_str()), 0);
  ASSERT_EQ(::symlink("d/g", p.at("s").c_str()), 0);
  ASSERT_EQ(::setxattr(p.at("d/g").c_str(), "user.k", "v", 1, 0), 0);
  Fd root(::open(p.dir.path().c_str(), O_RDONLY | O_DIRECTORY));
  ASSERT_EQ(::syncfs(root.get()), 0);
  put(p.at("d/e/f"), "later", false);
  cut.crash();
  EXPECT_EQ(read_file(p.at("s")), std::string(100'000, 'x'));
  struct stat a, b;
  ASSERT_EQ(::stat(p.at("d/e/f").c_str(), &a), 0);
  ASSERT_EQ(::stat(p.at("d/g").c_str(), &b), 0);
  EXPECT_EQ(a.st_ino, b.st_ino);
  char v;
  EXPECT_EQ(::getxattr(p.at("d/e/f").c_str(), "user.k", &v, 1), 1);
}

TEST(PowerCut, AnotherProcessIsSeenToo) {
  Place p;
  put(p.at("f"), "1", false);
  PowerCut cut({p.dir.path()});
  ASSERT_EQ(std::system(("echo 22 > " + p.at("f")).c_str()), 0);
  cut.crash();
  EXPECT_EQ(read_file(p.at("f")), "1");
}

TEST(PowerCut, AnInodeThatIsUsedAgainIsAnotherOne) {
  Place p;
  put(p.at("f"), "first", false);
  PowerCut cut({p.dir.path()});
  for (int i = 0; i < 20; i++) {
    ::unlink(p.at("f").c_str());
    put(p.at("f"), "second", false);
    fsync_directory(p.dir.path());
  }
  cut.crash();
  EXPECT_EQ(read_file(p.at("f")), "");
}

TEST(PowerCut, SyncedWritesCount) {
  Place p;
  put(p.at("f"), std::string(1000, '0'), false);
  PowerCut cut({p.dir.path()});
  Fd synced(::open(p.at("f").c_str(), O_RDWR | O_DSYNC)), plain(::open(p.at("f").c_str(), O_RDWR));
  ASSERT_EQ(::pwrite(plain.get(), "2", 1, 200), 1);
  ASSERT_EQ(::pwrite(synced.get(), "1", 1, 100), 1);
  cut.crash();
  std::string got = read_file(p.at("f"));
  EXPECT_EQ(got[100], '1');
  EXPECT_EQ(got[200], '0');
}

TEST(PowerCut, ASeedTears) {
  std::set<std::string> seen;
  for (unsigned seed = 1; seed <= 60; seed++) {
    Place p;
    put(p.at("f"), std::string(2000, 'a'), false);
    PowerCut cut({p.dir.path()});
    put(p.at("f"), std::string(2000, 'b'), false);
    cut.crash(seed);
    std::string got = read_file(p.at("f"));
    seen.insert(got);
    for (std::size_t i = 0; i < got.size(); i++) EXPECT_EQ(got[i], got[i / 512 * 512]);
  }
  EXPECT_GT(seen.size(), 10u);
}

// Old or new, whole, with the power failing in each call; new once it was answered.
void durable_write(bool lose, int* lost) {
  const std::string old(5000, 'o'), now(9000, 'n');
  std::uint64_t calls = 1;
  for (std::uint64_t k = 0; k <= calls; k++)
    for (unsigned seed = 0; seed < 20; seed++) {
      Place p;
      put(p.at("f"), old, false);
      PowerCut cut({p.dir.path()});
      cut.lose_syncs(lose);
      cut.fail_at(k);
      write_durably(p.at("f"), now);
      calls = cut.calls();
      cut.crash(seed);
      std::string got = read_file(p.at("f"));
      bool right = k >= calls ? got == now : got == old || got == now;
      *lost += !right;
    }
  EXPECT_GE(calls, 6u);
}

TEST(WriteDurably, IsOldOrNewAndThenNew) {
  int lost = 0;
  durable_write(false, &lost);
  EXPECT_EQ(lost, 0);
  durable_write(true, &lost);
  EXPECT_GT(lost, 0);
}

}  // namespace
}  // namespace rehome
