#include "agent/record.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "sys/fd.h"
#include "sys/fs.h"

namespace rehome {
namespace {

constexpr std::array<std::pair<Decision, std::string_view>, 9> kNames{{
    {Decision::serving, "SERVING"}, {Decision::attempt, "ATTEMPT"}, {Decision::commit, "COMMIT"},
    {Decision::abort, "ABORT"}, {Decision::cancelled, "CANCELLED"}, {Decision::prepared, "PREPARED"},
    {Decision::stored, "STORED"}, {Decision::opened, "OPENED"}, {Decision::refused, "REFUSED"},
}};

constexpr std::string_view kMagic = "rehome-record-1\n";

// CRC-32 of IEEE 802.3, bit by bit: forty bytes a write need no table.
std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

void put(std::string& out, std::uint64_t v) {
  for (int i = 0; i < 8; i++) out += static_cast<char>(v >> (8 * i) & 255);
}

std::uint64_t take(std::string_view& in) {
  std::uint64_t v = 0;
  for (int i = 7; i >= 0; i--) v = v << 8 | static_cast<unsigned char>(in[static_cast<std::size_t>(i)]);
  in.remove_prefix(8);
  return v;
}

class DiskBlocks : public BlockFile {
 public:
  explicit DiskBlocks(const std::string& path) : path_(path) {
    // O_DIRECT needs an aligned buffer; tmpfs and some others do not know it.
    fd_ = Fd(::open(path.c_str(), O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC));
    direct_ = static_cast<bool>(fd_);
    if (!fd_ && errno == EINVAL) fd_ = Fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (!fd_) throw errno_error(errno, "open", path, "the record is missing: does this state directory belong to the run?");
    struct stat st;
    if (::fstat(fd_.get(), &st) != 0) throw errno_error(errno, "stat", path);
    if (st.st_size != 2 * static_cast<off_t>(kBlockSize))
      throw Error(Code::io, "the record " + path + " has " + std::to_string(st.st_size) + " bytes instead of 8192",
                  "nothing was opened or undone; put the right file back, or see docs/PROTOCOL.md");
    void* p = nullptr;
    if (::posix_memalign(&p, kBlockSize, kBlockSize) != 0) throw errno_error(ENOMEM, "allocate for", path);
    buffer_.reset(static_cast<char*>(p));
  }

  std::string read(int block) override {
    ssize_t n;
    do n = ::pread(fd_.get(), buffer_.get(), kBlockSize, block * static_cast<off_t>(kBlockSize));
    while (n < 0 && errno == EINTR);
    if (n < 0) throw errno_error(errno, "read the record", path_);
    if (n != static_cast<ssize_t>(kBlockSize)) throw Error(Code::io, "the record " + path_ + " was read short");
    return std::string(buffer_.get(), kBlockSize);
  }

