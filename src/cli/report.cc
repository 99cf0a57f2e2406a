#include "cli/report.h"

#include "sys/fs.h"
#include "ui/report.h"

namespace rehome::cli {

int write_report(const ops::ReportOptions& report) {
  std::string page = ui::report_html(ops::report_entries(report));
  std::string path = report.out.empty() ? "rehome-report.html" : report.out;
  write_durably(path, page, 0644);
  report.emit({{"kind", "result"}, {"what", "report"}, {"text", path}});
  return 0;
}

}  // namespace rehome::cli
