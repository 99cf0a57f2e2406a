#include "ui/text_view.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/clock.h"
#include "base/text.h"
#include "ui/look.h"

namespace rehome::ui {
namespace {

using Lines = std::vector<std::string>;

std::string padded(std::string text, std::size_t width) {
  std::size_t have = columns(text);
  if (have < width) text.append(width - have, ' ');
  return text;
}

void phase_lines(const Json& phases, Lines& out) {
  if (!phases.is_array() || phases.empty()) return;
  double longest = 0;
  std::size_t width = 0;
  for (const auto& p : phases) {
    longest = std::max(longest, num(p, "ms"));
    width = std::max(width, columns(str(p, "name")));
  }
  for (const auto& p : phases) {
    double ms = num(p, "ms");
    auto cells = longest > 0 ? static_cast<std::size_t>(std::lround(ms / longest * 24)) : 0;
    std::string time = exact_ms(ms), bar;
    for (std::size_t i = 0; i < cells; i++) bar += "▇";
    out.push_back(printable("    " + padded(str(p, "name"), width) + "  " + std::string(9 - std::min<std::size_t>(9, columns(time)), ' ') + time + "  ") + bar);
  }
}

std::string ledger_line(const Json& l) {
  if (!at(l, "held").is_number()) return {};
  std::string text = grouped(whole(l, "held")) + " connections waited, the longest " + exact_ms(num(l, "longest_wait_ms")) + "; " +
                     grouped(whole(l, "dropped")) + " dropped, " + grouped(whole(l, "cut")) + " cut";
  if (at(l, "resets").is_number()) text += ", " + grouped(whole(l, "resets")) + " reset";
  if (whole(l, "past_gate") > 0) text += ", " + grouped(whole(l, "past_gate")) + " that had not come through the gate ended with the application";
  return text;
}

std::string said_of(const Json& error) {
  std::string context = str(error, "context");
  return (context.empty() ? "" : context + ": ") + str(error, "message");
}

void gate_lines(const Json& gate, Lines& out) {
  std::int64_t resets = 0, old_address = 0;
  for (const auto& route : at(gate, "routes")) {
    resets += whole(route, "resets");
    old_address += std::max(whole(route, "to_peer_last_minute"), whole(route, "in_flight_to_peer"));   // most are both
  }
  out.push_back("          gate " + str(gate, "state") + ": " + grouped(whole(gate, "in_flight")) + " in flight, " + grouped(whole(gate, "waiting")) + " waiting, " +
                grouped(resets) + " reset since it started");
  if (old_address > 0 && str(gate, "state") == "OPEN_PEER") out.push_back("          " + grouped(old_address) + " connections came to this address in the last minute, or are open, and are led to the other side");
  for (const char* key : {"longer", "past"})
    if (std::string text = str(gate, key); !text.empty()) out.push_back("          " + text);
}

void site_lines(const Json& s, const char* side, Lines& out) {
  const Json& site = at(s, side);
  if (!site.is_object()) return;
  std::string head = "  " + padded(side, 8);
  if (const Json& missing = at(site, "missing"); missing.is_object()) {
    out.push_back(head + "does not answer: " + said_of(missing));
    return;
  }
  std::string text = head;
  if (std::string bad = str(site, "record_error"); !bad.empty()) text += "RECORD UNREADABLE: " + bad;
  else if (const Json& r = at(site, "record"); r.is_object()) text += "epoch " + std::to_string(whole(r, "epoch")) + ", " + str(r, "serves", "nobody") + " serves by its record";
  else text += "agent up";
  if (const Json& link = at(site, "link"); link.is_object()) {
    std::string why = str(link, "error");
    text += yes(link, "up") ? ", link up" : ", LINK DOWN" + (why.empty() ? "" : ": " + why);
  }
  out.push_back(text);
  if (const Json& gate = at(site, "gate"); gate.is_object()) {
    if (yes(gate, "none")) out.push_back("          no gate yet");
    else if (at(gate, "error").is_object()) out.push_back("          gate does not answer: " + said_of(at(gate, "error")));
    else
      gate_lines(gate, out);
  }
  const Json& attempt = at(site, "attempt");
  if (std::string w = str(attempt, "waiting_for"); !w.empty()) out.push_back("          waiting for " + w);
  for (const auto& tail : at(attempt, "tails"))
    if (!yes(tail, "done")) out.push_back("          still to do: " + str(tail, "name") + (str(tail, "error").empty() ? "" : ": " + str(tail, "error")));
}

}  // namespace

std::string exact_ms(double ms) {
  if (ms >= 10000) return human_duration(Millis(std::llround(ms)));
  char buf[32];
  std::snprintf(buf, sizeof buf, ms < 10 ? "%.1f ms" : "%.0f ms", ms);
  return buf;
}

std::string grouped(std::int64_t n) {
  std::string digits = std::to_string(n), out;
  std::size_t from = digits[0] == '-' ? 1 : 0;
  for (std::size_t i = 0; i < digits.size(); i++) {
    if (i > from && (digits.size() - i) % 3 == 0) out += ',';
    out += digits[i];
  }
  return out;
}

std::string printable(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); i++) {
    auto c = static_cast<unsigned char>(text[i]);
    // C1 controls are two bytes in UTF-8, and terminals obey them too.
    bool c1 = c == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (c1) c = static_cast<unsigned char>(text[++i]);
    if (c1 || c < 0x20 || c == 0x7F) {
      char buf[8];
      std::snprintf(buf, sizeof buf, "\\x%02x", c);
      out += buf;
    } else {
      out += static_cast<char>(c);
    }
  }
  return out;
}

