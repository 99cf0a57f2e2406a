// rehome-history-check: reads the histories and what the serving side holds, and says whether the migration kept its
// promise. Meant for a moment at which nobody writes any more.
#include <cstdio>

#include "base/json.h"
#include "base/text.h"
#include "support/history.h"
#include "support/options.h"
#include "support/pg.h"
#include "support/receipt.h"
#include "support/shop_schema.h"
#include "sys/fs.h"

namespace rehome::testing {
namespace {

template <class T>
std::vector<T> read_lines(const std::vector<std::string>& files, T (*parse)(std::string_view)) {
  std::vector<T> out;
  for (auto& file : files) {
    const std::string text = read_file(file, std::size_t{4} << 30);
    std::size_t at = 0, number = 0;
    // A last line without its end belongs to a writer that was killed over it.
    for (std::size_t end; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
      ++number;
      try {
        out.push_back(parse(std::string_view(text).substr(at, end - at)));
      } catch (const Error& e) {
        throw e.in(file + ":" + std::to_string(number));
      }
    }
  }
  return out;
}

Stored read_side(Session& db, const std::string& files, const std::vector<OrderSeen>& orders) {
  Stored s;
  // One snapshot for all, so that a straggling writer cannot make the parts disagree.
  db.begin();
  db.script("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY");
  auto r = db.run(
      "WITH l AS (SELECT order_id, count(*) n, sum(quantity::bigint * price) amount FROM order_lines GROUP BY 1), "
      "b AS (SELECT key, count(*) n FROM outbox GROUP BY 1), "
      "a AS (SELECT substr(what, 7) AS key, count(*) n FROM audit WHERE what LIKE 'order %' GROUP BY 1) "
      "SELECT o.key, count(*), min(o.id), min(o.total), coalesce(sum(l.n), 0), coalesce(sum(l.amount), 0), "
      "coalesce(min(b.n), 0), coalesce(min(a.n), 0) FROM orders o LEFT JOIN l ON l.order_id = o.id "
      "LEFT JOIN b ON b.key = o.key LEFT JOIN a ON a.key = o.key WHERE o.key NOT LIKE 'history-%' GROUP BY o.key");
  for (int i = 0; i < PQntuples(r.get()); ++i) {
    auto n = [&](int column) { return std::stoll(value(r, i, column)); };
    s.orders[value(r, i, 0)] = {.rows = n(1), .id = n(2), .total = n(3), .lines = n(4),
                                .lines_amount = n(5), .outbox = n(6), .audit = n(7)};
  }
  auto sold = db.run("SELECT coalesce(sum(l.quantity), 0) FROM order_lines l JOIN orders o ON o.id = l.order_id "
                     "WHERE o.key NOT LIKE 'history-%'");
  s.sold = std::stoll(value(sold, 0, 0));
  auto booked = db.run("SELECT coalesce(sum($1::bigint - stock), 0) FROM products", {std::to_string(kStock)});
  s.booked = std::stoll(value(booked, 0, 0));
  auto probes = db.run("SELECT side, at_us, count(*) FROM probe GROUP BY 1, 2");
  for (int i = 0; i < PQntuples(probes.get()); ++i)
    s.probes[{value(probes, i, 0), std::stoll(value(probes, i, 1))}] = std::stoll(value(probes, i, 2));
  db.commit();
  if (files.empty()) return s;
  for (const char* side : {"source", "target"}) {
    const std::string path = files + "/probe/" + side;
    if (!exists(path)) continue;
    for (const auto& line : split(read_file(path), '\n'))
      if (!line.empty()) ++s.file_probes[{side, std::stoll(line)}];
  }
  for (auto& o : orders) {
    const std::string path = receipt_path(files, o.key);
    if (!exists(path)) continue;
    try {
      const Json j = parse_json(read_file(path), path);
      s.receipts[o.key] = get_string(j, "key") == o.key ? get_int(j, "order") : -1;
    } catch (const Error&) {
      s.receipts[o.key] = -1;
    }
  }
  return s;
}

// A write whose answer got lost is settled by looking for its row on its side.
void settle_probes(std::vector<ProbeSeen>& probes, bool of_last, const std::string& last, const Stored& side) {
  for (auto& p : probes)
    if ((p.side == last) == of_last && p.outcome == ProbeOutcome::unknown && side.probes.count({p.side, p.start_us}))
      p.outcome = ProbeOutcome::found;
}

int run_check(int argc, char** argv) {
  Options o(argc, argv,
            {"history", "earlier", "probes", "file-probes", "serving", "files", "sides", "other", "other-files", "json", "findings", "at-least"},
            {"none-failed"});
  Told told;
  told.sides = o.all("sides");
  for (auto& side : told.sides)
    if (side != "source" && side != "target") throw Error(Code::usage, "--sides are source and target");
  if (told.sides.size() > 2 || (told.sides.size() == 2 && told.sides[0] == told.sides[1]))
    throw Error(Code::usage, "--sides are one, or the one that served first and the one that serves now");
  if (o.has("probes") == told.sides.empty()) throw Error(Code::usage, "--probes and --sides need each other");
  told.at_least = o.number("at-least", 0);
  told.none_failed = o.has("none-failed");
  o.need("history");
  told.orders = read_lines(o.all("history"), parse_order);
  told.earlier = read_lines(o.all("earlier"), parse_order);
  told.probes = read_lines(o.all("probes"), parse_probe);
  told.file_probes = read_lines(o.all("file-probes"), parse_probe);
  if (o.has("file-probes") && told.file_probes.empty()) throw Error(Code::usage, "no probe has written into the files: nothing is shown");
  auto orders = told.earlier;
  orders.insert(orders.end(), told.orders.begin(), told.orders.end());
  Session serving(o.need("serving"));
  const Stored held = read_side(serving, o.need("files"), orders);
  std::optional<Stored> other_held;
  if (o.has("other")) {
    Session other(o.need("other"));
    other_held = read_side(other, o.get("other-files", ""), orders);
    if (!told.sides.empty()) settle_probes(told.probes, false, told.sides.back(), *other_held);
  }
  if (!told.sides.empty()) settle_probes(told.probes, true, told.sides.back(), held);
  const Verdict v = judge(told, held, other_held);
  std::int64_t first_us = told.orders.empty() ? 0 : told.orders.front().start_us;
  for (const auto& order : told.orders) first_us = std::min(first_us, order.start_us);

  const auto most = static_cast<std::size_t>(o.number("findings", 20));
  for (std::size_t i = 0; i < v.findings.size() && i < most; ++i) std::printf("%s\n", v.findings[i].c_str());
  if (v.findings.size() > most) std::printf("... and %zu more\n", v.findings.size() - most);
  std::printf("acknowledged    %lld\nlost            %lld\ndoubled         %lld\nfailed          %lld\n"
              "longest wait    %s, %.1f s after the first order\nboth accepting  %lld\nresets          %lld\n",
              static_cast<long long>(v.acknowledged), static_cast<long long>(v.lost),
              static_cast<long long>(v.doubled), static_cast<long long>(v.failed),
              human_duration(Millis(static_cast<std::int64_t>(v.longest_wait_ms))).c_str(),
              static_cast<double>(v.longest_wait_at_us - first_us) / 1e6, static_cast<long long>(v.both_accepting),
              static_cast<long long>(v.resets));
  if (o.has("json"))
    write_durably(o.need("json"),
                  dump_line({{"acknowledged", v.acknowledged}, {"lost", v.lost}, {"doubled", v.doubled},
                             {"failed", v.failed}, {"longest_wait_ms", v.longest_wait_ms},
                             {"both_accepting", v.both_accepting}, {"resets", v.resets}}) + "\n", 0644);
  return v.clean() ? 0 : 1;
}

}  // namespace
}  // namespace rehome::testing

int main(int argc, char** argv) {
  try {
    return rehome::testing::run_check(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-history-check: %s\n", e.what());
    return 2;
  }
}
