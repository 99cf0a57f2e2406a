#include "engine/journal.h"

#include <fcntl.h>

#include <cerrno>

#include "sys/fs.h"

namespace rehome {
namespace {

constexpr const char* kStates[] = {"none", "started", "done", "failed", "undone"};

}  // namespace

FileJournal::FileJournal(std::string path) : path_(std::move(path)) {
  if (!exists(path_)) {
    write_durably(path_, "");
    return;
  }
  std::string text = read_file(path_);
  auto end = text.find_last_of('\n');
  std::size_t whole = end == std::string::npos ? 0 : end + 1;
  if (whole != text.size()) {
    // A crash in the middle of an append: what was not acknowledged did not happen.
    if (::truncate(path_.c_str(), static_cast<off_t>(whole)) != 0) throw errno_error(errno, "truncate", path_);
  }
  for (char c : text.substr(0, whole)) next_ += c == '\n';
}

std::vector<std::string> FileJournal::read_all() {
  std::vector<std::string> lines;
  std::string text = read_file(path_);
  std::size_t from = 0;
  for (auto nl = text.find('\n'); nl != std::string::npos; nl = text.find('\n', from)) {
    lines.push_back(text.substr(from, nl - from));
    from = nl + 1;
  }
  return lines;
}

void FileJournal::append(std::size_t from, const std::vector<std::string>& lines) {
  if (from != next_)
    throw Error(Code::conflict, "the journal " + path_ + " has " + std::to_string(next_) + " lines, not " + std::to_string(from),
                "another rehome writes it; see status");
  Fd fd(::open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC));
  if (!fd) throw errno_error(errno, "open", path_);
  std::string text;
  for (const auto& l : lines) text += l + "\n";
  off_t size = ::lseek(fd.get(), 0, SEEK_END);
  try {
    write_all(fd.get(), text, path_);
    if (::fsync(fd.get()) != 0) throw errno_error(errno, "fsync", path_);
  } catch (const Error& e) {
    // A full disk leaves half a line: take it back, so that the next append starts on a line of its own.
    if (::ftruncate(fd.get(), size) != 0) throw errno_error(errno, "truncate", path_);
    throw Error(e.code, e.message, "make room on that disk, then resume");
  }
  next_ += lines.size();
}

Journal::Journal(std::unique_ptr<JournalBackend> backend, Clock& clock) : backend_(std::move(backend)), clock_(clock) {
  for (const auto& line : backend_->read_all()) {
    Json entry = parse_json(line, "journal line " + std::to_string(durable_));
    if (get_int(entry, "n") != static_cast<std::int64_t>(durable_))
      throw Error(Code::io, "journal line " + std::to_string(durable_) + " carries number " + std::to_string(get_int(entry, "n")));
    take(entry);
    durable_++;
  }
}

void Journal::take(const Json& entry) {
  entries_.push_back(entry);
  std::string kind = get_string(entry, "kind");
  if (kind == "step") {
    std::string state = get_string(entry, "state");
    for (int i = 0; i < 5; i++)
      if (state == kStates[i]) steps_[get_string(entry, "id")] = static_cast<StepState>(i);
  } else if (kind == "fact") {
    facts_[get_string(entry, "key")] = entry.at("value");
  }
}

void Journal::append(const std::string& kind, Json data) {
  std::lock_guard lock(mutex_);
  data["n"] = entries_.size();
  data["at"] = clock_.wall_us();
  data["kind"] = kind;
  pending_.push_back(dump_line(data));
  take(data);
  try {
    if (!held_) write_pending();
  } catch (...) {
    if (listener_) listener_(data);
    throw;
  }
  if (listener_) listener_(data);
}

// What fails here stays pending, before all that comes later: of an append whose answer was lost nobody knows whether it was done.
void Journal::write_pending() {
  for (bool again = false; !pending_.empty(); again = true) {
    try {
      if (unsure_) {
        const auto there = backend_->read_all();
        while (durable_ < there.size() && !pending_.empty() && there[durable_] == pending_.front()) {
          pending_.erase(pending_.begin());
          durable_++;
        }
        unsure_ = false;
        if (pending_.empty()) return;
      }
      backend_->append(durable_, pending_);
      durable_ += pending_.size();
      pending_.clear();
    } catch (const Error& e) {
      unsure_ = e.code != Code::conflict;
      if (again || e.code != Code::unreachable) throw;
    }
  }
}

void Journal::hold_back() {
  std::lock_guard lock(mutex_);
  held_ = true;
}

void Journal::append_intent(const std::string& kind, Json data) {
  append(kind, std::move(data));
  std::lock_guard lock(mutex_);
  write_pending();
}

void Journal::flush() {
  std::lock_guard lock(mutex_);
  held_ = false;
  write_pending();
}

std::vector<Json> Journal::entries() const {
  std::lock_guard lock(mutex_);
  return entries_;
}

std::vector<Json> Journal::of_kind(const std::string& kind) const {
  std::lock_guard lock(mutex_);
  std::vector<Json> found;
  for (const auto& e : entries_)
    if (e.at("kind") == kind) found.push_back(e);
  return found;
}

StepState Journal::step(const std::string& id) const {
  std::lock_guard lock(mutex_);
  auto it = steps_.find(id);
  return it == steps_.end() ? StepState::none : it->second;
}

void Journal::set_step(const std::string& id, const std::string& title, StepState state, const Error* error) {
  Json data{{"id", id}, {"title", title}, {"state", kStates[static_cast<int>(state)]}};
  if (error) data["error"] = error_to_json(*error);
  append("step", std::move(data));
}

Json Journal::fact(const std::string& key) const {
  std::lock_guard lock(mutex_);
  auto it = facts_.find(key);
  return it == facts_.end() ? Json() : it->second;
}

void Journal::set_fact(const std::string& key, const Json& value) {
  if (fact(key) == value) {
    // It may be one whose line could not be written.
    std::lock_guard lock(mutex_);
    if (!held_) write_pending();
    return;
  }
  append("fact", {{"key", key}, {"value", value}});
}

}  // namespace rehome
