#include "agent/actions.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

std::string tail_of(const std::string& text) {
  std::string_view t = trim(text);
  if (t.size() > 600) t.remove_prefix(t.size() - 600);
  return std::string(t);
}

void replace_all(std::string& text, std::string_view what, const std::string& with) {
  for (auto at = text.find(what); at != std::string::npos; at = text.find(what, at + with.size())) text.replace(at, what.size(), with);
}

}  // namespace

Json to_json(const Action& a) {
  Json env = Json::object();
  for (const auto& [k, v] : a.command.env) env[k] = v;
  return {{"name", a.name}, {"argv", a.command.argv}, {"env", env}, {"input", a.command.input},
          {"try_input", a.try_input}, {"user", a.command.user}, {"warm", a.warm}, {"timeout_ms", a.timeout.count()}};
}

Action action_from_json(const Json& j) {
  Action a;
  a.name = get_string(j, "name");
  Error bad(Code::usage, "action '" + a.name + "' has no argv", "argv is an array of strings");
  if (!j.contains("argv") || !j["argv"].is_array() || j["argv"].empty()) throw bad;
  for (const auto& w : j["argv"]) {
    if (!w.is_string()) throw bad;
    a.command.argv.push_back(w.get<std::string>());
  }
  if (j.contains("env"))
    for (const auto& [k, v] : j["env"].items()) a.command.env.emplace_back(k, v.get<std::string>());
  a.command.input = get_string(j, "input", "");
  a.command.user = get_string(j, "user", "");
  a.try_input = get_string(j, "try_input", "");
  a.warm = get_bool(j, "warm", false);
  a.timeout = Millis(get_int(j, "timeout_ms", 30000));
  return a;
}

// Not tied to the thread that starts it: whichever connection warms it, it ends when its standard input does, which
// happens when the agent dies too.
WarmProgram::WarmProgram(const Command& command)
    : child_(command, {.in = true, .out = true, .err = true, .die_with_parent = false}) {
  for (const Fd* fd : {&child_.in, &child_.out, &child_.err}) ::fcntl(fd->get(), F_SETFL, O_NONBLOCK);
}

