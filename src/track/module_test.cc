// The module as a store driver asks for it. rsync is the real one, and its shim is this test's own binary.
#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "track/two_modules.h"

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "rsync-shim") {
    try {
      return rehome::track::rsync_shim(std::vector<std::string>(argv + 2, argv + argc));
    } catch (const std::exception& e) {
      std::fprintf(stderr, "rsync-shim: %s\n", e.what());
      return 12;
    }
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}

namespace rehome {
namespace {

using testing::Files;

TEST_F(Files, CopyFollowFlush) {
  sh("mkdir -p a/b; for i in $(seq 200); do echo $i > a/b/$i; done; ln a/b/1 a/one; truncate -s 10M sparse; chown -R 33:33 a");
  begin();
  EXPECT_EQ(differences(), "");
  sh("echo more >> a/b/7; rm a/b/8; mv a/b a/c");
  Json f = flush();
  EXPECT_GT(f["files"].get<int>(), 2);
  EXPECT_EQ(f["rescanned"], false);
  EXPECT_EQ(differences(), "");
  f = flush();
  EXPECT_EQ(f["files"], 0);
  EXPECT_EQ(f["bytes"], 0);
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  sh("echo x > followed");
  wait([&] { return exists(to + "/followed"); });
  wait([&] { return status()["dirty"] == 0; });
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, FilesOfSeveralNamesOutsideAreNoChange) {
  sh("echo 1 > 1; mkdir ../out; echo 1 > ../out/a; ln ../out/a ../out/b; ln 1 ../out/1");
  begin();
  flush();
  auto settled = [&] { return source.call("files.status", {{"store", "files"}, {"settle", true}}); };
  sh("echo 2 >> ../out/a");
  // Others on this file system may have such files too.
  EXPECT_GE(status()["dirty"], 1);
  wait([&] { return settled()["dirty"] == 0; });
  sh("echo 2 >> ../out/1");
  EXPECT_GE(settled()["dirty"], 1) << "it has a name in the tree";
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, ChangesDuringTheCopyAreNotLost) {
  sh("mkdir d; for i in $(seq 2000); do echo $i > d/$i; done");
  source.call("files.track", settings(from));
  target.call("files.receive", receive(to));
  source.call("files.copy", {{"store", "files"}});
  for (int i = 0; i < 20; i++) sh("echo changed" + std::to_string(i) + " >> d/" + std::to_string(1 + i * 90) + "; mv d/" + std::to_string(2 + i * 90) + " d/m" + std::to_string(i));
  wait([&] { return status()["copied"] == true; });
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, AnOverflowIsARescan) {
  sh("echo 1 > 1");
  begin();
  // What the tracker is told when the kernel's queue overflowed.
  source.call("files.rescan", {{"store", "files"}, {"reason", "the kernel's event queue overflowed"}});
  EXPECT_EQ(status()["state"], "rescan");
  sh("echo 2 > 2; rm 1");
  Json f = flush();
  EXPECT_EQ(f["rescanned"], true);
  EXPECT_EQ(status()["state"], "tracking");
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, ARestartedAgentRescansAndFollowsAgain) {
  sh("mkdir d; echo 1 > d/1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 100}});
  source.down();
  sh("echo unseen >> d/1; echo 2 > d/2; mkdir e; ln d/2 e/2");
  source.up(target);
  wait([&] { return status()["state"] == "tracking" && status()["rescans"].get<int>() + status()["copied"].get<bool>() > 0 && exists(to + "/e/2"); });
  flush();
  EXPECT_EQ(differences(), "");
}

TEST_F(Files, ALostLinkIsTriedAgain) {
  sh("echo 1 > 1");
  begin();
  source.cut_ = true;
  target.down();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  sh("echo 2 > 2");
  wait([&] { return status().contains("trouble"); });
  target.up(source);
  source.cut_ = false;
  wait([&] { return exists(to + "/2"); });
  flush();
  EXPECT_EQ(differences(), "");
}

// Another process that has a file mapped or open and writes into it, without an event, when it is told: our own is not looked at,
// since it is the agent.
class Mapper {
 public:
  enum class By { memory, libaio };
  explicit Mapper(const std::string& file, By by = By::memory) {
    int ready[2], go[2];
    EXPECT_EQ(::pipe(ready), 0);
    EXPECT_EQ(::pipe(go), 0);
    pid = ::fork();
    if (pid == 0) {
      // Or it would not see the end of its own pipe.
      ::close(go[1]);
      int fd = ::open(file.c_str(), O_RDWR);
      if (by == By::libaio) submit(fd, ready[1], go[0]);
      auto* m = static_cast<char*>(::mmap(nullptr, 1000000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
      ::close(fd);
      m[10] = 'x';
      for (char c = 0; ::write(ready[1], &c, 1) == 1 && ::read(go[0], &c, 1) == 1 && c;) m[500000] = c;
      ::_exit(0);
    }
    ready_ = Fd(ready[0]);
    go_ = Fd(go[1]);
    ::close(ready[1]);
    ::close(go[0]);
    char c;
    EXPECT_EQ(::read(ready_.get(), &c, 1), 1);
  }
  void write(char c) {
    EXPECT_EQ(::write(go_.get(), &c, 1), 1);
    EXPECT_EQ(::read(ready_.get(), &c, 1), 1);
  }
  ~Mapper() {
    go_.reset();
    ::waitpid(pid, nullptr, 0);
  }
  pid_t pid;

 private:
  [[noreturn]] static void submit(int fd, int ready, int go) {
    aio_context_t context = 0;
    if (::syscall(SYS_io_setup, 1, &context) != 0) ::_exit(1);
    for (char c = 0; ::write(ready, &c, 1) == 1 && ::read(go, &c, 1) == 1 && c;) {
      iocb one{};
      one.aio_lio_opcode = IOCB_CMD_PWRITE;
      one.aio_fildes = static_cast<std::uint32_t>(fd);
      one.aio_buf = reinterpret_cast<std::uint64_t>(&c);
      one.aio_nbytes = 1;
      one.aio_offset = 500000;
      iocb* all[] = {&one};
      io_event done;
      if (::syscall(SYS_io_submit, context, 1, all) != 1 || ::syscall(SYS_io_getevents, context, 1, 1, &done, nullptr) != 1 || done.res != 1) ::_exit(1);
    }
    ::_exit(0);
  }
  Fd ready_, go_;
};

TEST_F(Files, MappedWritesAreSentAtTheEnd) {
  sh("head -c 1000000 /dev/zero > mapped");
  begin();
  Mapper mapper(from + "/mapped");
  flush(false);
  mapper.write('y');
  Json writers = source.call("files.writers", {{"store", "files"}});
  ASSERT_EQ(writers["writers"].size(), 1u) << writers.dump();
  EXPECT_EQ(writers["writers"][0]["pid"], mapper.pid);
  EXPECT_EQ(writers["writers"][0]["mapped"], true);
  EXPECT_EQ(source.call("files.writers", {{"store", "files"}, {"pids", {mapper.pid}}})["writers"].size(), 0u);
  flush();
  EXPECT_EQ(differences(), "");
}

// What MariaDB and qemu write by, in files that they keep open.
TEST_F(Files, WritesByLibaioAreSent) {
  sh("head -c 1000000 /dev/zero > pages; head -c 1000000 /dev/zero > still; touch -d '1 hour ago' still");
  begin();
  Mapper writer(from + "/pages", Mapper::By::libaio), idle(from + "/still", Mapper::By::libaio);
  flush(false);
  for (char c : {'x', 'y', 'z'}) {
    writer.write(c);
    // Not so late that its time alone would tell it from the write before.
    Json f = flush();
    EXPECT_EQ(differences(), "") << c;
    EXPECT_GE(f["files"], 1) << c;
    EXPECT_LE(f["files"], 2) << c;
  }
  writer.write('l');
  system_clock().sleep(Millis(100));
  flush(false);
  EXPECT_EQ(differences(), "");
  system_clock().sleep(Millis(100));
  flush(false);
  EXPECT_EQ(flush()["files"], 0) << "what nobody has written is sent";
}

// rsync believes size and time: neither tells of a write through memory.
TEST_F(Files, MappedWritesAreSentAtTheEndOfARescanToo) {
  sh("head -c 1000000 /dev/zero > mapped; echo 1 > open");
  begin();
  Mapper mapper(from + "/mapped");
  flush();
  mapper.write('y');
  sh("touch -r " + to + "/mapped mapped");
  source.call("files.rescan", {{"store", "files"}});
  Json f = flush();
  EXPECT_EQ(f["rescanned"], true);
  ASSERT_EQ(f["writers"].size(), 1u) << f.dump();
  EXPECT_EQ(run({.argv = {"cmp", from + "/mapped", to + "/mapped"}}).status, 0);
}

// A file system that can only be read whole: overlay tells no changes by handle. Its files have other devices than its
// directories, too.
TEST_F(Files, WithoutAWatchTheLastPassLooksForWritersAndMappings) {
  const std::string base = dir.path();
  run_ok({.argv = {"bash", "-c", "mkdir " + base + "/low " + base + "/up; mount -t tmpfs t " + base + "/low; mount -t tmpfs t " + base +
                                     "/up; mkdir " + base + "/up/u " + base + "/up/w; head -c 1000000 /dev/zero > " + base +
                                     "/low/mapped; echo 1 > " + base + "/low/open; mount -t overlay o " + from + " -o lowerdir=" + base +
                                     "/low,upperdir=" + base + "/up/u,workdir=" + base + "/up/w"}});
  begin();
  ASSERT_EQ(status()["tracking"], false) << status().dump(1);
  {
    Mapper mapper(from + "/mapped");
    Child writer({.argv = {"bash", "-c", "exec 3>>open; sleep 60"}, .directory = from}, {});
    wait([&] { return source.call("files.writers", {{"store", "files"}})["writers"].size() == 2; });
    flush();
    mapper.write('y');
    sh("touch -r " + to + "/mapped mapped");
    Json f = flush();
    EXPECT_EQ(f["writers"].size(), 2u) << f.dump();
    EXPECT_EQ(run({.argv = {"cmp", from + "/mapped", to + "/mapped"}}).status, 0);
  }
  source.down();
  for (const auto& at : {from, base + "/low", base + "/up"}) ::umount2(at.c_str(), MNT_DETACH);
}

TEST_F(Files, AClosedTreeIsWrittenByUsOnly) {
  sh("echo 1 > 1");
  begin();
  EXPECT_EQ(target.call("files.close", {{"store", "files"}})["closed"], true);
  EXPECT_NE(::open((to + "/x").c_str(), O_WRONLY | O_CREAT, 0644) >= 0, true);
  EXPECT_EQ(errno, EROFS);
  sh("echo 2 > 2; echo 11 > 1");
  flush();
  EXPECT_EQ(differences(), "");
  target.down();
  ::umount2(to.c_str(), MNT_DETACH);  // as a reboot does
  target.up(source);
  EXPECT_LT(::open((to + "/x").c_str(), O_WRONLY | O_CREAT, 0644), 0);
  sh("echo 3 > 3");
  flush();
  EXPECT_EQ(differences(), "");
  target.down();  // and with the mount still there
  target.up(source);
  source.call("files.rescan", {{"store", "files"}});
  sh("echo 4 > 4");
  flush();
  EXPECT_EQ(differences(), "");
  target.call("files.open", {{"store", "files"}});
  target.call("files.open", {{"store", "files"}});
  Fd fd(::open((to + "/mine").c_str(), O_WRONLY | O_CREAT, 0644));
  EXPECT_TRUE(fd);
}

TEST_F(Files, TheFirstCopyGoesIntoAClosedTree) {
  sh("mkdir d; echo 1 > d/1; ln d/1 2");
  source.call("files.track", settings(from));
  target.call("files.receive", settings(to));
  target.call("files.close", {{"store", "files"}});
  source.call("files.copy", {{"store", "files"}});
  wait([&] { return status()["copied"] == true; });
  EXPECT_EQ(differences(), "");
}

// The status of the rsync that writes decides, not that of the one that sends.
TEST_F(Files, ACopyThatTheOtherSideCouldNotWriteIsNotDone) {
  sh("mkdir d; echo 1 > d/1");
  make_directories(to);
  ASSERT_EQ(::mount("tmpfs", to.c_str(), "tmpfs", 0, "size=64k"), 0);
  sh("head -c 300000 /dev/urandom > big");
  source.call("files.track", settings(from));
  target.call("files.receive", receive(to));
  source.call("files.copy", {{"store", "files"}});
  wait([&] { return status().contains("trouble"); });
  EXPECT_EQ(status()["copied"], false);
  EXPECT_THROW(flush(), Error);
}

TEST_F(Files, TheOtherWayRound) {
  sh("mkdir d; echo 1 > d/1");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 50}});
  target.call("files.close", {{"store", "files"}});
  // Prepared before the pause, armed in it.
  target.call("files.track", settings(to));
  source.call("files.receive", settings(from));
  sh("echo 2 > d/2");
  flush();
  target.call("files.arm", {{"store", "files"}});
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 0}});
  source.call("files.untrack", {{"store", "files"}});
  target.call("files.open", {{"store", "files"}});
  source.call("files.close", {{"store", "files"}});
  EXPECT_EQ(run({.argv = {"bash", "-c", "echo new >> d/1; mv d e; ln e/2 two"}, .directory = to}).status, 0);
  Json was = target.call("files.status", {{"store", "files"}});
  Json f = target.call("files.flush", {{"store", "files"}, {"final", true}});
  EXPECT_EQ(f["rescanned"], false) << was.dump(1);
  EXPECT_EQ(differences(to, from), "");
  // A side that is in use is not written from the other, whatever that one believes.
  source.call("files.open", {{"store", "files"}});
  sh("echo mine > e/1");
  EXPECT_EQ(run({.argv = {"bash", "-c", "echo theirs > e/1"}, .directory = to}).status, 0);
  EXPECT_THROW(target.call("files.flush", {{"store", "files"}, {"final", true}}), Error);
  target.call("files.rescan", {{"store", "files"}});
  EXPECT_THROW(target.call("files.flush", {{"store", "files"}, {"final", true}}), Error);
  EXPECT_EQ(read_file(from + "/e/1"), "mine\n");
}

