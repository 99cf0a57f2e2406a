// Messages for anybody: hello, generations, programs, files, relays, the journal.
#include <sys/fanotify.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent/agent.h"
#include "agent/exec.h"
#include "agent/wire.h"
#include "base/bytes.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// Capability bit `bit` of this process, from /proc: the library for it is not worth linking.
bool has_capability(int bit) {
  for (const auto& line : split(read_file("/proc/self/status"), '\n'))
    if (line.starts_with("CapEff:")) return std::stoull(line.substr(7), nullptr, 16) >> bit & 1;
  return false;
}

bool can_watch() {
  Fd fd(static_cast<int>(::syscall(SYS_fanotify_init, FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_REPORT_DFID_NAME, 0)));
  return static_cast<bool>(fd);
}

unsigned mode_of(const Json& request, unsigned fallback) {
  if (!request.contains("mode")) return fallback;
  const Json& m = request["mode"];
  if (m.is_string()) return static_cast<unsigned>(std::stoul(m.get<std::string>(), nullptr, 8));
  return static_cast<unsigned>(get_int(request, "mode"));
}

}  // namespace

Json Agent::op_hello(const Json&, AgentConnection&) {
  Json j{{"version", kAgentVersion}, {"side", side()}, {"name", options_.name}, {"pid", ::getpid()}, {"boot_id", boot_id_},
         {"user", user_}, {"gen", generation_.load()}, {"ephemeral", options_.ephemeral}, {"state", options_.state}};
  j["capabilities"] = {{"fanotify", can_watch()}, {"mount", has_capability(21)}, {"freeze", Freezer::available()},
                       {"peer_connect", has_capability(7)}};
  if (options_.ephemeral) return j;
  if (auto r = attempt_.record()) j["record"] = record_to_json(*r);
  if (std::string e = attempt_.record_error(); !e.empty()) j["record_error"] = e;
  j["link"] = link_.status();
  j["gate"] = gate_.exists() ? gate_.status() : Json();
  j["returning"] = attempt_.returning();
  j["lease_left_ms"] = attempt_.lease_left().count();
  j["attempt"] = attempt_.status();
  return j;
}

// Closes what belongs to older controllers, after the new number is durable: nothing of theirs is let in any more.
void Agent::new_generation(std::int64_t generation) {
  write_durably(options_.state + "/generation", std::to_string(generation) + "\n");
  generation_ = generation;
  relays_.cut_older(generation);
  {
    std::lock_guard lock(running_mutex_);
    for (auto& [gen, cancelled] : running_)
      if (gen < generation) *cancelled = true;
  }
  log("generation " + std::to_string(generation));
}

Json Agent::op_generation_new(const Json& request, AgentConnection&) {
  std::lock_guard lock(generation_mutex_);
  std::int64_t next = std::max(generation_.load(), get_int(request, "above", 0)) + 1;
  new_generation(next);
  attempt_.controller_changed();
  return {{"gen", next}};
}

Json Agent::op_generation_adopt(const Json& request, AgentConnection&) {
  std::lock_guard lock(generation_mutex_);
  std::int64_t next = get_int(request, "gen");
  if (next < generation_)
    throw Error(Code::conflict, "generation " + std::to_string(generation_) + " is newer than " + std::to_string(next),
                "another controller took over: see status");
  if (next > generation_) {
    new_generation(next);
    attempt_.controller_changed();
  }
  return {{"gen", next}};
}

Json Agent::op_record_init(const Json& request, AgentConnection&) {
  AgentSide mine = agent_side_from(get_string(request, "side"));
  AgentSide serves = agent_side_from(get_string(request, "serves", "source"));
  const std::string path = options_.state + "/record";
  if (auto r = attempt_.record()) {
    if (r->epoch == 0 && r->attempt == 0 && r->serves == serves && r->decision == Decision::serving && side() == name_of(mine))
      return Json::object();
    throw Error(Code::state, "there is a record of a run already: " + std::string(name_of(r->decision)) + "(" + std::to_string(r->attempt) + ")",
                "complete or cancel that run first");
  }
  if (exists(path)) throw Error(Code::state, "the record cannot be read: " + attempt_.record_error(), "it is not replaced");
  if (config("began") == true)
    throw Error(Code::state, "the record of a run that has begun is missing in " + options_.state,
                "nothing is opened or undone; see docs/PROTOCOL.md, 'when the record is lost'");
  {
    std::lock_guard lock(config_mutex_);
    options_.side = name_of(mine);
    options_.name = get_string(request, "name", options_.name);
  }
  set_config("side", name_of(mine));
  set_config("name", options_.name);
  attempt_.set_side(mine);
  reserve_.keep();
  Record first;
  first.serves = serves;
  create_record_file(path, first);
  set_config("began", true);
  attempt_.start();
  if (auto e = attempt_.record_error(); !e.empty()) throw Error(Code::io, e);
  attempt_.wake();
  return Json::object();
}

