#include "sys/account.h"

#include <charconv>
#include <cstdint>

#include "base/error.h"
#include "base/text.h"
#include "sys/fs.h"

namespace rehome {
namespace {

// Half a number must not become root's.
std::optional<std::uint32_t> id_in(const std::string& field) {
  std::uint32_t id = 0;
  auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), id);
  if (error != std::errc() || end != field.data() + field.size()) return {};
  return id;
}

}  // namespace

std::optional<Account> find_account(const std::function<bool(const Account&)>& is) {
  for (const std::string& line : split(read_file("/etc/passwd"), '\n')) {
    std::vector<std::string> f = split(line, ':');   // name, password, uid, gid, who that is, home, shell
    if (f.size() < 6 || f[0].empty() || line[0] == '#') continue;
    const auto uid = id_in(f[2]), gid = id_in(f[3]);
    if (!uid || !gid) continue;
    Account a{f[0], *uid, *gid, f[5]};
    if (is(a)) return a;
  }
  return std::nullopt;
}

Account account_named(const std::string& name) {
  std::optional<Account> a = find_account([&](const Account& each) { return each.name == name; });
  if (!a) throw Error(Code::config, "account '" + name + "' is not in /etc/passwd", "name an account of this host");
  return *a;
}

}  // namespace rehome