TEST_F(Files, CompareFindsWhatDiffers) {
  sh("mkdir -p d/e; for i in $(seq 500); do echo $i > d/e/$i; done; ln d/e/1 d/one; ln d/e/2 d/two; setfacl -m u:7:r d/e/3; chown 33:33 d/e/4");
  begin();
  Json c = source.call("files.compare", {{"store", "files"}});
  EXPECT_EQ(c["equal"], true) << c.dump(1);
  EXPECT_EQ(c["entries"], 505);
  // Behind our back: no event of the source tells of it.
  run_ok({.argv = {"bash", "-c", "cd d/e; cp -p 5 x; echo Z > x; touch -r 5 x; cat x > 5; rm x; touch -r 6 5; chmod 600 7; rm 8; echo > extra; touch -d 2001-01-01 9; rm ../one; cp -p 1 ../one"}, .directory = to});
  c = source.call("files.compare", {{"store", "files"}});
  EXPECT_EQ(c["equal"], false);
  std::set<std::string> paths;
  for (const auto& d : c["differences"]) paths.insert(d["path"].get<std::string>());
  for (const char* p : {"d/e/5", "d/e/7", "d/e/8", "d/e/9", "d/e/extra"}) EXPECT_TRUE(paths.contains(p)) << p;
  EXPECT_FALSE(paths.contains("d/e/10"));
}

