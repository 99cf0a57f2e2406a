// rehome-load: offers orders at a fixed rate, whether or not earlier ones have been answered, and writes down what
// became of each. Times are microseconds of CLOCK_BOOTTIME; an order's wait begins when it was due, so a stall shows
// in every order that it held up, also in those which no client was free to send.
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/json.h"
#include "support/http.h"
#include "support/options.h"
#include "sys/fs.h"
#include "sys/net.h"

namespace rehome::testing {
namespace {

std::int64_t now_us() { return system_clock().now() / 1000; }

struct Settings {
  Address address;
  double rate = 100;
  bool close = false;
  Millis timeout{30'000};
  Millis retry_after{100};
  std::string prefix;
};

struct Tally {
  std::mutex mutex;
  Fd history;
  std::vector<std::int64_t> waits;
  std::int64_t ok = 0, failed = 0, unknown = 0, retried = 0, resets = 0, longest = -1, longest_at = 0;
};

enum class Try { ok, refused, unknown, hopeless };

struct Attempt {
  Try result = Try::refused;
  int status = 0;
  bool reset = false;
  std::string error;
};

class Client {
 public:
  explicit Client(const Settings& s) : settings_(s) {}

  Attempt order(const std::string& key) {
    Attempt a;
    const Deadline deadline = Deadline::in(settings_.timeout);
    try {
      drop_if_closed();
      if (!wire_) wire_ = std::make_unique<Wire>(connect_to(settings_.address, deadline));
    } catch (const Error& e) {
      a.error = e.what();  // nothing was sent, so nothing can have happened
      return a;
    }
    try {
      send_all(wire_->fd, "POST /order HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: " + key + "\r\nContent-Length: 0\r\n" +
                              (settings_.close ? "Connection: close\r\n\r\n" : "\r\n"), deadline);
      auto head = read_head(wire_->in, deadline);
      if (!head) throw Error(Code::unreachable, "closed without an answer");
      const std::string body = read_body(*head, wire_->in, deadline);
      a.status = std::atoi(head->first[1].c_str());
      if (settings_.close || !head->keeps_alive()) wire_.reset();
      if (a.status == 200 || a.status == 201) a.result = Try::ok;
      else if (a.status >= 400 && a.status < 500) a.result = Try::hopeless;
      if (a.result != Try::ok) a.error = body.substr(0, 200);
    } catch (const Error& e) {
      // Sent, at least in part, and not answered whole: the order may stand or not.
      wire_.reset();
      a = {Try::unknown, 0, e.code == Code::unreachable, e.what()};
    }
    return a;
  }

 private:
  struct Wire {
    explicit Wire(Fd f) : fd(std::move(f)), in(fd) {}
    Fd fd;
    Reader in;
  };

  // A server may end an idle connection; a client that looks first loses nothing by it.
  void drop_if_closed() {
    if (!wire_) return;
    char byte;
    const ssize_t n = ::recv(wire_->fd.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n >= 0 || (errno != EAGAIN && errno != EINTR)) wire_.reset();
  }