void WarmProgram::feed(const std::string& input, Deadline deadline) {
  const std::string done = "rehome-done " + std::to_string(++count_);
  const std::string text = input + "\n\\echo " + done + "\n";
  std::string_view left = text;
  err_.clear();
  auto take = [](const Fd& fd, std::string& into) {  // false: ended
    char buf[16384];
    ssize_t n = ::read(fd.get(), buf, sizeof buf);
    if (n > 0) into.append(buf, static_cast<std::size_t>(n));
    if (into.size() > 1u << 20) into.erase(0, into.size() - (1u << 16));
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EINTR));
  };
  bool out_open = true;
  while (true) {
    pollfd p[3] = {{child_.out.get(), POLLIN, 0},
                   {child_.err ? child_.err.get() : -1, POLLIN, 0},
                   {left.empty() ? -1 : child_.in.get(), POLLOUT, 0}};
    int r = ::poll(p, 3, static_cast<int>(deadline.left(Millis(10'000)).count()));
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", "a warm program");
    if (r > 0) {
      if (p[2].revents) {
        ssize_t n = ::write(child_.in.get(), left.data(), left.size());
        if (n > 0) left.remove_prefix(static_cast<std::size_t>(n));
        else if (n < 0 && errno != EAGAIN && errno != EINTR) left = {};  // it has ended; its output says why
      }
      if (p[1].revents && !take(child_.err, err_)) child_.err.reset();
      if (p[0].revents) out_open = take(child_.out, out_);
      for (auto nl = out_.find('\n'); nl != std::string::npos; nl = out_.find('\n')) {
        bool is_done = std::string_view(out_).substr(0, nl) == done;
        out_.erase(0, nl + 1);
        if (is_done) return;
      }
    }
    if (!out_open) {
      int status = child_.wait(Deadline::in(Millis(1000)));
      if (child_.err) take(child_.err, err_);
      throw Error(Code::store, "it ended with status " + std::to_string(status) + ": " + tail_of(err_));
    }
    if (deadline.passed()) {
      child_.kill(SIGKILL);
      throw Error(Code::timeout, "it did not answer in time: " + tail_of(err_));
    }
  }
}

Actions::Actions(std::string path, std::function<void(const std::string&)> log)
    : path_(std::move(path)), log_(std::move(log)) {
  if (!exists(path_)) return;
  try {
    Json j = parse_json(read_file(path_), path_);
    for (int i = 0; i < kActionSets; i++) {
      auto which = static_cast<ActionSet>(i);
      for (const auto& item : j.value(std::string(name_of(which)), Json::array()))
        at(which).items.push_back(action_from_json(item));
      at(which).programs.resize(at(which).items.size());
    }
  } catch (const std::exception& e) {
    error_ = std::string("the stored actions cannot be read: ") + e.what();
    log_(error_);
  }
}

void Actions::check_readable() const {
  std::lock_guard lock(mutex_);
  if (!error_.empty()) throw Error(Code::io, error_, "put the actions there again: resume does");
}

Json Actions::get() const {
  std::lock_guard lock(mutex_);
  Json j = Json::object();
  for (int i = 0; i < kActionSets; i++) {
    Json items = Json::array();
    for (const auto& a : sets_[i].items) items.push_back(to_json(a));
    j[std::string(name_of(static_cast<ActionSet>(i)))] = items;
  }
  return j;
}

void Actions::set(ActionSet which, const Json& items) {
  if (!items.is_array()) throw Error(Code::usage, "'items' is not an array");
  std::vector<Action> next;
  for (const auto& item : items) next.push_back(action_from_json(item));
  std::lock_guard running(at(which).running);
  Json all = get();
  all[std::string(name_of(which))] = items;
  write_durably(path_, all.dump(1) + "\n");
  std::lock_guard lock(mutex_);
  Set& s = at(which);
  s.items = std::move(next);
  s.programs.clear();
  s.programs.resize(s.items.size());
  s.next = 0;
  error_.clear();
}

// With set.running held, so items stay.
void Actions::feed(Set& set, std::size_t item, const std::string& input) {
  Action& a = set.items[item];
  Deadline deadline = Deadline::in(a.timeout);
  try {
    if (a.warm) {
      auto& program = set.programs[item];
      if (program && !program->alive()) program.reset();
      if (!program) {
        Command c = a.command;
        c.input.clear();
        program = std::make_unique<WarmProgram>(c);
      }
      try {
        program->feed(input, deadline);
      } catch (...) {
        program.reset();
        throw;
      }
      return;
    }
    Command c = a.command;
    c.input = input;
    Outcome o = rehome::run(c, deadline);
    if (!o.ok()) throw Error(Code::store, "it ended with status " + std::to_string(o.status) + ": " + tail_of(o.err));
  } catch (const Error& e) {
    throw Error(e.code, "action '" + a.name + "' (" + a.command.argv[0] + "): " + e.message, e.hint, true);
  }
}

void Actions::try_out(ActionSet which, const std::string& name) {
  check_readable();
  Set& s = at(which);
  std::lock_guard running(s.running);
  bool found = name.empty();
  for (std::size_t i = 0; i < s.items.size(); i++) {
    if (!name.empty() && s.items[i].name != name) continue;
    found = true;
    if (!s.items[i].try_input.empty() || s.items[i].warm) feed(s, i, s.items[i].try_input);
  }
  if (!found) throw Error(Code::usage, "no action is named '" + name + "' in set " + std::string(name_of(which)));
}

void Actions::warm(ActionSet which) { probe(which); }

void Actions::begin(ActionSet which) { at(which).restart = true; }

void Actions::run(ActionSet which, std::int64_t attempt, std::int64_t epoch) {
  check_readable();
  Set& s = at(which);
  std::lock_guard running(s.running);
  if (s.restart.exchange(false) || which == ActionSet::close) s.next = 0;
  std::optional<Error> failed;
  for (; s.next < s.items.size(); s.next++) {
    Ticks from = system_clock().now();
    std::string input = s.items[s.next].command.input;
    replace_all(input, "@rehome_attempt@", std::to_string(attempt));
    replace_all(input, "@rehome_epoch@", std::to_string(epoch));
    try {
      feed(s, s.next, input);
    } catch (const Error& e) {
      if (which != ActionSet::close) throw;
      if (!failed) failed = e;
      continue;
    }
    char took[64];
    std::snprintf(took, sizeof took, " done in %.1f ms", ms_between(from, system_clock().now()));
    log_(std::string(name_of(which)) + ": " + s.items[s.next].name + took);
  }
  if (failed) throw *failed;
}

void Actions::probe(ActionSet which) {
  check_readable();
  Set& s = at(which);
  std::lock_guard running(s.running);
  for (std::size_t i = 0; i < s.items.size(); i++)
    if (s.items[i].warm) feed(s, i, s.items[i].try_input);
}

void Actions::stop() {
  for (auto& s : sets_) {
    std::lock_guard running(s.running);
    for (auto& p : s.programs) p.reset();
  }
}

}  // namespace rehome
