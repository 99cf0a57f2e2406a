// The deployment's own checks: HTTP, SQL, commands; and the canaries, which are checks at a special moment.
#pragma once

#include <string>

#include "ops/run.h"

namespace rehome::ops {

struct CheckResult {
  std::string name;
  Side side;
  bool ok = false;
  double ms = 0;
  std::string said;   // why not: status, body's beginning, value; never a secret. Where it is ok: what it does not prove
};

// Is this check asked of that side (its `where`)?
bool meant_for(const CheckConfig& check, Side side);

// Runs one check at one side; a check that cannot be run is a failed one that says why. One that fails is asked again until its timeout:
// a service that kept connections to a server that went meanwhile answers an error once for each of them. `before_switch`: as ask_http().
CheckResult run_check(Run& run, const CheckConfig& check, Side side, bool before_switch);
// One of SQL, in a session of its own; a write canary may write.
CheckResult ask_sql(Store& store, StoreContext& context, const CheckConfig& check, Side side);
// Every check that is meant for this side, before it takes over; not the write canaries.
std::vector<CheckResult> run_checks(Run& run, Side side);

// By how many clients a service is warmed up before a pause.
constexpr int clients_at_once = 32;

// An HTTP request whose connection is made ahead, so that inside the pause only the request itself costs time.
class HttpCanary {
 public:
  // `past_gate`: at the application, where the check's URL leads through the gate. Throws nothing that the reader lets through.
  HttpCanary(const Deployment& deployment, Site& site, const CheckConfig& check, bool past_gate);
  void open();                      // connects; may be called again after ask()
  CheckResult ask(Deadline most);   // within the check's own timeout, too

 private:
  Site& site_;
  CheckConfig check_;
  HttpPlace place_;
  Fd fd_;
};

// The same request of the application by `n` clients at once, each on a connection of its own.
std::vector<CheckResult> ask_at_once(const Deployment& deployment, Site& site, const CheckConfig& check, int n, Deadline most);

// One of HTTP. `before_switch`, while the gate there leads to the other side: of the application itself. Where that cannot be asked, for
// its own address leads to the gate, or it starts in the switch only, the front door is, and the result says that the other side answered.
CheckResult ask_http(const Deployment& deployment, Site& site, const CheckConfig& check, bool before_switch, Deadline most);

}  // namespace rehome::ops
