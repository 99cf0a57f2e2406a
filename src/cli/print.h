// cli: the command line: options to ops, news to the terminal, errors to exit statuses. No work is done here.
#pragma once

#include "base/error.h"
#include "base/json.h"
#include "ops/ops.h"

namespace rehome::cli {

struct PrintOptions {
  bool json = false;
  bool quiet = false;
};

// Prints one object of ops::Emit. A closed terminal stops nothing: output that cannot be written is dropped.
void print(const PrintOptions& options, const Json& entry);
void print_error(const PrintOptions& options, const Error& error);

// Makes the HTML page of a run; the exit status.
int write_report(const PrintOptions& options, const ops::ReportOptions& report);

}  // namespace rehome::cli
