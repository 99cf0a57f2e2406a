#include "track/rsync.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/net.h"
#include "sys/process.h"

namespace rehome::track {
namespace {

// rsync splits --rsh at spaces, so the socket and the store travel in the environment.
constexpr const char* socket_variable = "REHOME_AGENT_SOCKET";
constexpr const char* store_variable = "REHOME_STORE";

}  // namespace

std::vector<std::string> rsync_argv(const RsyncPass& p) {
  // --sparse: a hole must not become data on the way. --modify-window=-1: times are compared to the nanosecond, or a file
  // changed twice within a second would be taken for unchanged. --no-compress: the link's ssh decides that.
  std::vector<std::string> argv{"rsync", "-aHAX", "--sparse", "--delete", "--partial", "--modify-window=-1",
                                "--info=progress2", "--outbuf=L", "--no-compress"};
  if (!p.owner_by_name) argv.push_back("--numeric-ids");
  if (p.bandwidth > 0) argv.push_back("--bwlimit=" + std::to_string(std::max<std::int64_t>(1, p.bandwidth / 1024)));
  for (const auto& i : p.include) argv.push_back("--include=" + i);
  for (const auto& e : p.exclude) argv.push_back("--exclude=" + e);
  // The agent's own binary, by its process: it may have been replaced or removed on disk.
  argv.push_back("--rsh=/proc/" + std::to_string(::getpid()) + "/exe rsync-shim");
  argv.push_back(p.path.ends_with('/') ? p.path : p.path + "/");
  argv.push_back("peer:./");
  return argv;
}

bool run_rsync(const RsyncPass& pass, RsyncProgress& progress, const std::atomic<bool>& stop) {
  Command command{.argv = rsync_argv(pass), .env = {{socket_variable, pass.state + "/run/agent.sock"},
                                                    {store_variable, pass.store}, {"LC_ALL", "C"}}};
  Child child(command, {.out = true, .err = true});
  std::string line, err;
  while (child.out || child.err) {
    if (stop) {
      child.kill(SIGTERM);
      throw Error(Code::interrupted, "rsync of " + pass.path + " was stopped", "it continues where it was", true);
    }
    pollfd p[2] = {{child.out ? child.out.get() : -1, POLLIN, 0}, {child.err ? child.err.get() : -1, POLLIN, 0}};
    if (::poll(p, 2, 200) <= 0) continue;
    char buf[8192];
    if (p[0].revents) {
      ssize_t n = ::read(child.out.get(), buf, sizeof buf);
      if (n <= 0) child.out.reset();
      for (ssize_t i = 0; i < n; i++) {
        if (buf[i] != '\r' && buf[i] != '\n') {
          if (line.size() < 4096) line += buf[i];
          continue;
        }
        // "  1,234,567  45%  ...": for display only.
        std::string digits;
        std::size_t at = 0;
        while (at < line.size() && (line[at] == ' ' || line[at] == ',' || std::isdigit(static_cast<unsigned char>(line[at])))) {
          if (std::isdigit(static_cast<unsigned char>(line[at]))) digits += line[at];
          else if (line[at] == ' ' && !digits.empty()) break;
          at++;
        }
        int percent;
        if (!digits.empty() && digits.size() < 19 && std::sscanf(line.c_str() + at, "%d%%", &percent) == 1) {
          progress.bytes = std::stoll(digits);
          progress.percent = percent;
        }
        line.clear();
      }
    }
    if (p[1].revents) {
      ssize_t n = ::read(child.err.get(), buf, sizeof buf);
      if (n <= 0) child.err.reset();
      else err.append(buf, static_cast<std::size_t>(n));
      if (err.size() > 16384) err.erase(0, err.size() - 8192);
    }
  }
  int status = child.wait(Deadline::in(Millis(30'000)));
  if (status == 0) return false;
  if (status == 24) return true;  // files vanished
  std::string_view last = trim(err);
  if (last.size() > 600) last.remove_prefix(last.size() - 600);
  throw Error(Code::store, "rsync of " + pass.path + " ended with status " + std::to_string(status) + ": " + std::string(last),
              status == 12 || status == 30 || status == 255 ? "it is tried again when the link is up" : "", true);
}

std::vector<std::string> check_server_argv(const std::vector<std::string>& argv) {
  auto denied = [](const std::string& what) {
    return Error(Code::denied, "rsync on this side is not run with " + what, "only what rehome's own agent asks for is run");
  };
  if (argv.size() < 5 || argv[0] != "rsync" || argv[1] != "--server") throw denied("anything but --server");
  if (argv[argv.size() - 2] != "." || argv.back() != "./") throw denied("a path of its own");
  static const std::vector<std::string> plain{"--delete", "--delete-during", "--delete-delay", "--delete-before", "--partial",
                                              "--numeric-ids", "--sparse", "--no-compress"};
  for (std::size_t i = 2; i + 2 < argv.size(); i++) {
    const std::string& a = argv[i];
    if (std::find(plain.begin(), plain.end(), a) != plain.end()) continue;
    if (a.starts_with("--bwlimit=") || a.starts_with("--modify-window=") || a.starts_with("--timeout=") || a == "-@-1") continue;
    bool letters = a.size() > 1 && a[0] == '-' &&
                   std::all_of(a.begin() + 1, a.end(), [](unsigned char c) { return std::isalnum(c) || c == '.'; });
    // -M, -T, -f and the like would take the next word as theirs, but the next word must be an option or the path.
    if (!letters) throw denied("'" + a + "'");
  }
  return argv;
}

int rsync_shim(const std::vector<std::string>& argv) {
  const char* socket = std::getenv(socket_variable);
  const char* store = std::getenv(store_variable);
  if (!socket || !store || argv.size() < 2) {
    std::fputs("rehome-agent rsync-shim: this is for rsync, started by the agent\n", stderr);
    return 2;
  }
  Json words = Json::array();
  for (std::size_t i = 1; i < argv.size(); i++) words.push_back(argv[i]);  // argv[0] is the host name, which is made up
  Fd fd = connect_to({.path = socket}, Deadline::in(Millis(5000)));
  send_all(fd, dump_line({{"op", "files.rsync"}, {"store", store}, {"argv", words}}) + "\n", Deadline::in(Millis(5000)));
  Reader in(fd);
  auto answer = in.line(Deadline::in(Millis(30'000)));
  if (!answer) throw Error(Code::unreachable, "the agent closed the connection");
  Json j = parse_json(*answer, "the agent's answer");
  if (j.contains("error")) throw error_from_json(j["error"]);
  std::string ahead = in.take_buffered();
  write_all(1, ahead, "standard output");
  bool in_open = true;
  char buf[131072];
  while (true) {
    pollfd p[2] = {{in_open ? 0 : -1, POLLIN, 0}, {fd.get(), POLLIN, 0}};
    if (::poll(p, 2, -1) < 0 && errno != EINTR) return 12;
    // Written without waiting: if neither side read while both write, nothing would move. rsync reads all the time.
    if (p[1].revents) {
      ssize_t n = ::recv(fd.get(), buf, sizeof buf, 0);
      if (n == 0) return 0;
      if (n < 0 && errno != EINTR) return 12;
      if (n > 0) write_all(1, std::string_view(buf, static_cast<std::size_t>(n)), "standard output");
    }
    if (p[0].revents) {
      ssize_t n = ::read(0, buf, sizeof buf);
      if (n > 0) {
        send_all(fd, std::string_view(buf, static_cast<std::size_t>(n)));
      } else if (n == 0 || errno != EINTR) {
        in_open = false;
        ::shutdown(fd.get(), SHUT_WR);
      }
    }
  }
}

std::string rsync_version() {
  try {
    Outcome o = run({.argv = {"rsync", "--version"}}, Deadline::in(Millis(5000)));
    // "rsync  version 3.2.7  protocol version 31": the only form there is; --version has had none other since 2.x.
    auto at = o.out.find("version ");
    if (!o.ok() || at == std::string::npos) return {};
    std::string v = o.out.substr(at + 8);
    return v.substr(0, v.find_first_of(" \n"));
  } catch (const Error&) {
    return {};
  }
}

}  // namespace rehome::track
