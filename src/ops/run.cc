#include "ops/run.h"

#include <cstdlib>

#include "base/text.h"
#include "ops/serves.h"
#include "stores/registry.h"
#include "sys/fs.h"

namespace rehome::ops {
namespace {

// The source's agent keeps the authoritative journal, the target's a copy. After the loss of the source the copy is
// what there is, and becomes the one that is written.
class SiteJournal : public JournalBackend {
 public:
  SiteJournal(AgentSite* source, AgentSite* target) : source_(source), target_(target) {}

  std::vector<std::string> read_all() override {
    AgentSite& from = source_ ? *source_ : *target_;
    lines_.clear();
    while (true) {
      Json answer = from.call("journal.read", {{"from", lines_.size()}});
      const Json& more = answer.at("lines");
      for (const auto& l : more) lines_.push_back(l.get<std::string>());
      if (more.empty() || static_cast<std::int64_t>(lines_.size()) >= get_int(answer, "next")) return lines_;
    }
  }

  void append(std::size_t from, const std::vector<std::string>& lines) override {
    if (source_) source_->call("journal.append", {{"from", from}, {"lines", lines}});
    lines_.insert(lines_.end(), lines.begin(), lines.end());
    if (!target_) return;
    try {
      if (!copied_) copied_ = static_cast<std::size_t>(get_int(target_->call("journal.read", {{"from", 1 << 30}}), "next"));
      if (*copied_ < lines_.size()) {
        std::vector<std::string> missing(lines_.begin() + static_cast<std::ptrdiff_t>(*copied_), lines_.end());
        target_->call("journal.append", {{"from", *copied_}, {"lines", missing}});
        copied_ = lines_.size();
      }
    } catch (const Error&) {
      copied_.reset();
      if (!source_) throw;
      // The copy lags while the target is away; the next append brings it up.
    }
  }