  void write(int block, std::string_view bytes) override {
    REHOME_CHECK(bytes.size() == kBlockSize);
    std::memcpy(buffer_.get(), bytes.data(), kBlockSize);
    ssize_t n;
    do n = ::pwrite(fd_.get(), buffer_.get(), kBlockSize, block * static_cast<off_t>(kBlockSize));
    while (n < 0 && errno == EINTR);
    if (n < 0) throw errno_error(errno, "write the record", path_);
    if (n != static_cast<ssize_t>(kBlockSize)) throw Error(Code::io, "the record " + path_ + " was written short");
    if (!direct_ && ::fdatasync(fd_.get()) != 0) throw errno_error(errno, "fsync the record", path_);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::string path_;
  Fd fd_;
  bool direct_ = false;
  std::unique_ptr<char, Free> buffer_;
};

bool same(const Record& a, const Record& b) { return encode_record(a) == encode_record(b); }

}  // namespace

std::string_view name_of(AgentSide s) { return s == AgentSide::source ? "source" : "target"; }

AgentSide agent_side_from(std::string_view name) {
  if (name == "source") return AgentSide::source;
  if (name == "target") return AgentSide::target;
  throw Error(Code::io, "'" + std::string(name) + "' is neither source nor target");
}

std::string_view name_of(Decision d) {
  for (const auto& [value, name] : kNames)
    if (value == d) return name;
  REHOME_CHECK(false && "every decision has a name");
  return {};
}

Decision decision_from(std::string_view wanted) {
  for (const auto& [value, name] : kNames)
    if (name == wanted) return value;
  throw Error(Code::io, "'" + std::string(wanted) + "' is no decision", "are both agents of the same version?");
}

std::string encode_record(const Record& r) {
  std::string out(kMagic);
  put(out, r.seq);
  put(out, static_cast<std::uint64_t>(r.epoch));
  put(out, static_cast<std::uint64_t>(r.attempt));
  put(out, static_cast<std::uint64_t>(r.decision));
  put(out, static_cast<std::uint64_t>(r.serves));
  put(out, (r.forced ? 1u : 0u) | (r.settled ? 2u : 0u));
  put(out, static_cast<std::uint64_t>(r.wall_us));
  put(out, crc32(out));
  out.resize(kBlockSize, '\0');
  return out;
}

std::optional<Record> decode_record(std::string_view block) {
  if (block.size() != kBlockSize || !block.starts_with(kMagic)) return std::nullopt;
  std::string_view in = block.substr(kMagic.size());
  Record r;
  r.seq = take(in);
  r.epoch = static_cast<std::int64_t>(take(in));
  r.attempt = static_cast<std::int64_t>(take(in));
  std::uint64_t decision = take(in), serves = take(in), flags = take(in);
  r.wall_us = static_cast<std::int64_t>(take(in));
  if (take(in) != crc32(block.substr(0, kMagic.size() + 56))) return std::nullopt;
  if (decision < 1 || decision > kNames.size() || serves > 1 || flags > 3) return std::nullopt;
  r.decision = static_cast<Decision>(decision);
  r.serves = static_cast<AgentSide>(serves);
  r.forced = flags & 1;
  r.settled = flags & 2;
  return r;
}

std::unique_ptr<BlockFile> open_record_file(const std::string& path) { return std::make_unique<DiskBlocks>(path); }

void create_record_file(const std::string& path, const Record& first) {
  std::string block = encode_record(first);
  write_durably(path, block + block, 0600);
}

const Record& RecordStore::load() {
  auto a = decode_record(file_.read(0)), b = decode_record(file_.read(1));
  if (!a && !b)
    throw Error(Code::io, "neither block of the record is valid",
                "nothing was opened or undone; see docs/PROTOCOL.md, 'when the record is lost'");
  if (a && b && a->seq == b->seq && !same(*a, *b))
    throw Error(Code::io, "the two blocks of the record contradict each other",
                "nothing was opened or undone; see docs/PROTOCOL.md, 'when the record is lost'");
  good_ = a && (!b || a->seq >= b->seq) ? 0 : 1;
  wanted_ = good_ == 0 ? *a : *b;
  last_seq_ = wanted_.seq;
  Record again = wanted_;
  again.seq = ++last_seq_;
  // Into the other block: the one that was read stays whole until the new one is.
  file_.write(1 - good_, encode_record(again));
  good_ = 1 - good_;
  current_ = wanted_ = again;
  loaded_ = true;
  unknown_ = false;
  mirrored_ = false;
  return current_;
}

const Record& RecordStore::current() const {
  REHOME_CHECK(loaded_);
  return current_;
}

void RecordStore::write(Record next) {
  REHOME_CHECK(loaded_);
  next.seq = ++last_seq_;
  wanted_ = next;
  try {
    file_.write(1 - good_, encode_record(next));
  } catch (const Error& e) {
    unknown_ = true;
    throw Error(Code::unknown, "whether " + std::string(name_of(next.decision)) + "(" + std::to_string(next.attempt) +
                                   ") is on the disk is not known: " + e.message,
                "nothing is undone and nothing is sent until the record can be written; repair the disk");
  }
  good_ = 1 - good_;
  current_ = next;
  unknown_ = false;
  mirrored_ = false;
}

void RecordStore::settle() {
  REHOME_CHECK(known());
  file_.write(1 - good_, encode_record(current_));
  mirrored_ = true;
}

}  // namespace rehome
