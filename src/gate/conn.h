// One client's connection and, once it is attached, the connection behind it; bytes move between the two here. Who is
// connected where and when is decided in gate.cc.
//
// Between two gates (a connection to `peer` arrives at the other gate's `marked`) bytes are framed at their beginning, so
// that a connection can change its mind without a request being lost or done twice:
//   towards the marked gate: one PROXY line (version 1) with the client's address, then, after 'T', what the client sends;
//   from the marked gate:    'T' (taken: the line was read), then either 'G' (go: from here on bytes have been passed to or
//                            from its application) and the answer, or 'B' (back: nothing was passed on) and the end.
// The forwarding gate sends nothing of the client's before 'T', and keeps what it has sent until 'G': after 'B' it sends
// the kept bytes elsewhere. An end without 'G' or 'B' is only a failure when something of the client's was sent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/clock.h"
#include "sys/fd.h"

namespace rehome {

struct Route;

// What an epoll event belongs to.
struct Slot {
  enum class Kind { listener, marked_listener, control, asking, client, server, wake, signals } kind;
  void* owner = nullptr;
};

class Conn {
 public:
  enum class Phase {
    waiting,     // no connection behind it; nothing is read but a PROXY header, where one is due
    connecting,  // behind it connect(2) is under way
    greeting,    // connected to the peer's gate, whose 'T' has not come
    attached,    // bytes move
    lingering,   // answered, by ourselves or before all of it was sent; what still comes is dropped until the client ends
    dead,
  };
  // What the owner has to do after bytes moved.
  enum class After {
    go_on,
    reroute,  // the connection behind it is of no use and nothing was lost: drop it and wait again
    end,      // both ways have ended
    broken,   // one side broke: both are to be reset, so that neither takes it for a clean end
  };

  Conn(Fd client, std::shared_ptr<Route> route, bool marked, std::string client_name, Ticks now);

  // Reads the PROXY header, of the peer's gate or of a proxy in front; true when it is there. Sets `phase` to dead when
  // what comes is none.
  bool read_prelude();
  // The other gate's 'T'. go_on: not yet, or attached now (see phase).
  After read_greeting();
  // Moves what can be moved, at most about a megabyte each way; `more` says that it stopped for that reason.
  After pump(Ticks now, bool& more);
  // Forgets the connection behind; the client's bytes that were kept are sent first to the next one.
  void detach();
  // Attached, and nothing of either side has been passed on: the connection may go elsewhere.
  bool movable() const { return !passed; }
  // Closes both with a reset where the transport knows one.
  void reset_both();
  // Answered last, nothing under way and nothing readable: a connection kept open for a later request.
  bool idle() const;
  // The application has ended its answer and nothing moves any more.
  bool spent() const { return server_eof && down_shut && up_at == up.size(); }

  Slot client_slot, server_slot;
  std::shared_ptr<Route> route;
  const bool marked;
  Phase phase = Phase::waiting;
  bool to_peer = false;           // what `server` is, or is becoming, connected to
  std::uint64_t waiting_key = 0;  // its place in the queue; 0: not in it
  bool counted_held = false;      // in the ledger, and waiting since
  Fd client, server;
  bool client_readable = false, client_writable = true, server_readable = false, server_writable = false;
  bool prelude_done = false;
  std::string client_name;        // "PROXY TCP4 …\r\n": what the application or the other gate is told
  Ticks accepted_at, wait_since, last_move, retry_at = 0, attached_at = 0;
  int tries = 0;

  std::string up, down;           // read and not yet written: to the server, to the client
  std::size_t up_at = 0, down_at = 0;
  std::string kept;               // the client's bytes sent to the peer before its 'G'
  bool client_eof = false, server_eof = false, up_shut = false, down_shut = false, up_broken = false;
  bool go_heard = false, go_said = false;
  bool passed = false;            // a byte or an end of either side was passed on
  bool server_last = false;       // the newest byte came from the server
  bool client_broke = false;      // After::broken is the client's doing

 private:
  After pump_down(Ticks now, bool& more);
  After pump_up(Ticks now, bool& more);
  void say_go();
};

// How many bytes of a client are kept for another try.
inline constexpr std::size_t kKeptBytes = 65536;

}  // namespace rehome
