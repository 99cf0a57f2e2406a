// The terminal while a command runs: finished news scroll, work under way is a block at the bottom that is redrawn.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/json.h"

namespace rehome::ui {

struct TerminalOptions {
  bool json = false;   // every object as one line, nothing else
  bool quiet = false;  // results, findings, plans, status and errors only
};

struct Window {
  std::size_t columns = 0;   // 0: no terminal
  std::size_t rows = 0;      // 0: without end
};

// Renders journal entries and the other objects a command emits. Thread-safe. A closed or broken terminal stops nothing:
// from the first failed write on, output is dropped.
class Terminal {
 public:
  // Where bytes go; returns false when nobody can read them any more.
  using Sink = std::function<bool(std::string_view)>;

  // Standard output and standard error of this process, with a block when standard output is a terminal.
  explicit Terminal(TerminalOptions options);
  // For tests. `window` is asked each time that something is drawn.
  Terminal(TerminalOptions options, Sink out, Sink err, std::function<Window()> window, Clock& clock);
  ~Terminal();
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;

  void operator()(const Json& entry);
  void error(const Error& error);
  // Whether anybody can still read what is printed.
  bool alive();

 private:
  struct Work {
    std::string store, phase, detail, unit;
    std::int64_t done = 0, total = 0;
    std::deque<std::pair<Ticks, std::int64_t>> seen;  // the last 15 seconds, for the rate
    Ticks said = 0;                                   // when a plain line was last written
    int order = 0;
  };
  void progress(const Json& e);
  void news(const std::vector<std::string>& lines);
  std::string work_line(const Work& w, std::size_t width) const;
  void erase();
  void draw(bool now);
  void block(std::vector<std::string> lines);
  void write(std::string_view text);

  TerminalOptions options_;
  Sink out_, err_;
  bool out_alive_ = true, err_alive_ = true;
  std::function<Window()> window_;
  std::size_t columns_;
  Clock& clock_;
  std::mutex mutex_;
  std::map<std::string, Work> work_;               // by store
  std::map<std::string, std::string> steps_;       // id -> title, those under way
  std::vector<std::string> status_;                // the last status, redrawn in place
  std::string last_message_;
  std::size_t drawn_ = 0;                          // lines of the block on the screen
  Ticks drawn_at_ = 0;
  std::string pending_;
};

}  // namespace rehome::ui
