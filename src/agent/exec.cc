#include "agent/exec.h"

#include <fcntl.h>
#include <poll.h>

#include <cerrno>

#include "base/bytes.h"

namespace rehome {
namespace {

// For what a program takes back when it is ended.
constexpr Millis kGrace{2000};

}  // namespace

Command command_from_json(const Json& request) {
  Command c;
  Error bad(Code::usage, "'argv' is not an array of strings");
  if (!request.contains("argv") || !request["argv"].is_array() || request["argv"].empty()) throw bad;
  for (const auto& w : request["argv"]) {
    if (!w.is_string()) throw bad;
    c.argv.push_back(w.get<std::string>());
  }
  if (request.contains("env"))
    for (const auto& [k, v] : request["env"].items()) {
      if (!v.is_string()) throw Error(Code::usage, "'env' holds something that is not a string");
      c.env.emplace_back(k, v.get<std::string>());
    }
  c.input = request.contains("input_base64") ? from_base64(get_string(request, "input_base64"))
                                             : get_string(request, "input", "");
  c.user = get_string(request, "user", "");
  c.directory = get_string(request, "directory", "");
  return c;
}

Outcome run_for(const Command& command, Deadline deadline, const Fd* caller, const std::atomic<bool>& cancelled) {
  constexpr std::size_t most = 16u << 20;
  Child child(command, {.in = !command.input.empty(), .out = true, .err = true});
  Outcome o;
  std::string_view input = command.input;
  if (child.in) ::fcntl(child.in.get(), F_SETFL, O_NONBLOCK);
  while (child.out || child.err) {
    pollfd p[4] = {{child.out ? child.out.get() : -1, POLLIN, 0},
                   {child.err ? child.err.get() : -1, POLLIN, 0},
                   {child.in ? child.in.get() : -1, POLLOUT, 0},
                   {caller ? caller->get() : -1, POLLRDHUP, 0}};
    int r = ::poll(p, 4, static_cast<int>(deadline.left(Millis(100)).count()));
    if (r < 0 && errno != EINTR) throw errno_error(errno, "poll", command.argv[0]);
    if (deadline.passed()) {
      child.end(kGrace);
      throw Error(Code::timeout, command.argv[0] + " did not end in time and was stopped");
    }
    if (cancelled || (r > 0 && p[3].revents)) {
      child.end(kGrace);
      throw Error(Code::interrupted, command.argv[0] + " was stopped: its controller is gone");
    }
    if (r <= 0) continue;
    if (p[2].revents) {
      ssize_t n = ::write(child.in.get(), input.data(), input.size());
      if (n > 0) input.remove_prefix(static_cast<std::size_t>(n));
      if (input.empty() || (n < 0 && errno != EAGAIN && errno != EINTR)) child.in.reset();
    }
    auto take = [&](Fd& fd, short revents, std::string& into) {
      if (!revents) return;
      char buf[65536];
      ssize_t n = ::read(fd.get(), buf, sizeof buf);
      if (n > 0) {
        auto count = static_cast<std::size_t>(n);
        o.truncated = o.truncated || into.size() + count > most;
        into.append(buf, std::min(count, most - std::min(most, into.size())));
      } else if (n == 0 || errno != EINTR) {
        fd.reset();
      }
    };
    take(child.out, p[0].revents, o.out);
    take(child.err, p[1].revents, o.err);
  }
  o.status = child.wait(deadline);
  return o;
}

}  // namespace rehome
