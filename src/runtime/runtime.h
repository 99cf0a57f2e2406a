// runtime: how a deployment's services start, stop and are frozen. One file a driver. It knows a Site, no store.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "site/site.h"
#include "stores/store.h"

namespace rehome {

class Service {
 public:
  virtual ~Service() = default;
  virtual const ServiceConfig& config() const = 0;

  virtual std::vector<Finding> preflight(StoreContext&, Side) = 0;
  virtual bool running(Site&) = 0;
  virtual void start(Site&) = 0;   // returns when it is up, or throws Error(store) with what it printed
  virtual void stop(Site&) = 0;    // a service that is not running is fine
  // The agent's item for freeze.set (docs/PROTOCOL.md).
  virtual Json freeze_item(Side) const = 0;
  // Keeps the service from starting while STATE/not-serving exists, across reboots; and takes that back.
  virtual void guard(StoreContext&, Site&) = 0;
  virtual void unguard(Site&) = 0;
  virtual std::vector<std::string> leftovers(Site&) = 0;
  // What the agent runs to bring the service back after the start condition skipped it (undo).
  virtual Action start_action(Side) const = 0;
};

std::unique_ptr<Service> make_systemd_service(const ServiceConfig& config);
std::unique_ptr<Service> make_command_service(const ServiceConfig& config);
std::vector<std::unique_ptr<Service>> make_services(const Deployment& deployment);

}  // namespace rehome
