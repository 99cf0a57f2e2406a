// rehome-gate --state STATE
#include <sys/resource.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "base/error.h"
#include "base/text.h"
#include "gate/gate.h"

namespace {

std::atomic<bool> stop_asked{false}, reload_asked{false};

// Sockets that the supervisor opened: the protocol of sd_listen_fds(3).
std::map<std::string, rehome::Fd> inherited_sockets() {
  std::map<std::string, rehome::Fd> sockets;
  const char *pid = std::getenv("LISTEN_PID"), *count = std::getenv("LISTEN_FDS"), *names = std::getenv("LISTEN_FDNAMES");
  if (!count || !names || (pid && std::atol(pid) != ::getpid())) return sockets;
  auto list = rehome::split(names, ':');
  for (int i = 0; i < std::atoi(count) && i < static_cast<int>(list.size()); i++)
    sockets[list[static_cast<std::size_t>(i)]] = rehome::Fd(3 + i);
  return sockets;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 || std::string(argv[1]) != "--state") {
    std::fprintf(stderr, "usage: rehome-gate --state DIRECTORY\n");
    return 2;
  }
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGTERM, [](int) { stop_asked = true; });
  std::signal(SIGINT, [](int) { stop_asked = true; });
  std::signal(SIGHUP, [](int) { reload_asked = true; });
  // Ten thousand waiting connections need ten thousand descriptors.
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  try {
    rehome::Gate gate(argv[2], inherited_sockets());
    gate.run(stop_asked, reload_asked);
    return 0;
  } catch (const rehome::Error& e) {
    std::fprintf(stderr, "rehome-gate: %s\n", e.what());
    return rehome::error_info(e.code).exit_status;
  }
}
