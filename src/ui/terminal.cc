#include "ui/terminal.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "base/text.h"
#include "sys/fd.h"
#include "ui/look.h"
#include "ui/text_view.h"

namespace rehome::ui {
namespace {

constexpr Ticks kMs = 1'000'000;
constexpr Ticks kRedraw = 100 * kMs, kPlain = 10'000 * kMs, kWindow = 15'000 * kMs;

Terminal::Sink to_fd(int fd) {
  return [fd](std::string_view text) {
    while (!text.empty()) {
      ssize_t n = ::write(fd, text.data(), text.size());
      if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        if (errno == EAGAIN) ::usleep(1000);
        continue;
      }
      if (n <= 0) return false;
      text.remove_prefix(static_cast<std::size_t>(n));
    }
    return true;
  };
}

// A terminal that was stopped with Ctrl-S takes nothing, and what we do must go on, a pause above all: what it does not
// take within 100 ms waits here until the next news. At the end it gets two seconds.
class PatientTerminal {
 public:
  // Opened anew, since O_NONBLOCK on the descriptor that we were given would be the shell's too.
  explicit PatientTerminal(int fd)
      : own_(::open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC)), fd_(own_ ? own_.get() : fd) {}
  ~PatientTerminal() { take(2000); }
  bool write(std::string_view text) {
    bool stalled = !waiting_.empty();
    waiting_ += text;
    if (waiting_.size() > kMost) waiting_.erase(0, waiting_.size() - kMost);
    return take(stalled ? 0 : 100);
  }

 private:
  static constexpr std::size_t kMost = 1u << 20;
  bool take(int patience_ms) {
    Deadline deadline = Deadline::in(Millis(patience_ms));
    while (!waiting_.empty()) {
      pollfd p{fd_, POLLOUT, 0};
      int ready = ::poll(&p, 1, static_cast<int>(deadline.left().count()));
      if (ready < 0 && errno == EINTR) continue;
      if (ready == 0) return true;
      ssize_t n = ::write(fd_, waiting_.data(), waiting_.size());
      if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        if (deadline.passed()) return true;
        continue;
      }
      if (n <= 0) {
        waiting_.clear();
        return false;
      }
      waiting_.erase(0, static_cast<std::size_t>(n));
      // The rest waits for the next news, or a terminal that takes a little at a time would hold us up.
      if (deadline.passed() && patience_ms > 0) return true;
    }
    return true;
  }
  Fd own_;
  int fd_;
  std::string waiting_;
};

Terminal::Sink to_terminal(int fd) {
  if (!::isatty(fd)) return to_fd(fd);
  auto patient = std::make_shared<PatientTerminal>(fd);
  return [patient](std::string_view text) { return patient->write(text); };
}

Window terminal_window() {
  const char* term = std::getenv("TERM");
  if (!::isatty(STDOUT_FILENO) || !term || std::string_view(term) == "dumb") return {};
  winsize size{};
  if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return {.columns = 80};
  return {.columns = size.ws_col, .rows = size.ws_row};
}

// At most `width` columns; a longer line would wrap, and the block could not be erased.
std::string clipped(const std::string& text, std::size_t width) {
  if (columns(text) <= width) return text;
  std::size_t used = 0, end = 0;
  while (end < text.size()) {
    std::size_t next = end + 1;
    while (next < text.size() && (static_cast<unsigned char>(text[next]) & 0xC0) == 0x80) next++;
    used += columns(std::string_view(text).substr(end, next - end));
    if (used >= width) break;
    end = next;
  }
  return text.substr(0, end) + "…";
}

std::string amount(std::int64_t n, const std::string& unit) {
  return unit == "bytes" ? human_bytes(n) : grouped(n) + " " + unit;
}

}  // namespace

Terminal::Terminal(TerminalOptions options)
    : Terminal(options, to_terminal(STDOUT_FILENO), to_terminal(STDERR_FILENO), terminal_window, system_clock()) {}

Terminal::Terminal(TerminalOptions options, Sink out, Sink err, std::function<Window()> window, Clock& clock)
    : options_(options), out_(std::move(out)), err_(std::move(err)), window_(std::move(window)), columns_(window_().columns), clock_(clock) {}

Terminal::~Terminal() {
  std::lock_guard lock(mutex_);
  // Unfinished work is no news; a status stays on the screen.
  if (status_.empty()) erase();
  write({});
}

void Terminal::write(std::string_view text) {
  pending_ += text;
  if (!pending_.empty() && out_alive_) out_alive_ = out_(pending_);
  pending_.clear();
}

void Terminal::erase() {
  if (drawn_ > 0) pending_ += "\x1b[" + std::to_string(drawn_) + "A\r\x1b[J";
  drawn_ = 0;
}

void Terminal::news(const std::vector<std::string>& lines) {
  if (lines.empty()) return;
  erase();
  status_.clear();
  for (const auto& l : lines) pending_ += l + "\n";
  draw(true);
}

// What will be erased again must not be higher than the window, nor wider.
void Terminal::block(std::vector<std::string> lines) {
  Window window = window_();
  if (columns_ > 0 && window.columns > 0) columns_ = window.columns;
  if (window.rows > 1 && lines.size() >= window.rows) {
    std::size_t fit = window.rows - 2;
    std::string more = "  … and " + std::to_string(lines.size() - fit) + " lines more";
    lines.resize(fit);
    lines.push_back(more);
  }
  for (const auto& l : lines) pending_ += clipped(l, columns_ - 1) + "\n";
  drawn_ = lines.size();
}