TEST_F(Files, CompareFindsLostLinks) {
  sh("echo 1 > 1; ln 1 2; touch -d 2001-01-01 .");
  begin();
  run_ok({.argv = {"bash", "-c", "rm 2; cp -p 1 2; touch -d 2001-01-01 ."}, .directory = to});
  Json c = source.call("files.compare", {{"store", "files"}});
  ASSERT_EQ(c["differences"].size(), 1u) << c.dump(1);
  EXPECT_EQ(c["differences"][0]["what"], "its hard links are not the same");
}

TEST_F(Files, CompareOfATreeInUse) {
  sh("for i in $(seq 300); do echo $i > $i; done");
  begin();
  source.call("files.follow", {{"store", "files"}, {"interval_ms", 20}});
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (int i = 0; !stop; i++) {
      std::string p = from + "/" + std::to_string(1 + i % 300);
      Fd fd(::open(p.c_str(), O_WRONLY | O_APPEND));
      (void)!::write(fd.get(), "x", 1);
      system_clock().sleep(Millis(1));
    }
  });
  Json c = source.call("files.compare", {{"store", "files"}});
  stop = true;
  writer.join();
  EXPECT_EQ(c["equal"], true) << c.dump(1);
}

// What is left of a pass that was given up must not be written after the next one has begun.
TEST_F(Files, AnEarlierStreamEndsBeforeTheNextBegins) {
  begin();
  flush();
  Fd earlier = source.open_peer({{"op", "files.apply"}, {"store", "files"}}, Deadline::in(Millis(5000)));
  sh("echo 1 > new");
  flush();
  EXPECT_EQ(differences(), "");
  char c;
  pollfd p{earlier.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&p, 1, 5000), 1);
  EXPECT_EQ(::read(earlier.get(), &c, 1), 0);
}