 private:
  AgentSite* source_;
  AgentSite* target_;
  std::vector<std::string> lines_;
  std::optional<std::size_t> copied_;
};

// For status, report and plan beside a controller at work: a line of ours would take its place in the journal from it.
class ObservedJournal : public SiteJournal {
 public:
  using SiteJournal::SiteJournal;
  void append(std::size_t, const std::vector<std::string>& lines) override {
    throw Error(Code::internal, "a command that only looks would have written into the journal: " + lines.front(), "nothing was written");
  }
};

// For check and plan before a run: nothing is written anywhere.
class MemoryJournal : public JournalBackend {
 public:
  std::vector<std::string> read_all() override { return {}; }
  void append(std::size_t, const std::vector<std::string>&) override {}
};

// {"store": {name: kind}, "service": ..., "traffic": ...}
Json parts_of(const Deployment& d) {
  Json parts{{"store", Json::object()}, {"service", Json::object()}, {"traffic", Json::object()}};
  for (const auto& s : d.stores) parts["store"][s.name] = s.kind == StoreConfig::Kind::files ? "files" : "postgres";
  for (const auto& s : d.services) parts["service"][s.name] = s.runtime == ServiceConfig::Runtime::systemd ? "systemd" : "command";
  for (const auto& t : d.traffic) parts["traffic"][t.name] = t.kind == TrafficConfig::Kind::nginx ? "nginx" : "gate";
  return parts;
}

std::string archive_directory() {
  if (::geteuid() == 0) return "/var/lib/rehome/archive";
  const char* xdg = std::getenv("XDG_STATE_HOME");
  const char* home = std::getenv("HOME");
  return (xdg && *xdg ? std::string(xdg) : std::string(home ? home : ".") + "/.local/state") + "/rehome/archive";
}

}  // namespace

std::atomic<bool>& cancel_flag() {
  static std::atomic<bool> flag{false};
  return flag;
}

Run::Run(Deployment deployment, Mode mode, bool may_miss, const std::function<void(Run&)>& possible) : deployment_(std::move(deployment)) {
  connect(mode, may_miss);
  if (possible) {
    make_journal(Mode::observe);
    require_parts();
    possible(*this);
  }
  if (mode == Mode::control || mode == Mode::begin) take_generation();
  make_journal(mode);
  if (possible) possible(*this);
  make_contexts();
  stores_ = make_stores(deployment_);
  services_ = make_services(deployment_);
  traffic_ = make_traffic(deployment_);
  if (mode == Mode::control) require_parts();
}

Run::~Run() {
  // Drivers hold connections through the sites: they go first.
  traffic_.clear();
  services_.clear();
  stores_.clear();
}

AgentSite& Run::site(Side side) {
  if (!sites_[side]) throw missing_[side] ? *missing_[side] : Error(Code::unreachable, std::string(side_name(side)) + " is not there");
  return *sites_[side];
}

void Run::connect(Mode mode, bool may_miss) {
  const AgentSite::How how = mode == Mode::look      ? AgentSite::How::ephemeral
                             : mode == Mode::begin   ? AgentSite::How::install
                             : mode == Mode::control ? AgentSite::How::control
                                                     : AgentSite::How::observe;
  for (Side side : {Side::source, Side::target}) {
    try {
      sites_[side] = AgentSite::open(deployment_, side, how);
    } catch (const Error& e) {
      if (!may_miss) throw;
      missing_[side] = std::make_unique<Error>(e);
    }
  }
  if (!sites_.source && !sites_.target) {
    // After complete the old host is often off: where this machine has the archive, the one that answers that no agent is there is
    // believed. Elsewhere it may have lost what it had.
    const bool over = !newest_archive(deployment_.name).empty();
    const Error &source = *missing_.source, &target = *missing_.target;
    throw (source.code == Code::state) == over || target.code == source.code ? source : target;
  }
  if (mode == Mode::look) return;
  // Looking takes nothing from the controller that is at work: its number, not a new one.
  for (Side side : {Side::source, Side::target})
    if (sites_[side]) sites_[side]->set_generation(get_int(sites_[side]->call("hello"), "gen"));
}

void Run::take_generation() {
  if (sites_.source) {
    // While the source was away the target may have been given numbers that the source has not heard of.
    const std::int64_t above = sites_.target ? get_int(sites_.target->call("hello"), "gen") : 0;
    std::int64_t generation = get_int(sites_.source->call("generation.new", {{"above", above}}), "gen");
    sites_.source->set_generation(generation);
    if (sites_.target) {
      sites_.target->set_generation(generation);
      sites_.target->call("generation.adopt");
    }
  } else {
    // Without the source nobody else can allocate: the target's own next one.
    Json hello = sites_.target->call("hello");
    sites_.target->set_generation(get_int(hello, "gen") + 1);
    sites_.target->call("generation.adopt");
  }
}

void Run::make_journal(Mode mode) {
  std::unique_ptr<JournalBackend> backend;
  if (mode == Mode::look)
    backend = std::make_unique<MemoryJournal>();
  else if (mode == Mode::observe)
    backend = std::make_unique<ObservedJournal>(sites_.source.get(), sites_.target.get());
  else
    backend = std::make_unique<SiteJournal>(sites_.source.get(), sites_.target.get());
  journal_ = std::make_unique<Journal>(std::move(backend), system_clock());
}

void Run::make_contexts() {
  // Contexts need both sites; after the loss of one, only what does not use it may be asked of the drivers.
  AgentSite& source = sites_.source ? *sites_.source : *sites_.target;
  AgentSite& target = sites_.target ? *sites_.target : *sites_.source;
  auto note = [this](const std::string& what, const Json& detail) {
    Json entry = detail.is_object() ? detail : Json{{"detail", detail}};
    entry["what"] = what;
    journal_->append_intent("change", entry);
  };
  auto recall = [this](const std::string& key) { return journal_->fact(key); };
  auto remember = [this](const std::string& key, const Json& value) { journal_->set_fact(key, value); };
  auto log = [this](const std::string& line) { journal_->append("message", {{"text", line}}); };
  store_context_ = std::make_unique<StoreContext>(
      StoreContext{deployment_, source, target, [](const Progress&) {}, note, recall, remember, log, cancel_flag()});
  traffic_context_ = std::make_unique<TrafficContext>(
      TrafficContext{deployment_, source, target, note, recall, remember, log, cancel_flag()});
}

void Run::remember_parts() { journal_->set_fact("parts", parts_of(deployment_)); }

void Run::require_parts() {
  const Json begun = journal_->fact("parts"), now = parts_of(deployment_);
  std::vector<std::string> lost;
  for (const auto& [what, kinds] : begun.items())
    for (const auto& [name, kind] : kinds.items()) {
      const Json is = now.value(what, Json::object()).value(name, Json());
      if (is == kind) continue;
      lost.push_back(what + " " + name + (is.is_null() ? " is not there any more" : " was " + kind.get<std::string>() + " and is " + is.get<std::string>()));
    }
  if (!lost.empty())
    throw Error(Code::config, deployment_.file + " is not what the run was begun with: " + join(lost, "; "),
                "put that back as it was; to move without it, cancel with the file as it was, and begin again");
}

void Run::give_up(Side side) {
  store_context_->gone = side;
  traffic_context_->gone = side;
}

std::string Run::phase() const {
  Json p = journal_->fact("phase");
  return p.is_string() ? p.get<std::string>() : "none";
}

Side Run::serves() {
  BySide<Json> records;
  for (Side side : {Side::source, Side::target}) {
    if (!sites_[side]) continue;
    Json hello = sites_[side]->call("hello");
    if (hello.contains("record_error"))
      throw Error(Code::unknown, "the record cannot be read: " + get_string(hello, "record_error"),
                  "nothing was undone; restore STATE/record from the other site's knowledge only with both hosts in view")
          .in(sites_[side]->label());
    records[side] = hello.at("record");
  }
  return who_serves(records);
}

// Each agent has what the other has seen: one of them is enough.
std::vector<Json> Run::lag_samples() {
  AgentSite& site = sites_.source ? *sites_.source : *sites_.target;
  std::int64_t seen = 0;
  for (const auto& e : journal_->of_kind("lag")) seen = std::max(seen, get_int(e, "at_us", 0));
  std::vector<Json> all;
  const Json answer = site.call("lag.read", {{"from_us", seen}, {"limit", 800}});
  for (const auto& s : answer.at("samples"))
    all.push_back({{"store", s.at("store")}, {"bytes", s.at("bytes")}, {"ms", s.at("ms")}, {"at_us", s.at("at")}});
  return all;
}

void Run::collect_lag() {
  const auto samples = lag_samples();   // may throw: before anything is held back
  journal_->hold_back();
  for (const auto& s : samples) journal_->append("lag", s);
  journal_->flush();
}

bool Run::superseded() {
  for (Side side : {Side::source, Side::target}) {
    if (!sites_[side]) continue;
    try {
      if (get_int(sites_[side]->call("hello"), "gen") > sites_[side]->generation()) return true;
    } catch (const Error&) {
      // Its agent is away: the other one may know.
    }
  }
  return false;
}

std::string Run::archive() {
  std::string directory = archive_directory();
  make_directories(directory);
  std::string stamp = format_wall(system_clock().wall_us());
  for (char& c : stamp)
    if (c == ':' || c == '.') c = '-';
  std::string path = directory + "/" + deployment_.name + "." + stamp + ".jsonl";
  std::string text;
  for (const auto& e : journal_->entries()) text += dump_line(e) + "\n";
  write_durably(path, text);
  return path;
}

std::unique_ptr<Run> existing_run(const Deployment& deployment, bool may_miss) {
  try {
    return std::make_unique<Run>(deployment, Run::Mode::observe, may_miss);
  } catch (const Error& e) {
    if (e.code != Code::state) throw;
    return nullptr;
  }
}

std::string newest_archive(const std::string& name) {
  std::string directory = archive_directory();
  if (!exists(directory)) return {};
  std::string best;
  // Names carry the time, so the last in order is the newest.
  for (const auto& file : list_directory(directory))
    if (file.starts_with(name + ".") && file.ends_with(".jsonl") && file > best) best = file;
  return best.empty() ? best : directory + "/" + best;
}

}  // namespace rehome::ops
