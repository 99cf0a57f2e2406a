// What a power cut leaves: nothing but what was fsynced. Whoever links this has the calls of his program that change or sync
// files looked at (symbol interposition, so dynamically linked tests only); no other code belongs here.
//
// The disk is stricter than any real one: a file's content and attributes are those of its last fsync, whoever wrote since, also
// another process; a directory's names are those of its own last fsync; syncfs makes all durable; a write to an O_DSYNC descriptor
// its own bytes. A file that was never fsynced is empty, one whose name was never is gone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace rehome::testing {

// One at a time, thread-safe. While it lives, no fsync of the program reaches the real disk.
class PowerCut {
 public:
  // What is in these directories now is durable; they must exist and be apart from each other.
  explicit PowerCut(std::vector<std::string> directories);
  ~PowerCut();
  PowerCut(const PowerCut&) = delete;
  PowerCut& operator=(const PowerCut&) = delete;

  // fsync and its like answer, and nothing becomes durable: what every test of durability must fail with.
  void lose_syncs(bool yes);
  // The power fails in the call number `call`, counted from the last crash (0 is the first): from there on nothing becomes durable,
  // and crash() puts back that moment. The program does not notice. Meant for one thread.
  void fail_at(std::uint64_t call);
  // Changing and syncing calls below the directories since the last crash.
  std::uint64_t calls() const;

  // Puts the directories back to what was durable. With a seed the disk had written some of the rest by itself: each name, each
  // file's size, attributes and 512 bytes are the old ones or the newer ones. Nothing may use the directories meanwhile. What
  // is there afterwards is durable.
  void crash(unsigned seed = 0);

  struct Disk;

 private:
  std::unique_ptr<Disk> disk_;
};

}  // namespace rehome::testing