std::size_t columns(std::string_view text) {
  struct Range {
    char32_t from, to;
  };
  static constexpr Range combining[] = {{0x300, 0x36F}, {0x483, 0x489}, {0x591, 0x5BD}, {0x610, 0x61A}, {0x64B, 0x65F}, {0x200B, 0x200F}, {0x202A, 0x202E}, {0x2060, 0x2064}, {0x20D0, 0x20F0}, {0xFE00, 0xFE0F}, {0xFE20, 0xFE2F}, {0xE0100, 0xE01EF}};
  static constexpr Range wide[] = {{0x1100, 0x115F}, {0x231A, 0x231B}, {0x2E80, 0x303E}, {0x3041, 0x33FF}, {0x3400, 0x4DBF}, {0x4E00, 0xA4CF}, {0xA960, 0xA97F}, {0xAC00, 0xD7A3}, {0xF900, 0xFAFF}, {0xFE30, 0xFE6F}, {0xFF00, 0xFF60}, {0xFFE0, 0xFFE6}, {0x1F300, 0x1F64F}, {0x1F680, 0x1F6FF}, {0x1F900, 0x1FAFF}, {0x20000, 0x3FFFD}};
  auto within = [](char32_t c, const auto& ranges) { return std::any_of(std::begin(ranges), std::end(ranges), [c](const Range& r) { return c >= r.from && c <= r.to; }); };
  std::size_t n = 0;
  for (std::size_t i = 0; i < text.size();) {
    auto first = static_cast<unsigned char>(text[i++]);
    char32_t c = first < 0xC0 ? first : first < 0xE0 ? first & 0x1F : first < 0xF0 ? first & 0x0F : first & 0x07;
    while (i < text.size() && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) c = c << 6 | (static_cast<unsigned char>(text[i++]) & 0x3F);
    n += within(c, combining) ? 0 : within(c, wide) ? 2 : 1;
  }
  return n;
}

