// rehome-gate --state STATE: see gate.h. Its supervisor starts it again when it ends.
#include <signal.h>
#include <sys/signalfd.h>

#include <cstdio>
#include <string>

#include "base/error.h"
#include "gate/gate.h"

int main(int argc, char** argv) {
  using namespace rehome;
  if (argc != 3 || std::string(argv[1]) != "--state" || argv[2][0] != '/') {
    std::fprintf(stderr, "usage: rehome-gate --state STATE\n");
    return error_info(Code::usage).exit_status;
  }
  sigset_t set;
  sigemptyset(&set);
  for (int s : {SIGHUP, SIGTERM, SIGINT}) sigaddset(&set, s);
  ::sigprocmask(SIG_BLOCK, &set, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  try {
    Fd signals(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
    Gate gate(argv[2], inherited_listeners(), signals.get());
    gate.run();
    return 0;
  } catch (const Error& e) {
    std::fprintf(stderr, "rehome-gate: %s\n", e.what());
    return error_info(e.code).exit_status;
  }
}
