#include "ui/report.h"

#include <algorithm>
#include <cmath>

#include "base/text.h"
#include "ui/chart.h"
#include "ui/look.h"
#include "ui/page.h"
#include "ui/story.h"
#include "ui/text_view.h"

namespace rehome::ui {
namespace {

struct PhaseInfo {
  std::string_view name, group, words;
};
constexpr PhaseInfo kPhases[] = {
    {"hold", "traffic", "new requests wait at the gate"},
    {"drain", "traffic", "requests in flight finish"},
    {"soft fence", "fence", "writers of every store wait"},
    {"freeze", "fence", "the services are frozen"},
    {"marker", "data", "a marker is written behind the last write"},
    {"catch up", "data", "the markers, and so all before them, are on the other side"},
    {"compare", "data", "counts, sequences and catalogues are compared"},
    {"arm reverse", "data", "the way back is positioned at the cut"},
    {"read canary", "data", "the new side answers correctly"},
    {"seal", "decide", "the gate waits for the decision alone"},
    {"hard fence", "fence", "the old side refuses writes for good"},
    {"open", "decide", "the decision is durable, the new side opens, requests go on"},
    {"commit", "decide", "the decision is durable on both sides"},
    {"release", "traffic", "waiting requests go to the new side"},
};
constexpr std::pair<std::string_view, std::string_view> kGroups[] = {
    {"traffic", "requests"}, {"fence", "fences"}, {"data", "catching up and proof"}, {"decide", "decision"}, {"other", "between the phases"}};

PhaseInfo info(std::string_view name) {
  for (const auto& p : kPhases)
    if (p.name == name) return p;
  return {name, "other", ""};
}

std::string section(std::string_view id, std::string_view title, const std::string& body) {
  return "<section id=\"" + std::string(id) + "\">\n<h2>" + esc(title) + "</h2>\n" + body + "</section>\n";
}
std::string none(std::string_view text) { return "<p class=\"soft\">" + esc(text) + "</p>\n"; }
std::string lines(std::string_view text) { return "<span class=\"lines\">" + esc(text) + "</span>"; }
std::string plural(std::int64_t n, const std::string& one, const std::string& many) { return grouped(n) + " " + (n == 1 ? one : many); }

class Report {
 public:
  explicit Report(const Story& s) : s_(s) {
    for (const auto& a : s.attempts)
      if (a.switched()) last_ = &a;
    for (const auto& v : s.verified) newest_[v.store] = &v;
  }

  std::string html() {
    if (s_.entries == 0) return page("rehome report", "<h1>rehome report</h1>\n" + section("empty", "Nothing yet", none("The journal has no entries.")));
    std::string body = head() + verdict() + cards() + life();
    body += section("pause", "The pause, and where it went", pause());
    body += section("verified", "What was verified", verified());
    body += section("connections", "Connections during the pause", connections());
    body += section("lag", "How far behind the other side was", lag());
    body += section("steps", "Steps", steps());
    body += section("changes", "What was changed, and what is left", changes());
    body += section("messages", "Messages and errors", messages());
    return page("rehome: " + (s_.name.empty() ? "report" : s_.name), body + foot());
  }

 private:
  // A run may take days: with the date where that is not the first one's.
  std::string when(std::int64_t us) const { return (date_utc(us) == date_utc(s_.from_us) ? "" : date_utc(us) + " ") + time_utc(us); }
  std::string serving() const { return s_.serves.empty() ? "source" : s_.serves.back().side; }
  std::string site(const std::string& side) const {
    auto it = s_.sites.find(side);
    return it == s_.sites.end() ? side : it->second;
  }
  bool completed() const { return s_.phase == "completed"; }
  bool cancelled() const { return s_.phase == "cancelled"; }

  std::string head() const {
    std::string out = "<p class=\"kicker\">rehome report</p>\n<h1>" + esc(s_.name.empty() ? "A run without a name" : s_.name) + "</h1>\n<p class=\"soft\">";
    // Labels of sites start with their side.
    if (!s_.sites.empty()) out += esc(site("source")) + " → " + esc(site("target")) + "<br/>";
    out += date_utc(s_.from_us) + ", " + time_utc(s_.from_us) + " to ";
    if (date_utc(s_.from_us) != date_utc(s_.to_us)) out += date_utc(s_.to_us) + ", ";
    return out + time_utc(s_.to_us) + " UTC (" + span_of(s_.from_us, s_.to_us) + ")</p>\n";
  }

