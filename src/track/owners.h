// Accounts by number and name: owners are carried by name (or by number where a name is unknown, as rsync does).
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "base/clock.h"

namespace rehome::track {

// The accounts of this host: /etc/passwd and /etc/group, then getent for what is not there (a static binary cannot load
// NSS modules); answers are remembered. Thread-safe.
class Accounts {
 public:
  enum class Kind { user, group };
  // The name of an id, empty when it has none.
  std::string name(Kind kind, id_t id);
  std::optional<id_t> id(Kind kind, const std::string& name);
  // Reads the files again: accounts may have been made since.
  void refresh();
  // The same where a file has changed since it was read; and what getent did not know some time ago is asked again. To be
  // called before every pass. The number differs from the last one's when answers may differ.
  std::uint64_t renew();

 private:
  using FileState = std::array<std::int64_t, 6>;
  static const char* file(Kind kind) { return kind == Kind::user ? "/etc/passwd" : "/etc/group"; }
  static FileState state_of(const char* file);
  void load(Kind kind);
  std::mutex mutex_;
  std::uint64_t generation_ = 0;
  struct Table {
    bool loaded = false;
    FileState state{};    // of the file, before it was read
    Ticks unknown_at = 0; // when the first that is unknown now was asked for; 0: none is
    std::map<id_t, std::string> names;
    std::map<std::string, std::optional<id_t>> ids;
  } tables_[2];
};

// An id of this side as the other side's. Called from several threads.
using OwnerLookup = std::function<id_t(Accounts::Kind, id_t)>;

// The sender's ids to the receiver's: told by name once, then a lookup. Id 0 is never mapped.
class OwnerMap {
 public:
  void set(Accounts::Kind kind, id_t from, id_t to) { map_[kind == Accounts::Kind::group][from] = to; }
  id_t get(Accounts::Kind kind, id_t from) const {
    const auto& m = map_[kind == Accounts::Kind::group];
    auto it = m.find(from);
    return it == m.end() ? from : it->second;
  }
 private:
  std::map<id_t, id_t> map_[2];
};

// Calls f(kind, id) for each account that a POSIX ACL's binary value names.
template <class F>
void each_acl_id(const std::string& value, F f) {
  // u32 version, then {u16 tag, u16 permissions, u32 id}: see the kernel's posix_acl_xattr.h.
  for (std::size_t at = 4; at + 8 <= value.size(); at += 8) {
    unsigned tag = static_cast<unsigned char>(value[at]) | static_cast<unsigned>(static_cast<unsigned char>(value[at + 1])) << 8;
    if (tag != 0x02 && tag != 0x08) continue;  // ACL_USER, ACL_GROUP
    id_t id;
    __builtin_memcpy(&id, value.data() + at + 4, sizeof id);
    f(tag == 0x02 ? Accounts::Kind::user : Accounts::Kind::group, id);
  }
}

// The value with its ids mapped by get(kind, id).
template <class F>
std::string map_acl(std::string value, F get) {
  for (std::size_t at = 4; at + 8 <= value.size(); at += 8) {
    std::uint16_t tag;
    __builtin_memcpy(&tag, value.data() + at, sizeof tag);
    if (tag != 0x02 && tag != 0x08) continue;
    id_t id;
    __builtin_memcpy(&id, value.data() + at + 4, sizeof id);
    id = get(tag == 0x02 ? Accounts::Kind::user : Accounts::Kind::group, id);
    __builtin_memcpy(value.data() + at + 4, &id, sizeof id);
  }
  return value;
}

inline bool is_acl(const std::string& xattr) { return xattr.starts_with("system.posix_acl_"); }

}  // namespace rehome::track
