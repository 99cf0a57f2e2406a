// Listeners of this site whose connections go through the link to a service of the other, and those services.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "agent/link.h"
#include "agent/module.h"
#include "agent/threads.h"

namespace rehome {

struct Service {
  Address to;
  std::string as_user;
};

class Listeners {
 public:
  Listeners(Link& link, std::function<void(const std::string&)> log) : link_(link), log_(std::move(log)) {}
  ~Listeners() { stop(); }

  // `account`: of a unix socket's callers only those of this uid, root and the agent's own account get through; -1: whoever
  // may open it. Throws Error(io) when the address is taken; with `later` it is tried again each second instead.
  void listen(const std::string& name, const Address& at, const std::string& service, unsigned mode, std::int64_t account, bool later);
  void drop_listener(const std::string& name);
  void serve(const std::string& name, Service service);
  void drop_service(const std::string& name);
  // The other side's stream to a service: answers, then relays in this thread. Throws Error(state) for an unknown name, and
  // when half of the agent's descriptors are in use by such streams: the rest is for its own work.
  void run_service(const std::string& name, AgentConnection& connection);
  Json status() const;
  void stop();

 private:
  struct Listener {
    Address at;
    std::string service;
    unsigned mode;
    std::int64_t account;
    Fd fd;
    std::uint16_t port = 0;
    std::string error;
    std::atomic<bool> stop{false};
    std::atomic<std::uint64_t> accepted{0}, failed{0};
    std::thread thread;
    Threads connections;
  };
  void loop(Listener& l);
  static void require_account(const Listener& l, const Fd& caller);
  static void end(std::unique_ptr<Listener> l);

  Link& link_;
  std::function<void(const std::string&)> log_;
  mutable std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Listener>> listeners_;
  std::map<std::string, Service> services_;
  std::atomic<std::size_t> streams_{0};
  std::atomic<bool> stopping_{false};
};

}  // namespace rehome
