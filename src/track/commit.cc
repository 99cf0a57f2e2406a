// The end of a pass at its receiver: times and modes of directories, and everything on the disk before it counts as done.
#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>

#include "base/error.h"
#include "base/json.h"
#include "track/delta.h"

namespace rehome::track {
namespace {

constexpr std::size_t most_fsyncs = 1000;  // past that, one syncfs
constexpr std::size_t most_open = 128;     // files that wait for their fsync together

// The error of one that failed, or 0. Several at a time: once the journal is committed an fsync is a flush of the disk's cache, and those
// that wait together are one flush (100 files: 370 ms one after the other, 74 to 170 ms so).
int fsync_together(const std::vector<Fd>& files) {
  std::atomic<std::size_t> next{0};
  std::atomic<int> error{0};
  auto work = [&] {
    for (std::size_t i; (i = next++) < files.size();)
      if (::fsync(files[i].get()) != 0) error = errno;
  };
  std::vector<std::jthread> helpers;
  for (std::size_t i = 1; i < std::min<std::size_t>(8, files.size() / 2); i++) helpers.emplace_back(work);
  work();
  helpers.clear();
  return error;
}

}  // namespace

void Receiver::make_durable() {
  if (written_.size() + changed_directories_.size() > most_fsyncs) {
    if (::syncfs(tree_.root()) != 0) throw errno_error(errno, "sync the file system of", tree_.label());
    return;
  }
  // Everything is written before the first fsync: it commits the journal for all, and the others find it done.
  auto opened = [&](const std::string& path, int flags) {
    std::string name;
    int directory = cursor_.at(path, name);
    Fd fd(directory < 0 ? -1 : ::openat(directory, name.c_str(), flags | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
    if (!fd && errno != ENOENT && errno != ENOTDIR && errno != ELOOP) throw errno_error(errno, "open for fsync", shown(path));
    return fd;
  };
  std::sort(written_.begin(), written_.end());
  written_.erase(std::unique(written_.begin(), written_.end()), written_.end());
  if (written_.size() > 1)
    for (const auto& path : written_)
      if (Fd fd = opened(path, O_RDONLY)) ::sync_file_range(fd.get(), 0, 0, SYNC_FILE_RANGE_WRITE);
  std::vector<Fd> some;
  auto sync_some = [&] {
    if (int error = fsync_together(some)) throw errno_error(error, "fsync a file in", tree_.label());
    some.clear();
  };
  auto add = [&](Fd fd) {
    if (!fd) return;
    some.push_back(std::move(fd));
    if (some.size() == most_open) sync_some();
  };
  for (const auto& path : written_) add(opened(path, O_RDONLY));
  for (const auto& path : changed_directories_) add(opened(path, O_RDONLY | O_DIRECTORY));
  sync_some();
}

void Receiver::on_commit(Channel& channel, bool durable) {
  for (const auto& p : batch_)
    // Asked for and not sent: it vanished at the sender, which has it dirty again.
    if (p.needed) written_.push_back(p.entry.path);
  batch_.clear();
  writing_.reset();
  // Deepest first, so that nothing changes a directory's times after they are set.
  for (auto it = touched_.rbegin(); it != touched_.rend(); ++it) {
    if (directories_.contains(it->first)) continue;
    std::string name;
    int directory = cursor_.at(it->first, name);
    timespec times[2] = {{0, UTIME_OMIT}, it->second};
    struct stat st;  // a file may stand there now
    if (directory >= 0 && ::fstatat(directory, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(st.st_mode))
      ::utimensat(directory, name.c_str(), times, AT_SYMLINK_NOFOLLOW);
  }
  for (auto it = directories_.rbegin(); it != directories_.rend(); ++it) {
    try {
      std::string name;
      int directory = need_parent(it->first, name);
      if (directory >= 0) write_meta(it->second, directory, name);
    } catch (const Error& e) {
      fail(it->first, e.message);
    }
  }
  try {
    if (options_.check) options_.check();
    if (durable) make_durable();
  } catch (const Error& e) {
    // Not known to be durable: the sender must not count any of it as done.
    channel.send(FrameType::failed, dump_line(error_to_json(e)));
    channel.flush();
    throw;
  }
  Packer p;
  p.u32(entries_).u32(static_cast<std::uint32_t>(failures_.size()));
  for (const auto& f : failures_) p.bytes(f.path).u8(f.parent_missing).bytes(f.message);
  channel.send(FrameType::done, p.out());
  channel.flush();
  directories_.clear();
  touched_.clear();
  written_.clear();
  changed_directories_.clear();
  failures_.clear();
  entries_ = 0;
  between_batches_ = true;
}

}  // namespace rehome::track