  std::string verdict() const {
    const char* tone = "";
    std::string title, text;
    const StoryAttempt* newest = s_.attempts.empty() ? nullptr : &s_.attempts.back();
    if (!s_.serves.empty() && s_.serves.back().forced) {
      tone = "warn";
      title = "The " + serving() + " serves, opened by hand without the other side";
      text = "A person said that the other host is off. If it comes back, it meets the higher epoch and fences itself.";
    } else if (cancelled()) {
      tone = "warn";
      title = reversed() ? "Cancelled: the source serves again" : "Cancelled: the source serves, as it did all the time";
      text = last_ && last_->direction == "reverse" ? "The way back was at " + when(last_->at_us) + " UTC. What was copied to the target has been removed." : "What was copied to the target has been removed.";
    } else if (s_.phase == "cancelling") {
      tone = "warn";
      title = "The cancel has not finished; the source serves";
      text = "“rehome cancel” goes on with it.";
    } else if (newest && newest->result.empty() && !completed()) {
      tone = "bad";
      title = "The journal ends inside a " + std::string(newest->direction.empty() ? "switch" : newest->direction);
      text = "The agents decide it by themselves. “rehome status” says who serves; “rehome resume” follows them to the end.";
    } else if (serving() == "target") {
      tone = differs() ? "bad" : "good";
      title = (s_.name.empty() ? std::string("The deployment") : s_.name) + " runs on the target";
      text = seen() ? "The switch at " + when(last_->at_us) + " UTC paused writes for " + exact_ms(last_->total_ms) + "." : unseen("switch") + ".";
      if (completed()) text += " The migration is complete.";
      else if (s_.phase == "completing") text += " “rehome complete” goes on with taking rehome away from both sites.";
      else text += " The source follows the target: until “rehome complete”, “rehome reverse” goes back and loses nothing.";
    } else if (reversed()) {
      tone = "warn";
      title = "Reversed: the source serves again";
      text = (seen() ? "The way back at " + when(last_->at_us) + " UTC paused writes for " + exact_ms(last_->total_ms) : unseen("way back")) + "; the target's writes came along.";
    } else if (newest && newest->result == "backed out") {
      tone = "warn";
      title = "The switch backed out: the source serves as before";
      text = "Nothing is lost, and it can be tried again. The reason: " + newest->error;
    } else if (s_.phase == "following") {
      tone = "good";
      title = "Everything is copied and follows; the source serves";
      text = "“rehome switch” is what comes next.";
    } else {
      tone = "warn";
      title = "The copy has not finished; the source serves";
      text = "“rehome resume” continues, “rehome cancel” takes everything back.";
    }
    return "<section class=\"verdict " + std::string(tone) + "\" id=\"verdict\">\n<h2>" + esc(title) + "</h2>\n<p>" + lines(text) + "</p>\n</section>\n";
  }

  bool reversed() const { return serving() == "source" && std::any_of(s_.serves.begin(), s_.serves.end(), [](const auto& e) { return e.side == "target"; }); }
  // Whether the controller that brought who serves now saw the end of it.
  bool seen() const { return last_ && !s_.serves.back().found; }
  std::string unseen(const std::string& what) const {
    return "The " + what + " was finished by the agents, without the controller that began it, so its pause is not known; it was found at " + when(s_.serves.back().at_us) + " UTC";
  }

  bool differs() const {
    return std::any_of(newest_.begin(), newest_.end(), [](const auto& v) { return !v.second->equal; });
  }

  static std::string card(std::string_view what, const std::string& big, const std::string& more) {
    return "<div class=\"card\"><div class=\"what\">" + esc(what) + "</div><div class=\"big\">" + esc(big) + "</div><div class=\"more\">" + esc(more) + "</div></div>\n";
  }

