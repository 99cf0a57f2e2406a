// The accounts of this host, from /etc/passwd alone: a static binary must not load NSS modules.
#pragma once

#include <sys/types.h>

#include <functional>
#include <optional>
#include <string>

namespace rehome {

struct Account {
  std::string name;
  uid_t uid;
  gid_t gid;
  std::string home;
};

// Read anew each time, and by any number of threads at once: fgetpwent answers all of them from one buffer.
// Throws Error(io) where the file cannot be read.
std::optional<Account> find_account(const std::function<bool(const Account&)>& is);
// Throws Error(config) where there is none of that name.
Account account_named(const std::string& name);

}  // namespace rehome
