#!/usr/bin/env bash
# Faults outside the pause: while begin copies, while it follows, while complete takes away. In ./check one fault at one step drawn
# with a printed seed; with REHOME_ALL every fault at every step.   SEED=n FAULTS="..." STEPS="copy follow complete" choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "seed $seed"
everything="kill_controller stop_controller kill_agent_source kill_agent_target kill_ssh cut_link lossy_link kill_pg_source kill_pg_target power_source power_target"
read -r -a faults <<<"${FAULTS:-$everything}"
read -r -a steps <<<"${STEPS:-copy follow complete}"
pairs=()
for fault in "${faults[@]}"; do
  # While it follows there is no controller.
  for step in "${steps[@]}"; do [[ $step = follow && $fault = *controller ]] || pairs+=("$fault $step"); done
done
[ ${#pairs[@]} -gt 0 ] || fail "none of these faults can meet one of these steps"
if [ -z "${REHOME_ALL:-}${FAULTS:-}${STEPS:-}" ]; then
  mapfile -t pairs < <(printf '%s\n' "${pairs[@]}" | shuf -n 2 --random-source=<(yes "$seed"))
fi

strike() { # FAULT: fails when there was nothing to break
  case $1 in
    kill_controller) kill_there new "$(cat "$world/shared/controller.pid")" ;;
    stop_controller) nap new "$(cat "$world/shared/controller.pid")" 4 "$command_pid" ;;
    kill_agent_source) kill_there old "$(agent_pid old)" ;;
    kill_agent_target) kill_there new "$(agent_pid new)" ;;
    # The link between the agents, and the controller's way to the source.
    kill_ssh) on new sh -c 'pids=$(pgrep -x ssh) && kill -9 $pids' ;;
    lossy_link) hosts wire "$world" 30 5 0 && sleep 8 && hosts wire "$world" off ;;
    cut_link) hosts link "$world" down && sleep 6 && hosts link "$world" up ;;
    kill_pg_source) pg_kill old && sleep 1 && pg start old 15 5432 ;;
    kill_pg_target) pg_kill new && sleep 1 && pg start new 15 5432 ;;
    power_source) hosts power-cut "$world" old && sleep 2 && hosts power-on "$world" old ;;
    power_target) hosts power-cut "$world" new && sleep 2 && hosts power-on "$world" new ;;
    *) fail "no fault $1" ;;
  esac
}
ends_of() { # NAME...: what commands said last
  local name
  for name; do echo "-- $name"; tail -n 12 "$world/shared/$name"; done
}
struck() { # FAULT NTH PATTERN COMMAND...: while the command runs, soon after it has said what matches for the nth time
  local fault=$1 nth=$2 pattern=$3 i said=0
  shift 3
  rm -f "$world/shared/controller.pid"
  : >"$world/shared/out"
  (on new sh -c "echo \$\$ >'$world/shared/controller.pid'; exec '$bin/rehome' --file '$yaml' --json $*" >"$world/shared/out" 2>&1) &
  command_pid=$!
  spawned command
  for i in $(seq 6000); do
    said=$(grep -c "$pattern" "$world/shared/out") || true
    [ "$said" -lt "$nth" ] && lives $command_pid || break
    sleep 0.02
  done
  sleep 0.$((RANDOM % 4))
  lives $command_pid || { ends_of out; fail "$fault: $* had ended"; }
  say "$fault after $(tail -n 1 "$world/shared/out" | cut -c1-160)"
  strike "$fault" || { ends_of out; fail "$fault at $*: nothing was broken"; }
  wait "$command_pid" || true
}
again() { # a command that a fault may have kept from its end, repeated as a person would
  local i
  for i in $(seq 12); do
    if rehome -q "$@" >"$world/shared/again" 2>&1; then return 0; fi
    sleep 3
  done
  ends_of out again
  rehome status || true
  fail "$*: it does not come to its end"
}
one() { # FAULT STEP
  local fault=$1 step=$2 may_fail= host name=x$((++n))
  say "$fault at $step"
  load "$name" 20 --keep-alive
  sleep 0.5
  if [ "$step" = copy ]; then
    struck "$fault" $((1 + RANDOM % 9)) '"state":"started"' begin
    # Nothing installed yet, or something: a person repeats begin, and is told that resume is what goes on.
    rehome -q begin >"$world/shared/again" 2>&1 || again resume
  else
    rehome -q begin
  fi
  if [ "$step" = follow ]; then
    sleep 0.$((RANDOM % 10))
    strike "$fault" || fail "$fault at follow: nothing was broken"
    again resume
  fi
  again verify
  again switch --when-ready
  sleep 1
  # Before complete the clients have gone to the new address.
  finish "$name"
  if [ "$step" = complete ]; then
    struck "$fault" 1 '"value":"completing"' complete --anyway
    if rehome status 2>/dev/null | grep -qE '^shop: (switched|completing)'; then again complete --anyway; fi
  else
    again complete --anyway
  fi
  [[ $fault != *_source || $fault = kill_agent_source ]] || may_fail=1
  MAY_FAIL=$may_fail judge "$name" old:new "$name" >"$world/shared/judged" 2>&1 || { ends_of out judged; fail "$fault at $step"; }
  nothing_left new
  nothing_left old fenced
  again complete --unfence-source
  nothing_left old
  say "ok  $fault at $step; $(tr '\n' ' ' <"$world/shared/judged" | tr -s ' ' | cut -c1-110)"
}
n=0
for pair in "${pairs[@]}"; do
  make_world
  both_sites -- --tables 10 --rows "${ROWS:-20000}"
  MAX_PAUSE=5s write_yaml
  one $pair
  stop_world
done
say "$n passed, 0 failed"
