#include "agent/link.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

constexpr Millis kHelloEvery{1000};
constexpr Millis kHelloDeadline{2000};
// ssh may need a while for its first answer, over a slow line with jump hosts; later, silence means a cut.
constexpr Millis kSshStart{30000};
constexpr Millis kSilence{10000};

std::string last_line(const std::string& text) {
  std::string_view t = trim(text);
  auto nl = t.find_last_of('\n');
  std::string line(trim(nl == std::string_view::npos ? t : t.substr(nl + 1)));
  return line.size() > 300 ? line.substr(0, 300) : line;
}

}  // namespace

Link::Link(Ports ports) : p_(std::move(ports)) {}

void Link::check(const Json& config) {
  if (config.is_null()) return;
  if (!get_string(config, "socket", "").empty()) return;
  Error bad(Code::usage, "a link needs 'argv' (the ssh program and its arguments) and 'peer_state', or 'socket'");
  if (!config.contains("argv") || !config["argv"].is_array() || config["argv"].empty()) throw bad;
  for (const auto& w : config["argv"])
    if (!w.is_string()) throw bad;
  if (get_string(config, "peer_state", "").empty()) throw bad;
}

void Link::set(const Json& config) {
  check(config);
  std::lock_guard lock(mutex_);
  if (config == config_) return;
  config_ = config;
  new_config_ = true;
  changed_.notify_all();
}

void Link::start() {
  thread_ = std::thread([this] { loop(); });
}

void Link::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

std::string Link::peer_path() const {
  std::lock_guard lock(mutex_);
  if (config_.is_object()) {
    std::string socket = get_string(config_, "socket", "");
    return socket.empty() ? p_.state + "/run/to-peer.sock" : socket;
  }
  if (!reverse_.empty()) return reverse_;
  throw Error(Code::unreachable, "the other agent cannot be reached: no link is set here, and it has not come", "", true);
}

Link::Channel& Link::channel(const std::string& purpose) {
  std::lock_guard lock(mutex_);
  auto& c = channels_[purpose];
  if (!c) c = std::make_unique<Channel>();
  return *c;
}

