// The table of messages: which function answers, and whether it must carry the current generation.
#include "agent/agent.h"

namespace rehome {

const std::map<std::string, Agent::Op>& Agent::ops() {
  static const std::map<std::string, Op> table{
      {"hello", {&Agent::op_hello, false}},
      {"generation.new", {&Agent::op_generation_new, false}},
      {"generation.adopt", {&Agent::op_generation_adopt, false}},
      {"record.init", {&Agent::op_record_init, true}},
      {"exec", {&Agent::op_exec, true}},
      {"put", {&Agent::op_put, true}},
      {"get", {&Agent::op_get, false}},
      {"relay", {&Agent::op_relay, true}},
      {"keep.list", {&Agent::op_keep_list, false}},
      {"keep.drop", {&Agent::op_keep_drop, true}},
      {"journal.append", {&Agent::op_journal_append, true}},
      {"journal.read", {&Agent::op_journal_read, false}},
      {"lag.read", {&Agent::op_lag_read, false}},
      {"shutdown", {&Agent::op_shutdown, true}},
      {"link.set", {&Agent::op_link_set, true}},
      {"service.set", {&Agent::op_service_set, true}},
      {"service.drop", {&Agent::op_service_drop, true}},
      {"listen.set", {&Agent::op_listen_set, true}},
      {"listen.drop", {&Agent::op_listen_drop, true}},
      {"listen.try", {&Agent::op_listen_try, false}},
      {"listen.status", {&Agent::op_listen_status, false}},
      {"child.set", {&Agent::op_child_set, true}},
      {"child.status", {&Agent::op_child_status, false}},
      {"child.drop", {&Agent::op_child_drop, true}},
      {"freeze.set", {&Agent::op_freeze_set, true}},
      {"freeze", {&Agent::op_freeze, true}},
      {"thaw", {&Agent::op_thaw, true}},
      {"kill_frozen", {&Agent::op_kill_frozen, true}},
      {"action.set", {&Agent::op_action_set, true}},
      {"action.try", {&Agent::op_action_try, true}},
      {"action.warm", {&Agent::op_action_warm, true}},
      {"gate.set", {&Agent::op_gate_set, true}},
      {"gate", {&Agent::op_gate, false}},
      {"boot.install", {&Agent::op_boot_install, true}},
      {"boot.remove", {&Agent::op_boot_remove, true}},
      {"attempt.open", {&Agent::op_attempt_open, true}},
      {"lease.renew", {&Agent::op_lease_renew, true}},
      {"attempt.seal", {&Agent::op_attempt_seal, true}},
      {"attempt.commit", {&Agent::op_attempt_commit, true}},
      {"attempt.abort", {&Agent::op_attempt_abort, true}},
      {"attempt.cancel", {&Agent::op_attempt_cancel, true}},
      {"attempt.status", {&Agent::op_attempt_status, false}},
      {"force.open", {&Agent::op_force_open, true}},
      {"force.reopen", {&Agent::op_force_reopen, true}},
      {"peer.hello", {&Agent::op_peer_hello, false}},
      {"peer.ready", {&Agent::op_peer_ready, false}},
      {"peer.prepared", {&Agent::op_peer_prepared, false}},
      {"peer.commit", {&Agent::op_peer_commit, false}},
      {"peer.tails", {&Agent::op_peer_tails, false}},
      {"peer.service", {&Agent::op_peer_service, false}},
  };
  return table;
}

}  // namespace rehome
