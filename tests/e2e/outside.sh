#!/usr/bin/env bash
# Faults outside the pause: while begin copies, while it follows, while complete takes away. In ./check one fault at one step drawn
# with a printed seed; with REHOME_ALL every fault at every step.   SEED=n FAULTS="..." STEPS="copy follow complete" choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "seed $seed"
everything="kill_controller stop_controller kill_agent_source kill_agent_target cut_link kill_pg_source kill_pg_target power_source power_target"
read -r -a faults <<<"${FAULTS:-$everything}"
read -r -a steps <<<"${STEPS:-copy follow complete}"
if [ -z "${REHOME_ALL:-}${FAULTS:-}${STEPS:-}" ]; then
  faults=("${faults[$((RANDOM % ${#faults[@]}))]}" "${faults[$((RANDOM % ${#faults[@]}))]}")
  steps=("${steps[$((RANDOM % ${#steps[@]}))]}")
fi

strike() { # FAULT
  local pid
  case $1 in
    kill_controller) pid=$(cat "$world/shared/controller.pid"); on new kill -9 "$pid" 2>/dev/null || say "   the command had ended" ;;
    stop_controller) nap new "$(cat "$world/shared/controller.pid")" 4 "$command_pid" 2>/dev/null || say "   the command had ended" ;;
    kill_agent_source) pid=$(agent_pid old); [ -z "$pid" ] || on old kill -9 "$pid" ;;
    kill_agent_target) pid=$(agent_pid new); [ -z "$pid" ] || on new kill -9 "$pid" ;;
    cut_link) hosts link "$world" down; sleep 6; hosts link "$world" up ;;
    kill_pg_source) pg_kill old; sleep 1; pg start old 15 5432 ;;
    kill_pg_target) pg_kill new; sleep 1; pg start new 15 5432 ;;
    power_source) hosts power-cut "$world" old; sleep 2; hosts power-on "$world" old ;;
    power_target) hosts power-cut "$world" new; sleep 2; hosts power-on "$world" new ;;
  esac
}
command() { # in the background, from the new server, with its pid where strike finds it
  rm -f "$world/shared/controller.pid"
  (on new sh -c "echo \$\$ >'$world/shared/controller.pid'; exec '$bin/rehome' --file '$yaml' -q $*" >"$world/shared/out" 2>&1) &
  command_pid=$!
  local i
  for i in $(seq 500); do [ -s "$world/shared/controller.pid" ] && return 0; sleep 0.01; done
}
again() { # a command that a fault may have kept from its end, repeated as a person would
  local i
  for i in $(seq 12); do
    if rehome -q "$@" >"$world/shared/again" 2>&1; then return 0; fi
    sleep 3
  done
  cat "$world/shared/out" "$world/shared/again"
  rehome status || true
  fail "$*: it does not come to its end"
}
one() { # FAULT STEP
  local fault=$1 step=$2 delay name=x$((++n))
  delay=0.$((RANDOM % 10))
  [ "$step" != copy ] || delay=$((RANDOM % 5)).$((RANDOM % 10))
  say "$fault at $step, after $delay s"
  load "$name" 20 --keep-alive
  eval "local load_pid=\$${name}_pid"
  sleep 0.5
  if [ "$step" = copy ]; then
    command begin
    sleep "$delay"
    strike "$fault"
    wait "$command_pid" || true
    # Nothing installed yet, or something: a person repeats begin, and is told that resume is what goes on.
    rehome -q begin >"$world/shared/again" 2>&1 || again resume
  else
    rehome -q begin
  fi
  if [ "$step" = follow ]; then
    sleep "$delay"
    [[ $fault = *controller ]] || strike "$fault"
    again resume
  fi
  again verify
  again switch --when-ready
  sleep 1
  # Before complete the clients have gone to the new address.
  finish "$load_pid" || true
  if [ "$step" = complete ]; then
    command complete --anyway
    sleep "$delay"
    strike "$fault"
    wait "$command_pid" || true
    if rehome status 2>/dev/null | grep -qE '^shop: (switched|completing)'; then again complete --anyway; fi
  else
    again complete --anyway
  fi
  judge judge new source "$name" >"$world/shared/judged" || { cat "$world/shared/out" "$world/shared/judged"; fail "$fault at $step"; }
  [[ $fault = *_source && $fault != kill_agent_source ]] || grep -qE '^failed +0$' "$world/shared/judged" || { cat "$world/shared/judged"; fail "$fault at $step: requests failed"; }
  for host in old new; do
    [ "$(sql $host postgres "SELECT count(*) FROM pg_replication_slots")$(sql $host postgres "SELECT count(*) FROM pg_subscription")" = 00 ] || fail "$fault at $step: slots or subscriptions are left on $host"
  done
  say "ok  $fault at $step; $(tr '\n' ' ' <"$world/shared/judged" | tr -s ' ' | cut -c1-110)"
}
n=0
for fault in "${faults[@]}"; do
  for step in "${steps[@]}"; do
    make_world
    both_sites -- --tables 10 --rows "${ROWS:-20000}"
    MAX_PAUSE=5s write_yaml
    one "$fault" "$step"
    stop_world
    world= background=()
  done
done
say "$n passed, 0 failed"