std::vector<std::string> status_lines(const Json& s) {
  Lines out;
  std::string phase = str(s, "phase"), serves = str(s, "serves");
  std::string head = str(s, "name") + ": " + (phase == "none" ? "no run" : phase);
  if (serves == "unknown") head += "; WHO SERVES IS NOT KNOWN";
  else if (serves == "neither") head += "; NEITHER SIDE SERVES";
  else if (!serves.empty()) head += "; the " + serves + " serves";
  out.push_back(head);
  if (at(s, "why").is_object()) {
    out.push_back("  " + said_of(s["why"]));
    if (std::string hint = str(s["why"], "hint"); !hint.empty()) out.push_back("  " + hint);
  }
  if (phase == "cancelling" || phase == "cancelled") out.push_back("  rehome cancel goes on with taking it back");
  if (phase == "completing" || phase == "completed") out.push_back("  rehome complete goes on with ending it");
  if (std::string last = str(s, "last_journal"); !last.empty()) out.push_back("  the last run's journal: " + last);
  site_lines(s, "source", out);
  site_lines(s, "target", out);
  if (const Json& services = at(s, "services"); services.is_object())
    for (auto& [name, service] : services.items()) {
      if (at(service, "error").is_object()) out.push_back("  service " + name + ": not known: " + said_of(at(service, "error")));
      else if (!yes(service, "running")) out.push_back("  service " + name + " does NOT run on the " + serves + ", which serves");
    }
  const Json& stores = at(s, "stores");
  std::size_t width = 6;
  if (stores.is_object())
    for (auto& [name, store] : stores.items()) width = std::max(width, columns(name));
  if (stores.is_object())
    for (auto& [name, store] : stores.items()) {
      std::string text = "  " + padded(name, width) + "  ";
      if (at(store, "error").is_object()) {
        out.push_back(text + "not known: " + said_of(at(store, "error")));
        continue;
      }
      if (yes(store, "following")) {
        text += std::string(str(store, "trouble").empty() ? "follows, " : "does NOT follow well, ") + human_bytes(whole(store, "lag_bytes")) + " behind";
        if (whole(store, "lag_ms") > 0) text += " (" + human_duration(Millis(whole(store, "lag_ms"))) + ")";
        if (whole(store, "open_write_ms") > 1000)
          text += "; a write has been open for " + human_duration(Millis(whole(store, "open_write_ms")));
      } else {
        text += "does NOT follow";
      }
      if (std::string trouble = str(store, "trouble"); !trouble.empty()) text += ": " + trouble;
      out.push_back(text);
      for (const auto& again : at(store, "needs_recopy"))
        if (again.is_string()) out.push_back("    must be copied again: " + again.get<std::string>());
    }
  for (const auto& step : at(s, "steps")) {
    std::string state = str(step, "state");
    if (state == "started") out.push_back("  in progress, or interrupted: " + str(step, "title"));
    if (state == "failed" && str(at(step, "error"), "code") == "interrupted") out.push_back("  interrupted, rehome resume goes on: " + str(step, "title"));
    else if (state == "failed") out.push_back("  FAILED: " + str(step, "title") + ": " + said_of(at(step, "error")));
  }
  for (auto& l : out) l = printable(l);
  return out;
}

std::vector<std::string> plan_lines(const Json& p) {
  Lines out{"Plan for " + str(p, "name")};
  std::string command;
  int n = 1;
  for (const auto& s : at(p, "steps")) {
    if (str(s, "command") != command) out.push_back("  " + (command = str(s, "command")) + ":");
    std::string number = std::to_string(n++);
    out.push_back("    " + std::string(number.size() < 2 ? 1 : 0, ' ') + number + ". " + str(s, "title") + (yes(s, "done") ? " (done)" : ""));
  }
  if (at(p, "stores").is_object()) {
    out.push_back("  stores:");
    for (auto& [name, s] : p["stores"].items()) {
      out.push_back("    " + name + ": " + human_bytes(whole(s, "bytes")) + " in " + (whole(s, "objects") < 0 ? "an unknown number of" : grouped(whole(s, "objects"))) + (str(s, "kind") == "files" ? " files" : " rows") +
                    ", about " + human_duration(Millis(whole(s, "copy_ms"))) + " to copy");
      for (const auto& line : at(s, "again"))
        if (line.is_string()) out.push_back("      " + line.get<std::string>());
    }
  }
  const Json& pause = at(p, "pause");
  out.push_back("  pause: about " + human_duration(Millis(whole(pause, "ms"))) + " of at most " + human_duration(Millis(whole(pause, "max_ms"))));
  for (const auto& r : at(pause, "reasons"))
    if (r.is_string()) out.push_back("    - " + r.get<std::string>());
  if (at(p, "traffic").is_object())
    for (auto& [name, notes] : p["traffic"].items())
      for (const auto& note : notes)
        if (note.is_string()) out.push_back("  " + name + ": " + note.get<std::string>());
  for (auto& l : out) l = printable(l);
  return out;
}

