#include "agent/agent.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <utility>

#include "agent/exec.h"
#include "agent/wire.h"
#include "base/text.h"
#include "sys/account.h"
#include "sys/fs.h"
#ifdef REHOME_WITH_TRACK
#include "track/module.h"
#endif

namespace rehome {
namespace {

// The record's file may not be there yet, or be unreadable for a while: each use tries to open it until it succeeds.
class LazyRecordFile : public BlockFile {
 public:
  explicit LazyRecordFile(std::string path) : path_(std::move(path)) {}
  std::string read(int block) override { return file().read(block); }
  void write(int block, std::string_view bytes) override { file().write(block, bytes); }

 private:
  BlockFile& file() {
    if (!file_) file_ = open_record_file(path_);
    return *file_;
  }
  std::string path_;
  std::unique_ptr<BlockFile> file_;
};

std::string tag_of(const std::string& state) {
  std::string t;
  for (char c : state) t += std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return t.size() > 60 ? t.substr(t.size() - 60) : t;
}

std::string account_name(uid_t uid) {
  try {
    if (auto a = find_account([&](const Account& each) { return each.uid == uid; })) return a->name;
  } catch (const Error&) {
    // A host without that file has no names.
  }
  return std::to_string(uid);
}

}  // namespace

Agent::Agent(AgentOptions options)
    : options_(std::move(options)),
      record_file_(std::make_unique<LazyRecordFile>(options_.state + "/record")),
      record_(*record_file_),
      reserve_(options_.state + "/reserve", [this](const std::string& l) { log(l); }),
      actions_(options_.state + "/actions.json", [this](const std::string& l) { log(l); }),
      freezer_(tag_of(options_.state), [this](const std::string& l) { log(l); }),
      gate_(options_.state, [this](const std::string& l) { log(l); }),
      link_({options_.state, [this] { return peer_hello(); },
             [this](const Json& j) {
               if (j.contains("lag")) lag_.take(j["lag"]);
               if (!j.contains("record")) return;
               Record r = record_from_json(j["record"]);
               attempt_.heard(r);
               // Its controller may have died while it had this side's gate held, too.
               if (r.decision != Decision::attempt && r.decision != Decision::commit) gate_.let_go(r.attempt);
             },
             [this] { attempt_.wake(); }, [this](const std::string& l) { log(l); }}),
      listeners_(link_, [this](const std::string& l) { log(l); }),
      journal_(options_.state + "/journal.jsonl"),
      lag_(options_.state + "/lag.jsonl"),
      children_([this](const std::string& l) { log(l); }, [this](const std::string& s, std::int64_t b, std::int64_t ms) { sample_lag(s, b, ms); }),
      attempt_({AgentSide::source, system_clock(), record_, *this, gate_, *this}) {
  for (const char* dir : {"", "/run", "/run/l", "/log", "/credentials", "/bin"}) make_directories(options_.state + dir);
  lock_ = Fd(::open((options_.state + "/run/agent.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!lock_) throw errno_error(errno, "open", options_.state + "/run/agent.lock");
  // A killed agent's lock is free at once; one that is still ending needs a moment.
  Deadline deadline = Deadline::in(Millis(3000));
  while (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) throw errno_error(errno, "lock", options_.state);
    if (deadline.passed())
      throw Error(Code::conflict, "another agent serves " + options_.state, "it answers at " + options_.state + "/run/agent.sock");
    system_clock().sleep(Millis(10));
  }
  log_file_ = Fd(::open((options_.state + "/log/agent.log").c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (exists(options_.state + "/agent.json"))
    config_ = parse_json(read_file(options_.state + "/agent.json"), options_.state + "/agent.json");
  auto parts = split(options_.state, '/');
  if (options_.side.empty()) options_.side = get_string(config_, "side", "");
  if (options_.side.empty() && (parts.back() == "source" || parts.back() == "target")) options_.side = parts.back();
  if (options_.name.empty()) options_.name = get_string(config_, "name", "");
  if (options_.name.empty() && parts.size() > 1) options_.name = parts[parts.size() - 2];
  if (!options_.side.empty()) attempt_.set_side(agent_side_from(options_.side));
  if (exists(options_.state + "/generation"))
    generation_ = std::stoll(read_file(options_.state + "/generation", 64));
  boot_id_ = trim(read_file("/proc/sys/kernel/random/boot_id", 128));
  user_ = account_name(::geteuid());
#ifdef REHOME_WITH_TRACK
  modules_.push_back(make_track_module(*this));
#endif
}

Agent::~Agent() { close(); }

std::string Agent::side() const {
  std::lock_guard lock(config_mutex_);
  return options_.side;
}

void Agent::log(const std::string& line) {
  std::string text = format_wall(system_clock().wall_us()) + " " + line + "\n";
  std::lock_guard lock(log_mutex_);
  if (log_file_) (void)!::write(log_file_.get(), text.data(), text.size());
}

Fd Agent::open_peer(const Json& request, Deadline deadline) { return link_.open(request, deadline); }

// The side that does not serve may hold a follower prepared for the way back, which stands still on purpose.
void Agent::sample_lag(const std::string& store, std::int64_t bytes, std::int64_t ms) {
  auto r = attempt_.record();
  if (r && name_of(r->serves) == side()) lag_.add(store, bytes, ms);
}

Json Agent::config(const char* key) const {
  std::lock_guard lock(config_mutex_);
  return config_.value(key, Json());
}

void Agent::set_config(const char* key, const Json& value) {
  std::lock_guard lock(config_mutex_);
  Json next = config_;
  value.is_null() ? (void)next.erase(key) : (void)(next[key] = value);
  if (next == config_) return;
  write_durably(options_.state + "/agent.json", next.dump(1) + "\n");
  config_ = std::move(next);
}

void Agent::set_config(const char* key, const std::string& name, const Json& value) {
  std::lock_guard lock(config_mutex_);
  Json next = config_;
  if (!next.contains(key)) next[key] = Json::object();
  value.is_null() ? (void)next[key].erase(name) : (void)(next[key][name] = value);
  if (next == config_) return;
  write_durably(options_.state + "/agent.json", next.dump(1) + "\n");
  config_ = std::move(next);
}

void Agent::or_log(const std::string& what, const std::function<void()>& act) {
  try {
    act();
  } catch (const std::exception& e) {
    log(what + ": " + e.what());
  }
}

// What a controller had set up before this start.
void Agent::start_residents() {
  Json services = config("services"), listeners = config("listeners"), children = config("children");
  or_log("link", [&] { link_.set(config("link")); });
  for (const auto& [name, s] : services.items())
    or_log("service " + name, [&] { listeners_.serve(name, {Address::parse(get_string(s, "to")), get_string(s, "as_user", "")}); });
  for (const auto& [name, l] : listeners.items())
    or_log("listener " + name, [&] {
      listeners_.listen(name, Address::parse(get_string(l, "at")), get_string(l, "service"),
                        static_cast<unsigned>(get_int(l, "mode", 0600)), get_int(l, "account", -1), true);
    });
  for (const auto& [name, c] : children.items())
    or_log("child " + name, [&] { children_.set(name, command_from_json(c), Millis(get_int(c, "restart_ms", 1000))); });
  Json items = config("freeze");
  if (!items.is_null()) or_log("freeze", [&] { freezer_.set(Freezer::parse(items), true, true); });
}

void Agent::forbid_services() {
  const std::string path = start_condition();
  // An attempt's own is empty.
  struct stat st {};
  if (::stat(path.c_str(), &st) == 0 && st.st_size > 0) return;
  reserve_.with([&] { write_durably(path, "the other site serves; see rehome status\n"); });
}

// Not durable, and not from the reserve, which is for what comes after a decision: a host that loses its power in an attempt undoes it,
// and one whose disk is full backs out.
void Agent::forbid_in_attempt() {
  const std::string path = start_condition();
  if (!Fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600))) throw errno_error(errno, "create", path);
}

void Agent::allow_services() {
  const std::string path = start_condition();
  if (::unlink(path.c_str()) == 0) fsync_directory(options_.state);
  else if (errno != ENOENT) throw errno_error(errno, "remove", path);
}

Json Agent::peer_hello() const {
  Json j{{"version", kAgentVersion}, {"side", side()}, {"boot_id", boot_id_}, {"pid", ::getpid()}, {"gate_told", gate_.told()}, {"hears", link_.up()}};
  if (auto r = attempt_.record()) {
    j["record"] = record_to_json(*r);
    if (name_of(r->serves) == side()) j["lag"] = lag_.newest();
  }
  return j;
}

AttemptPeer::State Agent::state(Deadline deadline) {
  Json hello = peer_hello();
  hello["op"] = "peer.hello";
  Json j = link_.call("prepare", hello, deadline);
  if (!j.contains("record")) throw Error(Code::state, "the other agent has no readable record", "see status on that site");
  return {record_from_json(j["record"]), get_bool(j, "gate_told", false)};
}

void Agent::ready(std::int64_t attempt, std::int64_t epoch, Deadline deadline) {
  link_.call("prepare", {{"op", "peer.ready"}, {"attempt", attempt}, {"epoch", epoch}}, deadline);
}

void Agent::prepared_soon(std::int64_t attempt, std::int64_t epoch) {
  std::lock_guard lock(prepare_mutex_);
  prepare_ = {{"op", "peer.prepared"}, {"attempt", attempt}, {"epoch", epoch}};
  prepare_changed_.notify_all();
}

void Agent::prepare_loop() {
  while (!stopping_) {
    Json message;
    {
      std::unique_lock lock(prepare_mutex_);
      prepare_changed_.wait_for(lock, Millis(200));
      message = std::exchange(prepare_, Json());
    }
    if (message.is_null()) continue;
    try {
      link_.call("prepare", message, Deadline::in(Millis(2000)));
    } catch (const Error& e) {
      log(std::string("prepared: ") + e.what());
    }
  }
}

PeerAnswer Agent::commit(std::int64_t attempt, std::int64_t epoch, Deadline deadline) {
  auto wait = std::max<std::int64_t>(deadline.left(Millis(60'000)).count() - 200, 100);
  Json j = link_.call("commit", {{"op", "peer.commit"}, {"attempt", attempt}, {"epoch", epoch}, {"wait_ms", wait}}, deadline);
  PeerAnswer a;
  a.what = get_bool(j, "opened", false) ? PeerAnswer::What::opened
           : get_bool(j, "refused", false) ? PeerAnswer::What::refused : PeerAnswer::What::pending;
  a.reason = get_string(j, "reason", "");
  a.times = j.value("times", Json::object());
  return a;
}

void Agent::tails(std::int64_t attempt, std::int64_t epoch, Deadline deadline) {
  auto wait = std::max<std::int64_t>(deadline.left(Millis(60'000)).count() - 500, 100);
  Json j = link_.call("tails", {{"op", "peer.tails"}, {"attempt", attempt}, {"epoch", epoch}, {"wait_ms", wait}}, deadline);
  if (!get_bool(j, "done", false))
    throw Error(Code::state, "they are not done" + (j.contains("reason") ? ": " + get_string(j, "reason") : ""), "", true);
}

void Agent::check_generation(const Json& request, bool changes) const {
  // Looking is everybody's right: status must work for whoever has lost the run to another.
  if (!changes) return;
  std::int64_t now = generation_, got = get_int(request, "gen", -1);
  if (got < 0 && now == 0) return;
  if (got < 0) throw Error(Code::usage, "the request carries no generation", "send 'gen'");
  if (got < now)
    throw Error(Code::conflict, "another controller took over: generation " + std::to_string(now) + " replaced " + std::to_string(got),
                "see status; resume takes the run over again");
  if (got > now)
    throw Error(Code::conflict, "generation " + std::to_string(got) + " is not known here yet; this site has " + std::to_string(now),
                "send generation.adopt first");
}

Json Agent::handle(const Json& request, AgentConnection& c) {
  std::string op = get_string(request, "op");
  auto it = ops().find(op);
  if (it != ops().end()) {
    if (!op.starts_with("generation.")) check_generation(request, it->second.changes);
    return (this->*it->second.handler)(request, c);
  }
  for (auto& m : modules_)
    if (m->owns(op)) {
      // A module's request that changes nothing may leave the generation out; an old one is refused all the same.
      if (!c.from_peer && request.contains("gen")) check_generation(request, true);
      // Sent by the stored actions when all is decided, and not when the disk has been made larger.
      if (op == "files.open" || op == "files.close") reserve_.make_room();
      return m->handle(op, request, c);
    }
  throw Error(Code::usage, "the agent does not know '" + op + "'", "are the program and the agent of the same version?");
}

void Agent::connection(Fd fd) {
  {
    std::lock_guard lock(open_mutex_);
    open_.insert(fd.get());
  }
  try {
    Reader in(fd);
    AgentConnection c{fd, in, false};
    bool first = true;
    while (!stopping_) {
      auto line = in.line({}, kLongestMessage);
      if (!line) break;
      Json answer;
      try {
        Json request = parse_json(*line, "the request");
        if (first) c.from_peer = get_string(request, "op", "").starts_with("peer.");
        first = false;
        answer = handle(request, c);
        if (answer.is_null()) break;  // it was a stream, and is over
        answer["ok"] = true;
      } catch (const Error& e) {
        answer = {{"error", error_to_json(e)}};
      } catch (const std::exception& e) {
        answer = {{"error", error_to_json(Error(Code::internal, std::string("the agent failed: ") + e.what()))}};
      }
      send_json(fd, answer, Deadline::in(Millis(30'000)));
    }
  } catch (const std::exception&) {
    // The caller is gone; there is nobody to tell.
  }
  std::lock_guard lock(open_mutex_);
  open_.erase(fd.get());
  if (options_.ephemeral && open_.empty()) stopping_ = true;
  fd.reset();  // under the lock: close() must not shut down a number that belongs to another by then
}

void Agent::work_loop() {
  bool returned = false;
  while (!stopping_) {
    Millis idle(200);
    // An agent that dies before that has to ask the other site as well. A full disk must not keep an agent from what its record asks
    // for; an old number only makes it ask once more.
    if (!returned && !attempt_.returning()) {
      returned = true;
      or_log("boot id", [this] { set_config("boot_id", boot_id_); });
    }
    try {
      idle = attempt_.work();
    } catch (const std::exception& e) {
      log(std::string("work: ") + e.what());
    }
    if (idle.count() > 0) attempt_.wait_for_work(idle, stopping_);
  }
}

int Agent::serve(const std::atomic<bool>& stop) {
  log("agent " + std::string(kAgentVersion) + " starts, pid " + std::to_string(::getpid()) + ", side " + side());
  if (!options_.ephemeral) {
    // First of all, before services of this host can start: the start condition, and what the gate is to do.
    attempt_.start(config("boot_id").is_string() && config("boot_id") != boot_id_);
    or_log("reserve", [this] { reserve_.keep(); });
    start_residents();
    // An agent that was killed between a freeze that came too late and taking it back.
    if (auto r = attempt_.record(); r && name_of(r->serves) == side() && (r->decision == Decision::serving || r->decision == Decision::opened))
      or_log("thaw", [this] { freezer_.thaw(); });
    gate_.start();
    link_.start();
    for (auto& m : modules_) m->start();
    worker_ = std::thread([this] { work_loop(); });
    preparer_ = std::thread([this] { prepare_loop(); });
  }
  Fd listener = listen_on({.path = options_.state + "/run/agent.sock"}, 0600);
  Ticks start = system_clock().now();
  while (!stop && !stopping_) {
    try {
      auto fd = accept_from(listener, Deadline::in(Millis(100)), &stopping_);
      if (options_.ephemeral && connections_ever_ == 0 && ms_between(start, system_clock().now()) > 60'000) break;
      if (!fd) continue;
      connections_ever_++;
      auto shared = std::make_shared<Fd>(std::move(*fd));
      threads_.run([this, shared] { connection(std::move(*shared)); });
    } catch (const std::exception& e) {
      log(std::string("accept: ") + e.what());
      system_clock().sleep(Millis(50));
    }
  }
  listener.reset();
  ::unlink((options_.state + "/run/agent.sock").c_str());
  close();
  log("agent ends");
  if (options_.ephemeral) remove_tree(options_.state);
  return exit_status_;
}

void Agent::close() {
  stopping_ = true;
  attempt_.wake();
  relays_.stop();
  {
    std::lock_guard lock(running_mutex_);
    for (auto& [gen, cancelled] : running_) *cancelled = true;
  }
  {
    std::lock_guard lock(open_mutex_);
    for (int fd : open_) ::shutdown(fd, SHUT_RDWR);
  }
  listeners_.stop();
  if (worker_.joinable()) worker_.join();
  if (preparer_.joinable()) preparer_.join();
  for (auto& m : modules_) m->stop();
  link_.stop();
  gate_.stop();
  children_.stop();
  threads_.join();
  actions_.stop();
}

}  // namespace rehome
