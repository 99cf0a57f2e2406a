// A real sshd for tests of what goes through ssh.
#pragma once

#include <pwd.h>
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/net.h"
#include "sys/process.h"

namespace rehome::testing {

// With its own keys and configuration, on a free port. Keeps its files in a directory that the caller removes.
class Sshd {
 public:
  explicit Sshd(const std::string& dir) : dir_(dir) {
    make_directories(dir);
    for (const char* key : {"/host", "/user"})
      run_ok({.argv = {"ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir + key}}, Deadline::in(Millis(10'000)));
    write_durably(dir + "/authorized", read_file(dir + "/user.pub"));
    {
      Fd free = listen_on({.host = "127.0.0.1", .port = 0});
      port_ = local_port(free);
    }
    write_durably(dir + "/config", "ListenAddress 127.0.0.1\nPort " + std::to_string(port_) + "\nHostKey " + dir + "/host\nAuthorizedKeysFile " +
                                       dir + "/authorized\nStrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin yes\nPasswordAuthentication no\n"
                                       // Or bash reads .bashrc, which may wait for anything.
                                       "SetEnv SHLVL=2\n");
    if (::geteuid() == 0) make_directories("/run/sshd", 0755);
    start();
  }
  void start() {
    sshd_ = std::make_unique<Child>(Command{.argv = {"/usr/sbin/sshd", "-D", "-e", "-f", dir_ + "/config"}}, Child::Pipes{.err = true});
    Deadline deadline = Deadline::in(Millis(5000));
    while (true) {
      try {
        connect_to({.host = "127.0.0.1", .port = port_}, Deadline::in(Millis(500)));
        return;
      } catch (const Error&) {
        if (deadline.passed()) throw;
        system_clock().sleep(Millis(10));
      }
    }
  }
  // Ends the server and every connection of it.
  void stop() {
    Outcome o = run({.argv = {"ps", "-e", "-o", "pid=,ppid="}}, Deadline::in(Millis(5000)));
    std::vector<int> all{sshd_->pid()};
    for (std::size_t i = 0; i < all.size(); i++)
      for (const auto& line : split(o.out, '\n')) {
        int pid = 0, parent = 0;
        if (std::sscanf(line.c_str(), "%d %d", &pid, &parent) == 2 && parent == all[i]) all.push_back(pid);
      }
    for (int pid : all) ::kill(pid, SIGKILL);
    sshd_.reset();
  }
  std::uint16_t port() const { return port_; }
  std::string key() const { return dir_ + "/user"; }
  std::string host() const { return ::getpwuid(::geteuid())->pw_name + std::string("@127.0.0.1"); }
  std::vector<std::string> options() const { return {"StrictHostKeyChecking=no", "UserKnownHostsFile=" + dir_ + "/known"}; }

 private:
  std::string dir_;
  std::uint16_t port_ = 0;
  std::unique_ptr<Child> sshd_;
};

}  // namespace rehome::testing
