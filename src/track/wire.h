// track: what the agents do with a files store: follow a tree's changes, send them to the other agent, apply them there,
// compare both trees, close one of them. It knows one tree and the connection to the other agent; it may include base, sys
// and agent/module.h only, since it is linked into the static agent.
//
// This file: binary frames, so that any file name (newlines, invalid UTF-8) crosses unharmed.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/clock.h"

namespace rehome::track {

// Builds a frame's payload: fixed-width little-endian numbers and length-prefixed bytes.
class Packer {
 public:
  Packer& u8(std::uint8_t v) { return out_ += static_cast<char>(v), *this; }
  Packer& u32(std::uint32_t v) { return raw(&v, sizeof v); }
  Packer& u64(std::uint64_t v) { return raw(&v, sizeof v); }
  Packer& i64(std::int64_t v) { return raw(&v, sizeof v); }
  Packer& bytes(std::string_view v) {
    u32(static_cast<std::uint32_t>(v.size()));
    out_.append(v);
    return *this;
  }
  const std::string& out() const { return out_; }

 private:
  // Every host that rehome runs on is little-endian; wire.cc asserts it.
  Packer& raw(const void* p, std::size_t n) { return out_.append(static_cast<const char*>(p), n), *this; }
  std::string out_;
};

// Takes one apart. Throws Error(io) when it is shorter than what is asked of it.
class Unpacker {
 public:
  explicit Unpacker(std::string_view in) : in_(in) {}
  std::uint8_t u8() { return number<std::uint8_t>(); }
  std::uint32_t u32() { return number<std::uint32_t>(); }
  std::uint64_t u64() { return number<std::uint64_t>(); }
  std::int64_t i64() { return number<std::int64_t>(); }
  std::string_view bytes() { return take(u32()); }
  std::string_view rest() { return take(in_.size()); }
  bool empty() const { return in_.empty(); }

 private:
  template <class T>
  T number() {
    T v;
    auto s = take(sizeof v);
    __builtin_memcpy(&v, s.data(), sizeof v);
    return v;
  }
  std::string_view take(std::size_t n);
  std::string_view in_;
};

enum class FrameType : std::uint8_t {
  // sender to receiver
  owner = 1,      // kind u8 (0 user, 1 group), id u32, name bytes
  hint = 2,       // from, to: rename there if it helps; never needed for correctness
  remove = 3,     // path: gone, with all below it
  names = 4,      // path, last u8, count u32, names: the directory's whole list; others are removed
  entry = 5,      // see delta.h
  link = 6,       // path, of: must be the same inode
  ask = 7,        // end of the batch's entries: answer what content is needed
  data = 8,       // index u32, offset u64, bytes
  zero = 9,       // index u32, offset u64, length u64: a hole
  data_end = 10,  // index u32, size u64
  commit = 11,    // durable u8
  // receiver to sender
  need = 20,      // index u32, block u32 (0: all of it), then 16 bytes a block
  ready = 21,     // end of needs
  done = 22,      // entries u32, failures u32, then path, parent_missing u8, message each
  // manifests
  bucket = 30,    // see manifest.h
  listed = 31,
  end = 32,
  failed = 33,    // an Error as JSON
};

struct Frame {
  FrameType type{};
  std::string payload;
};

// Frames over a connected socket, which it borrows. Sending is buffered until flush() or 256 KiB. Not thread-safe.
class Channel {
 public:
  explicit Channel(int fd, std::string read_ahead = {}) : fd_(fd), in_(std::move(read_ahead)) {}
  void send(FrameType type, std::string_view payload, Deadline deadline = {});
  void flush(Deadline deadline = {});
  // Throws Error(unreachable) when the other end is gone, Error(timeout) at the deadline, Error(io) for a frame larger
  // than any that this program sends.
  Frame receive(Deadline deadline = {});
  // Whether a frame, or the end of the stream, can be read now; waits at most `wait`.
  bool readable(Millis wait);
  // False when the other end closed cleanly before a frame.
  bool receive_or_end(Frame& frame, Deadline deadline = {});
  // Bytes, with those that wait in the buffer.
  std::uint64_t sent() const { return sent_ + out_.size(); }

 private:
  bool fill(Deadline deadline);
  int fd_;
  std::string in_, out_;
  std::size_t at_ = 0;
  std::uint64_t sent_ = 0;
};

}  // namespace rehome::track
