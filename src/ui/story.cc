#include "ui/story.h"

#include <algorithm>

#include "ui/look.h"

namespace rehome::ui {
namespace {

std::string said(const Json& error) {
  std::string context = str(error, "context"), message = str(error, "message");
  return context.empty() || message.empty() ? context + message : context + ": " + message;
}

class Teller {
 public:
  Story story;

  void take(const Json& e) {
    if (!e.is_object()) return;
    at_ = whole(e, "at");
    if (at_ > 0) {
      if (story.from_us == 0) story.from_us = at_;
      story.to_us = std::max(story.to_us, at_);
    }
    story.entries++;
    std::string kind = str(e, "kind");
    if (kind == "run") run(e);
    else if (kind == "step") step(e);
    else if (kind == "change") story.changes.push_back({at_, str(e, "what"), where(e), str(e, "undo", str(e, "undone_by"))});
    else if (kind == "fact") fact(e);
    else if (kind == "lag") story.lag[str(e, "store")].push_back({whole(e, "at_us", at_), whole(e, "bytes"), num(e, "ms")});
    else if (kind == "phase") attempt(e).phases.push_back({str(e, "name"), said(at(e, "error")), num(e, "ms")});
    else if (kind == "ledger") ledger_ = e;
    else if (kind == "pause") pause(e);
    else if (kind == "verify")
      story.verified.push_back({at_, whole(e, "compared"), whole(e, "more"), str(e, "store"), yes(e, "equal"), at(e, "differences"), at(e, "detail")});
    else if (kind == "check" || kind == "canary")
      story.checks.push_back({at_, kind, str(e, "name"), str(e, "side", kind == "canary" ? str(e, "when") : ""), str(e, "said"), yes(e, "ok"), num(e, "ms")});
    else if (kind == "serves") serves(e);
    else if (kind == "left") left(e);
    else if (kind == "message") note(str(e, "text"), "", false);
    else if (kind == "error") note(said(at(e, "error").is_object() ? at(e, "error") : e), str(at(e, "error").is_object() ? at(e, "error") : e, "hint"), true);
  }

 private:
  void run(const Json& e) {
    // A cancelled run that began again is told from its new beginning on: it undid everything before.
    if (!story.name.empty() && story.phase == "cancelled") {
      story = Story{};
      story.from_us = story.to_us = at_;
      story.entries = 1;
    }
    story.name = str(e, "name", story.name);
    story.hash = str(e, "hash", story.hash);
    if (story.command.empty()) story.command = str(e, "command");
    story.max_pause_ms = num(e, "max_pause_ms", story.max_pause_ms);
    for (const char* side : {"source", "target"}) {
      if (std::string s = str(at(e, "sites"), side); !s.empty()) story.sites[side] = s;
      if (std::string s = str(at(e, "agents"), side); !s.empty()) story.versions[side] = s;
    }
  }

  void step(const Json& e) {
    std::string id = str(e, "id"), state = str(e, "state");
    auto found = std::find_if(story.steps.rbegin(), story.steps.rend(), [&](const StoryStep& s) { return s.id == id; });
    if (state == "started" || found == story.steps.rend()) {
      story.steps.push_back({id, str(e, "title"), state, at_, at_, said(at(e, "error"))});
      return;
    }
    if (state == "undone" && found->state == "done") {
      story.steps.push_back({id, str(e, "title"), state, at_, at_, ""});
      return;
    }
    found->state = state;
    found->to_us = at_;
    found->error = said(at(e, "error"));
  }

  void fact(const Json& e) {
    if (str(e, "key") != "phase") return;
    story.phase = str(e, "value");
    story.milestones.emplace(story.phase, at_);
  }

  StoryAttempt& attempt(const Json& e) {
    std::int64_t number = whole(e, "attempt");
    // The generation of attempts may start again after a loss; an attempt that has ended is never continued.
    if (story.attempts.empty() || story.attempts.back().number != number || !story.attempts.back().result.empty()) {
      StoryAttempt a;
      a.number = number;
      a.at_us = whole(e, "from_us", at_);
      story.attempts.push_back(a);
    }
    return story.attempts.back();
  }

  void pause(const Json& e) {
    StoryAttempt& a = attempt(e);
    a.direction = str(e, "direction", "switch");
    a.result = str(e, "result", "unknown");
    a.total_ms = num(e, "total_ms");
    a.predicted_ms = num(e, "predicted_ms");
    a.error = said(at(e, "error"));
    a.hint = str(at(e, "error"), "hint");
    a.ledger = ledger_;
    ledger_ = Json();
  }

  void serves(const Json& e) {
    const bool forced = yes(e, "forced"), found = yes(e, "found");
    const std::string side = str(e, "side"), before = story.serves.empty() ? "source" : story.serves.back().side;
    // Of an attempt whose controller saw the end, `pause` says how it ended.
    if ((forced || found) && !story.attempts.empty() && story.attempts.back().result.empty())
      story.attempts.back().result = side == before ? "undone by the agents" : "finished by the agents";
    if (!found || side != before) story.serves.push_back({at_, side, forced, found});
  }

  void left(const Json& e) {
    story.ended = true;
    story.left.clear();
    story.unexpected.clear();
    for (const auto& l : at(e, "what"))
      if (l.is_string()) story.left.push_back(l.get<std::string>());
    for (const auto& l : at(e, "unexpected"))
      if (l.is_string()) story.unexpected.push_back(l.get<std::string>());
  }

  void note(const std::string& text, const std::string& hint, bool error) {
    if (text.empty()) return;
    // "not yet: the predicted pause of 512 ms ..." differs in its numbers only, second after second.
    auto plain = [](std::string s) {
      std::erase_if(s, [](unsigned char c) { return std::isdigit(c) || c == '.'; });
      return s;
    };
    if (!story.notes.empty() && story.notes.back().error == error && plain(story.notes.back().text) == plain(text)) {
      story.notes.back().times++;
      story.notes.back().until_us = at_;
      story.notes.back().text = text;
      return;
    }
    story.notes.push_back({at_, at_, 1, error, text, hint});
  }

  std::string where(const Json& e) const {
    std::string w = str(e, "where"), object = str(e, "object");
    if (object.empty()) object = str(e, "file");
    return object.empty() ? w : w.empty() ? object : w + ": " + object;
  }

  std::int64_t at_ = 0;
  Json ledger_;
};

}  // namespace

Story tell(const std::vector<Json>& entries) {
  Teller t;
  for (const auto& e : entries) t.take(e);
  return std::move(t.story);
}

}  // namespace rehome::ui