  std::string cards() const {
    std::string out = "<div class=\"cards\">\n" + card("Serves", serving(), serving() == "source" && s_.serves.empty() ? "never stopped" : "since " + when(s_.serves.empty() ? s_.from_us : s_.serves.back().at_us) + " UTC");
    if (last_) {
      std::string more = last_->predicted_ms > 0 ? "predicted " + exact_ms(last_->predicted_ms) : "";
      if (s_.max_pause_ms > 0) more += std::string(more.empty() ? "" : ", ") + "allowed " + exact_ms(s_.max_pause_ms);
      out += card("Pause of the last " + last_->direction, exact_ms(last_->total_ms), more);
      if (last_->ledger.is_object())
        out += card("Connections dropped", grouped(whole(last_->ledger, "dropped") + whole(last_->ledger, "resets") + whole(last_->ledger, "past_gate")),
                    plural(whole(last_->ledger, "held"), "waited", "waited") + ", " + grouped(whole(last_->ledger, "cut")) + " cut");
    }
    if (!newest_.empty()) {
      std::int64_t compared = 0, differences = 0;
      for (const auto& [name, v] : newest_) {
        compared += v->compared;
        differences += static_cast<std::int64_t>(v->differences.size()) + v->more;
      }
      out += card("Differences found", grouped(differences), grouped(compared) + " rows and files compared");
    }
    return out + "</div>\n";
  }

  std::string life() const {
    struct Mark {
      std::string title;
      std::int64_t at = 0;
    };
    auto reached = [&](const char* phase) {
      auto it = s_.milestones.find(phase);
      return it == s_.milestones.end() ? std::int64_t{0} : it->second;
    };
    std::vector<Mark> marks{{"Begun", s_.from_us}, {"Everything follows", reached("following")}};
    if (!s_.verified.empty() || !cancelled()) marks.push_back({"Compared", s_.verified.empty() ? 0 : s_.verified.back().at_us});
    for (const auto& a : s_.attempts)
      if (a.switched()) marks.push_back({a.direction == "reverse" ? "Reversed" : "Switched", a.at_us});
    if (!last_ && !cancelled()) marks.push_back({"Switched", reached("switched")});
    marks.push_back(cancelled() ? Mark{"Cancelled", reached("cancelled")} : Mark{"Completed", reached("completed")});
    // What has happened in its order; what has not, after it.
    std::stable_sort(marks.begin(), marks.end(), [](const Mark& a, const Mark& b) { return (a.at == 0 ? INT64_MAX : a.at) < (b.at == 0 ? INT64_MAX : b.at); });
    std::string out = "<ol class=\"life\" id=\"life\">\n";
    for (const auto& m : marks) {
      out += std::string("<li class=\"") + (m.at ? "done" : "open") + "\"><b>" + esc(m.title) + "</b>";
      out += m.at ? when(m.at) : "not yet";
      out += "</li>\n";
    }
    return out + "</ol>\n";
  }

  std::string bar(const StoryAttempt& a) const {
    double sum = 0;
    for (const auto& p : a.phases) sum += p.ms;
    double total = std::max(a.total_ms, sum), rest = total - sum;
    std::string out = "<div class=\"bar\" role=\"img\" aria-label=\"The phases of the pause, in order\">";
    auto segment = [&](std::string_view group, std::string_view name, double ms) {
      if (ms <= 0 || total <= 0) return;
      double part = ms / total;
      out += "<div class=\"" + std::string(group) + "\" style=\"flex:" + number(std::max(part * 1000, 1.0)) + " 1 0\" title=\"" + esc(name) + ": " + exact_ms(ms) + "\">";
      // A label that would be cut off is left to the table.
      if (part * 115 > static_cast<double>(std::max<std::size_t>(name.size(), 6)) + 2) out += esc(name) + "<br/>" + exact_ms(ms);
      out += "</div>";
    };
    for (const auto& p : a.phases) segment(info(p.name).group, p.name, p.ms);
    if (rest > total * 0.005) segment("other", "between", rest);
    out += "</div>\n<div class=\"scale\"><span>0</span><span>" + exact_ms(total / 2) + "</span><span>" + exact_ms(total) + "</span></div>\n<div class=\"key\">";
    for (const auto& [group, words] : kGroups) {
      double ms = group == "other" && rest > total * 0.005 ? rest : 0;
      for (const auto& p : a.phases)
        if (info(p.name).group == group) ms += p.ms;
      if (ms > 0) out += "<span><span class=\"sw " + std::string(group) + "\"></span>" + esc(words) + " " + exact_ms(ms) + "</span>";
    }
    return out + "</div>\n";
  }

