// The controller's own ssh: one master connection a site, commands and socket forwards through it. The system's ssh, so
// that the user's configuration, jump hosts and agents just work.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "config/deployment.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {

// "ssh -o ... -p ... user@host" without a command: what every use of ssh for this host starts with. BatchMode: nothing
// in a run may wait for a person's password.
std::vector<std::string> ssh_argv(const SshHost& host);

// Turns what ssh printed into an Error that says what the person does: unreachable, key refused, host key changed.
Error ssh_error(const SshHost& host, const std::string& stderr_text);

// A command line for the account's login shell, whichever that is, that runs `line` in sh: fish and csh know other quotes than sh.
// `line` holds no newline.
std::string in_sh(const std::string& line);

class SshMaster {
 public:
  // Connects; throws Error(unreachable or denied).
  explicit SshMaster(SshHost host, Deadline deadline = Deadline::in(Millis(20000)));
  ~SshMaster();
  SshMaster(const SshMaster&) = delete;
  SshMaster& operator=(const SshMaster&) = delete;

  // Runs a command line of sh there.
  Outcome run(const std::string& command_line, const std::string& input = {}, Deadline deadline = Deadline::in(Millis(60000)));
  Outcome run_ok(const std::string& command_line, const std::string& input = {}, Deadline deadline = Deadline::in(Millis(60000)));
  // Copies a local file there through standard input; a temporary name, then rename.
  void upload(const std::string& local, const std::string& remote, unsigned mode);
  // A local socket path that leads to a unix socket there.
  std::string forward(const std::string& remote_socket);
  // Connects again where the connection's process has ended (killed, or its link was cut for seconds), and lets the sockets of
  // forward() lead there again; connections through them are lost. Nothing when it lives. Thread-safe. Throws Error(unreachable or denied).
  void redial(Deadline deadline);

 private:
  void dial(Deadline deadline);
  void forward(const std::string& local, const std::string& remote_socket);
  std::vector<std::string> through(std::vector<std::string> more) const;
  SshHost host_;
  TempDir dir_;
  std::string control_;
  std::timed_mutex mutex_;                      // of who dials, and of forwards_
  std::map<std::string, std::string> forwards_;  // here -> there
};

}  // namespace rehome
