// cli: the command line: options to ops, news to ui, errors to exit statuses. No work is done here.
#pragma once

#include "ops/ops.h"

namespace rehome::cli {

// Writes the HTML page of a run (0644: it holds no secret) and emits where it is; the exit status.
int write_report(const ops::ReportOptions& report);

}  // namespace rehome::cli
