// rehome-probe: asks both databases, over and over, whether they accept a write, and writes down every answer. Two
// sides that both accept after one has handed over to the other are what a switch must never allow, and only tries
// from outside can show it.
#include <fcntl.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "support/options.h"
#include "support/pg.h"
#include "sys/fs.h"

namespace rehome::testing {
namespace {

std::int64_t now_us() { return system_clock().now() / 1000; }

struct Side {
  std::string name;
  std::string conninfo;
  std::int64_t accepted = 0, refused = 0, unknown = 0;
};

int run_probe(int argc, char** argv) {
  Options o(argc, argv, {"source", "target", "history", "every-ms"}, {"kept-only"});
  const Millis every(o.number("every-ms", 20));
  const std::string path = o.need("history");
  Fd history(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!history) throw errno_error(errno, "open", path);

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  std::atomic<bool> stop{false};
  std::mutex mutex;
  Side sides[2] = {{"source", o.need("source")}, {"target", o.need("target")}};
  const bool kept_only = o.has("kept-only");

  // Two sessions for each side: one that is kept, as a pool's would be, and one that is opened for every write. A
  // fence that only turns new sessions away, or only ends old ones, lets one of the two through.
  auto probe = [&](Side& side, bool fresh) {
    Session db(side.conninfo);
    while (!stop) {
      if (fresh) db.close();
      const std::int64_t start = now_us();
      std::string outcome = "accepted", reason, state;
      bool sent = false;
      try {
        db.raw();  // connecting can do no harm: what fails here is a refusal, never a doubt
        sent = true;
        db.run("INSERT INTO probe (side, at_us) VALUES ($1, $2)", {side.name, std::to_string(start)});
      } catch (const SqlError& e) {
        // Without an SQLSTATE the connection broke: the write may have been committed.
        outcome = sent && (e.state.empty() || e.state.rfind("57P", 0) == 0) ? "unknown" : "refused";
        reason = e.message;
        state = e.state;
      }
      const std::int64_t end = now_us();
      Json line = {{"side", side.name}, {"start_us", start}, {"end_us", end}, {"outcome", outcome},
                   {"session", fresh ? "new" : "kept"}};
      if (!reason.empty()) line["reason"] = reason, line["state"] = state;
      {
        std::lock_guard lock(mutex);
        write_all(history.get(), dump_line(line) + "\n", "the history");
        (outcome == "accepted" ? side.accepted : outcome == "refused" ? side.refused : side.unknown) += 1;
      }
      // A password's check costs both ends milliseconds of work: new sessions come more rarely.
      const std::int64_t period = every.count() * (fresh ? 5000 : 1000), used = now_us() - start;
      if (used < period) std::this_thread::sleep_for(Micros(period - used));
    }
  };
  std::vector<std::thread> threads;
  for (auto& side : sides) {
    threads.emplace_back([&] { probe(side, false); });
    if (!kept_only) threads.emplace_back([&] { probe(side, true); });
  }
  int signal = 0;
  ::sigwait(&signals, &signal);
  stop = true;
  for (auto& t : threads) t.join();
  Json summary;
  for (auto& side : sides)
    summary[side.name] = {{"accepted", side.accepted}, {"refused", side.refused}, {"unknown", side.unknown}};
  std::printf("%s\n", dump_line(summary).c_str());
  return 0;
}

}  // namespace
}  // namespace rehome::testing

int main(int argc, char** argv) {
  try {
    return rehome::testing::run_probe(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-probe: %s\n", e.what());
    return 2;
  }
}
