// Child processes: run to the end with captured output, or kept with their pipes.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/json.h"
#include "sys/fd.h"

namespace rehome {

struct Command {
  std::vector<std::string> argv;                                // argv[0] is looked up in PATH; never holds a secret
  std::vector<std::pair<std::string, std::string>> env;         // added to, or replacing, the inherited ones
  std::string input;                                            // standard input; empty means /dev/null
  std::string directory;                                        // empty: inherited
  std::string user;                                             // run as this account; empty: as we are
};

struct Outcome {
  int status = 0;  // exit status, or 128 + signal
  std::string out;
  std::string err;
  bool truncated = false;  // there was more of either
  bool ok() const { return status == 0; }
};

// As a message of the agent carries it: {status, out, err}, with out_base64 or err_base64 where they are not text in UTF-8, and
// `truncated`. The agent answers with the one, the controller reads with the other.
Json outcome_to_json(const Outcome& o);
Outcome outcome_from_json(const Json& j);  // throws Error(io) for anything else

// Runs to the end and captures both outputs (each at most 16 MiB; of more it says `truncated`). At the deadline the
// process group is killed and Error(timeout) thrown; when `stop` becomes true the group is ended as Child::end does it, with 5 s of
// grace, and Error(interrupted) thrown; a program that cannot be started is Error(io) with a hint.
Outcome run(const Command& command, Deadline deadline = {}, const std::atomic<bool>* stop = nullptr);
// The same, and a status other than 0 is an Error(code) with the last lines of standard error.
Outcome run_ok(const Command& command, Deadline deadline = {}, const char* what = nullptr);

// Raises the soft limit of open files to the hard one. Programs that are started get the old one: some cannot use more, and go
// through all numbers. restore_file_limit() is for who forks by itself.
void raise_file_limit();
void restore_file_limit();
std::size_t file_limit();

// A child that is kept: own process group, pipes as asked. Destroying it kills the group and reaps the child.
class Child {
 public:
  struct Pipes {
    bool in = false, out = false, err = false;  // otherwise: in from /dev/null, out and err inherited
    int in_fd = -1, out_fd = -1, err_fd = -1;   // or these (borrowed) descriptors
    bool die_with_parent = true;                // SIGKILL when the thread that spawned it ends
    bool many_files = false;                    // it keeps our limit of open files; see raise_file_limit()
  };
  Child(const Command& command, const Pipes& pipes);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  Fd in, out, err;                    // our ends
  std::optional<int> poll();          // exit status (or 128 + signal) once it has ended
  int wait(Deadline deadline = {});   // throws Error(timeout)
  void kill(int signal);              // the whole group; nothing once it has ended
  // SIGTERM to the group; SIGKILL to what is left of it when the first process has ended, or after `grace`. Returns when it has.
  void end(Millis grace);

 private:
  pid_t pid_ = -1;
  std::optional<int> status_;
};

}  // namespace rehome
