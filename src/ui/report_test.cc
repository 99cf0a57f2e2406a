#include "ui/report.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "base/text.h"
#include "sys/fs.h"
#include "ui/page.h"

namespace rehome::ui {
namespace {

std::vector<Json> journal(const std::string& name) {
  std::vector<Json> entries;
  for (const auto& line : split(read_file(std::string(REHOME_UI_TESTDATA) + "/" + name), '\n'))
    if (!line.empty()) entries.push_back(Json::parse(line));
  return entries;
}

// Every element closed in order, every attribute quoted, no bare & or <; returns what is wrong, empty when nothing is.
std::string not_well_formed(const std::string& html) {
  std::vector<std::string> open;
  std::size_t i = html.find("<html");
  if (!html.starts_with("<!DOCTYPE html>\n") || i == std::string::npos) return "no document";
  while (i < html.size()) {
    if (html[i] == '&') {
      std::size_t end = html.find(';', i);
      if (end == std::string::npos || end - i > 7) return "bare & at " + html.substr(i, 40);
    }
    if (html[i] != '<') {
      i++;
      continue;
    }
    std::size_t end = i + 1;
    char quote = 0;
    while (end < html.size() && (quote || html[end] != '>')) {
      if (html[end] == '"') quote = quote ? 0 : '"';
      else if (html[end] == '<') return "< inside a tag: " + html.substr(i, 80);
      else if (html[end] == '=' && !quote && html[end + 1] != '"') return "attribute without quotes: " + html.substr(i, 80);
      end++;
    }
    if (end == html.size()) return "unended tag: " + html.substr(i, 80);
    std::string tag = html.substr(i + 1, end - i - 1);
    i = end + 1;
    if (tag.back() == '/') continue;
    std::string name = tag.substr(0, tag.find_first_of(" \n"));
    if (name[0] == '/') {
      if (open.empty() || open.back() != name.substr(1)) return name + " closes " + (open.empty() ? "nothing" : open.back()) + " before " + html.substr(i, 60);
      open.pop_back();
      continue;
    }
    if (name == "style") {
      i = html.find("</style>", i) + 8;
      continue;
    }
    // These hold no block: a browser would end them where one starts.
    for (const char* block : {"section", "div", "table", "ul", "p"})
      if (name == block && !open.empty() && open.back() == "p") return name + " inside p before " + html.substr(i, 60);
    open.push_back(name);
  }
  return open.empty() ? "" : open.back() + " is not closed";
}

TEST(Report, TellsAWholeMigration) {
  std::string html = report_html(journal("run.jsonl"));
  EXPECT_EQ(not_well_formed(html), "");
  for (const char* id : {"verdict", "life", "pause", "verified", "connections", "lag", "steps", "changes", "messages"})
    EXPECT_NE(html.find("id=\"" + std::string(id) + "\""), std::string::npos) << id;
  for (const char* text : {"shop runs on the target", "The migration is complete", "202 ms", "predicted 180 ms", "allowed 500 ms", "catch up", "59 ms", "1,204", "211 ms", "12,403,118",
                           "3 requests were still in flight", "DROP PUBLICATION", "start condition of web.service (the fence)", "<polyline", "order 1 placed and read back", "40 times"})
    EXPECT_NE(html.find(text), std::string::npos) << text;
  if (const char* keep = std::getenv("REHOME_KEEP_REPORT")) std::ofstream(keep) << html;
}

TEST(Report, StandsByItself) {
  std::string html = report_html(journal("run.jsonl"));
  for (const char* word : {"<script", "<link", "<img", "src=", "@import", "url(", "http://", "https://", "href="}) EXPECT_EQ(html.find(word), std::string::npos) << word;
}

TEST(Report, EveryStateOfARunIsAPage) {
  auto all = journal("run.jsonl");
  for (std::size_t n = 0; n <= all.size(); n++) {
    std::vector<Json> part(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(n));
    std::string wrong = not_well_formed(report_html(part));
    ASSERT_EQ(wrong, "") << "after " << n << " entries";
  }
}

TEST(Report, SaysWhoServes) {
  auto page_of = [](std::vector<Json> more) {
    std::vector<Json> e{{{"kind", "run"}, {"at", 1}, {"name", "shop"}}};
    e.insert(e.end(), more.begin(), more.end());
    return report_html(e);
  };
  Json phase{{"kind", "phase"}, {"at", 2}, {"attempt", 1}, {"name", "hold"}, {"ms", 2.5}};
  Json switched{{"kind", "pause"}, {"at", 3}, {"attempt", 1}, {"direction", "switch"}, {"total_ms", 90}, {"result", "switched"}};
  Json back{{"kind", "pause"}, {"at", 4}, {"attempt", 2}, {"direction", "reverse"}, {"total_ms", 91}, {"result", "switched"}};
  Json target{{"kind", "serves"}, {"at", 3}, {"side", "target"}}, source{{"kind", "serves"}, {"at", 4}, {"side", "source"}};
  EXPECT_NE(page_of({}).find("The copy has not finished"), std::string::npos);
  EXPECT_NE(page_of({{{"kind", "fact"}, {"key", "phase"}, {"value", "following"}}}).find("Everything is copied and follows"), std::string::npos);
  EXPECT_NE(page_of({phase}).find("The journal ends inside a switch"), std::string::npos);
  EXPECT_NE(page_of({phase, target, switched}).find("shop runs on the target"), std::string::npos);
  EXPECT_NE(page_of({phase, target, switched, source, back}).find("Reversed: the source serves again"), std::string::npos);
  EXPECT_NE(page_of({{{"kind", "serves"}, {"at", 3}, {"side", "target"}, {"forced", true}}}).find("opened by hand"), std::string::npos);
  Json cancelled{{"kind", "fact"}, {"at", std::int64_t{2} * 86'400'000'000 + 5'000'000}, {"key", "phase"}, {"value", "cancelled"}};
  EXPECT_NE(page_of({cancelled}).find("Cancelled: the source serves, as it did all the time"), std::string::npos);
  std::string there_and_back = page_of({phase, target, switched, source, back, cancelled});
  for (const char* text : {"Cancelled: the source serves again", "<b>Switched</b>", "<b>Reversed</b>", "3 Jan 1970 00:00:05"})
    EXPECT_NE(there_and_back.find(text), std::string::npos) << text;
}

TEST(Report, AControllerThatDiedLeavesATrueVerdict) {
  auto page_of = [](std::vector<Json> more) {
    std::vector<Json> e{{{"kind", "run"}, {"at", 1}, {"name", "shop"}}, {{"kind", "fact"}, {"key", "phase"}, {"value", "following"}}};
    e.insert(e.end(), more.begin(), more.end());
    return report_html(e);
  };
  auto phase_is = [](const char* value) { return Json{{"kind", "fact"}, {"at", 5}, {"key", "phase"}, {"value", value}}; };
  auto found = [](const char* side) { return Json{{"kind", "serves"}, {"at", 5}, {"side", side}, {"found", true}}; };
  auto has = [](const std::string& html, const char* text) { return html.find(text) != std::string::npos; };
  Json hold{{"kind", "phase"}, {"at", 2}, {"attempt", 1}, {"name", "hold"}, {"ms", 2.5}};
  Json out{{"kind", "pause"}, {"at", 3}, {"attempt", 1}, {"direction", "switch"}, {"total_ms", 90}, {"result", "backed out"}};
  Json switched = out, target{{"kind", "serves"}, {"at", 3}, {"side", "target"}};
  switched["result"] = "switched";
  for (const auto& before : std::vector<std::vector<Json>>{{}, {hold}, {hold, out}}) {
    auto entries = before;
    entries.insert(entries.end(), {found("target"), phase_is("switched")});
    std::string html = page_of(entries);
    EXPECT_TRUE(has(html, "shop runs on the target")) << before.size();
    EXPECT_TRUE(has(html, "was finished by the agents")) << before.size();
    EXPECT_FALSE(has(html, "The journal ends inside")) << before.size();
    entries.push_back(phase_is("completed"));
    EXPECT_TRUE(has(page_of(entries), "The migration is complete")) << before.size();
  }
  std::string html = page_of({hold, target, switched, hold, found("source"), phase_is("following")});
  EXPECT_TRUE(has(html, "Reversed: the source serves again"));
  EXPECT_TRUE(has(html, "The way back was finished by the agents"));
  // The agents undid it: the source never stopped serving.
  html = page_of({hold, found("source")});
  for (const char* text : {"Everything is copied and follows", "never stopped", "undone by the agents"}) EXPECT_TRUE(has(html, text)) << text;
  EXPECT_TRUE(has(page_of({hold, target, switched, phase_is("completed"), hold}), "The migration is complete"));
  EXPECT_TRUE(has(page_of({phase_is("cancelling")}), "The cancel has not finished"));
}

TEST(Report, EscapesWhatTheSitesSay) {
  std::string evil = "\"'><script>alert(1)</script>&amp;\x1b[2J\x01 <!-- ]]> \u202e";
  std::vector<Json> entries;
  int n = 0;
  auto add = [&](const char* kind, Json data) {
    data["kind"] = kind;
    data["at"] = 1772402403000000 + n * 1000000;
    data["n"] = n++;
    entries.push_back(data);
  };
  add("run", {{"name", evil}, {"hash", evil}, {"command", evil}, {"sites", {{"source", evil}, {"target", evil}}}, {"agents", {{"source", evil}}}});
  add("step", {{"id", evil}, {"title", evil}, {"state", "started"}});
  add("step", {{"id", evil}, {"title", evil}, {"state", evil}, {"error", {{"message", evil}, {"context", evil}}}});
  add("change", {{"what", evil}, {"where", evil}, {"undo", evil}, {"object", evil}});
  add("lag", {{"store", evil}, {"bytes", 5}});
  add("lag", {{"store", evil}, {"bytes", 9}});
  add("phase", {{"attempt", 1}, {"name", evil}, {"ms", 400}, {"error", {{"message", evil}}}});
  add("ledger", {{"held", 4}, {"longest_wait_ms", 3}});
  add("pause", {{"attempt", 1}, {"direction", evil}, {"total_ms", 401}, {"result", evil}, {"error", {{"message", evil}, {"hint", evil}}}});
  add("phase", {{"attempt", 2}, {"name", evil}, {"ms", 400}});
  add("pause", {{"attempt", 2}, {"direction", evil}, {"total_ms", 401}, {"result", "switched"}});
  add("verify", {{"store", evil}, {"equal", false}, {"compared", 1}, {"differences", {{{"object", evil}, {"what", evil}}}}});
  for (const char* kind : {"check", "canary"}) add(kind, {{"name", evil}, {"side", evil}, {"ok", false}, {"ms", 1}, {"said", evil}});
  add("serves", {{"side", evil}});
  add("left", {{"what", {evil}}, {"unexpected", {evil}}});
  add("message", {{"text", evil}});
  add("error", {{"error", {{"message", evil}, {"hint", evil}}}});
  std::string html = report_html(entries);
  EXPECT_EQ(not_well_formed(html), "");
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(html.find("<!--"), std::string::npos);
  EXPECT_EQ(html.find('\x1b'), std::string::npos);
  EXPECT_EQ(html.find('\x01'), std::string::npos);
  EXPECT_NE(html.find("&lt;script&gt;alert(1)"), std::string::npos);
}

TEST(Report, OddEntriesAreLeftOutAndNoError) {
  std::vector<Json> entries{Json(3), Json("x"), Json::array({1}), Json::object()};
  for (const char* kind : {"run", "step", "change", "fact", "lag", "phase", "pause", "ledger", "verify", "check", "canary", "serves", "left", "error", "message", "unheard of"}) {
    entries.push_back({{"kind", kind}});
    entries.push_back({{"kind", kind}, {"at", "x"}, {"name", 3}, {"ms", "soon"}, {"attempt", nullptr}, {"differences", 4}, {"what", 5}, {"error", 6}, {"sites", 7}, {"bytes", 1e300}, {"value", {1}}, {"state", 8}});
    entries.push_back({{"kind", kind}, {"at", 1e300}, {"ms", -5}, {"total_ms", -1}});
    entries.push_back({{"kind", kind}, {"at", -5}});
  }
  EXPECT_EQ(not_well_formed(report_html(entries)), "");
  EXPECT_EQ(not_well_formed(report_html({})), "");
}

TEST(Page, TimesAreUtcAndNumbersPlain) {
  EXPECT_EQ(date_utc(1772402403412000), "1 Mar 2026");
  EXPECT_EQ(time_ms_utc(1772402403412000), "22:00:03.412");
  EXPECT_EQ(number(1234567.5), "1234567.5");
  EXPECT_EQ(number(0.0004), "0");
}

}  // namespace
}  // namespace rehome::ui
