#include "support/history.h"

#include <algorithm>
#include <optional>

#include "base/json.h"

namespace rehome::testing {
namespace {

void judge_order(const std::string& key, bool acknowledged, const Stored& serving, const std::optional<Stored>& other,
                 Verdict& v) {
  auto found = serving.orders.find(key);
  if (found == serving.orders.end()) {
    if (!acknowledged) return;
    ++v.lost;
    const bool elsewhere = other && other->orders.count(key) > 0;
    v.findings.push_back("lost: " + key + (elsewhere ? " is on the other side only" : " is on no side looked at"));
    return;
  }
  const OrderStored& o = found->second;
  // Each order is one transaction, so even one that nobody was told about is there whole or not at all.
  std::vector<std::string> missing, twice;
  if (o.lines == 0 || o.lines_amount < o.total) missing.push_back("lines");
  if (o.outbox < 1) missing.push_back("outbox row");
  if (o.audit < 1) missing.push_back("audit row");
  if (o.rows > 1) twice.push_back("order row");
  if (o.lines_amount > o.total) twice.push_back("lines");
  if (o.outbox > 1) twice.push_back("outbox row");
  if (o.audit > 1) twice.push_back("audit row");
  if (acknowledged) {
    // The receipt is written after the commit, so only an acknowledgement promises it.
    auto receipt = serving.receipts.find(key);
    if (receipt == serving.receipts.end()) missing.push_back("receipt");
    else if (receipt->second != o.id) missing.push_back("receipt (it is not this order's)");
  }
  auto say = [&](const char* what, const std::vector<std::string>& parts) {
    std::string text = std::string(what) + ": " + key + ":";
    for (auto& p : parts) text += " " + p;
    v.findings.push_back(text);
  };
  if (!missing.empty()) ++v.lost, say("lost", missing);
  if (!twice.empty()) ++v.doubled, say("doubled", twice);
}

// What the stores of one `kind` themselves said to writers that go past the gate.
template <class Unmet>
void judge_probes(const std::string& kind, const std::vector<std::string>& sides, const std::vector<ProbeSeen>& probes,
                  const std::map<std::pair<std::string, std::int64_t>, std::int64_t>& held, Verdict& v, const Unmet& unmet) {
  const std::string& last = sides.back();
  auto taken = [](const ProbeSeen& p) { return p.outcome == ProbeOutcome::accepted || p.outcome == ProbeOutcome::found; };
  std::optional<std::int64_t> handed_over;  // by when the last side had taken its first write
  for (auto& p : probes)
    if (p.side == last && taken(p)) handed_over = std::min(handed_over.value_or(p.end_us), p.end_us);
  // Two of a side may have begun in the same microsecond: then they share their rows.
  struct Rows {
    std::int64_t least = 0, most = 0;
  };
  std::map<std::pair<std::string, std::int64_t>, Rows> expected;
  std::map<std::string, std::int64_t> accepted;
  for (auto& p : probes) {
    if (p.side != last && taken(p) && (sides.size() < 2 || (handed_over && p.start_us > *handed_over))) {
      ++v.both_accepting;
      v.findings.push_back("both accepting: " + p.side + " took a " + kind + " write" +
                           (sides.size() < 2 ? ", and never served"
                                                  : " " + std::to_string((p.start_us - *handed_over) / 1000) +
                                                        " ms after the other side's first"));
      continue;
    }
    Rows& rows = expected[{p.side, p.start_us}];
    if (p.outcome == ProbeOutcome::accepted) ++rows.least, ++accepted[p.side];
    if (p.outcome != ProbeOutcome::refused) ++rows.most;
  }
  for (auto& [probe, rows] : expected) {
    auto it = held.find(probe);
    const std::int64_t n = it == held.end() ? 0 : it->second;
    if (n >= rows.least && n <= rows.most) continue;
    (n < rows.least ? v.lost : v.doubled) += n < rows.least ? rows.least - n : n - rows.most;
    v.findings.push_back((n < rows.least ? "lost: " : "doubled: ") + probe.first + "'s direct " + kind + " write of " +
                         std::to_string(probe.second) + " is there " + std::to_string(n) + " times");
  }
  for (auto& side : sides)
    if (accepted[side] == 0) unmet("the " + side + " accepted no direct " + kind + " write");
}

}  // namespace

OrderSeen parse_order(std::string_view line) {
  const Json j = parse_json(line, "an order's history");
  OrderSeen o;
  o.key = get_string(j, "key");
  o.start_us = get_int(j, "start_us");
  o.end_us = get_int(j, "end_us");
  const std::string outcome = get_string(j, "outcome");
  if (outcome != "ok" && outcome != "failed" && outcome != "unknown")
    throw Error(Code::io, "no outcome of an order: " + outcome);
  o.outcome = outcome == "ok" ? Outcome::ok : outcome == "failed" ? Outcome::failed : Outcome::unknown;
  o.reset = get_bool(j, "reset");
  return o;
}

ProbeSeen parse_probe(std::string_view line) {
  const Json j = parse_json(line, "a probe's history");
  ProbeSeen p;
  p.side = get_string(j, "side");
  if (p.side != "source" && p.side != "target") throw Error(Code::io, "no side: " + p.side);
  p.start_us = get_int(j, "start_us");
  p.end_us = get_int(j, "end_us");
  const std::string outcome = get_string(j, "outcome");
  if (outcome != "accepted" && outcome != "refused" && outcome != "unknown")
    throw Error(Code::io, "no outcome of a probe: " + outcome);
  p.outcome = outcome == "accepted"  ? ProbeOutcome::accepted
              : outcome == "refused" ? ProbeOutcome::refused
                                     : ProbeOutcome::unknown;
  return p;
}

Verdict judge(const Told& told, const Stored& serving, const std::optional<Stored>& other) {
  Verdict v;
  std::map<std::string, bool> acknowledged;  // a key in two histories counts once, as acknowledged if either says so
  for (auto& o : told.orders) {
    acknowledged[o.key] |= o.outcome == Outcome::ok;
    v.resets += o.reset;
    const double wait = static_cast<double>(o.end_us - o.start_us) / 1e3;
    if (wait > v.longest_wait_ms) v.longest_wait_ms = wait, v.longest_wait_at_us = o.start_us;
  }
  for (auto& [key, ok] : acknowledged) ++(ok ? v.acknowledged : v.failed);
  auto unmet = [&](const std::string& text) { ++v.unmet, v.findings.push_back("shows nothing: " + text); };
  if (v.acknowledged < told.at_least)
    unmet(std::to_string(v.acknowledged) + " orders were acknowledged, not at least " + std::to_string(told.at_least));
  if (told.none_failed && v.failed > 0)
    ++v.unmet, v.findings.push_back(std::to_string(v.failed) + " orders failed that should have waited");
  for (auto& o : told.earlier) {
    auto [it, fresh] = acknowledged.try_emplace(o.key, o.outcome == Outcome::ok);
    if (fresh && it->second) ++v.acknowledged;
  }
  for (auto& [key, ok] : acknowledged) judge_order(key, ok, serving, other, v);
  if (v.lost == 0 && v.doubled == 0 && serving.booked != serving.sold) {
    // Updates of rows that many orders share: no key names them, but they must add up. Once orders are known to be
    // missing or double, the sums only say so again.
    ++(serving.booked < serving.sold ? v.lost : v.doubled);
    v.findings.push_back((serving.booked < serving.sold ? "lost" : "doubled") + std::string(": stock is booked for ") +
                         std::to_string(serving.booked) + ", the lines say " + std::to_string(serving.sold));
  }
  if (told.sides.empty()) return v;
  judge_probes("database", told.sides, told.probes, serving.probes, v, unmet);
  if (!told.file_probes.empty()) judge_probes("file", told.sides, told.file_probes, serving.file_probes, v, unmet);
  return v;
}

}  // namespace rehome::testing
