#include "agent/children.h"

#include <poll.h>
#include <signal.h>

#include <cerrno>
#include <charconv>

#include "base/text.h"

namespace rehome {
namespace {

constexpr std::size_t kTail = 20;

}  // namespace

void Children::set(const std::string& name, const Command& command, Millis restart) {
  drop(name);
  auto one = std::make_unique<One>();
  one->name = name;
  one->command = command;
  one->restart = restart;
  One& ref = *one;
  // Each has a thread of its own, and dies with it: with the agent, too.
  one->thread = std::thread([this, &ref] { loop(ref); });
  std::lock_guard lock(mutex_);
  all_[name] = std::move(one);
}

void Children::loop(One& one) {
  while (!one.stop) {
    std::string partial;
    auto say = [&](std::string line) {
      if (is_sample(line)) return;
      std::lock_guard lock(one.mutex);
      if (line.size() > 1000) line.resize(1000);
      one.tail.push_back(std::move(line));
      if (one.tail.size() > kTail) one.tail.pop_front();
    };
    try {
      Child child(one.command, {.in = !one.command.input.empty(), .out = true, .err = true});
      {
        std::lock_guard lock(one.mutex);
        one.running = true;
        one.pid = child.pid();
        one.starts++;
      }
      if (child.in) {
        std::string_view in = one.command.input;
        while (!in.empty() && !one.stop) {
          ssize_t n = ::write(child.in.get(), in.data(), in.size());
          if (n < 0 && errno != EINTR) break;
          if (n > 0) in.remove_prefix(static_cast<std::size_t>(n));
        }
        child.in.reset();
      }
      while (!one.stop && (child.out || child.err)) {
        pollfd p[2] = {{child.out ? child.out.get() : -1, POLLIN, 0}, {child.err ? child.err.get() : -1, POLLIN, 0}};
        if (::poll(p, 2, 100) <= 0) {
          if (child.poll()) break;  // it has ended, a grandchild holds its output open
          continue;
        }
        for (int i = 0; i < 2; i++) {
          if (!p[i].revents) continue;
          char buf[8192];
          Fd& fd = i == 0 ? child.out : child.err;
          ssize_t n = ::read(fd.get(), buf, sizeof buf);
          if (n <= 0) {
            fd.reset();
            continue;
          }
          partial.append(buf, static_cast<std::size_t>(n));
          for (auto nl = partial.find('\n'); nl != std::string::npos; nl = partial.find('\n')) {
            say(partial.substr(0, nl));
            partial.erase(0, nl + 1);
          }
          if (partial.size() > 4096) partial.clear();
        }
      }
      if (one.stop) {
        child.kill(SIGTERM);
        try {
          child.wait(Deadline::in(Millis(1000)));
        } catch (const Error&) {
          child.kill(SIGKILL);
        }
      }
      int status = 0;
      while (!one.stop && !child.poll()) system_clock().sleep(Millis(20));
      if (auto s = child.poll()) status = *s;
      if (!partial.empty()) say(partial);
      std::lock_guard lock(one.mutex);
      one.running = false;
      one.last_status = status;
      if (!one.stop) log_("child " + one.name + " ended with status " + std::to_string(status));
    } catch (const std::exception& e) {
      say(e.what());
      std::lock_guard lock(one.mutex);
      one.running = false;
      one.last_status = 127;
    }
    for (Deadline d = Deadline::in(one.restart); !one.stop && !d.passed();) system_clock().sleep(d.left(Millis(50)));
  }
}

bool Children::is_sample(const std::string& line) const {
  if (!line.starts_with("lag ")) return false;
  auto words = split(line, ' ');
  std::int64_t bytes = 0, ms = 0;
  auto number = [](const std::string& w, std::int64_t& n) {
    auto [end, error] = std::from_chars(w.data(), w.data() + w.size(), n);
    return error == std::errc() && end == w.data() + w.size();
  };
  if (words.size() != 4 || !number(words[2], bytes) || !number(words[3], ms)) return false;
  sample_(words[1], bytes, ms);
  return true;
}

bool Children::drop(const std::string& name) {
  std::unique_ptr<One> one;
  {
    std::lock_guard lock(mutex_);
    auto it = all_.find(name);
    if (it == all_.end()) return false;
    one = std::move(it->second);
    all_.erase(it);
  }
  one->stop = true;
  one->thread.join();
  return true;
}

Json Children::describe(const One& one) {
  std::lock_guard lock(one.mutex);
  Json j{{"name", one.name}, {"running", one.running}, {"pid", one.pid}, {"starts", one.starts}, {"tail", one.tail}};
  if (one.last_status) j["last_status"] = *one.last_status;
  return j;
}

Json Children::status(const std::string& name) const {
  std::lock_guard lock(mutex_);
  if (name.empty()) {
    Json all = Json::array();
    for (const auto& [n, one] : all_) all.push_back(describe(*one));
    return all;
  }
  auto it = all_.find(name);
  if (it == all_.end()) throw Error(Code::state, "no child is named '" + name + "'", "send child.set first");
  return describe(*it->second);
}

void Children::stop() {
  std::map<std::string, std::unique_ptr<One>> all;
  {
    std::lock_guard lock(mutex_);
    all.swap(all_);
  }
  for (auto& [n, one] : all) one->stop = true;
  for (auto& [n, one] : all) one->thread.join();
}

}  // namespace rehome
