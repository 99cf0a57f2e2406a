// engine: steps, their journal and the runner. It knows no store and no host.
//
// The journal is a list of JSON lines; what each kind means is in docs/JOURNAL.md. It is the only thing that status, the
// report and a resumed run read.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/json.h"

namespace rehome {

// Where journal lines live. append() returns only when they are durable; line numbers start at 0 and have no gaps.
class JournalBackend {
 public:
  virtual ~JournalBackend() = default;
  virtual std::vector<std::string> read_all() = 0;
  // Throws Error(conflict) when line `from` is not the next one: somebody else has written.
  virtual void append(std::size_t from, const std::vector<std::string>& lines) = 0;
};

// A file: one line an entry, fsync after each append. A torn last line is cut off when it is opened.
class FileJournal : public JournalBackend {
 public:
  explicit FileJournal(std::string path);
  std::vector<std::string> read_all() override;
  void append(std::size_t from, const std::vector<std::string>& lines) override;

 private:
  std::string path_;
  std::size_t next_ = 0;
};

enum class StepState { none, started, done, failed, undone };

// Thread-safe.
class Journal {
 public:
  // Reads everything there is.
  Journal(std::unique_ptr<JournalBackend> backend, Clock& clock);

  // Adds {"n", "at", "kind", ...data} durably. While held back (see below) it is only remembered. An entry whose writing failed
  // is remembered too, and written before the next one.
  void append(const std::string& kind, Json data);
  // Inside the pause only intents and the record are made durable: append() keeps lines in memory from hold_back() until
  // flush(), except append_intent().
  void hold_back();
  void append_intent(const std::string& kind, Json data);
  void flush();

  std::vector<Json> entries() const;
  std::vector<Json> of_kind(const std::string& kind) const;
  StepState step(const std::string& id) const;
  void set_step(const std::string& id, const std::string& title, StepState state, const Error* error = nullptr);

  // Facts: the last value of a key; null when there is none.
  Json fact(const std::string& key) const;
  void set_fact(const std::string& key, const Json& value);

  // Called for every entry as it is added (also held-back ones); for the terminal.
  void listen(std::function<void(const Json&)> listener) { listener_ = std::move(listener); }

 private:
  void take(const Json& entry);
  void write_pending();
  std::unique_ptr<JournalBackend> backend_;
  Clock& clock_;
  mutable std::mutex mutex_;
  std::vector<Json> entries_;
  std::vector<std::string> pending_;
  std::size_t durable_ = 0;
  bool held_ = false, unsure_ = false;   // unsure_: the backend may have more than durable_ lines, and ours
  std::map<std::string, StepState> steps_;
  std::map<std::string, Json> facts_;
  std::function<void(const Json&)> listener_;
};

}  // namespace rehome
