#include "track/owners.h"

#include <sys/stat.h>

#include <charconv>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome::track {
namespace {

// Accounts of a directory service appear without a change of any file.
constexpr Millis unknown_for{30'000};

std::optional<id_t> number(std::string_view text) {
  id_t v = 0;
  auto [end, err] = std::from_chars(text.data(), text.data() + text.size(), v);
  if (err != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return v;
}

// One line of getent's answer, or of the file: name:x:id:...
std::optional<std::pair<std::string, id_t>> account_line(std::string_view line) {
  auto fields = split(line, ':');
  if (fields.size() < 3) return std::nullopt;
  auto id = number(fields[2]);
  if (!id) return std::nullopt;
  return std::pair(fields[0], *id);
}

std::optional<std::pair<std::string, id_t>> ask_getent(Accounts::Kind kind, const std::string& key) {
  try {
    Outcome o = run({.argv = {"getent", kind == Accounts::Kind::user ? "passwd" : "group", key}}, Deadline::in(Millis(5000)));
    if (o.ok()) return account_line(trim(o.out));
  } catch (const Error&) {
    // No getent (musl, containers): the files are all there is.
  }
  return std::nullopt;
}

}  // namespace

Accounts::FileState Accounts::state_of(const char* file) {
  struct stat st;
  if (::stat(file, &st) != 0) return {};
  return {static_cast<std::int64_t>(st.st_ino), st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec, st.st_ctim.tv_sec, st.st_ctim.tv_nsec};
}

void Accounts::load(Kind kind) {
  Table& t = tables_[kind == Kind::group];
  if (t.loaded) return;
  t.loaded = true;
  t.state = state_of(file(kind));
  if (!exists(file(kind))) return;
  for (const auto& line : split(read_file(file(kind)), '\n'))
    if (auto a = account_line(line)) {
      t.names.emplace(a->second, a->first);
      t.ids.emplace(a->first, a->second);
    }
}

std::string Accounts::name(Kind kind, id_t id) {
  std::lock_guard lock(mutex_);
  load(kind);
  Table& t = tables_[kind == Kind::group];
  auto it = t.names.find(id);
  if (it == t.names.end()) {
    auto a = ask_getent(kind, std::to_string(id));
    it = t.names.emplace(id, a && a->second == id ? a->first : std::string()).first;
    if (it->second.empty() && t.unknown_at == 0) t.unknown_at = system_clock().now();
  }
  return it->second;
}

std::optional<id_t> Accounts::id(Kind kind, const std::string& name) {
  std::lock_guard lock(mutex_);
  load(kind);
  Table& t = tables_[kind == Kind::group];
  auto it = t.ids.find(name);
  if (it == t.ids.end()) {
    auto a = ask_getent(kind, name);
    it = t.ids.emplace(name, a && a->first == name ? std::optional(a->second) : std::nullopt).first;
    if (!it->second && t.unknown_at == 0) t.unknown_at = system_clock().now();
  }
  return it->second;
}

void Accounts::refresh() {
  std::lock_guard lock(mutex_);
  for (auto& t : tables_) t = {};
  generation_++;
}

std::uint64_t Accounts::renew() {
  std::lock_guard lock(mutex_);
  for (auto kind : {Kind::user, Kind::group}) {
    Table& t = tables_[kind == Kind::group];
    if (t.loaded && t.state != state_of(file(kind))) {
      t = {};
      generation_++;
    } else if (t.unknown_at != 0 && ms_between(t.unknown_at, system_clock().now()) > static_cast<double>(unknown_for.count())) {
      std::erase_if(t.names, [](const auto& e) { return e.second.empty(); });
      std::erase_if(t.ids, [](const auto& e) { return !e.second; });
      t.unknown_at = 0;
      generation_++;
    }
  }
  return generation_;
}

}  // namespace rehome::track
