#include "ui/page.h"

#include <cstdio>
#include <ctime>

#include "base/clock.h"
#include "base/text.h"

namespace rehome::ui {
namespace {

std::tm utc(std::int64_t wall_us) {
  std::time_t s = static_cast<std::time_t>(wall_us / 1'000'000);
  std::tm tm{};
  ::gmtime_r(&s, &tm);
  return tm;
}

constexpr std::string_view kStyle = R"css(
:root { color-scheme: light dark;
  --paper: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #5a6675; --line: #dfe4ea; --faint: #eef1f4;
  --good: #12713f; --good-bg: #e3f4ea; --bad: #ac1f24; --bad-bg: #fce8e7; --warn: #8a5200; --warn-bg: #fdf0d8;
  --traffic: #2f6bd0; --fence: #d07a12; --data: #128f80; --decide: #7d56d6; --other: #9aa5b1; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #10151b; --card: #182028; --ink: #e6ebf0; --soft: #9aa8b6; --line: #2b3641; --faint: #202a33;
  --good: #6fd39b; --good-bg: #143425; --bad: #ff9a92; --bad-bg: #43201f; --warn: #f2c06a; --warn-bg: #3b2d12;
  --traffic: #6a9cf0; --fence: #eaa24c; --data: #45bdac; --decide: #a98df0; --other: #6d7a87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 20px 0 8px; }
p { margin: 0 0 10px; } ul { margin: 6px 0; padding-left: 20px; }
.soft { color: var(--soft); } .small { font-size: 13px; } .kicker { color: var(--soft); font-size: 13px; margin: 0 0 4px; }
code, .mono { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; unicode-bidi: isolate; overflow-wrap: anywhere; }
.lines { white-space: pre-line; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px; margin-top: 20px; }
.verdict { border-left: 6px solid var(--other); } .verdict h2 { font-size: 22px; line-height: 1.3; margin: 0 0 6px; }
.verdict p:last-child { margin: 0; }
.verdict.good { border-left-color: var(--good); } .verdict.bad { border-left-color: var(--bad); } .verdict.warn { border-left-color: var(--fence); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin-top: 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card .what { color: var(--soft); font-size: 13px; } .card .big { font-size: 28px; font-weight: 650; line-height: 1.25; letter-spacing: -0.01em; }
.card .more { color: var(--soft); font-size: 13px; }
.life { display: flex; flex-wrap: wrap; list-style: none; margin: 24px 0 0; padding: 0; gap: 0; }
.life li { flex: 1 1 110px; border-top: 3px solid var(--line); padding: 10px 10px 0 0; position: relative; color: var(--soft); font-size: 13px; }
.life li b { display: block; font-size: 14px; font-weight: 600; } .life li.done { border-top-color: var(--good); color: var(--ink); }
.life li::before { content: ""; position: absolute; top: -8px; left: 0; width: 13px; height: 13px; border-radius: 50%; background: var(--card); border: 3px solid var(--line); box-sizing: border-box; }
.life li.done::before { background: var(--good); border-color: var(--good); } .life .soft { display: block; }
.badge { display: inline-block; border-radius: 20px; padding: 1px 10px; font-size: 13px; font-weight: 600; white-space: nowrap; }
.badge.good { color: var(--good); background: var(--good-bg); } .badge.bad { color: var(--bad); background: var(--bad-bg); } .badge.warn { color: var(--warn); background: var(--warn-bg); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--soft); padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { padding: 7px 14px 7px 0; border-bottom: 1px solid var(--faint); vertical-align: top; } tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } .t { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: flex; gap: 2px; height: 44px; border-radius: 6px; overflow: hidden; margin-top: 4px; }
.bar div { min-width: 2px; color: #fff; font-size: 12px; line-height: 1.25; padding: 6px 0 0 7px; overflow: hidden; white-space: nowrap; text-overflow: clip; }
@media (prefers-color-scheme: dark) { .bar div { color: #0c1218; } }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: 12px; margin: 4px 0 10px; font-variant-numeric: tabular-nums; }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); margin: 0 0 14px; } .key span { display: inline-flex; align-items: center; gap: 7px; }
.sw { display: inline-block; width: 11px; height: 11px; border-radius: 3px; flex: none; }
.traffic { background: var(--traffic); } .fence { background: var(--fence); } .data { background: var(--data); } .decide { background: var(--decide); } .other { background: var(--other); }
.share { display: inline-block; height: 9px; border-radius: 2px; vertical-align: middle; }
.steps { display: grid; grid-template-columns: minmax(160px, 34%) 1fr auto; gap: 6px 14px; align-items: center; }
.steps .track { background: var(--faint); border-radius: 4px; height: 14px; position: relative; } .steps .track div { position: absolute; top: 0; bottom: 0; border-radius: 4px; min-width: 3px; background: var(--data); }
.steps .track .failed { background: var(--bad); } .steps .track .undone, .steps .track .started { background: var(--fence); }
.steps .why { grid-column: 1 / -1; color: var(--bad); font-size: 13px; margin: -4px 0 4px; }
details { margin-top: 12px; } summary { cursor: pointer; font-weight: 600; } summary:hover { color: var(--traffic); } details > *:not(summary) { margin-top: 10px; }
.warnbox { background: var(--warn-bg); color: var(--warn); border-radius: 8px; padding: 10px 14px; margin: 0 0 12px; } .badbox { background: var(--bad-bg); color: var(--bad); border-radius: 8px; padding: 10px 14px; margin: 0 0 12px; }
.warnbox ul, .badbox ul { margin-bottom: 0; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; } svg .grid { stroke: var(--line); stroke-width: 1; } svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
.l0 { stroke: var(--traffic); } .l1 { stroke: var(--fence); } .l2 { stroke: var(--data); } .l3 { stroke: var(--decide); } .b0 { background: var(--traffic); } .b1 { background: var(--fence); } .b2 { background: var(--data); } .b3 { background: var(--decide); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
footer { color: var(--soft); font-size: 13px; margin-top: 28px; }
@media (max-width: 620px) { main { padding: 24px 14px 48px; } section { padding: 18px 16px; } .steps { grid-template-columns: 1fr auto; } .steps .track { grid-column: 1 / -1; grid-row: auto; order: 3; } h1 { font-size: 26px; }
  .life { flex-direction: column; } .life li { border-top: 0; border-left: 3px solid var(--line); padding: 0 0 14px 16px; flex: none; } .life li.done { border-left-color: var(--good); } .life li::before { top: 3px; left: -8px; } }
@media print { :root { --paper: #fff; } section, .card { break-inside: avoid; } main { padding: 0; max-width: none; } .bar div, .sw, .share, .steps .track div { print-color-adjust: exact; } }
)css";

}  // namespace

std::string esc(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); i++) {
    auto c = static_cast<unsigned char>(text[i]);
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      case '\n': out += '\n'; break;
      default:
        if (c < 0x20 || c == 0x7F) {
          char buf[8];
          std::snprintf(buf, sizeof buf, "\\x%02x", c);
          out += buf;
        } else {
          out += static_cast<char>(c);
        }
    }
  }
  return out;
}

std::string date_utc(std::int64_t wall_us) {
  static constexpr const char* months[] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  std::tm tm = utc(wall_us);
  return std::to_string(tm.tm_mday) + " " + months[tm.tm_mon] + " " + std::to_string(tm.tm_year + 1900);
}

std::string time_utc(std::int64_t wall_us) {
  std::tm tm = utc(wall_us);
  char buf[48];
  std::snprintf(buf, sizeof buf, "%02d:%02d:%02d", tm.tm_hour, tm.tm_min, tm.tm_sec);
  return buf;
}

std::string time_ms_utc(std::int64_t wall_us) {
  char buf[16];
  std::snprintf(buf, sizeof buf, ".%03d", static_cast<int>(wall_us / 1000 % 1000));
  return time_utc(wall_us) + buf;
}

std::string span_of(std::int64_t from_us, std::int64_t to_us) { return human_duration(Millis((to_us - from_us) / 1000)); }

std::string number(double v) {
  char buf[48];
  std::snprintf(buf, sizeof buf, "%.3f", v);
  std::string s = buf;
  for (char& c : s)
    if (c == ',') c = '.';
  while (s.back() == '0') s.pop_back();
  if (s.back() == '.') s.pop_back();
  return s;
}

std::string table(const std::vector<Cell>& head, const std::vector<std::vector<Cell>>& rows) {
  std::string out = "<div class=\"scroll\"><table><thead><tr>";
  for (const auto& c : head) out += std::string("<th class=\"") + c.style + "\" scope=\"col\">" + c.html + "</th>";
  out += "</tr></thead><tbody>\n";
  for (const auto& row : rows) {
    out += "<tr>";
    for (const auto& c : row) out += std::string("<td class=\"") + c.style + "\">" + c.html + "</td>";
    out += "</tr>\n";
  }
  return out + "</tbody></table></div>\n";
}

std::string badge(bool good, std::string_view text) {
  return std::string("<span class=\"badge ") + (good ? "good\">✓ " : "bad\">✗ ") + esc(text) + "</span>";
}

std::string page(std::string_view title, std::string_view body) {
  std::string out = "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n"
                    "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
                    // A page that holds text from two servers may load and run nothing.
                    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;\"/>\n"
                    "<title>";
  out += esc(title);
  out += "</title>\n<style>";
  out += kStyle;
  out += "</style>\n</head>\n<body>\n<main>\n";
  out += body;
  return out + "</main>\n</body>\n</html>\n";
}

}  // namespace rehome::ui
