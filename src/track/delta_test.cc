// The tracker, the delta and its receiver over a socket pair, judged by rsync: after a flush,
// `rsync -aHAXc --delete -ni SRC/ DST/` prints nothing.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/xattr.h>

#include <cstdlib>
#include <functional>
#include <random>
#include <thread>

#include "base/error.h"
#include "sys/fs.h"
#include "sys/process.h"
#include "track/delta.h"
#include "track/watch.h"

namespace rehome::track {
namespace {

Fd open_root(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  EXPECT_TRUE(fd) << path;
  return fd;
}

std::string oracle(const std::string& from, const std::string& to, std::vector<std::string> more = {}) {
  std::vector<std::string> argv{"rsync", "-aHAXc", "--delete", "-ni", "--modify-window=-1"};
  argv.insert(argv.end(), more.begin(), more.end());
  argv.push_back(from + "/");
  argv.push_back(to + "/");
  Outcome o = run({.argv = argv});
  return o.out + o.err;
}

// Two trees, a watch on the first, and the way from one to the other.
class Pair {
 public:
  explicit Pair(std::vector<std::string> include = {}, std::vector<std::string> exclude = {})
      : dir(), filter(include, exclude) {
    make_directories(from());
    make_directories(to());
    source.emplace(open_root(from()), from());
    target.emplace(open_root(to()), to());
    links.emplace(*source, filter);
    sender.emplace(*source, filter, *links, accounts);
  }
  ~Pair() {
    watch.reset();
    disconnect();
  }
  std::string from() const { return dir.path() + "/from"; }
  std::string to() const { return dir.path() + "/to"; }
  void start() {
    watch.emplace(*source, filter, dirty, &*links);
    dirty.add("", why_attributes);  // both roots were made just now, not copied
    std::atomic<bool> stop{false};
    links->build(stop);
  }
  void connect() {
    int s[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
    ours = Fd(s[0]);
    theirs = Fd(s[1]);
    channel.emplace(ours.get());
    sender->forget_names();
    stop = false;
    thread = std::thread([this] {
      Receiver receiver(*target, filter, accounts, {});
      Channel c(theirs.get());
      try {
        receiver.serve(c, stop);
      } catch (const Error& e) {
        ADD_FAILURE() << e.what();
      }
    });
  }
  void disconnect() {
    if (!thread.joinable()) return;
    stop = true;
    ours.reset();
    thread.join();
  }
  Sent flush() {
    if (!thread.joinable()) connect();
    Sent last;
    for (int i = 0; i < 8; i++) {
      watch->drain();
      Dirty now = dirty.take();
      if (now.rescan) {
        ADD_FAILURE() << "a rescan is asked for: " << now.reason;
        return last;
      }
      last = sender->send(*channel, std::move(now), dirty, {.durable = true, .deadline = Deadline::in(Millis(60000))});
      if (dirty.empty()) break;
    }
    EXPECT_TRUE(dirty.empty());
    for (const auto& [path, why] : last.failed) ADD_FAILURE() << path << ": " << why;
    return last;
  }
  std::string differences() { return oracle(from(), to()); }

  TempDir dir;
  Filter filter;
  Accounts accounts;
  DirtySet dirty;
  std::optional<Tree> source, target;
  std::optional<LinkIndex> links;
  std::optional<Sender> sender;
  std::optional<Watch> watch;
  Fd ours, theirs;
  std::optional<Channel> channel;
  std::atomic<bool> stop{false};
  std::thread thread;
};

void sh(const std::string& directory, const std::string& script) {
  Outcome o = run({.argv = {"bash", "-c", "set -e; " + script}, .directory = directory});
  ASSERT_TRUE(o.ok()) << script << "\n" << o.err;
}

// Does `script` in the source after `before` was synchronised, and expects the trees to be equal.
void expect_followed(const std::string& before, const std::string& script) {
  Pair p;
  p.start();
  sh(p.from(), before);
  p.flush();
  EXPECT_EQ(p.differences(), "") << "before: " << before;
  sh(p.from(), script);
  p.flush();
  EXPECT_EQ(p.differences(), "") << script;
}

TEST(Delta, NothingDirtySendsNothing) {
  Pair p;
  p.start();
  sh(p.from(), "echo a > a");
  EXPECT_GT(p.flush().bytes, 0);
  Sent again = p.flush();
  EXPECT_EQ(again.bytes, 0);
  EXPECT_EQ(again.files, 0);
}

TEST(Delta, ContentAndNames) {
  expect_followed("echo a > a; mkdir -p d/e; echo b > d/e/b", "echo c >> a; truncate -s 1 d/e/b; echo n > d/n; rm -f x; mkdir f; echo 1 > f/1");
  expect_followed("mkdir -p d/e/f; echo 1 > d/e/f/1; echo 2 > d/2", "mv d g; echo 3 > g/e/3; mkdir d; echo 4 > d/2");
  expect_followed("mkdir -p d/e; echo 1 > d/e/1; echo x > x", "rm -rf d; echo file > d; rm x; mkdir x; echo in > x/in");
  expect_followed("mkdir a b; echo 1 > a/1; echo 2 > b/1", "mv a t; mv b a; mv t b");
  expect_followed("mkdir -p a/b; echo 1 > a/b/1; mkdir c", "mv a/b c/b; echo 2 > c/b/2; mv c/b/1 a/1; rmdir a 2>/dev/null || true");
  expect_followed("mkdir a q; echo 1 > a/a; echo 22 > q/a", "mv a/a a/b; mv q r; mv a q");
}

TEST(Delta, OutsideMovesInAndOut) {
  Pair p;
  p.start();
  sh(p.dir.path(), "mkdir -p out/deep; echo 1 > out/deep/1; mkdir from/gone; echo 2 > from/gone/2");
  p.flush();
  sh(p.dir.path(), "mv out/deep from/in; mv from/gone out/gone; echo 3 > from/in/3");
  p.flush();
  EXPECT_EQ(p.differences(), "");
}

TEST(Delta, HardLinks) {
  expect_followed("echo a > a; ln a b; mkdir d; ln a d/c", "echo more >> b");
  expect_followed("echo a > a; echo z > z", "ln a b; ln a c; mkdir d; ln z d/z");
  expect_followed("echo a > a; ln a b", "rm b; echo other > b");
  expect_followed("echo a > a; ln a b; ln a c", "echo n > n; mv n a; ln a d");
  expect_followed("mkdir d; echo a > d/a; ln d/a d/b; ln d/a x", "mv d e; chmod 600 e/a");
  expect_followed("echo a > a; ln a b", "rm a; chmod 640 b");
  expect_followed("mkfifo p; ln -s a l; ln l l2", "ln p p2; rm l; ln -s other l");
  expect_followed("head -c 300000 /dev/urandom > big; ln big big2", "printf x | dd of=big bs=1 seek=150000 conv=notrunc status=none; ln big2 big3");
}

TEST(Delta, WritesThroughANameThatIsGone) {
  // link, unlink, then write through the descriptor: the event names what is no longer there.
  expect_followed("true", "exec 3>a; echo 1 >&3; ln a b; rm a; sleep 0.1; echo 2 >&3");
  Pair p;
  p.start();
  Fd fd(::open((p.from() + "/a").c_str(), O_RDWR | O_CREAT, 0644));
  sh(p.from(), "ln a b; rm a");
  p.flush();
  ASSERT_EQ(::write(fd.get(), "late", 4), 4);
  p.flush();
  EXPECT_EQ(p.differences(), "");
}

TEST(Delta, WritesThroughNamesThatCannotBePlaced) {
  // Its directory has gone before the watch looks: nothing but the file itself leads to its other name.
  for (int i = 0; i < 5; i++) expect_followed("echo a > a; ln a b", "mkdir d; ln a d/p; echo more >> d/p; rm -r d");
  // A name outside of the tree; the one inside had no second name before.
  Pair p;
  p.start();
  sh(p.from(), "echo a > a; echo b > b; mkdir ../out; ln b ../out/b");
  p.flush();
  EXPECT_EQ(p.differences(), "");
  sh(p.from(), "ln a ../out/a; echo more >> ../out/a; chmod 600 ../out/b");
  p.flush();
  EXPECT_EQ(p.differences(), "");
  // Foreign files with several names are looked for once, not in every pass.
  sh(p.dir.path(), "echo 1 > out/x; ln out/x out/y; echo 2 >> out/x");
  p.flush();
  auto passes = p.links->passes();
  sh(p.dir.path(), "echo 3 >> out/x");
  p.watch->drain();
  EXPECT_TRUE(p.dirty.empty());
  EXPECT_EQ(p.links->passes(), passes);
  // One of them comes into the tree: they are looked at again.
  sh(p.dir.path(), "rm out/y; ln out/x from/x; echo 4 >> out/x");
  p.flush();
  sh(p.dir.path(), "echo 5 >> out/x");
  p.flush();
  EXPECT_EQ(p.differences(), "");
}

TEST(Delta, AWriteThroughANameThatIsGoneBesideAnotherChange) {
  // The first of the names that are left is dirty for its mode alone.
  expect_followed("echo a > a; ln a b; ln a p", "printf z | dd of=p conv=notrunc status=none; rm p; chmod 600 a");
}

TEST(Delta, Metadata) {
  expect_followed("echo a > a; mkdir d", "chmod 4751 a; chown 12:34 a; touch -d '2001-02-03 04:05:06.123456789' a; chmod 1770 d; chown 7 d; touch -d '1999-01-01 01:01:01.987654321' d");
  expect_followed("echo a > a; mkdir d", "setfattr -n user.x -v 1 a; setfattr -n user.y -v 2 d; setfacl -m u:7:rw,g:8:r a; setfacl -d -m u:9:rwx d");
  expect_followed("echo a > a; setfattr -n user.x -v 1 a; setfacl -m u:7:rw a", "setfattr -x user.x a; setfacl -b a; setfattr -n user.z -v 0x00ff a");
  expect_followed("ln -s nowhere l", "chown -h 5:6 l; touch -h -d '2005-05-05' l; ln -sf elsewhere m");
  expect_followed("mkdir d", "touch -d 2010-01-01 .; mkdir d/e; touch -d 2011-01-01 d/e; touch -d 2012-01-01 d");
  expect_followed("cp /bin/true t", "setcap cap_net_raw+ep t 2>/dev/null || setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 t");
}

TEST(Delta, ADirectoryMadeAgainHoldsNothingOfTheOneBefore) {
  // What the watch can tell when it looks after both: that the name is new.
  Pair p;
  p.start();
  sh(p.from(), "mkdir -p d/e/f g; echo 1 > d/1; echo 2 > d/e/2; echo 3 > g/3");
  p.flush();
  EXPECT_EQ(p.differences(), "");
  p.watch.reset();
  sh(p.from(), "rm -r d; mkdir -p d/e; echo 4 > d/4");
  p.dirty.add("d", why_name | why_attributes);
  p.dirty.add("d/e", why_name | why_attributes);
  p.dirty.add("d/4", why_name | why_attributes | why_content);
  p.dirty.add("", why_attributes);
  p.watch.emplace(*p.source, p.filter, p.dirty);
  p.flush();
  EXPECT_EQ(p.differences(), "");
}

TEST(Delta, SpecialFilesAndOddNames) {
  expect_followed("true", "mkfifo p; mknod c c 1 3; mknod b b 7 9; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"s\")'");
  expect_followed("true", "echo 1 > $'new\\nline'; echo 2 > $'bad\\xff\\xfe'; echo 3 > ' space '; echo 4 > $'\\x01'; echo 5 > '*'; echo 6 > -n; "
                          "mkdir $'d\\xff\\n'; echo 7 > $'d\\xff\\n/in'; ln -s $'to\\xff' $'l\\n'");
  expect_followed("true", "n=$(printf 'x%.0s' {1..250}); for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do mkdir $n; cd $n; done; echo deep > file");
}

TEST(Delta, LargeFilesGoByBlocksAndHolesStay) {
  Pair p;
  p.start();
  sh(p.from(), "head -c 20000000 /dev/urandom > big; truncate -s 50M holes; printf data | dd of=holes bs=1 seek=30000000 conv=notrunc status=none");
  p.flush();
  EXPECT_EQ(p.differences(), "");
  sh(p.from(), "printf changed | dd of=big bs=1 seek=9999999 conv=notrunc status=none; fallocate -p -o 4M -l 8M big; truncate -s 19000000 big");
  Sent s = p.flush();
  EXPECT_EQ(p.differences(), "");
  EXPECT_LT(s.bytes, 1'000'000);
  struct stat a, b;
  ASSERT_EQ(::stat((p.from() + "/holes").c_str(), &a), 0);
  ASSERT_EQ(::stat((p.to() + "/holes").c_str(), &b), 0);
  EXPECT_LE(b.st_blocks, a.st_blocks + 64);
  ASSERT_EQ(::stat((p.to() + "/big").c_str(), &b), 0);
  EXPECT_LT(b.st_blocks * 512, 12'000'000);
}

TEST(Delta, RenamedDirectoryIsNotSentAgain) {
  Pair p;
  p.start();
  sh(p.from(), "mkdir d; for i in 1 2 3 4 5; do head -c 1000000 /dev/urandom > d/$i; done");
  p.flush();
  sh(p.from(), "mv d e; echo more >> e/3");
  Sent s = p.flush();
  EXPECT_EQ(p.differences(), "");
  EXPECT_LT(s.bytes, 300'000);
}

TEST(Delta, UnchangedFilesAreNotRead) {
  Pair p;
  p.start();
  sh(p.from(), "mkdir -p d; for i in $(seq 300); do echo $i > d/$i; done");
  p.flush();
  sh(p.from(), "echo x >> d/7");
  Sent s = p.flush();
  EXPECT_LE(s.files, 2);
  EXPECT_EQ(p.differences(), "");
}

TEST(Delta, BoundedMemoryBecomesOneTree) {
  DirtySet set(100'000);
  for (int i = 0; i < 5000; i++) set.add("data/one/" + std::to_string(i), why_content);
  EXPECT_LT(set.size(), 1200u);
  Dirty d = set.take();
  EXPECT_FALSE(d.rescan);
  EXPECT_TRUE(d.paths.contains("data/one"));
  for (int i = 0; i < 5000; i++) set.add(std::to_string(i), why_content);
  EXPECT_FALSE(set.rescan_reason().empty());
}

TEST(Delta, AFileThatBecomesAnExcludedDirectoryIsRemoved) {
  Pair p({}, {"cache/"});
  p.start();
  sh(p.from(), "echo 1 > cache; mkdir d; echo 2 > d/cache");
  p.flush();
  EXPECT_EQ(oracle(p.from(), p.to(), {"--exclude=cache/"}), "");
  sh(p.from(), "rm cache d/cache; mkdir cache d/cache; echo 3 > cache/in");
  sh(p.to(), "rm d/cache; mkdir d/cache; echo kept > d/cache/of-this-side");
  p.flush();
  EXPECT_EQ(oracle(p.from(), p.to(), {"--exclude=cache/"}), "");
  EXPECT_TRUE(exists(p.to() + "/d/cache/of-this-side"));
}

TEST(Delta, WhatIsUnderWayIsNotClean) {
  DirtySet set;
  set.add("a", why_content);
  set.add_inode(7);
  Dirty taken = set.take();
  EXPECT_TRUE(set.empty());
  EXPECT_EQ(set.size(), 2u);
  set.put_back(std::move(taken));
  set.confirm();
  EXPECT_EQ(set.size(), 2u);
  set.take();
  set.confirm();
  EXPECT_EQ(set.size(), 0u);
  set.rescan("lost");
  set.take();
  EXPECT_EQ(set.rescan_reason(), "");
  EXPECT_EQ(set.open_rescan(), "lost");
  set.confirm();
  EXPECT_EQ(set.open_rescan(), "");
}

TEST(Delta, ExcludedIsNeitherSentNorRemoved) {
  Pair p({}, {"*.tmp", "/cache/"});
  p.start();
  sh(p.from(), "mkdir -p cache d/cache; echo 1 > cache/1; echo 2 > d/cache/2; echo 3 > a.tmp; echo 4 > a");
  sh(p.to(), "echo keep > b.tmp; mkdir cache; echo keep > cache/k");
  p.flush();
  sh(p.from(), "mv d e; rm a.tmp; mv a b; echo 5 > c.tmp");
  p.flush();
  EXPECT_EQ(oracle(p.from(), p.to(), {"--exclude=*.tmp", "--exclude=/cache/"}), "");
  EXPECT_TRUE(exists(p.to() + "/b.tmp"));
  EXPECT_TRUE(exists(p.to() + "/cache/k"));
  EXPECT_FALSE(exists(p.to() + "/c.tmp"));
}

// What was written through a name whose directory is gone when the event is looked at, and which was not its only name.
TEST(Delta, AWriteThroughANameThatWentWithItsDirectoryIsSentByTheOther) {
  Pair p;
  p.start();
  sh(p.from(), "echo 0 > kept; mkdir busy one; cd busy; touch {1..1000}");
  p.flush();
  for (int i = 1; i <= 10 && !HasFailure(); i++) {
    const std::string d = p.from() + "/d", x = d + "/x";
    ASSERT_EQ(::mkdir(d.c_str(), 0755), 0);
    ASSERT_EQ(::link((p.from() + "/kept").c_str(), x.c_str()), 0);
    p.flush();
    // The watch has enough to look at to come late, and a directory that was moved lets it forget where it has seen the others.
    for (int n = 1; n <= 1000; n++) ::chmod((p.from() + "/busy/" + std::to_string(n)).c_str(), static_cast<mode_t>(0600 + i));
    ::rename((p.from() + "/one").c_str(), (p.from() + "/two").c_str());
    ::rename((p.from() + "/two").c_str(), (p.from() + "/one").c_str());
    {
      Fd fd(::open(x.c_str(), O_WRONLY | O_CLOEXEC));
      const std::string text = std::to_string(i);
      ASSERT_EQ(::pwrite(fd.get(), text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
    }
    if (i % 2) {
      ::unlink(x.c_str());
      ::rmdir(d.c_str());
    } else {
      // Out of the tree, and gone from there.
      const std::string out = p.dir.path() + "/out";
      ::rename(d.c_str(), out.c_str());
      ::unlink((out + "/x").c_str());
      ::rmdir(out.c_str());
    }
    p.flush();
    EXPECT_EQ(read_file(p.to() + "/kept"), read_file(p.from() + "/kept")) << "round " << i;
  }
}

// Random operations with flushes between them. REHOME_SEED repeats one; REHOME_ROUNDS sets how many.
class Random {
 public:
  Random(const std::string& root, unsigned seed) : root_(root), rng_(seed) {}
  void step() {
    static constexpr int kinds = 19;
    switch (pick(kinds)) {
      case 0: case 1: write(path(), text(), O_WRONLY | O_CREAT | O_TRUNC); break;
      case 2: write(path(), text(), O_WRONLY | O_APPEND); break;
      case 3: (void)!::truncate(path().c_str(), static_cast<off_t>(pick(300000))); break;
      case 4: case 5: ::mkdir(path().c_str(), 0755); break;
      case 6: case 7: ::rename(path().c_str(), path().c_str()); break;
      case 8: case 9: (void)!::link(path().c_str(), path().c_str()); break;
      case 10: ::chmod(path().c_str(), static_cast<mode_t>(0400 | pick(010000))); break;
      case 11: (void)!::lchown(path().c_str(), static_cast<uid_t>(pick(5)), static_cast<gid_t>(pick(5))); break;
      case 12: ::lsetxattr(path().c_str(), pick(2) ? "user.a" : "user.b", "v", pick(2), 0); break;
      case 13: acl(path()); break;
      case 14: sparse(path()); break;
      case 15: map_write(path()); break;
      case 16: ::unlink(path().c_str()); break;
      case 17: {
        std::string p = path();
        if (p.size() > root_.size() + 1 && pick(3) == 0) run({.argv = {"rm", "-rf", p}});
        break;
      }
      case 18: (void)!::symlink(text().substr(0, 20).c_str(), path().c_str()); break;
    }
  }
  std::size_t pick(std::size_t n) { return std::uniform_int_distribution<std::size_t>(0, n - 1)(rng_); }

 private:
  std::string path() {
    static const std::vector<std::string> names{"a", "b", "c", "d\n", "e\xff", " f", "*"};
    std::string p = root_;
    for (std::size_t depth = 1 + pick(3); depth > 0; depth--) p += "/" + names[pick(names.size())];
    return p;
  }
  std::string text() {
    std::string t;
    std::size_t n = pick(10) == 0 ? 200000 + pick(200000) : pick(50);
    for (std::size_t i = 0; i < n; i++) t += static_cast<char>('a' + pick(26));
    return t + "x";
  }
  void write(const std::string& p, const std::string& t, int flags) {
    Fd fd(::open(p.c_str(), flags | O_NONBLOCK | O_NOFOLLOW, 0644));
    struct stat st;
    if (fd && ::fstat(fd.get(), &st) == 0 && S_ISREG(st.st_mode)) (void)!::write(fd.get(), t.data(), t.size());
  }
  void sparse(const std::string& p) {
    Fd fd(::open(p.c_str(), O_RDWR | O_CREAT | O_NONBLOCK | O_NOFOLLOW, 0644));
    if (fd) (void)!::pwrite(fd.get(), "end", 3, static_cast<off_t>(pick(2'000'000)));
    if (fd && pick(2)) ::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 200000);
  }
  void map_write(const std::string& p) {
    Fd fd(::open(p.c_str(), O_RDWR | O_NONBLOCK | O_NOFOLLOW));
    struct stat st;
    if (!fd || ::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size == 0) return;
    auto size = static_cast<std::size_t>(st.st_size);
    void* m = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (m == MAP_FAILED) return;
    static_cast<char*>(m)[pick(size)] = static_cast<char>('A' + pick(26));
    ::munmap(m, size);
  }
  void acl(const std::string& p) {
    // version 2; user_obj, user:N, group_obj, mask, other
    struct {
      std::uint32_t version = 2;
      struct {
        std::uint16_t tag, perm;
        std::uint32_t id;
      } e[5];
    } a;
    a.e[0] = {1, 6, ~0u};
    a.e[1] = {2, static_cast<std::uint16_t>(pick(8)), static_cast<std::uint32_t>(pick(9))};
    a.e[2] = {4, 4, ~0u};
    a.e[3] = {16, static_cast<std::uint16_t>(pick(8)), ~0u};
    a.e[4] = {32, static_cast<std::uint16_t>(pick(8)), ~0u};
    ::lsetxattr(p.c_str(), pick(3) ? "system.posix_acl_access" : "system.posix_acl_default", &a, sizeof a, 0);
  }
  std::string root_;
  std::mt19937 rng_;
};

// Random operations in a tree, which is followed all the time.
void follow_random_operations(unsigned seed) {
  SCOPED_TRACE("REHOME_SEED=" + std::to_string(seed));
  Pair p;
  p.start();
  Random random(p.from(), seed);
  for (int i = 0; i < 600; i++) {
    random.step();
    if (random.pick(25) == 0) p.flush();
    if (random.pick(200) == 0) p.disconnect();
  }
  p.flush();
  std::string d = p.differences();
  EXPECT_EQ(d, "");
  if (!d.empty() && std::getenv("REHOME_KEEP")) std::abort();
}

// Several at once, as every watch sees the whole file system: they come late to what happened in their own trees, and the
// inode numbers of removed directories are given to new ones all the time.
TEST(Delta, RandomOperations) {
  const char* given = std::getenv("REHOME_SEED");
  const char* rounds_given = std::getenv("REHOME_ROUNDS");
  unsigned first = given ? static_cast<unsigned>(std::atoi(given)) : std::random_device{}();
  unsigned rounds = given ? 1 : rounds_given ? static_cast<unsigned>(std::atoi(rounds_given)) : 6;
  unsigned at_once = given ? 1 : 5;
  for (unsigned round = 0; round < rounds && !HasFailure(); round++) {
    std::vector<std::thread> trees;
    for (unsigned k = 0; k < at_once; k++) trees.emplace_back(follow_random_operations, first + round * at_once + k);
    for (auto& t : trees) t.join();
  }
}

TEST(Filter, MeansWhatRsyncMeans) {
  TempDir dir;
  sh(dir.path(), "mkdir -p t/a/b/c t/cache/x t/d/cache t/e/a/b; touch t/a/1.txt t/a/b/2.txt t/a/b/c/3.log t/cache/x/4 t/d/cache/5 t/e/a/b/6.txt "
                 "t/top.txt t/[x] 't/a b' t/a/b/.hid");
  std::vector<std::pair<std::vector<std::string>, std::vector<std::string>>> cases{
      {{}, {"*.txt"}},     {{}, {"/a"}},          {{}, {"cache/"}},       {{}, {"a/b"}},         {{}, {"/a/b/***"}},
      {{"*/", "*.txt"}, {"*"}}, {{}, {"a/**/3.log"}}, {{}, {"**/b"}},      {{}, {"\\[x\\]"}},     {{"/a/***"}, {"*"}},
      {{}, {"[a-c]"}},     {{}, {"?.txt"}},       {{}, {"/*/b"}},         {{}, {"a*"}},          {{}, {"/a/*"}},
      {{"/a/", "/a/b/***"}, {"/a/*", "/*"}},      {{}, {"- *.log", "+ x"}}, {{}, {"c/***"}},      {{}, {"**txt"}},
      {{}, {"**/a"}},      {{}, {"**/cache/"}},   {{}, {"**/top.txt"}},   {{}, {"**/t*"}},       {{}, {"**/a/b"}},        {{}, {"**/a/***"}},
      {{"**/a/", "**/b/", "**/2.txt"}, {"*"}},    {{}, {"/**/a"}},        {{}, {"**/**/a"}},     {{}, {"**a"}},           {{}, {"***/a"}},
      {{}, {"[!a]*"}},     {{}, {"/a/b/"}},       {{}, {"e/**"}},          {{}, {"**/"}},        {{}, {"[[:digit:]].*"}}};
  for (const auto& [include, exclude] : cases) {
    std::vector<std::string> argv{"rsync", "-an", "--out-format=%n"};
    for (const auto& i : include) argv.push_back("--include=" + i);
    for (const auto& x : exclude) argv.push_back("--exclude=" + x);
    argv.push_back(dir.path() + "/t/");
    argv.push_back(dir.path() + "/none/");
    std::set<std::string> theirs, ours;
    std::string out = run({.argv = argv}).out;
    for (std::size_t at = 0; at < out.size();) {
      auto end = out.find('\n', at);
      std::string line = out.substr(at, end - at);
      at = end + 1;
      if (line.ends_with('/')) line.pop_back();
      if (line != "." && !line.starts_with("created directory")) theirs.insert(line);
    }
    Filter filter(include, exclude);
    Tree tree(open_root(dir.path() + "/t"), "t");
    walk(tree, filter, [&](const std::string& path, ino_t, unsigned char type, int) {
      EXPECT_TRUE(filter.includes(path, type == 4)) << path;
      ours.insert(path);
      return true;
    });
    EXPECT_EQ(ours, theirs) << ::testing::PrintToString(include) << " " << ::testing::PrintToString(exclude);
  }
}

}  // namespace
}  // namespace rehome::track