TEST_F(Files, OnlyWhatIsRegisteredIsWritten) {
  EXPECT_THROW(target.call("files.rsync_server", {{"store", "none"}, {"argv", {"rsync", "--server", "-a", ".", "./"}}}), Error);
  begin();
  for (std::vector<std::string> argv : {std::vector<std::string>{"rsync", "--server", "-a", ".", "/etc"},
                                        {"rsync", "--server", "--sender", "-a", ".", "./"},
                                        {"rsync", "--server", "--log-file=/x", "-a", ".", "./"},
                                        {"rsync", "--server", "-a", "--temp-dir", "/x", ".", "./"},
                                        {"sh", "-c", "true", ".", "./"}})
    EXPECT_THROW(target.call("files.rsync_server", {{"store", "files"}, {"argv", argv}}), Error) << argv[2];
}

TEST_F(Files, ProbeSaysWhatIsThere) {
  sh("mkdir d; echo hello > d/f; ln d/f g; setfattr -n user.x -v 1 d; setfacl -m u:33:r g; chown 33:54321 d");
  Json a = settings(from);
  a["count"] = true;
  a["attributes"] = true;
  auto times = [&] { return run({.argv = {"stat", "-c", "%y %z", from}}).out; };
  const std::string before = times();
  Json p = source.call("files.probe", a);
  EXPECT_EQ(p["files"], 3);
  EXPECT_EQ(p["linked"], 2);
  EXPECT_EQ(p["empty"], false);
  EXPECT_EQ(p["has_xattrs"], true);
  EXPECT_EQ(p["has_acls"], true);
  EXPECT_EQ(p["watch_obstacle"], "");
  EXPECT_EQ(p["users"], Json::array({"www-data"}));
  EXPECT_EQ(p["unnamed_groups"], Json::array({54321}));
  // Asking leaves nothing, not even in the directory's times.
  EXPECT_EQ(times(), before);
}

}  // namespace
}  // namespace rehome
