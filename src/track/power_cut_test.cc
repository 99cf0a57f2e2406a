// The other side loses its power after files.flush has answered, or the copy was done: rsync finds no difference afterwards.
#include <sys/stat.h>

#include "sys/testing/power_cut.h"
#include "track/two_modules.h"

namespace rehome {
namespace {

using testing::Files;
using testing::PowerCut;

class PowerCutFiles : public Files {
 protected:
  // The other host goes and comes back; its directory holds what its disk held.
  void crash(unsigned seed = 0) {
    target.down();
    while (::umount2(to.c_str(), MNT_DETACH) == 0) {
    }
    cut->crash(seed);
    target.up(source);
  }
  void copied() {
    make_directories(to, 0755);
    cut.emplace(std::vector<std::string>{to});
    begin();
  }
  // A tree with something of every kind.
  void plant() {
    sh("mkdir -p a/b c/d gone/deep keep; for i in $(seq 40); do echo $i > a/b/$i; done; echo one > one; ln one c/two; ln one c/d/three;"
       "truncate -s 3M sparse; echo x | dd of=sparse bs=1 seek=1000000 conv=notrunc status=none; head -c 5000000 /dev/urandom > big;"
       "ln -s a/b/1 soft; mkfifo pipe; setfattr -n user.k -v 1 a/b/2; setfacl -m u:33:r a/b/3; chown -R 33:33 a; chmod 711 keep;"
       "echo 1 > gone/deep/1; echo 2 > gone/2; touch -d 2001-01-01 a c/d keep");
  }
  void change() {
    sh("echo new > a/new; echo more >> a/b/7; echo other > a/b/8; mv a/b/9 c/nine; rm a/b/10; rm -r gone; ln a/b/11 c/eleven; rm c/two;"
       "dd if=/dev/urandom of=big bs=1000 seek=2000 count=3 conv=notrunc status=none; truncate -s 100 a/b/12;"
       "echo y | dd of=sparse bs=1 seek=2000000 conv=notrunc status=none; setfattr -n user.k -v 2 a/b/2; setfattr -n user.l -v 3 keep;"
       "setfacl -m u:33:rw a/b/3; chmod 700 keep; ln -sfn a/b/2 soft; rm pipe; mkdir pipe; echo in > pipe/in; mkdir -p n/e/s/t;"
       "echo t > n/e/s/t/f; chown 7:7 n/e; head -c 1000000 /dev/urandom > n/blob; mv c/d keep/moved; touch -d 2002-02-02 n a");
  }
  std::optional<PowerCut> cut;
};

TEST_F(PowerCutFiles, WhatAFinalPassHasAnsweredIsThere) {
  for (unsigned seed : {0u, 1u, 2u}) {
    if (seed != 0) {
      cut.reset();
      source.call("files.untrack", {{"store", "files"}});
      for (auto* side : {&source, &target}) side->call("files.forget", {{"store", "files"}});
      run_ok({.argv = {"rm", "-rf", to}});
      sh("rm -rf ./*");
    }
    plant();
    copied();
    change();
    flush();
    crash(seed);
    EXPECT_EQ(differences(), "") << "seed " << seed;
    // And it goes on.
    sh("echo later > later");
    flush();
    EXPECT_EQ(differences(), "");
  }
}

TEST_F(PowerCutFiles, ACopyIsDurableBeforeItCountsAsDone) {
  plant();
  copied();
  crash();
  EXPECT_EQ(differences(), "");
}

TEST_F(PowerCutFiles, ARescanIsDurableToo) {
  plant();
  copied();
  source.call("files.rescan", {{"store", "files"}, {"reason", "the kernel's event queue overflowed"}});
  change();
  EXPECT_EQ(flush()["rescanned"], true);
  crash();
  EXPECT_EQ(differences(), "");
}

TEST_F(PowerCutFiles, AClosedTreeToo) {
  plant();
  copied();
  target.call("files.close", {{"store", "files"}});
  change();
  flush();
  crash();
  EXPECT_EQ(differences(), "");
}

TEST_F(PowerCutFiles, DirectoriesThatAreRenamedOneInAnother) {
  sh("mkdir -p a/b/c; for i in $(seq 5); do echo $i > a/b/c/$i; head -c 300000 /dev/urandom > a/b/big$i; done; mkdir x");
  copied();
  sh("mv a/b/c/1 a/b/one; mv a/b/big1 a/b/c/big; mv a/b/c a/c; echo 22 > a/c/2; mv a/b x/b; mv x y; mv y/b/big2 y/two; mv a z; rm z/c/3");
  flush();
  crash();
  EXPECT_EQ(differences(), "");
}

TEST_F(PowerCutFiles, MoreThanAreSyncedOneByOne) {
  sh("mkdir d; for i in $(seq 1010); do echo $i > d/$i; done");
  copied();
  sh("for i in $(seq 1010); do echo more >> d/$i; done; mkdir e; mv d/[1-9] e");
  flush();
  crash();
  EXPECT_EQ(differences(), "");
}

// Random changes in many passes, followed in the background, with the power failing after each final one.
TEST_F(PowerCutFiles, ManyPasses) {
  plant();
  copied();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 20}});
  for (unsigned seed = 1; seed <= 5 && !HasFailure(); seed++) {
    sh("RANDOM=" + std::to_string(seed) + R"(; for i in $(seq 30); do f=$(find . -mindepth 1 | shuf -n1 --random-source=<(yes $RANDOM)) d=$(find . -type d | shuf -n1 --random-source=<(yes $RANDOM))
      case $((RANDOM % 8)) in
        0) [ -f "$f" ] && echo "$i" >> "$f" || true ;;
        1) echo $i > "$d/n$seed$RANDOM" ;;
        2) mkdir -p "$d/d$RANDOM" ;;
        3) mv "$f" "$d/m$RANDOM" 2>/dev/null || true ;;
        4) [ -f "$f" ] && ln "$f" "$d/l$RANDOM" || true ;;
        5) [ $((RANDOM % 4)) = 0 ] && rm -rf "$f" || true ;;
        6) [ -f "$f" ] && head -c $((RANDOM * 20)) /dev/urandom > "$f" || true ;;
        7) chmod $((RANDOM % 2))75$((RANDOM % 8)) "$f" 2>/dev/null || true ;;
      esac; done)");
    flush();
    crash(seed % 3 ? seed : 0);
    EXPECT_EQ(differences(), "") << "pass " << seed;
  }
}

// The judge itself: without fsync all of this must fail.
TEST_F(PowerCutFiles, WithoutSyncsItIsLost) {
  plant();
  copied();
  cut->lose_syncs(true);
  change();
  flush();
  crash();
  EXPECT_NE(differences(), "");
}

TEST_F(PowerCutFiles, WithoutSyncsACopyIsLost) {
  plant();
  make_directories(to, 0755);
  cut.emplace(std::vector<std::string>{to});
  cut->lose_syncs(true);
  begin();
  crash();
  EXPECT_NE(differences(), "");
}

}  // namespace
}  // namespace rehome
