// A cable with a delay, loss and a rate, for kernels without netem: two TAP devices in this network namespace, joined
// in user space. Each direction has its own queue with a tail drop, as a router has.
//   rehome-wire IF_A IF_B    prints "ready"; commands on standard input, one a line:
//   delay MS (one way), loss PERCENT, rate MBIT (0: no limit), cut, heal, quit
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Nanos = std::chrono::nanoseconds;

constexpr std::size_t queue_limit = 4u << 20;

struct Settings {
  Nanos delay{0};
  double loss = 0;  // 0 to 1
  double rate = 0;  // bits a nanosecond; 0: no limit
  bool cut = false;
};

int open_tap(const std::string& name) {
  const int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
  ifreq request{};
  name.copy(request.ifr_name, IFNAMSIZ - 1);
  request.ifr_flags = IFF_TAP | IFF_NO_PI;
  if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) {
    fprintf(stderr, "rehome-wire: tap %s: %s\n", name.c_str(), strerror(errno));
    exit(1);
  }
  return fd;
}

// What travels in one direction.
class Lane {
 public:
  Lane(int from, int to) : from_(from), to_(to) {}

  void receive(const Settings& settings, std::mt19937& random) {
    std::array<char, 65536> frame;
    for (int i = 0; i < 64; ++i) {
      const ssize_t n = read(from_, frame.data(), frame.size());
      if (n <= 0) return;
      const auto size = static_cast<std::size_t>(n);
      if (settings.cut || queued_ + size > queue_limit) continue;
      if (settings.loss > 0 && std::uniform_real_distribution<>(0, 1)(random) < settings.loss) continue;
      // Serialised onto the line after what is already on it, then carried for `delay`.
      line_free_ = std::max(line_free_, Clock::now());
      if (settings.rate > 0) line_free_ += Nanos(static_cast<std::int64_t>(static_cast<double>(size) * 8 / settings.rate));
      queue_.push_back({line_free_ + settings.delay, std::vector<char>(frame.data(), frame.data() + size)});
      queued_ += size;
    }
  }

  // Sends what is due; the time at which more will be.
  std::optional<Clock::time_point> deliver(const Settings& settings) {
    const auto now = Clock::now();
    while (!queue_.empty() && queue_.front().due <= now) {
      const Frame& frame = queue_.front();
      // A device that is down refuses the frame: it is lost, as on a dead cable.
      if (!settings.cut && write(to_, frame.bytes.data(), frame.bytes.size()) < 0 && errno == EBADFD) exit(1);
      queued_ -= frame.bytes.size();
      queue_.pop_front();
    }
    if (queue_.empty()) return std::nullopt;
    return queue_.front().due;
  }

  int from() const { return from_; }

 private:
  struct Frame {
    Clock::time_point due;
    std::vector<char> bytes;
  };
  int from_, to_;
  std::deque<Frame> queue_;
  std::size_t queued_ = 0;
  Clock::time_point line_free_{};
};

bool apply(const std::string& line, Settings& settings) {
  std::istringstream in(line);
  std::string word;
  double value = 0;
  in >> word >> value;
  if (word == "delay") settings.delay = Nanos(static_cast<std::int64_t>(value * 1e6));
  if (word == "loss") settings.loss = value / 100;
  if (word == "rate") settings.rate = value / 1000;
  if (word == "cut") settings.cut = true;
  if (word == "heal") settings.cut = false;
  return word != "quit";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fputs("usage: rehome-wire IF_A IF_B\n", stderr);
    return 2;
  }
  const int a = open_tap(argv[1]);
  const int b = open_tap(argv[2]);
  std::array<Lane, 2> lanes{Lane(a, b), Lane(b, a)};
  Settings settings;
  std::mt19937 random(1);
  std::string pending;
  bool commands = true;
  puts("ready");
  fflush(stdout);
  for (;;) {
    std::optional<Clock::time_point> next;
    for (Lane& lane : lanes) {
      const auto due = lane.deliver(settings);
      if (due && (!next || *due < *next)) next = due;
    }
    std::array<pollfd, 3> polled{{{a, POLLIN, 0}, {b, POLLIN, 0}, {commands ? 0 : -1, POLLIN, 0}}};
    timespec wait{};
    if (next) {
      const auto left = std::max(Nanos(0), std::chrono::duration_cast<Nanos>(*next - Clock::now()));
      wait = {static_cast<time_t>(left.count() / 1'000'000'000), static_cast<long>(left.count() % 1'000'000'000)};
    }
    ppoll(polled.data(), polled.size(), next ? &wait : nullptr, nullptr);
    for (Lane& lane : lanes) lane.receive(settings, random);
    if (polled[2].revents) {
      std::array<char, 256> text;
      const ssize_t n = read(0, text.data(), text.size());
      if (n <= 0) {
        commands = false;
        continue;
      }
      pending.append(text.data(), static_cast<std::size_t>(n));
      for (std::size_t end; (end = pending.find('\n')) != std::string::npos; pending.erase(0, end + 1))
        if (!apply(pending.substr(0, end), settings)) return 0;
    }
  }
}
