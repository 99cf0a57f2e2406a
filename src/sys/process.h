// Child processes: run to the end with captured output, or kept with their pipes.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
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
  bool ok() const { return status == 0; }
};

// Runs to the end and captures both outputs (each at most 16 MiB, the rest is read and dropped). At the deadline the
// process group is killed and Error(timeout) thrown; a program that cannot be started is Error(io) with a hint.
Outcome run(const Command& command, Deadline deadline = {});
// The same, and a status other than 0 is an Error(code) with the last lines of standard error.
Outcome run_ok(const Command& command, Deadline deadline = {}, const char* what = nullptr);

// A child that is kept: own process group, pipes as asked. Destroying it kills the group and reaps the child.
class Child {
 public:
  struct Pipes {
    bool in = false, out = false, err = false;  // otherwise: in from /dev/null, out and err inherited
    int in_fd = -1, out_fd = -1, err_fd = -1;   // or these (borrowed) descriptors
    bool die_with_parent = true;                // SIGKILL when the thread that spawned it ends
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

 private:
  pid_t pid_ = -1;
  std::optional<int> status_;
};

}  // namespace rehome
