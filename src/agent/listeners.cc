#include "agent/listeners.h"

#include <sys/socket.h>
#include <unistd.h>

#include "agent/wire.h"
#include "sys/fs.h"
#include "sys/process.h"

namespace rehome {

void Listeners::listen(const std::string& name, const Address& at, const std::string& service, unsigned mode, std::int64_t account, bool later) {
  drop_listener(name);
  auto l = std::make_unique<Listener>();
  l->at = at;
  l->service = service;
  l->mode = mode;
  l->account = account;
  if (at.is_unix()) make_directories(parent_path(at.path));
  try {
    l->fd = listen_on(at, mode);
    if (!at.is_unix()) l->port = local_port(l->fd);
  } catch (const Error& e) {
    if (!later) throw;
    l->error = e.message;
    log_("listener " + name + ": " + e.message);
  }
  Listener& ref = *l;
  l->thread = std::thread([this, &ref] { loop(ref); });
  std::lock_guard lock(mutex_);
  listeners_[name] = std::move(l);
}

void Listeners::loop(Listener& l) {
  while (!l.stop) {
    if (!l.fd) {
      for (int i = 0; i < 10 && !l.stop; i++) system_clock().sleep(Millis(100));
      try {
        Fd fd = listen_on(l.at, l.mode);
        std::lock_guard lock(mutex_);
        l.fd = std::move(fd);
        l.error.clear();
      } catch (const Error&) {
        continue;  // its first failure was logged; status shows it
      }
    }
    try {
      auto caller = accept_from(l.fd, Deadline::in(Millis(1000)), &l.stop);
      if (!caller) continue;
      l.accepted++;
      auto shared = std::make_shared<Fd>(std::move(*caller));
      l.connections.run([this, &l, shared] {
        try {
          require_account(l, *shared);
          Fd there = link_.open({{"op", "peer.service"}, {"name", l.service}}, Deadline::in(Millis(5000)));
          relay(*shared, there, l.stop);
        } catch (const std::exception& e) {
          // The client sees its connection closed and tries again, as with a server that restarts.
          if (l.failed++ % 100 == 0) log_("listener for " + l.service + ": " + e.what());
        }
      });
    } catch (const std::exception& e) {
      log_("listener for " + l.service + ": " + e.what());
      system_clock().sleep(Millis(100));
    }
  }
}

// Behind the socket somebody else's rights may wait: the service connects as an account that the server over there trusts.
void Listeners::require_account(const Listener& l, const Fd& caller) {
  if (l.account < 0) return;
  ucred who{};
  socklen_t size = sizeof who;
  if (::getsockopt(caller.get(), SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) throw errno_error(errno, "ask who calls at", l.at.text());
  if (who.uid != l.account && who.uid != 0 && who.uid != ::geteuid())
    throw Error(Code::denied, "refused process " + std::to_string(who.pid) + " of uid " + std::to_string(who.uid) + ": " + l.at.text() + " is for uid " + std::to_string(l.account));
}

void Listeners::end(std::unique_ptr<Listener> l) {
  l->stop = true;
  if (l->thread.joinable()) l->thread.join();
  l->connections.join();
  if (l->at.is_unix() && l->fd) ::unlink(l->at.path.c_str());
}

void Listeners::drop_listener(const std::string& name) {
  std::unique_ptr<Listener> l;
  {
    std::lock_guard lock(mutex_);
    auto it = listeners_.find(name);
    if (it == listeners_.end()) return;
    l = std::move(it->second);
    listeners_.erase(it);
  }
  end(std::move(l));
}

void Listeners::serve(const std::string& name, Service service) {
  std::lock_guard lock(mutex_);
  services_[name] = std::move(service);
}

void Listeners::drop_service(const std::string& name) {
  std::lock_guard lock(mutex_);
  services_.erase(name);
}

void Listeners::run_service(const std::string& name, AgentConnection& connection) {
  Service service;
  {
    std::lock_guard lock(mutex_);
    auto it = services_.find(name);
    if (it == services_.end())
      throw Error(Code::state, "this site offers no service '" + name + "'", "send service.set first");
    service = it->second;
  }
  struct Counted {
    std::atomic<std::size_t>& n;
    ~Counted() { n--; }
  };
  const std::size_t most = file_limit() / 4, now = ++streams_;   // two descriptors each
  Counted counted{streams_};
  if (now > most)
    throw Error(Code::state, "the agent has " + std::to_string(most) + " streams of the other site open, as many as its limit of open files leaves room for",
                "raise the limit (LimitNOFILE, or ulimit -n) of the agent, or let the application use fewer connections", true);
  Fd there = connect_to(service.to, Deadline::in(Millis(5000)), service.as_user);
  send_json(connection.fd, {{"ok", true}}, Deadline::in(Millis(5000)));
  std::string ahead = connection.in.take_buffered();
  if (!ahead.empty()) send_all(there, ahead, Deadline::in(Millis(5000)));
  relay(connection.fd, there, stopping_);
}

Json Listeners::status() const {
  std::lock_guard lock(mutex_);
  Json j = Json::array();
  for (const auto& [name, l] : listeners_) {
    Json one{{"name", name}, {"at", l->at.text()}, {"service", l->service}, {"listening", static_cast<bool>(l->fd)},
             {"accepted", l->accepted.load()}, {"failed", l->failed.load()}};
    if (l->port) one["port"] = l->port;
    if (!l->error.empty()) one["error"] = l->error;
    j.push_back(one);
  }
  return j;
}

void Listeners::stop() {
  stopping_ = true;
  std::map<std::string, std::unique_ptr<Listener>> all;
  {
    std::lock_guard lock(mutex_);
    all.swap(listeners_);
  }
  for (auto& [name, l] : all) end(std::move(l));
}

}  // namespace rehome