  const Settings& settings_;
  std::unique_ptr<Wire> wire_;
};

void record(Tally& t, const std::string& key, std::int64_t due, std::int64_t sent, std::int64_t end, int tries,
            bool reset, bool doubtful, const Attempt& last) {
  const char* outcome = last.result == Try::ok ? "ok" : doubtful ? "unknown" : "failed";
  Json line = {{"key", key}, {"start_us", due}, {"sent_us", sent}, {"end_us", end}, {"outcome", outcome},
               {"tries", tries}, {"status", last.status}, {"reset", reset}};
  if (!last.error.empty()) line["error"] = last.error;
  std::lock_guard lock(t.mutex);
  // One write for each line: what was acknowledged is on record even if this program is killed.
  write_all(t.history.get(), dump_line(line) + "\n", "the history");
  t.waits.push_back(end - due);
  (last.result == Try::ok ? t.ok : doubtful ? t.unknown : t.failed) += 1;
  t.retried += tries > 1;
  t.resets += reset;
  if (end - due > t.longest) t.longest = end - due, t.longest_at = due;
}

int run_load(int argc, char** argv) {
  Options o(argc, argv,
            {"rate", "clients", "seconds", "url-address", "history", "timeout-ms", "retry-after-ms", "prefix"},
            {"close", "keep-alive"});
  Settings s;
  s.address = Address::parse(o.need("url-address"));
  s.rate = static_cast<double>(std::max(1LL, o.number("rate", 100)));
  s.close = o.has("close");
  s.timeout = Millis(o.number("timeout-ms", 30'000));
  s.retry_after = Millis(o.number("retry-after-ms", 100));
  s.prefix = o.get("prefix", "k" + std::to_string(now_us()) + "-" + std::to_string(::getpid()));
  Tally tally;
  const std::string history = o.need("history");
  tally.history = Fd(::open(history.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!tally.history) throw errno_error(errno, "open", history);

  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  const long long seconds = o.number("seconds", 0);
  const auto most = seconds > 0 ? static_cast<std::int64_t>(s.rate * static_cast<double>(seconds)) : INT64_MAX;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stop{false};
  std::atomic<long long> working{o.number("clients", 16)};
  const std::int64_t begin = now_us() + 20'000;
  std::vector<std::thread> clients;
  for (long long c = working; c > 0; --c)
    clients.emplace_back([&] {
      Client client(s);
      while (!stop) {
        const std::int64_t n = next++;
        if (n >= most) break;
        const std::int64_t due = begin + static_cast<std::int64_t>(static_cast<double>(n) * 1e6 / s.rate);
        while (!stop && now_us() < due)
          std::this_thread::sleep_for(std::min(Micros(due - now_us()), Micros(100'000)));
        if (stop) break;  // due, but not sent: no client was ever told anything about it
        const std::string key = s.prefix + "-" + std::to_string(n);
        const std::int64_t sent = now_us();
        int tries = 1;
        Attempt last = client.order(key);
        bool doubtful = last.result == Try::unknown, reset = last.reset;
        if (last.result == Try::refused || last.result == Try::unknown) {
          system_clock().sleep(s.retry_after);
          ++tries;
          last = client.order(key);
          doubtful |= last.result == Try::unknown;
          reset |= last.reset;
        }
        record(tally, key, due, sent, now_us(), tries, reset, doubtful, last);
      }
      --working;
    });
  while (working > 0) {
    const timespec turn{.tv_sec = 0, .tv_nsec = 50'000'000};
    if (::sigtimedwait(&signals, nullptr, &turn) > 0) stop = true;
  }
  for (auto& c : clients) c.join();

  auto& w = tally.waits;
  std::sort(w.begin(), w.end());
  auto percentile = [&](double p) {
    return w.empty() ? 0.0 : static_cast<double>(w[static_cast<std::size_t>(p * static_cast<double>(w.size() - 1))]) / 1e3;
  };
  const double took = static_cast<double>(now_us() - begin) / 1e6;
  std::printf("%s\n", dump_line({{"orders", w.size()}, {"ok", tally.ok}, {"failed", tally.failed},
                                 {"unknown", tally.unknown}, {"retried", tally.retried}, {"resets", tally.resets},
                                 {"per_second", took > 0 ? static_cast<double>(tally.ok) / took : 0},
                                 {"p50_ms", percentile(0.5)}, {"p99_ms", percentile(0.99)},
                                 {"longest_ms", w.empty() ? 0.0 : static_cast<double>(tally.longest) / 1e3},
                                 {"longest_at_us", tally.longest_at}}).c_str());
  return 0;
}

}  // namespace
}  // namespace rehome::testing

int main(int argc, char** argv) {
  try {
    return rehome::testing::run_load(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-load: %s\n", e.what());
    return 2;
  }
}
