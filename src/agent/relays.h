// Relays: streams of a controller to addresses of this host, counted by generation so that they can be cut.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "agent/module.h"
#include "base/json.h"
#include "sys/net.h"

namespace rehome {

class Relays {
 public:
  // Connects, sends the answer line, and relays in this thread until either end is gone or the relay is cut. With `keep`
  // the upstream connection then stays open, unread, under that name. `still_allowed` throws when the generation has
  // ended meanwhile; it is asked once the relay can be cut. Throws Error(unreachable), Error(conflict).
  void run(AgentConnection& caller, const Address& to, const std::string& as_user, const std::string& keep,
           std::int64_t generation, const std::function<void()>& still_allowed);
  // Ends the relays of generations below `generation`; kept upstreams stay, since a snapshot must outlive its controller.
  void cut_older(std::int64_t generation);
  void cut_all();
  Json list();                            // [{name, alive, attached}]
  // Ends it, attached or not; on return the name is free. Throws Error(timeout).
  bool drop(const std::string& name);
  void stop();                            // cuts all and drops all

 private:
  struct One {
    std::int64_t generation;
    std::atomic<bool> stop{false};
    int caller = -1, upstream = -1;
    std::string keep;
  };
  std::mutex mutex_;
  std::condition_variable over_;   // one of them is
  std::list<std::shared_ptr<One>> running_;
  std::map<std::string, Fd> kept_;
};

}  // namespace rehome
