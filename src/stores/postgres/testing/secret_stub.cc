#include "config/config.h"

namespace rehome {

// Until the config library is there: the tests' servers need no password.
std::string read_secret(const SecretRef&, const std::string&, int, const std::string&, const std::string&) { return {}; }

}  // namespace rehome
