// The stored sets of actions: programs with their input, kept durably, run in order until each has succeeded, fed to
// programs that were started ahead where a start would cost time inside the pause.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "agent/attempt.h"
#include "base/json.h"
#include "sys/process.h"

namespace rehome {

struct Action {
  std::string name;
  Command command;        // its input is what the action does
  std::string try_input;  // harmless, shows that it could; empty: none
  bool warm = false;
  Millis timeout{30000};
};
Json to_json(const Action& a);
Action action_from_json(const Json& j);  // throws Error(usage)

// A program that reads commands from standard input, like psql, kept running. Not thread-safe.
// Feeding appends "\echo rehome-done N" and waits for that line on its output, which psql and a POSIX shell both answer.
// The program must end at its first error (psql: -v ON_ERROR_STOP=1), or an error would count as success.
class WarmProgram {
 public:
  explicit WarmProgram(const Command& command);
  bool alive() { return !child_.poll(); }
  // Throws Error(store) with the end of its standard error when it ends, Error(timeout) at the deadline; it is
  // then dead, and whether the input took effect is unknown.
  void feed(const std::string& input, Deadline deadline);

 private:
  Child child_;
  int count_ = 0;
  std::string out_, err_;
};

// Thread-safe; a set is run by one thread at a time.
class Actions {
 public:
  // Reads `path` if it exists. A file that cannot be read makes every run and probe fail with that error.
  Actions(std::string path, std::function<void(const std::string&)> log);

  // Replaces one set, durably. Throws Error(usage) for a bad item, Error(io) when the old set stays.
  void set(ActionSet which, const Json& items);
  Json get() const;
  // Runs the try_input of the item named, or of all; of a warm one through its running program.
  void try_out(ActionSet which, const std::string& name);
  // Starts the set's warm programs that do not run; throws the first failure.
  void warm(ActionSet which);
  void begin(ActionSet which);
  // One pass from the first item that has not succeeded since begin(); throws the failure of the item that fails. Of `close` every item is
  // run in every pass: a store that cannot be closed now leaves no other one open.
  // @rehome_attempt@ and @rehome_epoch@ in the inputs become these numbers.
  void run(ActionSet which, std::int64_t attempt, std::int64_t epoch);
  // Asks every warm program of the set for a sign of life. Throws when one cannot run now.
  void probe(ActionSet which);
  void stop();  // ends the warm programs

 private:
  struct Set {
    std::vector<Action> items;
    std::vector<std::unique_ptr<WarmProgram>> programs;
    std::size_t next = 0;
    std::atomic<bool> restart{false};  // set without waiting for a pass that is running
    std::mutex running;
  };
  Set& at(ActionSet which) { return sets_[static_cast<std::size_t>(which)]; }
  void feed(Set& set, std::size_t item, const std::string& input);
  void check_readable() const;

  std::string path_;
  std::function<void(const std::string&)> log_;
  mutable std::mutex mutex_;  // items and the file
  Set sets_[kActionSets];
  std::string error_;
};

}  // namespace rehome
