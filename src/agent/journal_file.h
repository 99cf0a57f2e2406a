// The run's journal as an agent keeps it: whole lines, appended in order and fsynced, so that any controller can resume.
#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "sys/fd.h"

namespace rehome {

// Thread-safe. The file is opened at the first use.
class JournalFile {
 public:
  explicit JournalFile(std::string path) : path_(std::move(path)) {}
  // Appends lines `from`, from + 1, ... (the first line of a journal is 0) and makes them durable; returns the number of
  // the next line. Throws Error(conflict) when `from` is not the next one (it names the next), Error(io).
  std::int64_t append(std::int64_t from, const std::vector<std::string>& lines);
  // Lines from `from` on, at most 8 MiB of them; *next is the number behind the last one returned.
  std::vector<std::string> read(std::int64_t from, std::int64_t* next);

 private:
  void open();

  std::string path_;
  std::mutex mutex_;
  Fd fd_;
  std::int64_t next_ = 0;
};

}  // namespace rehome
