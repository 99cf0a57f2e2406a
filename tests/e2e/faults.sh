#!/usr/bin/env bash
# Faults inside the pause, on real servers under load: whatever dies, nothing acknowledged is lost, never do both sides accept
# writes, and one side serves again by itself. In ./check every fault meets one phase, drawn with a printed seed; with REHOME_ALL
# every fault meets every phase.   SEED=n FAULTS="name ..." PHASES="name;..." choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "seed $seed"

IFS=';' read -r -a phases <<<"${PHASES:-hold;drain;soft fence;freeze;marker;catch up;compare;arm reverse;read canary;seal;hard fence;open}"
everything="kill_controller kill_agent_yields kill_agent_takes kill_ssh cut_link stop_controller second_controller stuck_controller lossy_link kill_pg_yields kill_pg_takes restart_pg_yields restart_pg_takes kill_gate power_yields power_takes"
read -r -a faults <<<"${FAULTS:-$everything}"

# Breaks things while a switch or a reverse is at the hook, and mends what does not mend itself. Runs beside it; fails when nothing
# was broken.
breaker() { # FAULT YIELDS TAKES
  local status=1
  until [ -e "$world/shared/hook.asks" ]; do
    [ ! -e "$world/shared/ended" ] || { say "the command ended before the phase"; return 1; }
    sleep 0.01
  done
  strike "$@" && status=0
  touch "$world/shared/hook.done"
  [ $status = 0 ] || { say "nothing was broken"; return 1; }
  case $1 in
    lossy_link) sleep 8; hosts wire "$world" off ;;
    cut_link) sleep 6; hosts link "$world" up ;;
    power_yields) sleep 2; hosts power-on "$world" "$2" ;;
    power_takes) sleep 2; hosts power-on "$world" "$3" ;;
  esac
}
strike() {
  local controller
  controller=$(cat "$world/shared/controller.pid")
  case $1 in
    kill_controller) kill_there new "$controller" ;;
    stop_controller) nap new "$controller" 7 "$(cat "$world/shared/command.pid")" ;;
    kill_agent_yields) kill_there "$2" "$(agent_pid "$2")" ;;
    kill_agent_takes) kill_there "$3" "$(agent_pid "$3")" ;;
    # The link between the agents, and the controller's way to old.
    kill_ssh) on new sh -c 'pids=$(pgrep -x ssh) && kill -9 $pids' ;;
    # Its work waits in the hook, and its threads go on.
    stuck_controller) sleep 15; [ ! -e "$world/shared/ended" ] ;;
    second_controller) second ;;
    lossy_link) hosts wire "$world" 30 5 0 ;;
    cut_link) hosts link "$world" down ;;
    kill_pg_yields) pg_kill "$2" ;;
    kill_pg_takes) pg_kill "$3" ;;
    # There again before anybody has asked for it: nothing that was held in its memory is.
    restart_pg_yields) pg_kill "$2" && pg start "$2" 15 5432 ;;
    restart_pg_takes) pg_kill "$3" && pg start "$3" 15 5432 ;;
    kill_gate) kill_there "$2" "$(gate_pid "$2")" ;;
    power_yields) hosts power-cut "$world" "$2" ;;
    power_takes) hosts power-cut "$world" "$3" ;;
    *) say "no fault $1"; return 1 ;;
  esac
}
# It takes the run over, or says why it may not.
second() {
  local status=0
  rehome -q resume >"$world/shared/second" 2>&1 || status=$?
  say "   the second controller ended with $status: $(tail -n 1 "$world/shared/second" | cut -c1-160)"
  [ $status -lt 100 ] && [ $status != 70 ] && [ -s "$world/shared/second" ]
}

# A fault before may have left the shop that takes over with sessions that are dead, one for each of its threads.
healthy() { # YIELDS TAKES
  local i
  for i in $(seq 60); do
    [ $i = 1 ] || sleep 1
    [ "$(settled following)" = "$1" ] && sql old shop "SELECT 1" >/dev/null && sql new shop "SELECT 1" >/dev/null || continue
    on "$2" sh -c 'kill -0 "$(cat /run/shop/pid 2>/dev/null)" 2>/dev/null || exit 0; for i in $(seq 32); do curl -sf -m 5 -o /dev/null http://127.0.0.1:8000/health || exit 1; done' || continue
    site health "$1" >/dev/null && return
  done
  rehome status || true
  fail "the two sides are not healthy"
}