Json Link::call(const std::string& purpose, const Json& request, Deadline deadline) {
  Channel& c = channel(purpose);
  std::unique_lock lock(c.mutex, std::defer_lock);
  if (!lock.try_lock_for(deadline.left(Millis(10'000))))
    throw Error(Code::timeout, "the connection to the other agent is busy", "", true);
  std::string path = peer_path();
  if (c.path != path) c.client.reset();
  for (int tries = 0;; tries++) {
    bool fresh = !c.client || !c.client->usable();
    try {
      if (fresh) {
        c.client = std::make_unique<AgentClient>(path, deadline);
        c.path = path;
        c.client->ask({{"op", "peer.hello"}, {"brief", true}}, deadline);
      }
      return c.client->ask(request, deadline);
    } catch (const Error& e) {
      if (c.client && c.client->usable()) throw;  // the other agent's own error
      c.client.reset();
      if (fresh || tries > 0 || deadline.passed()) throw Error(e).in("link");
    }
  }
}

Fd Link::open(const Json& request, Deadline deadline) {
  Fd fd = connect_to({.path = peer_path()}, deadline);
  // Both at once: a round trip over the link costs more than these bytes.
  send_all(fd, dump_line({{"op", "peer.hello"}, {"brief", true}}) + "\n" + dump_line(request) + "\n", deadline);
  read_answer_exactly(fd, deadline);
  read_answer_exactly(fd, deadline);
  return fd;
}

void Link::peer_came(const Json& hello) {
  std::string path = get_string(hello, "reverse", "");
  {
    std::lock_guard lock(mutex_);
    heard_ = system_clock().now();
    if (!path.empty() && path != reverse_) {
      reverse_ = path;
      changed_.notify_all();
    }
  }
  clear_ways();
  p_.heard(hello);
}

// The sockets that earlier starts of the other side's ssh left behind. A hello does not tell which those are: one that was said before
// a cut may be delivered after those that were said since. Nobody listens behind a dead one; that tells.
void Link::clear_ways() {
  std::string now;
  {
    std::lock_guard lock(mutex_);
    now = reverse_;
    if (cleared_ == now) return;
    cleared_ = now;
  }
  const std::string run = p_.state + "/run";
  for (const auto& name : list_directory(run)) {
    std::string path = run + "/" + name;
    if (!name.starts_with("from-peer.") || path == now) continue;
    try {
      connect_to({.path = path}, Deadline::in(Millis(200)));
    } catch (const Error&) {
      ::unlink(path.c_str());
    }
  }
}

void Link::set_up(bool up, const std::string& error) {
  bool came = false;
  {
    std::lock_guard lock(mutex_);
    if (up != up_) {
      since_ = system_clock().now();
      came = up;
    }
    if (up != up_ || error != error_) p_.log(up ? "link is up" : "link is down: " + error);
    up_ = up;
    error_ = up ? "" : error;
    if (up) heard_ = system_clock().now();
  }
  if (came) p_.up();
}

std::string Link::ssh_error() {
  char buf[4096];
  ssize_t n;
  while (ssh_ && ssh_->err && (n = ::read(ssh_->err.get(), buf, sizeof buf)) > 0)
    ssh_text_.append(buf, static_cast<std::size_t>(n));
  if (ssh_text_.size() > 8192) ssh_text_.erase(0, ssh_text_.size() - 4096);
  return last_line(ssh_text_);
}

void Link::keep_ssh() {
  Json config;
  {
    std::lock_guard lock(mutex_);
    config = config_;
  }
  if (!config.is_object() || !config.contains("argv")) return;
  Ticks now = system_clock().now();
  if (ssh_) {
    std::string said = ssh_error();
    if (auto status = ssh_->poll()) {
      said = ssh_error();
      set_up(false, said.empty() ? "ssh ended with status " + std::to_string(*status) : said);
      // A refused key must not become an attack on the other host's sshd.
      ssh_wait_ = now - ssh_started_ > 10'000'000'000 ? Millis(100) : std::min(ssh_wait_ * 2, Millis(5000));
      ssh_.reset();
      ssh_next_ = after(system_clock(), ssh_wait_);
    }
    return;
  }
  if (now < ssh_next_) return;
  std::string local = p_.state + "/run/to-peer.sock", peer = get_string(config, "peer_state");
  ::unlink(local.c_str());
  // A fresh name each start: sshd does not replace a socket that an earlier connection left behind.
  ssh_reverse_ = peer + "/run/from-peer." + std::to_string(::getpid()) + "." + std::to_string(now / 1'000'000) + ".sock";
  Command c;
  for (const auto& w : config["argv"]) c.argv.push_back(w.get<std::string>());
  // With a terminal, and a cat that says nothing: ssh and sshd switch Nagle's delay off for interactive sessions only, and with it a
  // small message behind another one waits 40 ms for an acknowledgement.
  std::vector<std::string> options{
      "-tt", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-o", "ControlMaster=no", "-o",
      "ControlPath=none", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=4", "-o", "ConnectTimeout=10", "-o",
      "StreamLocalBindUnlink=yes", "-o", "StreamLocalBindMask=0177", "-o", "ClearAllForwardings=no",
      "-L", local + ":" + peer + "/run/agent.sock", "-R", ssh_reverse_ + ":" + p_.state + "/run/agent.sock"};
  c.argv.insert(c.argv.begin() + 1, options.begin(), options.end());
  c.argv.push_back("exec cat");
  ssh_text_.clear();
  ssh_started_ = now;
  try {
    // Ends with this thread, so that a killed agent leaves no second way in.
    Fd quiet(::open("/dev/null", O_WRONLY | O_CLOEXEC));
    ssh_ = std::make_unique<Child>(c, Child::Pipes{.in = true, .err = true, .out_fd = quiet.get(), .many_files = true});
    ::fcntl(ssh_->err.get(), F_SETFL, O_NONBLOCK);
  } catch (const Error& e) {
    set_up(false, e.message);
    ssh_next_ = after(system_clock(), Millis(5000));
  }
}

void Link::say_hello() {
  std::string path;
  try {
    path = peer_path();
  } catch (const Error& e) {
    set_up(false, e.message);
    return;
  }
  auto silent_for = [&](Millis d) {
    return system_clock().now() - std::max(ssh_started_, last_heard()) > d.count() * 1'000'000;
  };
  if (ssh_ && !exists(path)) {
    if (silent_for(kSshStart)) ssh_->kill(SIGKILL);
    return;
  }
  Json hello = p_.hello();
  hello["op"] = "peer.hello";
  {
    std::lock_guard lock(mutex_);
    if (config_.is_object()) hello["reverse"] = config_.contains("argv") ? ssh_reverse_ : p_.state + "/run/agent.sock";
  }
  try {
    Json answer = call("hello", hello, Deadline::in(kHelloDeadline));
    p_.heard(answer);
    set_up(true, "");
    // One way works and the other does not (its socket was removed, say): only a new ssh makes another.
    if (get_bool(answer, "hears", true)) back_works_ = system_clock().now();
    if (ssh_ && system_clock().now() - std::max(ssh_started_, back_works_) > kSilence.count() * 1'000'000) {
      p_.log("the other side has no way back; ssh is started anew");
      ssh_->kill(SIGKILL);
    }
    // The connection of the commit is proved each second too: opening it must not cost time inside the pause.
    call("commit", {{"op", "peer.hello"}, {"brief", true}}, Deadline::in(kHelloDeadline));
  } catch (const Error& e) {
    std::string said = ssh_error();
    set_up(false, said.empty() ? e.message : said);
    if (ssh_ && silent_for(kSilence)) ssh_->kill(SIGKILL);
  }
}

void Link::loop() {
  while (!stopping_) {
    bool restart;
    {
      std::lock_guard lock(mutex_);
      restart = std::exchange(new_config_, false);
    }
    if (restart) {
      ssh_.reset();
      ssh_next_ = 0;
      ssh_wait_ = Millis(100);
    }
    keep_ssh();
    say_hello();
    std::unique_lock lock(mutex_);
    Deadline next = Deadline::in(up_ ? kHelloEvery : Millis(100));
    std::string reverse = reverse_;
    while (!stopping_ && !new_config_ && reverse == reverse_ && !next.passed())
      changed_.wait_for(lock, next.left(Millis(100)));
  }
  ssh_.reset();
}

Json Link::status() const {
  std::lock_guard lock(mutex_);
  Json j{{"up", up_}, {"since_ms", since_ ? static_cast<std::int64_t>(ms_between(since_, system_clock().now())) : 0}};
  if (!up_) j["error"] = error_;
  return j;
}

bool Link::up() const {
  std::lock_guard lock(mutex_);
  return up_;
}

Ticks Link::last_heard() const {
  std::lock_guard lock(mutex_);
  return heard_;
}

}  // namespace rehome