  std::string phases(const StoryAttempt& a) const {
    double longest = 0, sum = 0;
    for (const auto& p : a.phases) longest = std::max(longest, p.ms), sum += p.ms;
    double total = std::max(a.total_ms, sum);
    std::vector<std::vector<Cell>> rows;
    for (const auto& p : a.phases) {
      PhaseInfo i = info(p.name);
      std::string share = total > 0 ? std::to_string(std::lround(p.ms / total * 100)) + " %" : "";
      std::string what = esc(i.words);
      if (!p.error.empty()) what += std::string(what.empty() ? "" : "<br/>") + badge(false, "failed") + " " + lines(p.error);
      rows.push_back({{"<span class=\"sw " + std::string(i.group) + "\"></span> " + esc(p.name), "t"}, {what}, {exact_ms(p.ms), "n"}, {share, "n"},
                      {longest > 0 ? "<span class=\"share " + std::string(i.group) + "\" style=\"width:" + number(std::max(p.ms / longest * 120, 1.0)) + "px\"></span>" : ""}});
    }
    if (total - sum > total * 0.005)
      rows.push_back({{"<span class=\"sw other\"></span> between", "t"}, {"between one phase and the next"}, {exact_ms(total - sum), "n"}, {std::to_string(std::lround((total - sum) / total * 100)) + " %", "n"}, {""}});
    rows.push_back({{"<b>total</b>", "t"}, {""}, {"<b>" + exact_ms(a.total_ms > 0 ? a.total_ms : sum) + "</b>", "n"}, {"", "n"}, {""}});
    return table({{"Phase"}, {"What happened"}, {"Time", "n"}, {"Share", "n"}, {""}}, rows);
  }

  std::string attempt(const StoryAttempt& a) const {
    std::string out = "<p>" + std::string(a.switched() ? badge(true, a.direction == "reverse" ? "reversed" : "switched")
                                          : a.result.empty() ? "<span class=\"badge warn\">! not finished</span>"
                                                             : "<span class=\"badge warn\">↺ " + esc(a.result) + "</span>");
    out += " <span class=\"soft\">attempt " + std::to_string(a.number) + " at " + (date_utc(a.at_us) == date_utc(s_.from_us) ? "" : date_utc(a.at_us) + " ") + time_ms_utc(a.at_us) + " UTC";
    if (a.predicted_ms > 0) out += ", predicted " + exact_ms(a.predicted_ms);
    if (s_.max_pause_ms > 0) out += ", allowed " + exact_ms(s_.max_pause_ms);
    out += "</span></p>\n";
    if (!a.error.empty()) out += "<div class=\"warnbox\">" + lines(a.error) + (a.hint.empty() ? "" : "<br/>" + lines(a.hint)) + "</div>\n";
    if (!a.phases.empty()) out += bar(a) + phases(a);
    return out;
  }

  std::string pause() const {
    if (s_.attempts.empty()) return none("Nothing has been paused yet: there was no switch.");
    std::string out = attempt(s_.attempts.back());
    for (auto a = s_.attempts.rbegin() + 1; a != s_.attempts.rend(); ++a)
      out += "<details><summary>Attempt " + std::to_string(a->number) + ": " + esc(a->direction.empty() ? "switch" : a->direction) + ", " + esc(a->result.empty() ? "not finished" : a->result) +
             (a->total_ms > 0 ? ", " + exact_ms(a->total_ms) : "") + "</summary>\n<div>" + attempt(*a) + "</div></details>\n";
    return out;
  }