make_world
make_hook
both_sites -- --tables 10 --rows 1000
MAX_PAUSE=8s DRAIN=5s write_yaml
rehome -q begin
serving=old
histories=()
n=0

one_fault() { # FAULT WHEN PHASE
  local fault=$1 when=$2 phase=$3 yields=$serving takes=new command=switch status i name
  if [ $serving = new ]; then takes=old command=reverse; fi
  n=$((n + 1))
  name=f$n
  healthy "$yields" "$takes"
  rm -f "$world/shared/ended"
  hook_at "$when $phase"
  load "$name" 25 --keep-alive
  probe "$name"
  sleep 0.5
  breaker "$fault" "$yields" "$takes" >"$world/shared/broke" 2>&1 &
  local breaker_pid=$!
  on new sh -c "echo \$\$ >'$world/shared/controller.pid'; REHOME_FAULT_HOOK='$world/shared/hook' exec '$bin/rehome' --file '$yaml' -q $command" >"$world/shared/out" 2>&1 &
  local command_pid=$!
  echo $command_pid >"$world/shared/command.pid"
  wait $command_pid && status=0 || status=$?
  touch "$world/shared/ended"
  wait "$breaker_pid" || { cat "$world/shared/broke" "$world/shared/out"; fail "$fault $when $phase was not injected; $command ended with $status"; }
  cat "$world/shared/broke"
  # What a person or the init system does; the agents do the rest by themselves.
  sleep 1
  case $fault in
    kill_pg_yields) pg start "$yields" 15 5432 ;;
    kill_pg_takes) pg start "$takes" 15 5432 ;;
  esac
  local now= started=$SECONDS
  for i in $(seq 60); do
    if now=$(settled); then break; fi
    sleep 1
  done
  if [ -z "$now" ]; then
    rehome status || true
    cat "$world/shared/out"
    for h in old new; do on $h sh -c 'tail -15 /var/lib/rehome/shop/*/log/agent.log' || true; done
    fail "$fault $when $phase: neither side serves after 60 s"
  fi
  serving=$now
  rehome -q resume || { sleep 3; rehome -q resume; } || fail "$fault $when $phase: resume"
  sleep 1
  finish "$name"
  # Where nobody took over, not one write may have been taken by the other side.
  local sides=$serving may_fail=
  [ "$serving" = "$yields" ] || sides=$yields:$takes
  # A request may fail only where the service's own server died, or the one whose proxy the clients talk to, which is old's; and
  # afterwards orders must be taken again.
  case "$fault $takes" in *_pg_yields* | kill_gate* | power_yields* | "power_takes old") may_fail=1 ;; esac
  [[ "$fault $serving" != *"_pg_takes $takes" ]] || may_fail=1
  MAY_FAIL=$may_fail judge "$name" "$sides" "$name" -- "${histories[@]}" >"$world/shared/judged" 2>&1 || { cat "$world/shared/out" "$world/shared/judged"; fail "$fault $when $phase"; }
  histories+=("$name")
  # Whoever held the attempt is gone, and its lease with it; what it takes to serve again comes on top.
  # The clients' own way to new is the link.
  case "$fault $yields" in
    kill_controller* | stop_controller* | second_controller* | "cut_link old" | kill_agent_* | kill_gate*)
      [ "$serving" != "$yields" ] || [ "$(number longest_wait_ms "$world/shared/$name.verdict")" -lt 6000 ] || { cat "$world/shared/judged"; fail "$fault $when $phase: the lease is 3 s, and a request waited longer than 6"; } ;;
  esac
  on admin curl -sf -m 5 -o /dev/null http://10.77.0.1/health || fail "$fault $when $phase: the shop does not answer"
  say "ok  $fault $when $phase: $command ended with $status, $serving serves, settled in $((SECONDS - started)) s; $(tr '\n' ' ' <"$world/shared/judged" | tr -s ' ' | cut -c1-110)"
}

for fault in "${faults[@]}"; do
  if [ -n "${REHOME_ALL:-}" ] || [ -n "${PHASES:-}" ]; then
    for phase in "${phases[@]}"; do one_fault "$fault" before "$phase"; done
    one_fault "$fault" after "$phase"
  else
    one_fault "$fault" "$([ $((RANDOM % 2)) = 0 ] && echo before || echo after)" "${phases[$((RANDOM % ${#phases[@]}))]}"
  fi
done
say "$n passed, 0 failed"
