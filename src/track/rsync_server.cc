#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "sys/process.h"
#include "track/receiving.h"
#include "track/rsync.h"

namespace rehome::track {

void serve_rsync(AgentHost& host, Receiving& r, const Json& request, AgentConnection& c) {
  // Told to files.sync, which the other side asks for before it counts the pass as done.
  struct Running {
    Receiving& r;
    std::string failure = "rsync here could not be run to its end";
    explicit Running(Receiving& receiving) : r(receiving) {
      std::lock_guard lock(r.mutex);
      r.rsyncs++;
    }
    ~Running() {
      std::lock_guard lock(r.mutex);
      r.rsyncs--;
      r.rsync_failure = failure;
      r.ended.notify_all();
    }
  } running(r);
  Command command{.argv = check_server_argv(request.at("argv").get<std::vector<std::string>>()),
                  // The descriptor, not the path: the path may be closed by our own bind mount.
                  .directory = "/proc/self/fd/" + std::to_string(r.root.dir())};
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) throw errno_error(errno, "make a socket pair for", "rsync");
  Fd ours(pair[0]), theirs(pair[1]);
  Child child(command, {.err = true, .in_fd = theirs.get(), .out_fd = theirs.get()});
  theirs.reset();
  send_all(c.fd, "{\"ok\":true}\n", Deadline::in(Millis(5000)));
  std::string ahead = c.in.take_buffered();
  if (!ahead.empty()) send_all(ours, ahead, Deadline::in(Millis(30'000)));
  relay(c.fd, ours, host.stopping());
  ours.reset();
  if (r.revoked) child.kill(SIGKILL);
  int status = 0;
  std::string said;
  try {
    status = child.wait(Deadline::in(Millis(10'000)));
  } catch (const Error&) {
    child.kill(SIGKILL);
    status = 137;
  }
  if (status != 0) {
    ::fcntl(child.err.get(), F_SETFL, O_NONBLOCK);
    char buf[600];
    ssize_t n = ::read(child.err.get(), buf, sizeof buf);
    said = "rsync here ended with status " + std::to_string(status) + ": " + std::string(buf, static_cast<std::size_t>(std::max<ssize_t>(0, n)));
    host.log("files " + get_string(request, "store") + ": " + said);
  }
  running.failure = said;
}

void await_rsync(const AgentHost& host, Receiving& r) {
  std::unique_lock lock(r.mutex);
  if (!r.ended.wait_for(lock, std::chrono::seconds(15), [&] { return r.rsyncs == 0; }))
    throw Error(Code::timeout, "rsync has not ended on the " + host.side(), "see its agent's log", true);
  if (!r.rsync_failure.empty())
    throw Error(Code::store, r.settings.path + ": " + r.rsync_failure, "mend that on the " + host.side() + "; it is tried again", true);
}

}  // namespace rehome::track
