// The first process of a test host: runs /var/lib/boot.d/* in order, as a reboot would, and reaps what is left to it.
// SIGTERM ends the host as an orderly shutdown does; SIGKILL from outside is the power cut.
//   rehome-host-init FD    writes "booted" to FD once the boot scripts were run
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <vector>

namespace {

const char* const boot_dir = "/var/lib/boot.d";

std::vector<std::string> boot_scripts() {
  std::vector<std::string> found;
  DIR* dir = opendir(boot_dir);
  if (!dir) return found;
  while (const dirent* entry = readdir(dir)) {
    std::string path = std::string(boot_dir) + "/" + entry->d_name;
    if (entry->d_name[0] != '.' && access(path.c_str(), X_OK) == 0) found.push_back(path);
  }
  closedir(dir);
  std::sort(found.begin(), found.end());
  return found;
}

// The child that boots. timeout(1) bounds each script, so that one which hangs does not keep the others from starting.
[[noreturn]] void boot(int ready) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (const std::string& script : boot_scripts()) {
    const pid_t pid = fork();
    if (pid == 0) {
      close(ready);
      const int log = open("/var/log/boot.log", O_WRONLY | O_CREAT | O_APPEND, 0644);
      const int null = open("/dev/null", O_RDONLY);
      dup2(null, 0);
      dup2(log, 1);
      dup2(log, 2);
      setsid();
      setenv("HOME", "/root", 1);
      execlp("timeout", "timeout", "60", script.c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    if (status != 0) {
      FILE* log = fopen("/var/log/boot.log", "a");
      if (log) {
        fprintf(log, "%s ended with status %d\n", script.c_str(), WIFEXITED(status) ? WEXITSTATUS(status) : -1);
        fclose(log);
      }
    }
  }
  const int flag = open("/run/booted", O_WRONLY | O_CREAT, 0644);
  close(flag);
  // Opened without waiting and ignoring SIGPIPE: whoever powered us on may be gone.
  signal(SIGPIPE, SIG_IGN);
  if (write(ready, "booted\n", 7) < 0) perror("rehome-host-init: ready");
  _exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    fputs("usage: rehome-host-init FD, as the first process of a pid namespace\n", stderr);
    return 2;
  }
  const int ready = atoi(argv[1]);
  prctl(PR_SET_NAME, "host-init");
  sigset_t waited;
  sigemptyset(&waited);
  sigaddset(&waited, SIGCHLD);
  sigaddset(&waited, SIGTERM);
  sigprocmask(SIG_BLOCK, &waited, nullptr);
  if (fork() == 0) boot(ready);
  close(ready);
  for (bool stopping = false;;) {
    while (waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    // A signal can be merged with one that is pending, so look again now and then.
    const timespec second{1, 0};
    siginfo_t from{};
    const int got = sigtimedwait(&waited, &from, &second);
    if (stopping) return 0;
    if (got == SIGTERM) {
      // Process 0 is one outside. A host that ends in the middle of a test must be able to say who ended it.
      fprintf(stderr, "rehome-host-init: shutting down, asked by process %d\n", static_cast<int>(from.si_pid));
      stopping = true;
      kill(-1, SIGTERM);
      sleep(2);
    }
  }
}
