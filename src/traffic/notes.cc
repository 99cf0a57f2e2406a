// What happens to whom at a switch: how long connections in flight are waited for, and the sentences of the plan.
#include "base/text.h"
#include "traffic/gates.h"

namespace rehome {

bool cuts_longer(const Deployment& d) {
  for (const auto& t : d.traffic)
    if (t.longer_requests != TrafficConfig::Longer::cut) return false;
  return !d.traffic.empty();
}

Millis drain_time(const Deployment& d) {
  // A switch that has cut somebody must not back out for lack of time after it.
  return std::min(d.drain_deadline, cuts_longer(d) ? d.max_pause / 2 : d.max_pause);
}

std::string long_connections(const Deployment& d, std::int64_t count) {
  std::string many = count == 1 ? "1 connection is" : std::to_string(count) + " connections are";
  return many + " open for longer than requests have to finish (" + human_duration(drain_time(d)) + "): websockets, event streams, long requests, or idle keep-alive clients; " +
         (cuts_longer(d) ? std::string(count == 1 ? "it is" : "they are") + " cut at the switch, and counted" : "a switch would back out (longer_requests: cut cuts them instead)");
}

std::vector<std::string> common_notes(const Deployment& d, const TrafficConfig& t, Front front) {
  bool cut = cuts_longer(d), nginx = front == Front::nginx;
  std::string time = human_duration(drain_time(d));
  std::string why = drain_time(d) == d.drain_deadline ? "drain_deadline" : cut ? "half of max_pause, since the rest of the switch must fit too" : "max_pause";
  std::string refused = t.refuse_with_503 ? "are answered 503" : "are closed without an answer";
  std::vector<std::string> notes{
      "new connections wait while the switch pauses, at most " + std::to_string(t.max_waiting) + " of them and " + human_duration(t.max_wait) +
          " each; more, or longer, " + refused + " and counted as dropped"};
  if (nginx)
    notes.push_back("keep-alive clients keep their connection to nginx over a switch and see no error: behind nginx each request is a connection of its own, which waits");
  else
    notes.push_back("keep-alive clients: a connection counts as in flight for as long as it is open, so " +
                    std::string(cut ? "after " + time + " it is closed, cleanly when no request is under way on it, and the client connects again"
                                    : "a client that keeps one makes the switch back out; longer_requests: cut closes them instead, or put nginx in front"));
  notes.push_back("long requests: those in flight have " + time + " to finish (" + why + "); " +
                  (cut ? std::string("longer ones are cut, and counted: ") + (nginx ? "nginx answers 502, or breaks off an answer that has begun" : "the client sees a reset")
                       : "a longer one makes the switch back out, and is not harmed"));
  notes.push_back(nginx ? "uploads: nginx asks the application once it has the whole of one, so an upload that still arrives goes on and then waits as a new request; where "
                          "proxy_request_buffering is off it is in flight from its beginning, as a long request"
                        : "uploads are in flight from their beginning, as long requests are");
  notes.push_back("event streams (SSE) do not end by themselves: " + std::string(cut ? "they are cut after " + time + ", and counted; a browser connects again by itself, to the side that serves then"
                                                                                     : "one that is open makes the switch refuse to begin, or back out; longer_requests: cut cuts them instead"));
  notes.push_back("websockets do not end by themselves either: " + std::string(cut ? "they are cut after " + time + ", and counted; the client's program must connect again"
                                                                                   : "one that is open makes the switch refuse to begin, or back out; longer_requests: cut cuts them instead"));
  // Until the switch its address there leads through the gates to the side that serves.
  if (t.take != TrafficConfig::Take::listen)
    for (const auto& check : d.checks)
      if (check.kind == CheckConfig::Kind::http && traffic_of(d, check, Side::target) == &t)
        notes.push_back("check " + check.name + " cannot ask the application of the side that takes over before the switch: through the gates the side that serves answers; canary: write asks after it");
  notes.push_back("complete and cancel give connections through the gate " + human_duration(d.drain_deadline) + " (drain_deadline) to end, and then end them");
  return notes;
}

}  // namespace rehome