  std::string verified() const {
    std::string out;
    if (newest_.empty()) {
      out += none("The stores have not been compared: “rehome verify” compares them at one consistent point.");
    } else {
      std::vector<std::vector<Cell>> rows;
      for (const auto& v : s_.verified)
        rows.push_back({{"<b>" + esc(v.store) + "</b>"}, {v.equal ? badge(true, "equal") : badge(false, "differs")}, {grouped(v.compared), "n"},
                        {grouped(static_cast<std::int64_t>(v.differences.size()) + v.more), "n"}, {when(v.at_us), "t"}});
      out += table({{"Store"}, {"Result"}, {"Compared", "n"}, {"Differences", "n"}, {"At (UTC)", "t"}}, rows);
    }
    for (const auto& [name, v] : newest_) {
      if (v->equal || v->differences.empty()) continue;
      std::vector<std::vector<Cell>> rows;
      for (const auto& d : v->differences) rows.push_back({{"<code>" + esc(str(d, "object")) + "</code>"}, {esc(str(d, "what"))}});
      out += "<details open=\"open\"><summary>" + plural(static_cast<std::int64_t>(v->differences.size()), "difference", "differences") + " in " + esc(name) +
             (v->more > 0 ? ", and " + grouped(v->more) + " more" : "") + "</summary>\n" + table({{"Object"}, {"What"}}, rows) + "</details>\n";
    }
    if (s_.checks.empty()) return out;
    std::vector<std::vector<Cell>> rows;
    for (const auto& c : s_.checks)
      rows.push_back({{esc(c.name)}, {esc(c.kind == "canary" ? "canary" + (c.side.empty() ? "" : ", " + c.side) : c.side)}, {c.ok ? badge(true, "passed") : badge(false, "failed")}, {exact_ms(c.ms), "n"},
                      {when(c.at_us), "t"}, {c.said.empty() ? "" : "<code class=\"lines\">" + esc(c.said) + "</code>"}});
    return out + "<h3>Checks and canaries</h3>\n" + table({{"Name"}, {"Where"}, {"Result"}, {"Took", "n"}, {"At (UTC)", "t"}, {"It said"}}, rows);
  }

  std::string connections() const {
    std::vector<std::vector<Cell>> rows;
    bool any = false;
    for (const auto& a : s_.attempts) {
      std::string name = esc(a.direction.empty() ? "switch" : a.direction) + " " + std::to_string(a.number);
      if (!a.ledger.is_object()) continue;
      any = true;
      const Json& l = a.ledger;
      rows.push_back({{name}, {grouped(whole(l, "held")), "n"}, {exact_ms(num(l, "longest_wait_ms")), "n"}, {grouped(whole(l, "dropped")), "n"}, {grouped(whole(l, "cut")), "n"},
                      {at(l, "resets").is_number() ? grouped(whole(l, "resets")) : "not counted", "n"}, {at(l, "past_gate").is_number() ? grouped(whole(l, "past_gate")) : "not counted", "n"}});
    }
    if (!any) return none(s_.attempts.empty() ? "There was no pause." : "No gate kept count: traffic is not rehome's here, or the attempt backed out before it was asked.");
    return table({{"Attempt"}, {"Waited", "n"}, {"Longest wait", "n"}, {"Dropped", "n"}, {"Cut", "n"}, {"Resets", "n"}, {"Past the gate", "n"}}, rows) +
           "<p class=\"soft small\">Waited: new connections that the gate kept until the pause was over. Dropped: given up because too many waited, or too long. Cut: closed by us while a request was in flight. Past the gate: made before begin, or at the application's own port, and ended with the application by the switch.</p>\n";
  }

  std::string lag() const {
    std::string chart = lag_chart(s_);
    return chart.empty() ? none("The journal holds no course of the lag.") : chart;
  }

