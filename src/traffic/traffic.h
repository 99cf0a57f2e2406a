// traffic: how clients come to the application, one driver a kind, all behind this interface. A driver makes the gates of
// the two sites stand between clients and application, and takes them out again. It switches nothing: holding, sealing
// and releasing is the agents' business.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "config/deployment.h"
#include "site/site.h"
#include "stores/store.h"

namespace rehome {

// What a driver is given for one run. The functions are those of StoreContext.
struct TrafficContext {
  const Deployment& deployment;
  Site& source;
  Site& target;
  // Writes {what, how to undo} to the journal durably before the change is made.
  std::function<void(const std::string& what, const Json& detail)> note;
  // Facts of this run that later commands need: read (null when never written) and durably written.
  std::function<Json(const std::string& key)> recall;
  std::function<void(const std::string& key, const Json& value)> remember;
  std::function<void(const std::string& line)> log;
  const std::atomic<bool>& cancelled;  // looked at between pieces of work; then Error(interrupted)
  // A host that a person has declared gone for good: withdraw and leftovers do the other side alone.
  std::optional<Side> gone{};

  bool has(Side s) const { return gone != s; }
  Site& at(Side s) const { return s == Side::source ? source : target; }
};

class Traffic {
 public:
  virtual ~Traffic() = default;
  virtual const std::string& name() const = 0;

  // What would keep prepare() from working. Changes nothing at either site.
  virtual std::vector<Finding> preflight(TrafficContext&) = 0;
  // What a person should know before agreeing: one sentence each.
  virtual std::vector<std::string> plan_notes() = 0;
  // The gates of both sites stand in the way of clients when this returns; idempotent. When it throws, each site is
  // either as before or has its gate in the way and open to its own application: clients are served either way, and
  // calling it again, or withdraw(), goes on from there.
  virtual void prepare(TrafficContext&) = 0;
  // What prepare() made at that side and somebody has undone since, so that clients there pass the gate by: a sentence each; empty:
  // nothing. prepare() leads it through again. Changes nothing; a second or so, not for inside a pause.
  virtual std::vector<std::string> astray(TrafficContext&, Side) { return {}; }
  // The gates are out of the way and the originals are back, byte for byte; idempotent, also after half a prepare().
  // The gates themselves go on until their agents are shut down, so that connections in flight end in peace.
  virtual void withdraw(TrafficContext&) = 0;
  // How many connections of clients still come to that side's gate, which leads them to the other: those of the last
  // minute and those that are open. Waits until the gate has watched for a minute before it answers 0. Throws
  // Error(unreachable) when the gate does not answer.
  virtual std::int64_t from_old_address(TrafficContext&, Side old_side) = 0;
  // What of ours is still there; empty after withdraw().
  virtual std::vector<std::string> leftovers(TrafficContext&) = 0;
};

// Somebody answers at the application's address of that site within `patience`; else Error(state). Where that address is taken by the
// gate nothing can be asked, and nothing is.
void require_application(Site&, const TrafficConfig&, Millis patience);

// Whether connections that outlast a switch's drain are cut. The gates know no routes then, so one entry that does not
// allow it decides for all.
bool cuts_longer(const Deployment&);
// How long connections in flight have to end in a switch: drain_deadline, but no longer than max_pause, after which the
// switch backs out, or half of that where they are cut.
Millis drain_time(const Deployment&);
// For `count` connections that are older than that: what they probably are and what a switch does with them.
std::string long_connections(const Deployment&, std::int64_t count);

// Established connections to that side's applications that its gate knows nothing of.
struct PastGate {
  std::optional<std::int64_t> count;   // nothing where they cannot be counted
  std::string text;                    // one sentence: what becomes of them, or why they are not counted; empty with none
};
// Reads the host's table of sockets, some 50 ms: outside of a pause only. Throws nothing that the host lets through.
PastGate past_gate(const Deployment&, Site&);

// One driver for each `traffic` entry of the deployment, in its order.
std::vector<std::unique_ptr<Traffic>> make_traffic(const Deployment& deployment);
// The last that was prepared first: one may have been led through its gate in a file that another had led through its own.
void withdraw_all(std::vector<std::unique_ptr<Traffic>>& prepared, TrafficContext&);

}  // namespace rehome
