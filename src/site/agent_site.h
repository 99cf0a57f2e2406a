// The real Site: an agent reached through its unix socket, here or through ssh.
#pragma once

#include <list>
#include <map>
#include <mutex>
#include <thread>

#include "site/site.h"
#include "site/ssh.h"

namespace rehome {

class AgentSite : public Site {
 public:
  // How to find or start the agent:
  //   ephemeral  one of our own in a temporary directory; gone with this object (check, plan before begin)
  //   observe    the resident one; Error(state) when there is none
  //   control    the same, and what an uninstall left whose host went down meanwhile is removed first
  //   install    upload and start the resident one if it is not there (begin)
  enum class How { ephemeral, observe, control, install };
  static std::unique_ptr<AgentSite> open(const Deployment& deployment, Side side, How how);
  ~AgentSite() override;

  Side side() const override { return side_; }
  std::string label() const override { return label_; }
  // Where the agent of a run lives on that host, also for one that is opened in a temporary directory.
  const std::string& resident_state() const { return resident_state_; }
  std::string state() const override { return state_; }
  std::int64_t generation() const override { return generation_; }
  void set_generation(std::int64_t g) { generation_ = g; }

  Json call(const std::string& op, Json args = Json::object(), Deadline deadline = Deadline::in(Millis(30000))) override;
  Fd open_relay(const std::string& address, const std::string& as_user = {}, const std::string& keep = {}) override;
  std::string local_socket_for(const std::string& address, const std::string& as_user, const std::string& keep) override;

  // A connection of its own for a caller that must not wait for a pool (the lease).
  Fd connect(Deadline deadline) const;
  // complete and cancel: ends the resident agent and removes all of STATE; `keep_start_condition` leaves the one file that keeps the
  // old side's services from starting. Throws Error(io) that names what of the run is then still on the host; its agent is gone.
  void uninstall(bool keep_start_condition);
  bool has_systemd() const { return systemd_; }

 private:
  struct Door {
    std::unique_ptr<TempDir> dir;
    Fd listener;
    std::thread thread;
    struct Session {
      std::thread thread;
      std::atomic<bool> done{false};
    };
    std::list<Session> sessions;
  };
  AgentSite(const Deployment& deployment, Side side);
  Fd greet(Deadline deadline) const;
  void learn_host();
  void start_ephemeral();
  void use_existing(bool may_remove);
  void install(const Deployment& deployment);
  void bring_agent(const Deployment& deployment);
  void serve_door(Door& door, std::string address, std::string as_user, std::string keep);
  Outcome shell(const std::string& line, const std::string& input = {}, Deadline deadline = Deadline::in(Millis(60000)));
  Outcome try_shell(const std::string& line);
  void require_nothing_mounted();                        // below STATE
  void remove_what_is_left(bool keep_start_condition);   // of STATE, when the supervisor has had ten seconds to do it
  void require_gone(bool keep_start_condition);          // STATE, what starts the supervisor, and every program of STATE/bin
  std::string why_not(const std::string& program);
  std::string upload_program(const std::string& name, const std::string& directory);
  void attach();

  Side side_;
  std::string name_;
  std::string label_;
  SiteConfig config_;
  std::string state_, resident_state_;
  std::string socket_;            // on this machine
  bool systemd_ = false;
  std::int64_t generation_ = 0;
  std::unique_ptr<SshMaster> ssh_;
  std::vector<std::string> places_;   // for an agent that is there for one command
  std::string ephemeral_directory_;
  Fd ephemeral_hold_;             // an ephemeral agent lives while somebody is connected
  std::mutex mutex_;
  std::vector<Fd> idle_;
  std::map<std::string, std::unique_ptr<Door>> doors_;
  std::atomic<bool> stopping_{false};
};

// SHA-256 of a file, hex, by sha256sum.
std::string file_hash(const std::string& path);
// The directory of the running program: rehome-agent and rehome-gate stand beside rehome.
std::string program_directory();

}  // namespace rehome