void Terminal::draw(bool now) {
  if (columns_ == 0) return write({});
  Ticks t = clock_.now();
  if (!now && t - drawn_at_ < kRedraw) return;
  drawn_at_ = t;
  erase();
  std::vector<const Work*> order;
  for (const auto& [store, w] : work_) order.push_back(&w);
  std::sort(order.begin(), order.end(), [](const Work* a, const Work* b) { return a->order < b->order; });
  std::size_t width = columns_ - 1;
  std::vector<std::string> lines;
  for (const auto& [id, title] : steps_) lines.push_back("  … " + title);
  for (const Work* w : order) lines.push_back(work_line(*w, width));
  block(std::move(lines));
  write({});
}

std::string Terminal::work_line(const Work& w, std::size_t width) const {
  std::string text = "    " + w.store + "  " + w.phase + "  ";
  double rate = 0;
  if (w.seen.size() > 1) {
    auto [t0, d0] = w.seen.front();
    auto [t1, d1] = w.seen.back();
    if (t1 > t0 && d1 > d0) rate = static_cast<double>(d1 - d0) / (static_cast<double>(t1 - t0) / 1e9);
  }
  std::string numbers;
  if (w.total > 0) {
    double part = std::clamp(static_cast<double>(w.done) / static_cast<double>(w.total), 0.0, 1.0);
    if (columns_ >= 70) {
      auto full = static_cast<int>(part * 20);
      for (int i = 0; i < 20; i++) text += i < full ? "█" : "░";
      text += " ";
    }
    // Rounded down: 100 % is said when all is there.
    text += std::to_string(static_cast<int>(part * 100)) + " %";
    numbers = "  " + amount(w.done, w.unit) + " of " + amount(w.total, w.unit);
  } else if (w.done > 0) {
    numbers = amount(w.done, w.unit);
  }
  if (rate > 0) {
    numbers += "  " + (w.unit == "bytes" ? human_bytes(std::llround(rate)) : grouped(std::llround(rate)) + " " + w.unit) + "/s";
    if (w.total > w.done) {
      double left = static_cast<double>(w.total - w.done) / rate;
      if (left < 1e7) numbers += "  " + human_duration(Millis(std::llround(left) * 1000)) + " left";
    }
  }
  text += numbers;
  if (!w.detail.empty()) text += "  " + w.detail;
  return columns_ == 0 ? text : clipped(text, width);
}

void Terminal::progress(const Json& e) {
  std::string store = printable(str(e, "store"));
  auto [it, fresh] = work_.try_emplace(store);
  Work& w = it->second;
  if (fresh) w.order = static_cast<int>(work_.size());
  std::string phase = printable(str(e, "phase"));
  if (w.phase != phase) w.seen.clear(), w.said = 0;
  w.store = store;
  w.phase = phase;
  w.detail = printable(str(e, "detail"));
  w.unit = printable(str(e, "unit", "bytes"));
  bool was_whole = w.total > 0 && w.done >= w.total;
  w.done = whole(e, "done");
  w.total = whole(e, "total");
  Ticks t = clock_.now();
  if (!w.seen.empty() && w.done < w.seen.back().second) w.seen.clear();
  w.seen.emplace_back(t, w.done);
  while (w.seen.size() > 2 && w.seen.front().first < t - kWindow) w.seen.pop_front();
  if (columns_ > 0) return draw(false);
  bool complete = w.total > 0 && w.done >= w.total;
  if (w.said != 0 && t - w.said < kPlain && (!complete || was_whole)) return;
  if (w.said != 0 && complete && was_whole) return;
  w.said = t;
  write(work_line(w, 0) + "\n");
}

void Terminal::operator()(const Json& e) {
  std::lock_guard lock(mutex_);
  std::string kind = str(e, "kind");
  if (options_.json) return write(dump_line(e) + "\n");
  if (kind == "status") {
    auto lines = status_lines(e);
    // A status that follows a status replaces it: status --watch.
    const bool again = drawn_ > 0;
    erase();
    status_ = lines;
    if (columns_ > 0 && again) {
      block(lines);
    } else {
      // Asked once it is printed whole.
      for (const auto& l : lines) pending_ += (columns_ > 0 ? clipped(l, columns_ - 1) : l) + "\n";
      if (columns_ > 0) drawn_ = lines.size();
    }
    return write({});
  }
  if (kind == "plan") return news(plan_lines(e));
  if (kind == "result") {
    work_.clear();
    steps_.clear();
    return news(result_lines(e));
  }
  if (kind == "finding") return news(entry_lines(e));
  if (options_.quiet) return;
  if (kind == "progress") return progress(e);
  if (kind == "step") {
    std::string id = str(e, "id"), state = str(e, "state");
    if (state == "started") {
      steps_[id] = printable(str(e, "title"));
      if (columns_ > 0) return draw(true);
    } else {
      steps_.erase(id);
      // A step's stores are done with it: "copy db" ends the line of db.
      std::erase_if(work_, [&](const auto& w) { return id.ends_with(" " + w.first) || steps_.empty(); });
    }
    return news(entry_lines(e));
  }
  if (kind == "message") {
    // Waiting for a moment says the same thing every second.
    if (str(e, "text") == last_message_) return;
    last_message_ = str(e, "text");
  }
  news(entry_lines(e));
}

void Terminal::error(const Error& error) {
  std::lock_guard lock(mutex_);
  if (options_.json) return write(dump_line({{"kind", "error"}, {"error", error_to_json(error)}}) + "\n");
  erase();
  work_.clear();
  steps_.clear();
  write({});
  std::string text;
  for (const auto& l : error_lines(error)) text += l + "\n";
  if (err_alive_) err_alive_ = err_(text);
}

bool Terminal::alive() {
  std::lock_guard lock(mutex_);
  return out_alive_;
}

}  // namespace rehome::ui
