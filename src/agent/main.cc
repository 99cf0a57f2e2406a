// rehome-agent: serve, supervise, dial. Started by rehome itself, and by what brings it back after a reboot.
#include <poll.h>
#include <sys/socket.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <string>
#include <vector>

#include "agent/agent.h"
#include "agent/client.h"
#include "agent/boot.h"
#include "agent/client.h"
#include "agent/supervisor.h"
#include "sys/fs.h"
#include "sys/process.h"
#ifdef REHOME_WITH_TRACK
#include "track/module.h"
#endif

namespace {

std::atomic<bool> stop_serving{false};
std::atomic<int> stop_supervising{0};

void on_signal(int signal) {
  stop_serving = true;
  stop_supervising = signal == SIGTERM ? 1 : 2;
}

const char* const kUsage =
    "rehome-agent serve --state DIR [--ephemeral] [--side source|target] [--name NAME]\n"
    "rehome-agent install --state DIR --side source|target --name NAME [--boot HOW] [--before UNIT]...\n"
    "rehome-agent supervise --state DIR [--detach] [--wait]\n"
    "rehome-agent dial SOCKET\n"
    "rehome-agent ask --state DIR     one request from standard input, its answer on standard output\n"
    "rehome-agent rsync-shim ...      started by rsync only\n"
    "rehome-agent version\n";

// Joins standard input and output to a socket: for ssh servers that forbid forwarding sockets.
int dial(const std::string& path) {
  rehome::Fd fd = rehome::connect_to({.path = path}, rehome::Deadline::in(rehome::Millis(5000)));
  bool in_open = true;
  char buf[65536];
  while (true) {
    pollfd p[2] = {{in_open ? 0 : -1, POLLIN, 0}, {fd.get(), POLLIN, 0}};
    if (::poll(p, 2, -1) < 0 && errno != EINTR) return 1;
    if (p[0].revents) {
      ssize_t n = ::read(0, buf, sizeof buf);
      if (n > 0) {
        rehome::send_all(fd, std::string_view(buf, static_cast<std::size_t>(n)));
      } else if (n == 0 || errno != EINTR) {
        in_open = false;
        ::shutdown(fd.get(), SHUT_WR);
      }
    }
    if (p[1].revents) {
      ssize_t n = ::recv(fd.get(), buf, sizeof buf, 0);
      if (n == 0) return 0;
      if (n < 0 && errno != EINTR) return 1;
      if (n > 0) rehome::write_all(1, std::string_view(buf, static_cast<std::size_t>(n)), "standard output");
    }
  }
}

// One request line from standard input to the agent, its answer to standard output: what stored actions use. Throws the
// error that the agent answers.
int ask(const std::string& state) {
  std::string request;
  char buf[4096];
  ssize_t n;
  while ((n = ::read(0, buf, sizeof buf)) > 0 || (n < 0 && errno == EINTR))
    if (n > 0) request.append(buf, static_cast<std::size_t>(n));
  rehome::AgentClient client(state + "/run/agent.sock");
  rehome::Json answer = client.ask(rehome::parse_json(request, "the request"), rehome::Deadline::in(rehome::Millis(60'000)));
  rehome::write_all(1, rehome::dump_line(answer) + "\n", "standard output");
  return 0;
}

// Makes the agent of a state directory resident: what a restarted one needs, what brings it back after a reboot, and
// then itself. Idempotent; returns when it answers.
void install(const rehome::AgentOptions& options, rehome::Boot boot) {
  using namespace rehome;
  if (options.side.empty() || options.name.empty()) throw Error(Code::usage, "install needs --side and --name");
  agent_side_from(options.side);
  boot.name = options.name;
  boot.side = options.side;
  boot.state = options.state;
  if (boot.how.empty()) boot.how = "none";
  make_directories(options.state);
  // It may have been there before, open to others: secrets will lie below it.
  if (::chmod(options.state.c_str(), 0700) != 0) throw errno_error(errno, "chmod", options.state, "name a directory with `state` that this account owns, or one that is not there");
  const std::string path = options.state + "/agent.json";
  // A running agent owns its files, so it is asked; nothing but what brings it back can be new.
  try {
    AgentClient agent(options.state + "/run/agent.sock", Deadline::in(Millis(1000)));
    Json hello = agent.call("hello", Json::object(), Deadline::in(Millis(5000)));
    if (!hello.contains("record") && !exists(options.state + "/record"))
      agent.call("record.init", {{"gen", hello["gen"]}, {"side", options.side}, {"name", options.name}}, Deadline::in(Millis(5000)));
    agent.call("boot.install", {{"gen", hello["gen"]}, {"how", boot.how}, {"before", boot.before}}, Deadline::in(Millis(60'000)));
    return;
  } catch (const Error& e) {
    if (e.code != Code::unreachable) throw;
  }
  Json config = exists(path) ? parse_json(read_file(path), path) : Json::object();
  if (config.value("side", "") != options.side || config.value("name", "") != options.name || config.value("boot", "") != boot.how) {
    config["side"] = options.side;
    config["name"] = options.name;
    config["boot"] = boot.how;  // before it is made, so that boot.remove finds whatever a crash leaves
    write_durably(path, config.dump(1) + "\n");
  }
  // A run begins with the source serving, and its record there before its agent is.
  if (!exists(options.state + "/record") && !config.value("began", false)) {
    create_record_file(options.state + "/record", {});
    config["began"] = true;
    write_durably(path, config.dump(1) + "\n");
  }
  install_boot(boot, "");
  // systemd has started it by now, or will take over when this one ends.
  if (boot.how != "systemd") supervise_detached({options.state});
  else wait_for_agent(options.state);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> args(argv + 1, argv + argc);
  std::string command = args.empty() ? "" : args[0];
#ifdef REHOME_WITH_TRACK
  // Its words are rsync's, not ours.
  if (command == "rsync-shim") {
    try {
      ::signal(SIGPIPE, SIG_IGN);
      return rehome::track::rsync_shim({args.begin() + 1, args.end()});
    } catch (const std::exception& e) {
      std::fprintf(stderr, "rehome-agent: %s\n", e.what());
      return 12;  // rsync's own status for a broken stream
    }
  }
#endif
  rehome::AgentOptions serve;
  rehome::SuperviseOptions supervise;
  rehome::Boot boot;
  bool detach = false;
  std::string plain;
  for (std::size_t i = 1; i < args.size(); i++) {
    bool more = i + 1 < args.size();
    if (args[i] == "--state" && more) serve.state = supervise.state = args[++i];
    else if (args[i] == "--side" && more) serve.side = args[++i];
    else if (args[i] == "--name" && more) serve.name = args[++i];
    else if (args[i] == "--boot" && more) boot.how = args[++i];
    else if (args[i] == "--before" && more) boot.before.push_back(args[++i]);
    else if (args[i] == "--ephemeral") serve.ephemeral = true;
    else if (args[i] == "--detach") detach = true;
    else if (args[i] == "--wait") supervise.wait = true;
    else if (plain.empty() && args[i][0] != '-') plain = args[i];
    else return std::fprintf(stderr, "rehome-agent: '%s' is not understood\n%s", args[i].c_str(), kUsage), 2;
  }
  while (serve.state.size() > 1 && serve.state.ends_with('/')) serve.state.pop_back();
  supervise.state = serve.state;
  if (command == "version") return std::printf("%s\n", rehome::kAgentVersion), 0;
  struct sigaction action {};
  action.sa_handler = on_signal;
  ::sigaction(SIGTERM, &action, nullptr);
  ::sigaction(SIGINT, &action, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  try {
    if (command == "dial" && !plain.empty()) return dial(plain);
    if (command == "ask" && !serve.state.empty()) return ask(serve.state);
    if (serve.state.empty() || serve.state[0] != '/' || (command != "serve" && command != "supervise" && command != "install"))
      return std::fputs(kUsage, stderr), 2;
    if (command == "install") return install(serve, boot), 0;
    if (!detach) rehome::raise_file_limit();
    if (command == "serve") return rehome::Agent(serve).serve(stop_serving);
    if (detach) return rehome::supervise_detached(supervise), 0;
    return rehome::supervise(supervise, stop_supervising);
  } catch (const rehome::Error& e) {
    std::fprintf(stderr, "rehome-agent: %s\n", e.what());
    if (!e.hint.empty()) std::fprintf(stderr, "  %s\n", e.hint.c_str());
    return rehome::error_info(e.code).exit_status;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "rehome-agent: %s\n", e.what());
    return 70;
  }
}
