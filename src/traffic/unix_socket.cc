#include "base/error.h"
#include "traffic/gates.h"

namespace rehome {

std::unique_ptr<Traffic> make_unix_socket(const Deployment&, const TrafficConfig& t) {
  throw Error(Code::config, "traffic " + t.name + ": take: unix_socket is not there yet", "use take: listen, or traffic of kind nginx");
}

}  // namespace rehome
