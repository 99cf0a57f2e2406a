#include "base/error.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace rehome {
namespace {

constexpr std::array kTable{
    CodeInfo{Code::internal, "internal", 70, "a bug in rehome; please report it with the journal"},
    CodeInfo{Code::usage, "usage", 2, "the command line is wrong"},
    CodeInfo{Code::config, "config", 3, "rehome.yaml is wrong; every mistake is listed with line and column"},
    CodeInfo{Code::preflight, "preflight", 4, "check found something that would break the migration"},
    CodeInfo{Code::unreachable, "unreachable", 5, "a site, server or socket does not answer"},
    CodeInfo{Code::denied, "denied", 6, "a site or server refuses us: key, password, rights or host key"},
    CodeInfo{Code::state, "state", 7, "the run is not in a state that allows this command"},
    CodeInfo{Code::conflict, "conflict", 8, "another controller or run holds this deployment"},
    CodeInfo{Code::stale_plan, "stale-plan", 9, "facts changed since the plan was saved; it says which"},
    CodeInfo{Code::backed_out, "backed-out", 10, "the switch was undone: the yielding site serves, nothing is lost"},
    CodeInfo{Code::store, "store", 11, "a store failed or refused"},
    CodeInfo{Code::verify, "verify", 12, "the sites differ; the differences are listed"},
    CodeInfo{Code::check_failed, "check-failed", 13, "one of the deployment's own checks failed"},
    CodeInfo{Code::timeout, "timeout", 14, "a deadline passed"},
    CodeInfo{Code::io, "io", 15, "a file or disk failed"},
    CodeInfo{Code::unknown, "unknown", 16, "what was asked for is not known to have come about, or is decided and not done yet; see status"},
    CodeInfo{Code::interrupted, "interrupted", 130, "stopped by a signal; resume or cancel continues"},
};

}  // namespace

const CodeInfo& error_info(Code code) {
  for (const auto& row : kTable)
    if (row.code == code) return row;
  REHOME_CHECK(false && "every code has a row");
  std::abort();
}

const CodeInfo* error_table(std::size_t& count) {
  count = kTable.size();
  return kTable.data();
}

Code code_from_name(std::string_view name) {
  for (const auto& row : kTable)
    if (row.name == name) return row.code;
  return Code::internal;
}

Error errno_error(int err, std::string_view call, std::string_view object, std::string hint) {
  std::string text(call);
  text += ' ';
  text += object;
  text += ": ";
  text += std::strerror(err);
  Error e(Code::io, std::move(text), std::move(hint), err == EAGAIN || err == EINTR);
  e.err = err;
  return e;
}

void broken_invariant(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "rehome: internal error: %s does not hold (%s:%d)\n", condition, file, line);
  std::abort();
}

}  // namespace rehome