  std::string steps() const {
    if (s_.steps.empty()) return none("No step has been taken.");
    std::string out;
    // One scale a sitting: a step of seconds would not be seen beside a night of following.
    constexpr std::int64_t gap = 300'000'000;
    for (std::size_t i = 0; i < s_.steps.size();) {
      std::size_t k = i;
      std::int64_t from = s_.steps[i].from_us, to = s_.steps[i].to_us;
      while (k < s_.steps.size() && s_.steps[k].from_us <= to + gap) to = std::max(to, s_.steps[k++].to_us);
      out += "<h3>" + date_utc(from) + ", " + time_utc(from) + " to " + time_utc(to) + " <span class=\"soft\">(" + span_of(from, to) + ")</span></h3>\n<div class=\"steps\">\n";
      double whole_us = static_cast<double>(std::max<std::int64_t>(to - from, 1));
      for (; i < k; i++) {
        const StoryStep& st = s_.steps[i];
        double left = static_cast<double>(st.from_us - from) / whole_us * 100, width = static_cast<double>(st.to_us - st.from_us) / whole_us * 100;
        std::string state = st.state == "done" ? span_of(st.from_us, st.to_us) : st.state == "started" ? "never ended" : st.state;
        out += "<div>" + esc(st.title) + "</div><div class=\"track\"><div class=\"" + esc(st.state) + "\" style=\"left:" + number(std::min(left, 99.4)) + "%;width:" + number(std::min(width, 100 - left)) +
               "%\" title=\"" + time_ms_utc(st.from_us) + "\"></div></div><div class=\"n small\">" + esc(state) + "</div>\n";
        if (!st.error.empty()) out += "<div class=\"why\">" + lines(st.error) + "</div>\n";
      }
      out += "</div>\n";
    }
    return out;
  }

  std::string changes() const {
    std::string out;
    auto list = [](const std::vector<std::string>& items) {
      std::string l = "<ul>";
      for (const auto& i : items) l += "<li>" + lines(i) + "</li>";
      return l + "</ul>\n";
    };
    if (!s_.unexpected.empty()) out += "<div class=\"badbox\">These should be gone and are not; “rehome complete” again takes them away:" + list(s_.unexpected) + "</div>\n";
    if (!s_.ended) out += "<p>The run has not ended, so what is listed here is in place.</p>\n";
    else if (s_.left.empty()) out += "<p>" + badge(true, "nothing is left") + " Everything below has been taken back on both sites.</p>\n";
    else out += "<p>Everything below has been taken back, except what protects the old side:</p>" + list(s_.left);
    if (s_.changes.empty()) return out + none("No change has been written down.");
    std::vector<std::vector<Cell>> rows;
    for (const auto& c : s_.changes) rows.push_back({{when(c.at_us), "t"}, {lines(c.what)}, {esc(c.where)}, {esc(c.undo)}});
    return out + "<details" + std::string(rows.size() <= 12 ? " open=\"open\"" : "") + "><summary>" + plural(static_cast<std::int64_t>(rows.size()), "change", "changes") + ", each written down before it was made</summary>\n" +
           table({{"At (UTC)"}, {"What"}, {"Where"}, {"Taken back by"}}, rows) + "</details>\n";
  }

  std::string messages() const {
    if (s_.notes.empty()) return none("None.");
    std::vector<std::vector<Cell>> rows;
    for (const auto& n : s_.notes) {
      std::string text = lines(n.text);
      if (n.error) text = badge(false, "error") + " " + text;
      if (!n.hint.empty()) text += "<br/><span class=\"soft\">" + lines(n.hint) + "</span>";
      if (n.times > 1) text += " <span class=\"soft\">(" + grouped(n.times) + " times, until " + when(n.until_us) + ")</span>";
      rows.push_back({{when(n.at_us), "t"}, {text}});
    }
    return table({{"At (UTC)"}, {"Message"}}, rows);
  }

  std::string foot() const {
    std::string out = "<footer>\n<p>Made from " + plural(static_cast<std::int64_t>(s_.entries), "journal entry", "journal entries") + ". All times are UTC.";
    for (const auto& [side, version] : s_.versions) out += " Agent on the " + esc(side) + ": " + esc(version) + ".";
    if (!s_.hash.empty()) out += "<br/>rehome.yaml: SHA-256 <code>" + esc(s_.hash) + "</code>";
    return out + "</p>\n</footer>\n";
  }

  const Story& s_;
  const StoryAttempt* last_ = nullptr;                      // the last one that changed who serves
  std::map<std::string, const StoryVerify*> newest_;
};

}  // namespace

std::string report_html(const std::vector<Json>& entries) {
  Story story = tell(entries);
  return Report(story).html();
}

}  // namespace rehome::ui
