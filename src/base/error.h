// base: errors, clocks, text and JSON. No I/O lives here, and nothing here may include another folder.
#pragma once

#include <exception>
#include <string>
#include <string_view>

namespace rehome {

// What went wrong, as far as the person who reads it must tell cases apart. Every code has one row in
// error_info(): its name, its exit status and one line of documentation, which `rehome --help` prints.
enum class Code {
  internal,       // a bug: an invariant did not hold
  usage,          // the command line is wrong
  config,         // rehome.yaml is wrong
  preflight,      // a finding that would break the migration
  unreachable,    // a site, server or socket does not answer
  denied,         // it answers, and refuses us (password, rights, host key)
  state,          // the run is not in a state that allows this command
  conflict,       // another controller, run or generation holds the deployment
  stale_plan,     // a saved plan was made from facts that changed
  backed_out,     // a switch was tried and undone: the yielding site serves, nothing is lost
  store,          // a store failed or refused
  verify,         // the sites differ
  check_failed,   // one of the deployment's own checks failed
  timeout,        // a deadline passed
  io,             // a file or disk failed
  unknown,        // the outcome is not known; nothing was undone
  interrupted,    // stopped by a signal; resume or cancel continues
};

struct CodeInfo {
  Code code;
  std::string_view name;
  int exit_status;
  std::string_view meaning;
};

const CodeInfo& error_info(Code code);
// All rows, in the order of the enum; size is in `count`.
const CodeInfo* error_table(std::size_t& count);
// The code with this name; Code::internal for a name that no version of ours has written.
Code code_from_name(std::string_view name);

// The one exception type. `message` says what failed on which object, `context` where (site, store, step; may be
// empty), `hint` what the person does next. `retryable` is true where the same call may succeed a moment later.
// None of the texts may contain a secret.
class Error : public std::exception {
 public:
  Error(Code code, std::string message, std::string hint = {}, bool retryable = false)
      : code(code), message(std::move(message)), hint(std::move(hint)), retryable(retryable) {
    render();
  }
  // The same error with `where` in front of its context ("target: shop").
  Error in(std::string_view where) const {
    Error e = *this;
    e.context = context.empty() ? std::string(where) : std::string(where) + ": " + context;
    e.render();
    return e;
  }
  // It may end by itself: who waits anyway goes on waiting. A conflict is another's word, and does not.
  bool passes() const { return (retryable || code == Code::unreachable) && code != Code::conflict; }
  const char* what() const noexcept override { return rendered_.c_str(); }

  Code code;
  std::string message;
  std::string context;
  std::string hint;
  bool retryable;
  int err = 0;  // errno of the system call that failed, here and not at another agent; 0: none

 private:
  void render() { rendered_ = context.empty() ? message : context + ": " + message; }
  std::string rendered_;
};

// "message: strerror(err)" as Code::io, for a failed system call on `object`.
Error errno_error(int err, std::string_view call, std::string_view object, std::string hint = {});

// Ends the process with a message: for broken invariants only.
[[noreturn]] void broken_invariant(const char* condition, const char* file, int line);

}  // namespace rehome

#define REHOME_CHECK(condition) \
  ((condition) ? (void)0 : ::rehome::broken_invariant(#condition, __FILE__, __LINE__))
