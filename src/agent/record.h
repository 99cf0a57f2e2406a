// The record: the one durable fact of a site that says who serves. Two preallocated blocks of 4096 bytes, written in
// turn, each with a sequence number and a checksum, so that a write that a crash tears costs the newer block only.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace rehome {

enum class AgentSide : std::uint32_t { source = 0, target = 1 };
inline AgentSide other(AgentSide s) { return s == AgentSide::source ? AgentSide::target : AgentSide::source; }
std::string_view name_of(AgentSide s);
AgentSide agent_side_from(std::string_view name);  // throws Error(io)

// What the last attempt came to, as this site knows it. The yielding site writes attempt, commit, abort, cancelled and
// serving; the one that takes over writes prepared, stored, opened and refused. docs/PROTOCOL.md has the transitions.
enum class Decision : std::uint32_t {
  serving = 1, attempt, commit, abort, cancelled, prepared, stored, opened, refused,
};
std::string_view name_of(Decision d);   // "SERVING", ...
Decision decision_from(std::string_view name);  // throws Error(io)

struct Record {
  std::uint64_t seq = 0;     // of the write; the store counts it
  std::int64_t epoch = 0;    // of two sites' records the higher epoch wins
  std::int64_t attempt = 0;  // the last one this site took part in
  Decision decision = Decision::serving;
  AgentSide serves = AgentSide::source;
  bool forced = false;       // a person decided without the other site
  bool settled = true;       // false: what follows the decision (undo, opening, tails, closing) is still to be done
  std::int64_t wall_us = 0;  // when it was decided, in microseconds since the Unix epoch: for people only
};

inline constexpr std::size_t kBlockSize = 4096;
std::string encode_record(const Record& r);                       // kBlockSize bytes
std::optional<Record> decode_record(std::string_view block);      // nullopt: not valid

// Two blocks on a disk. An injectable place for torn, lost and failing writes.
class BlockFile {
 public:
  virtual ~BlockFile() = default;
  // kBlockSize bytes of block 0 or 1, from the device where that is possible. Throws Error(io).
  virtual std::string read(int block) = 0;
  // Returns once the bytes are durable. Throws Error(io); whether they are on the disk is then unknown.
  virtual void write(int block, std::string_view bytes) = 0;
};

// The file at `path` (it must exist and hold two blocks), with O_DIRECT and O_DSYNC where the file system has them,
// otherwise with fsync after each write. Throws Error(io).
std::unique_ptr<BlockFile> open_record_file(const std::string& path);
// Makes `path` with both blocks holding `first`; a crash leaves no file or a whole one. Throws Error(io).
void create_record_file(const std::string& path, const Record& first);

// The record behind its file. Not thread-safe: the state machine holds its own lock around it.
class RecordStore {
 public:
  explicit RecordStore(BlockFile& file) : file_(file) {}

  // Reads both blocks, takes the newer valid one and writes it again before anybody acts on it: it may have been
  // read from a cache that a failed fsync left behind. Throws Error(io) when a block cannot be read or neither is valid.
  const Record& load();
  bool loaded() const { return loaded_; }
  // The newest record known to be durable. Only after load().
  const Record& current() const;
  // False after a failed write, until a later one succeeds: the disk may hold either. Nothing may be undone or sent.
  bool known() const { return loaded_ && !unknown_; }
  // What the failed write wanted to say.
  const Record& wanted() const { return wanted_; }
  // Makes `next` the record; seq is set here. Throws Error(unknown). A retry goes to the same block as the write that
  // failed, so that the last good block is never at risk.
  void write(Record next);
  // Copies the current record to the older block too, so that one decayed block does not bring an old decision back.
  // Throws Error(io); the current record stays.
  void settle();
  bool mirrored() const { return mirrored_; }

 private:
  BlockFile& file_;
  Record current_{}, wanted_{};
  int good_ = 0;               // the block that holds current_
  std::uint64_t last_seq_ = 0; // the highest ever tried
  bool loaded_ = false, unknown_ = false, mirrored_ = false;
};

}  // namespace rehome
