#include "site/agent_site.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <utility>

#include "base/text.h"
#include "sys/state_dir.h"

namespace rehome {

std::string file_hash(const std::string& path) {
  Outcome o = run_ok({.argv = {"sha256sum", path}}, Deadline::in(Millis(60000)));
  return o.out.substr(0, 64);
}

std::string program_directory() {
  char buf[4096];
  ssize_t n = ::readlink("/proc/self/exe", buf, sizeof buf);
  if (n <= 0) throw errno_error(errno, "readlink", "/proc/self/exe");
  return parent_path(std::string(buf, static_cast<std::size_t>(n)));
}

namespace {

// Says it in the words of PostgreSQL's protocol (ErrorResponse, after any startup packet), so that libpq reports why there is no way
// to the server, and not only a connection that was closed.
void refuse_libpq(const Fd& client, const Error& why) {
  std::string fields;
  auto field = [&](char kind, const std::string& text) { fields += kind + text + '\0'; };
  field('S', "FATAL");
  field('V', "FATAL");
  field('C', "08006");
  field('M', why.message);
  if (!why.hint.empty()) field('H', why.hint);
  fields += '\0';
  const std::uint32_t size = htonl(static_cast<std::uint32_t>(fields.size() + 4));
  try {
    // What is not read when a socket is closed may take the answer with it.
    pollfd p{client.get(), POLLIN, 0};
    char startup[8192];
    if (::poll(&p, 1, 1000) > 0) (void)!::read(client.get(), startup, sizeof startup);
    send_all(client, "E" + std::string(reinterpret_cast<const char*>(&size), 4) + fields, Deadline::in(Millis(1000)));
  } catch (const Error&) {
    // It has gone: nobody waits for the reason.
  }
}

}  // namespace

AgentSite::AgentSite(const Deployment& deployment, Side side)
    : side_(side), name_(deployment.name), config_(deployment.site[side]) {
  label_ = std::string(side_name(side)) + (config_.local ? " (this machine)" : " (" + config_.ssh.host + ")");
}

std::unique_ptr<AgentSite> AgentSite::open(const Deployment& deployment, Side side, How how) {
  std::unique_ptr<AgentSite> site(new AgentSite(deployment, side));
  try {
    if (!site->config_.local) site->ssh_ = std::make_unique<SshMaster>(site->config_.ssh);
    site->learn_host();
    if (how == How::ephemeral)
      site->start_ephemeral();
    else if (how == How::install)
      site->install(deployment);
    else
      site->use_existing(how == How::control);
  } catch (const Error& e) {
    throw e.in(site->label_);
  }
  return site;
}

AgentSite::~AgentSite() {
  stopping_ = true;
  for (auto& [key, door] : doors_) {
    if (door->thread.joinable()) door->thread.join();
    for (auto& s : door->sessions)
      if (s.thread.joinable()) s.thread.join();
  }
  idle_.clear();
  ephemeral_hold_.reset();
  if (!ephemeral_directory_.empty()) {
    try {
      shell("rm -rf " + shell_quote(ephemeral_directory_));
    } catch (const Error&) {
      // Nobody to tell: the directory holds no secret.
    }
  }
}

Outcome AgentSite::try_shell(const std::string& line) {
  if (ssh_) return ssh_->run(line);
  return run({.argv = {"sh", "-c", line}}, Deadline::in(Millis(60000)));
}

Outcome AgentSite::shell(const std::string& line, const std::string& input, Deadline deadline) {
  if (ssh_) return ssh_->run_ok(line, input, deadline);
  return run_ok({.argv = {"sh", "-c", line}, .input = input}, deadline, line.substr(0, 60).c_str());
}

void AgentSite::learn_host() {
  // One round trip: who we are there, and what the host has. Lines are key=value.
  Outcome o = shell(
      "echo uid=$(id -u); echo home=$HOME; echo xdg=$XDG_STATE_HOME; echo run=$XDG_RUNTIME_DIR; echo arch=$(uname -m); echo kernel=$(uname -s); "
      "if [ -d /run/systemd/system ]; then echo systemd=1; fi");
  std::map<std::string, std::string> facts;
  for (const auto& line : split(o.out, '\n'))
    if (auto eq = line.find('='); eq != std::string::npos) facts[line.substr(0, eq)] = line.substr(eq + 1);
  if (facts["kernel"] != "Linux" || facts["arch"] != "x86_64")
    throw Error(Code::preflight, "the host runs " + facts["kernel"] + " on " + facts["arch"],
                "rehome's agent runs on Linux x86_64");
  systemd_ = facts.contains("systemd");
  std::string side(side_name(side_));
  if (!config_.state.empty())
    state_ = config_.state;
  else if (facts["uid"] == "0")
    state_ = "/var/lib/rehome/" + name_ + "/" + side;
  else
    state_ = (facts["xdg"].empty() ? facts["home"] + "/.local/state" : facts["xdg"]) + "/rehome/" + name_ + "/" + side;
  resident_state_ = state_;
  for (const auto& place : {facts["run"], std::string("/var/lib"), facts["home"], std::string("/tmp")})
    if (place.starts_with('/')) places_.push_back(place);
}

std::string AgentSite::upload_program(const std::string& program, const std::string& directory) {
  std::string local = program_directory() + "/" + program;
  if (!exists(local))
    throw Error(Code::internal, program + " is not beside rehome in " + program_directory(), "install all three programs");
  std::string remote = directory + "/" + program + "-" + file_hash(local).substr(0, 16);
  if (ssh_) {
    if (!ssh_->run("test -x " + shell_quote(remote)).ok()) ssh_->upload(local, remote, 0700);
  } else if (!exists(remote)) {
    make_directories(directory);
    write_durably(remote, read_file(local), 0700);
  }
  return remote;
}

// Empty when it runs.
std::string AgentSite::why_not(const std::string& program) {
  Outcome o = try_shell(shell_quote(program) + " version");
  if (o.ok()) return {};
  return std::string(trim(o.err)) + (o.status == 126 ? " (is its file system mounted noexec?)" : "");
}

void AgentSite::attach() {
  socket_ = state_ + "/run/agent.sock";
  if (ssh_) socket_ = ssh_->forward(socket_);
}

void AgentSite::start_ephemeral() {
  std::string program, tried;
  for (const auto& place : places_) {
    Outcome made = try_shell("mktemp -d " + shell_quote(place) + "/rehome-XXXXXX");
    std::string obstacle(trim(made.err));
    if (made.ok()) {
      state_ = ephemeral_directory_ = std::string(trim(made.out));
      try {
        program = upload_program("rehome-agent", state_ + "/bin");
        obstacle = why_not(program);
        if (obstacle.empty()) break;
      } catch (const Error& e) {
        if (e.code == Code::internal || e.code == Code::unreachable) throw;
        obstacle = e.message;
      }
      program.clear();
      shell("rm -rf " + shell_quote(std::exchange(ephemeral_directory_, {})));
    }
    tried += "\n  " + place + ": " + obstacle;
  }
  if (program.empty())
    throw Error(Code::preflight, "no directory of that host takes a program of ours and runs it:" + tried,
                "let one of them be on a file system that is not mounted noexec, and has 20 MB of room");
  std::string line = "mkdir -p " + shell_quote(state_ + "/log") + "; setsid " + shell_quote(program) + " serve --ephemeral --state " +
                     shell_quote(state_) + " --side " + std::string(side_name(side_)) + " --name " + shell_quote(name_) +
                     " </dev/null >>" + shell_quote(state_ + "/log/agent.log") +
                     " 2>&1 & i=0; while [ ! -S " + shell_quote(state_ + "/run/agent.sock") +
                     " ] && [ $i -lt 200 ]; do sleep 0.05; i=$((i+1)); done; test -S " +
                     shell_quote(state_ + "/run/agent.sock") + " || { cat " + shell_quote(state_ + "/log/agent.log") + " >&2; exit 1; }";
  shell(line);
  attach();
  ephemeral_hold_ = connect(Deadline::in(Millis(10000)));
}

void AgentSite::use_existing(bool may_remove) {
  attach();
  std::string sock = shell_quote(state_ + "/run/agent.sock");
  Outcome o = shell("if test -S " + sock + "; then echo yes; else echo no; fi");
  if (trim(o.out) != "yes")
    throw Error(Code::state, "no run of '" + name_ + "' is there: " + state_ + " has no agent", "start one with rehome begin");
  try {
    connect(Deadline::in(Millis(10000)));
  } catch (const Error&) {
    // Its host went down while the supervisor took all away, and nothing starts it again.
    Outcome removing = try_shell("cat " + shell_quote(state_ + "/run/remove"));
    if (!removing.ok()) throw;
    if (!may_remove)
      throw Error(Code::unreachable, "the run of '" + name_ + "' was being taken away from there when its host went down, and not all of it is gone",
                  "give the command that ended it once more");
    require_nothing_mounted();
    remove_what_is_left(trim(removing.out) != "all");
    throw Error(Code::state, "the run of '" + name_ + "' was being taken away from there, and is gone now");
  }
}

void AgentSite::install(const Deployment& deployment) {
  try {
    bring_agent(deployment);
  } catch (const Error&) {
    // What was brought and became no agent is taken away at once: no command would find it there.
    const std::string state = shell_quote(state_);
    try {
      try_shell("[ -e " + state + "/agent.json ] || { rm -f -- " + state + "/bin/rehome-*; rmdir -- " + state + "/bin " + state + (config_.state.empty() ? " " + shell_quote(parent_path(state_)) : "") + "; } 2>/dev/null");
    } catch (const Error&) {
      // Out of reach: the next begin uses what is there.
    }
    throw;
  }
}

void AgentSite::bring_agent(const Deployment& deployment) {
  std::string agent = upload_program("rehome-agent", state_ + "/bin");
  if (std::string obstacle = why_not(agent); !obstacle.empty())
    throw Error(Code::preflight, "programs in " + state_ + " do not run: " + obstacle, "name another place with `state`, on a file system that is not mounted noexec");
  upload_program("rehome-gate", state_ + "/bin");
  attach();
  std::string how = config_.boot;
  if (how.empty()) how = systemd_ ? "systemd" : "none";
  std::string line = "cd / && " + shell_quote(agent) + " install --state " + shell_quote(state_) + " --side " +
                     std::string(side_name(side_)) + " --name " + shell_quote(name_) + " --boot " + shell_quote(how);
  for (const auto& service : deployment.services)
    if (!service.on[side_].unit.empty()) line += " --before " + shell_quote(service.on[side_].unit);
  shell(line);
  Deadline deadline = Deadline::in(Millis(15000));
  while (true) {
    try {
      connect(deadline);
      return;
    } catch (const Error& e) {
      if (!e.passes() || deadline.passed())
        throw Error(Code::unreachable, "the agent was started but does not answer: " + e.message,
                    "look at " + state_ + "/log/agent.log on that host");
      system_clock().sleep(Millis(50));
    }
  }
}

void AgentSite::require_nothing_mounted() {
  // A tree that is still mounted below STATE would be removed with it. mountinfo writes a space as \040.
  shell("at=$(readlink -f " + shell_quote(state_) + " | sed 's/\\\\/\\\\134/g; s/ /\\\\040/g'); [ -z \"$at\" ] || "
      "while read -r _ _ _ _ p _; do case \"$p\" in \"$at\"/*) echo \"something is mounted at $p, in rehome's own directory, which is not removed: "
      "umount $p, then try again\" >&2; exit 1;; esac; done < /proc/self/mountinfo");
}

void AgentSite::uninstall(bool keep_start_condition) {
  require_nothing_mounted();   // while the agent is there, so that the command can be repeated
  // The supervisor takes it all away when its children have ended, whatever becomes of us meanwhile; what it leaves we remove.
  call("shutdown", {{"remove", true}, {"keep_fence", keep_start_condition}});
  idle_.clear();
  remove_what_is_left(keep_start_condition);
  if (!systemd_) return;
  // Its unit ended with the status that says so, and without its file systemd takes that for a failure and remembers it.
  std::string unit = shell_quote("rehome-" + name_ + "-" + std::string(side_name(side_)) + ".service");
  shell("i=0; while systemctl -q is-active " + unit + " && [ $i -lt 40 ]; do sleep 0.05; i=$((i+1)); done; systemctl reset-failed " + unit + " 2>/dev/null; true");
}

void AgentSite::remove_what_is_left(bool keep_start_condition) {
  // The names of rehome that are there, but for the start condition that stays; a case's action follows.
  const std::string names = "for f in *; do [ -e \"$f\" ] || [ -L \"$f\" ] || continue; " + std::string(keep_start_condition ? "[ \"$f\" = not-serving ] && continue; " : "") + "case \"$f\" in " + state_name_pattern() + ") ";
  const std::string state = shell_quote(state_), above = config_.state.empty() ? " " + shell_quote(parent_path(state_)) : "";
  shell("if cd " + state + " 2>/dev/null; then i=0; while [ $i -lt 200 ]; do left=; " + names + "[ \"$f\" = not-serving ] || left=1;; esac; done; [ \"$left\" ] || break; sleep 0.05; i=$((i+1)); done; " +
        names + "rm -rf -- \"$f\";; esac; done; fi; cd / && rmdir " + state + above + " 2>/dev/null; true");
  require_gone(keep_start_condition);
}

void AgentSite::require_gone(bool keep_start_condition) {
  const std::string boot = "rehome-" + name_ + "-" + std::string(side_name(side_));
  std::string files = "/etc/systemd/system/" + boot + ".service /etc/systemd/system/multi-user.target.wants/" + boot + ".service";
  if (config_.boot.starts_with("directory:")) files += " " + shell_quote(config_.boot.substr(10) + "/00-" + boot);
  // A program whose file is removed is still named by its process: "/proc/7/exe -> STATE/bin/rehome-agent (deleted)".
  Outcome o = try_shell(
      "state=" + shell_quote(state_) + "; at=$(readlink -m \"$state\" || echo \"$state\"); left() { "
      "for f in " + files + "; do [ ! -e \"$f\" ] && [ ! -h \"$f\" ] || echo \"$f\"; done; "
      "for f in $(ls \"$state\" 2>/dev/null); do " + std::string(keep_start_condition ? "[ \"$f\" != not-serving ] || continue; " : "") + "case \"$f\" in " + state_name_pattern() + ") echo \"$state/$f\" ;; esac; done; " +
      (config_.boot == "cron" ? "crontab -l 2>/dev/null | grep ' # " + boot + "$'; " : "") +
      "ls -l /proc/[0-9]*/exe 2>/dev/null | grep -F \" -> $at/bin/\" | sed 's|.*/proc/|process /proc/|'; }; "
      // The supervisor ends a moment after it has removed everything.
      "i=0; while what=$(left); [ -n \"$what\" ] && [ $i -lt 40 ]; do sleep 0.05; i=$((i+1)); done; [ -z \"$what\" ] || { echo \"$what\"; exit 1; }");
  if (o.ok()) return;
  std::string what(trim(o.out.empty() ? o.err : o.out));
  std::replace(what.begin(), what.end(), '\n', ',');
  throw Error(Code::io, "of the run there is still: " + what, "take it away by hand; then repeat the command").in(label_);
}

Fd AgentSite::connect(Deadline deadline) const {
  try {
    return greet(deadline);
  } catch (const Error& e) {
    // Where only ssh has ended, the resident agent is there as before; one for a single command went with its connection.
    if (e.code != Code::unreachable || !ssh_ || !ephemeral_directory_.empty()) throw;
    ssh_->redial(deadline);
  }
  return greet(deadline);
}

Fd AgentSite::greet(Deadline deadline) const {
  Fd fd = connect_to({.path = socket_}, deadline);
  // Through ssh a connection that the other end refuses is accepted here first and then closed: ask before trusting it.
  send_all(fd, "{\"op\":\"hello\"}\n", deadline);
  Reader reader(fd);
  auto line = reader.line(deadline);
  if (!line) throw Error(Code::unreachable, "the agent does not answer at " + socket_, "is its host up?", true);
  return fd;
}

Json AgentSite::call(const std::string& op, Json args, Deadline deadline) {
  Fd fd;
  {
    std::lock_guard lock(mutex_);
    while (!fd && !idle_.empty()) {
      // Nothing is owed on it: whatever can be read is the end, of an agent that was started again, say.
      pollfd p{idle_.back().get(), POLLIN | POLLRDHUP, 0};
      if (::poll(&p, 1, 0) == 0) fd = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  try {
    if (!fd) fd = connect(deadline);
    args["op"] = op;
    args["gen"] = generation_;
    send_all(fd, dump_line(args) + "\n", deadline);
    Reader reader(fd);
    std::optional<std::string> line;
    try {
      line = reader.line(deadline);
    } catch (const Error& e) {
      if (e.code == Code::timeout) throw Error(Code::timeout, "the agent has not answered " + op + " in time", "see status, then repeat the command", true);
      throw;
    }
    if (!line) throw Error(Code::unreachable, "the agent closed the connection during " + op, "see status, then resume", true);
    Json answer = parse_json(*line, "the agent's answer to " + op);
    {
      std::lock_guard lock(mutex_);
      if (idle_.size() < 8) idle_.push_back(std::move(fd));
    }
    if (answer.contains("error")) throw error_from_json(answer["error"]);
    return answer;
  } catch (const Error& e) {
    if (e.code == Code::unreachable) {
      // The others led to the same agent.
      std::lock_guard lock(mutex_);
      idle_.clear();
    }
    throw e.in(label_);
  }
}

Fd AgentSite::open_relay(const std::string& address, const std::string& as_user, const std::string& keep) {
  try {
    Deadline deadline = Deadline::in(Millis(15000));
    Fd fd = connect(deadline);
    Json request{{"op", "relay"}, {"gen", generation_}, {"to", address}};
    if (!as_user.empty()) request["as_user"] = as_user;
    if (!keep.empty()) request["keep"] = keep;
    send_all(fd, dump_line(request) + "\n", deadline);
    // Byte by byte: nothing of the stream behind the answer line may be read ahead and lost.
    std::string line;
    while (true) {
      char c;
      ssize_t n = ::read(fd.get(), &c, 1);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) throw Error(Code::unreachable, "the agent closed the connection during relay", "", true);
      if (c == '\n') break;
      line += c;
    }
    Json answer = parse_json(line, "the agent's answer to relay");
    if (answer.contains("error")) throw error_from_json(answer["error"]);
    return fd;
  } catch (const Error& e) {
    throw e.in(label_);
  }
}

std::string AgentSite::local_socket_for(const std::string& address, const std::string& as_user, const std::string& keep) {
  std::lock_guard lock(mutex_);
  auto& door = doors_[address + "\n" + as_user + "\n" + keep];
  if (!door) {
    auto made = std::make_unique<Door>();
    made->dir = std::make_unique<TempDir>("rehome-pg");
    made->listener = listen_on({.path = made->dir->path() + "/.s.PGSQL.5432"}, 0600);
    Door* d = made.get();
    made->thread = std::thread([this, d, address, as_user, keep] { serve_door(*d, address, as_user, keep); });
    door = std::move(made);
  }
  return door->dir->path();
}

void AgentSite::serve_door(Door& door, std::string address, std::string as_user, std::string keep) {
  while (auto client = accept_from(door.listener, {}, &stopping_)) {
    // Ended sessions are joined here, so that a long run does not collect threads.
    door.sessions.remove_if([](Door::Session& s) {
      if (!s.done) return false;
      s.thread.join();
      return true;
    });
    auto& session = door.sessions.emplace_back();
    session.thread = std::thread([this, &session, address, as_user, keep, client = std::move(*client)]() mutable {
      try {
        Fd upstream = open_relay(address, as_user, keep);
        relay(client, upstream, stopping_);
      } catch (const Error& e) {
        refuse_libpq(client, e);
      }
      client.reset();
      session.done = true;
    });
  }
}

}  // namespace rehome