std::vector<std::string> result_lines(const Json& r) {
  Lines out;
  std::string text = str(r, "what");
  if (std::string said = str(r, "text"); !said.empty()) text += ": " + said;
  if (at(r, "pause_ms").is_number()) text += ": done; the pause was " + exact_ms(num(r, "pause_ms"));
  if (yes(r, "forced")) text += ": done, without the other side";
  out.push_back(printable(text));
  phase_lines(at(r, "phases"), out);
  if (std::string l = ledger_line(at(r, "ledger")); !l.empty()) out.push_back("    " + l);
  for (const auto& l : at(r, "left"))
    if (l.is_string()) out.push_back(printable("    left: " + l.get<std::string>()));
  if (std::string j = str(r, "journal"); !j.empty()) out.push_back(printable("    journal: " + j));
  return out;
}

std::vector<std::string> entry_lines(const Json& e) {
  Lines out;
  std::string kind = str(e, "kind");
  if (kind == "finding") {
    out.push_back(str(e, "level") + ": " + str(e, "object") + ": " + str(e, "message"));
    if (std::string mend = str(e, "mend"); !mend.empty()) out.push_back("    " + mend);
  } else if (kind == "step") {
    std::string state = str(e, "state"), title = str(e, "title");
    if (state == "started") out.push_back("  … " + title);
    if (state == "done") out.push_back("  ✓ " + title);
    if (state == "failed") out.push_back("  ✗ " + title + ": " + said_of(at(e, "error")));
    if (state == "undone") out.push_back("  ↺ undone: " + title);
  } else if (kind == "message") {
    out.push_back("    " + str(e, "text"));
  } else if (kind == "verify") {
    out.push_back("  " + std::string(yes(e, "equal") ? "✓ " : "✗ ") + str(e, "store") + (yes(e, "equal") ? ": equal, " : ": DIFFERENT, ") + grouped(whole(e, "compared")) + " compared");
    for (const auto& d : at(e, "differences")) out.push_back("      " + str(d, "object") + ": " + str(d, "what"));
    if (whole(e, "more") > 0) out.push_back("      and " + grouped(whole(e, "more")) + " more");
  } else if (kind == "check" || kind == "canary") {
    std::string side = str(e, "side");
    std::string text = std::string("  ") + (yes(e, "ok") ? "✓ " : "✗ ") + kind + " " + str(e, "name") + (side.empty() ? "" : " on the " + side) + ", " + exact_ms(num(e, "ms"));
    if (std::string said = str(e, "said"); !said.empty()) text += ": " + said;
    out.push_back(text);
  } else if (kind == "serves") {
    out.push_back("  the " + str(e, "side") + " serves");
  } else if (kind == "pause" && str(e, "result") == "backed out") {
    out.push_back("  backed out after " + exact_ms(num(e, "total_ms")) + ": " + said_of(at(e, "error")));
  } else if (kind == "error") {
    out.push_back("  " + said_of(at(e, "error").is_object() ? e["error"] : e));
  }
  for (auto& l : out) l = printable(l);
  return out;
}

std::vector<std::string> error_lines(const Error& error) {
  Lines out;
  for (const auto& part : split(error.what(), '\n')) out.push_back(printable((out.empty() ? "rehome: " : "  ") + part));
  if (error.code == Code::config && out.size() > 1) {
    // Places first, so that editors and eyes find them.
    out.clear();
    for (const auto& part : split(error.what(), '\n')) out.push_back(printable(part));
  }
  if (!error.hint.empty()) out.push_back(printable("  " + error.hint));
  const CodeInfo& info = error_info(error.code);
  out.push_back("  (" + std::string(info.name) + ", exit status " + std::to_string(info.exit_status) + ")");
  return out;
}

}  // namespace rehome::ui