Json Agent::op_exec(const Json& request, AgentConnection& c) {
  Command command = command_from_json(request);
  Deadline deadline = Deadline::in(Millis(get_int(request, "timeout_ms", 60'000)));
  auto cancelled = std::make_shared<std::atomic<bool>>(false);
  std::multimap<std::int64_t, std::shared_ptr<std::atomic<bool>>>::iterator at;
  {
    std::lock_guard lock(running_mutex_);
    // A generation that ended between the check and here.
    check_generation(request, true);
    at = running_.emplace(get_int(request, "gen", 0), cancelled);
  }
  Json answer;
  std::exception_ptr failure;
  try {
    answer = outcome_to_json(run_for(command, deadline, &c.fd, *cancelled));
  } catch (...) {
    failure = std::current_exception();
  }
  {
    std::lock_guard lock(running_mutex_);
    running_.erase(at);
  }
  if (failure) std::rethrow_exception(failure);
  return answer;
}

Json Agent::op_put(const Json& request, AgentConnection&) {
  std::string path = get_string(request, "path");
  std::string content = request.contains("base64") ? from_base64(get_string(request, "base64")) : get_string(request, "content");
  make_directories(parent_path(path));
  write_durably(path, content, mode_of(request, 0600));
  return {{"bytes", content.size()}};
}

Json Agent::op_get(const Json& request, AgentConnection&) {
  std::string path = get_string(request, "path");
  if (!exists(path)) return {{"missing", true}};
  std::string content = read_file(path, static_cast<std::size_t>(get_int(request, "most", 16 << 20)));
  if (is_utf8(content)) return {{"content", content}};
  return {{"base64", to_base64(content)}};
}

Json Agent::op_relay(const Json& request, AgentConnection& c) {
  std::int64_t gen = get_int(request, "gen", 0);
  relays_.run(c, Address::parse(get_string(request, "to")), get_string(request, "as_user", ""), get_string(request, "keep", ""),
              gen, [&] { check_generation(request, true); });
  return Json();
}

Json Agent::op_keep_list(const Json&, AgentConnection&) { return {{"kept", relays_.list()}}; }

Json Agent::op_keep_drop(const Json& request, AgentConnection&) {
  return {{"dropped", relays_.drop(get_string(request, "name"))}};
}

Json Agent::op_journal_append(const Json& request, AgentConnection&) {
  std::vector<std::string> lines;
  if (!request.contains("lines") || !request["lines"].is_array()) throw Error(Code::usage, "'lines' is not an array");
  for (const auto& l : request["lines"]) {
    if (!l.is_string()) throw Error(Code::usage, "'lines' holds something that is not a string");
    lines.push_back(l.get<std::string>());
  }
  return {{"next", journal_.append(get_int(request, "from"), lines)}};
}

Json Agent::op_journal_read(const Json& request, AgentConnection&) {
  std::int64_t next = 0;
  auto lines = journal_.read(get_int(request, "from", 0), &next);
  return {{"lines", lines}, {"next", next}};
}

Json Agent::op_lag_read(const Json& request, AgentConnection&) {
  return {{"samples", lag_.read(get_int(request, "from_us", 0), static_cast<std::size_t>(std::max<std::int64_t>(1, get_int(request, "limit", 500))))}};
}

Json Agent::op_shutdown(const Json& request, AgentConnection& c) {
  log("shutdown is asked for");
  if (get_bool(request, "remove", false)) {
    op_boot_remove(request, c);
    freezer_.forget();
    // The directory outlives the agent: its supervisor ends the gate first, and then removes it.
    write_durably(options_.state + "/run/remove", get_bool(request, "keep_fence", false) ? "keep the fence" : "all");
  }
  send_json(c.fd, {{"ok", true}}, Deadline::in(Millis(5000)));
  exit_status_ = kEndedByShutdown;
  stopping_ = true;
  return Json();
}

}  // namespace rehome
