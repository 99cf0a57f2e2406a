// Judges a migration by what its clients were told: histories of orders and write probes against what the serving
// side holds in the end. Pure: whoever calls has read the files and the databases.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rehome::testing {

enum class Outcome { ok, failed, unknown };

// One order as its client saw it. Times are microseconds of one host's CLOCK_BOOTTIME.
struct OrderSeen {
  std::string key;
  std::int64_t start_us = 0;
  std::int64_t end_us = 0;
  Outcome outcome = Outcome::ok;
  bool reset = false;
};

// found: nobody was told how it ended, and its row is on the side that it was sent to.
enum class ProbeOutcome { accepted, refused, unknown, found };

struct ProbeSeen {
  std::string side;  // "source" or "target"
  std::int64_t start_us = 0;  // also in its row
  std::int64_t end_us = 0;
  ProbeOutcome outcome = ProbeOutcome::accepted;
};

// What a side holds for one key.
struct OrderStored {
  std::int64_t rows = 1;  // of this key in orders
  std::int64_t id = 0;
  std::int64_t total = 0;
  std::int64_t lines = 0;         // rows in order_lines
  std::int64_t lines_amount = 0;  // what they add up to: the order's total, when none is missing or doubled
  std::int64_t outbox = 1;
  std::int64_t audit = 1;  // written by a trigger
};

struct Stored {
  std::map<std::string, OrderStored> orders;
  std::map<std::string, std::int64_t> receipts;  // key to the order number inside; -1 for an unreadable one
  std::map<std::pair<std::string, std::int64_t>, std::int64_t> probes;  // side and start of a probe to its rows
  std::map<std::pair<std::string, std::int64_t>, std::int64_t> file_probes;  // the same, of lines in the tree
  std::int64_t sold = 0;    // quantities in the lines of orders that came in over HTTP
  std::int64_t booked = 0;  // what the products' stock is short of its start
};

struct Verdict {
  std::int64_t acknowledged = 0, lost = 0, doubled = 0, failed = 0, both_accepting = 0, resets = 0;
  double longest_wait_ms = 0;
  std::int64_t longest_wait_at_us = 0;
  std::int64_t unmet = 0;             // demands of Told, without which nothing was shown
  std::vector<std::string> findings;  // one line for each fault, for a person
  bool clean() const { return lost == 0 && doubled == 0 && both_accepting == 0 && unmet == 0; }
};

// What clients were told, and what must have happened for the verdict to mean anything.
struct Told {
  std::vector<OrderSeen> orders;
  std::vector<OrderSeen> earlier;  // must be there as well; how long they waited, and whether they failed, was judged before
  std::vector<ProbeSeen> probes, file_probes;  // of the databases, and of the trees
  std::vector<std::string> sides;  // who served while the probes ran: one side, or first the one and then the other
  std::int64_t at_least = 0;       // acknowledged orders
  bool none_failed = false;
};

// Parse one line of a history; throw Error(io) naming what is wrong.
OrderSeen parse_order(std::string_view line);
ProbeSeen parse_probe(std::string_view line);

// `serving`: what the last of the sides holds. `other`: what the one that does not serve holds; it only tells where a lost order
// was left.
Verdict judge(const Told& told, const Stored& serving, const std::optional<Stored>& other = std::nullopt);

}  // namespace rehome::testing
