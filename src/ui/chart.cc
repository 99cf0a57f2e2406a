#include "ui/chart.h"

#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "ui/page.h"

namespace rehome::ui {
namespace {

constexpr double kWidth = 950, kHeight = 240, kLeft = 70, kRight = 12, kTop = 22, kBottom = 26;

// The least of 1, 2, 5 times a power of ten that is not below v.
double nice(double v) {
  double base = std::pow(10, std::floor(std::log10(std::max(v, 1.0))));
  for (double f : {1.0, 2.0, 5.0, 10.0})
    if (f * base >= v) return f * base;
  return 10 * base;
}

// At most 500 points, of each stretch of time the worst: a peak is what a chart of lag is for.
std::vector<StoryLag> thinned(const std::vector<StoryLag>& all) {
  if (all.size() <= 500) return all;
  std::vector<StoryLag> out;
  std::size_t step = (all.size() + 499) / 500;
  for (std::size_t i = 0; i < all.size(); i += step)
    out.push_back(*std::max_element(all.begin() + static_cast<std::ptrdiff_t>(i), all.begin() + static_cast<std::ptrdiff_t>(std::min(i + step, all.size())),
                                    [](const StoryLag& a, const StoryLag& b) { return a.bytes < b.bytes; }));
  return out;
}

}  // namespace

std::string lag_chart(const Story& story) {
  std::int64_t from = INT64_MAX, to = 0, most = 0;
  std::size_t points = 0;
  for (const auto& [name, lag] : story.lag)
    for (const auto& p : lag) {
      from = std::min(from, p.at_us);
      to = std::max(to, p.at_us);
      most = std::max(most, p.bytes);
      points++;
    }
  if (points < 2 || to <= from) return {};
  double top = nice(static_cast<double>(std::max<std::int64_t>(most, 1000)));
  auto x = [&](std::int64_t at) { return kLeft + (kWidth - kLeft - kRight) * static_cast<double>(at - from) / static_cast<double>(to - from); };
  auto y = [&](double bytes) { return kTop + (kHeight - kTop - kBottom) * (1 - bytes / top); };

  std::string out = "<div class=\"key\">", svg;
  int i = 0;
  for (const auto& [name, lag] : story.lag) {
    if (lag.empty()) continue;
    auto worst = std::max_element(lag.begin(), lag.end(), [](const StoryLag& a, const StoryLag& b) { return a.bytes < b.bytes; });
    if (worst->bytes == 0) {
      // A store that does not know bytes before it sends them says for how long it was behind.
      double ms = 0;
      for (const auto& p : lag) ms = std::max(ms, p.ms);
      out += "<span>" + esc(name) + ": at most " + human_duration(Millis(std::llround(ms))) + "</span>";
      continue;
    }
    std::string c = std::to_string(i++ % 4);
    out += "<span><span class=\"sw b" + c + "\"></span>" + esc(name) + ": at most " + human_bytes(worst->bytes) + ", at the end " + human_bytes(lag.back().bytes) + "</span>";
    svg += "<polyline class=\"line l" + c + "\" points=\"";
    for (const auto& p : thinned(lag)) svg += number(x(p.at_us)) + "," + number(y(static_cast<double>(p.bytes))) + " ";
    svg += "\"/>\n";
  }
  out += "</div>\n<svg viewBox=\"0 0 " + number(kWidth) + " " + number(kHeight) + "\" role=\"img\" aria-label=\"Lag of every store over time\">\n";
  for (int k = 0; k <= 4; k++) {
    double v = top * k / 4;
    out += "<line class=\"grid\" x1=\"" + number(kLeft) + "\" x2=\"" + number(kWidth - kRight) + "\" y1=\"" + number(y(v)) + "\" y2=\"" + number(y(v)) + "\"/>";
    out += "<text x=\"" + number(kLeft - 8) + "\" y=\"" + number(y(v) + 4) + "\" text-anchor=\"end\">" + (k == 0 ? "0" : human_bytes(std::llround(v))) + "</text>\n";
  }
  bool days = date_utc(from) != date_utc(to);
  for (int k = 0; k <= 4; k++) {
    std::int64_t at = from + (to - from) * k / 4;
    std::string text = days ? date_utc(at).substr(0, date_utc(at).size() - 5) + " " + time_utc(at).substr(0, 5) : time_utc(at);
    out += "<text x=\"" + number(x(at)) + "\" y=\"" + number(kHeight - 6) + "\" text-anchor=\"" + (k == 0 ? "start" : k == 4 ? "end" : "middle") + "\">" + text + "</text>\n";
  }
  for (const auto& a : story.attempts) {
    if (!a.switched() || a.at_us < from || a.at_us > to) continue;
    double at = x(a.at_us);
    bool right = at > kWidth - 80;
    out += "<line class=\"mark\" x1=\"" + number(at) + "\" x2=\"" + number(at) + "\" y1=\"" + number(kTop - 6) + "\" y2=\"" + number(kHeight - kBottom) + "\"/>";
    out += "<text x=\"" + number(at + (right ? -5 : 5)) + "\" y=\"" + number(kTop - 8) + "\" text-anchor=\"" + (right ? "end" : "start") + "\">" + esc(a.direction) + "</text>\n";
  }
  return out + svg + "</svg>\n";
}

}  // namespace rehome::ui
