#!/usr/bin/env bash
# Faults inside the pause, on real servers under load: whatever dies, nothing acknowledged is lost, never do both sides accept
# writes, and one side serves again by itself. In ./check every fault meets one phase, drawn with a printed seed; with REHOME_ALL
# every fault meets every phase.   SEED=n FAULTS="name ..." PHASES="name;..." choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "seed $seed"

IFS=';' read -r -a phases <<<"${PHASES:-hold;drain;soft fence;freeze;marker;catch up;compare;arm reverse;read canary;seal;hard fence;open}"
everything="kill_controller kill_agent_yields kill_agent_takes cut_link stop_controller second_controller stuck_controller lossy_link kill_pg_yields kill_pg_takes kill_gate power_yields power_takes"
read -r -a faults <<<"${FAULTS:-$everything}"

# Breaks things while a switch or a reverse is at FAULT_WHEN FAULT_PHASE. Runs beside it.
breaker() { # FAULT YIELDS TAKES
  local fault=$1 yields=$2 takes=$3 i pid
  for i in $(seq 3000); do [ -e "$world/shared/hook.asks" ] && break; sleep 0.01; done
  [ -e "$world/shared/hook.asks" ] || return 0
  case $fault in
    kill_controller) on new sh -c "kill -9 \$(cat '$world/shared/controller.pid')" ;;
    stop_controller) nap new "$(cat "$world/shared/controller.pid")" 7 "$(cat "$world/shared/command.pid")" ;;
    kill_agent_yields) on "$yields" kill -9 "$(agent_pid "$yields")" ;;
    kill_agent_takes) on "$takes" kill -9 "$(agent_pid "$takes")" ;;
    # Its work waits in the hook, and its threads go on.
    stuck_controller) sleep 15 ;;
    second_controller) rehome -q resume >"$world/shared/second" 2>&1 ;;
    lossy_link) hosts wire "$world" 30 5 0; (sleep 8; hosts wire "$world" off) & ;;
    cut_link) hosts link "$world" down; (sleep 6; hosts link "$world" up) & ;;
    kill_pg_yields) pg_kill "$yields" ;;
    kill_pg_takes) pg_kill "$takes" ;;
    kill_gate) on "$yields" kill -9 "$(gate_pid "$yields")" ;;
    power_yields) hosts power-cut "$world" "$yields"; (sleep 2; hosts power-on "$world" "$yields") & ;;
    power_takes) hosts power-cut "$world" "$takes"; (sleep 2; hosts power-on "$world" "$takes") & ;;
  esac || true
  touch "$world/shared/hook.done"
}

settled() { # prints the side that serves when both agents have come to rest
  rehome status --json 2>/dev/null | python3 -c '
import json, sys
s = json.loads(sys.stdin.readline())
if "missing" in s["source"] or "missing" in s["target"]: sys.exit(1)
for side in ("source", "target"):
    a = s[side]
    if "record" not in a or not a["link"].get("up"): sys.exit(1)
    if a["attempt"].get("phase") not in ("serving", "closed", "refused", "prepared") or not a["attempt"].get("settled", True): sys.exit(1)
    g = a.get("gate") or {}
    if "state" in g and g["state"] not in ("OPEN_LOCAL", "OPEN_PEER"): sys.exit(1)
print({"source": "old", "target": "new"}[s["serves"]])'
}

make_world
cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "\$(cat '$world/shared/hook.at')" ] || exit 0
[ ! -e '$world/shared/hook.asks' ] || exit 0
touch '$world/shared/hook.asks'
i=0
while [ ! -e '$world/shared/hook.done' ] && [ \$i -lt 2000 ]; do sleep 0.01; i=\$((i+1)); done
H
chmod 755 "$world/shared/hook"
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
  rm -f "$world/shared/hook.asks" "$world/shared/hook.done"
  echo "$when $phase" >"$world/shared/hook.at"
  load "$name" 25 --keep-alive
  probe "p$n"
  eval "local load_pid=\$${name}_pid probe_pid=\$p${n}_pid"
  sleep 0.5
  breaker "$fault" "$yields" "$takes" &
  local breaker_pid=$!
  on new sh -c "echo \$\$ >'$world/shared/controller.pid'; REHOME_FAULT_HOOK='$world/shared/hook' exec '$bin/rehome' --file '$yaml' -q $command" >"$world/shared/out" 2>&1 &
  local command_pid=$!
  echo $command_pid >"$world/shared/command.pid"
  wait $command_pid && status=0 || status=$?
  wait "$breaker_pid" || true
  # What a person or the init system does; the agents do the rest by themselves.
  sleep 1
  case $fault in
    kill_pg_yields) pg start "$yields" 15 5432 >/dev/null 2>&1 || true ;;
    kill_pg_takes) pg start "$takes" 15 5432 >/dev/null 2>&1 || true ;;
    cut_link | power_*) sleep 6; hosts link "$world" up ;;
    lossy_link) sleep 8 ;;
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
  rehome -q resume || { sleep 3; rehome -q resume; }
  sleep 1
  finish "$load_pid" || true
  finish "$probe_pid" 2>/dev/null || true
  mv "$world/shared/p$n.probes" "$world/shared/judge.probes"
  local yielded=source
  [ "$yields" = old ] || yielded=target
  if [ "$serving" = "$yields" ]; then
    # Nobody took over: not one write may have been taken by the other side.
    yielded=$([ "$takes" = old ] && echo source || echo target)
  fi
  judge judge "$serving" "$yielded" "$name" -- "${histories[@]}" >"$world/shared/judged" || { cat "$world/shared/out" "$world/shared/judged"; fail "$fault $when $phase"; }
  histories+=("$name")
  # Only where the service's own server died may a request fail, and afterwards orders must be taken again.
  case $fault in kill_pg_yields | kill_gate | power_yields) ;; *) grep -qE '^failed +0$' "$world/shared/judged" || { cat "$world/shared/out" "$world/shared/judged"; fail "$fault $when $phase: requests failed"; } ;; esac
  on admin curl -sf -m 5 -o /dev/null http://10.77.0.1/health || fail "$fault $when $phase: the shop does not answer"
  say "ok  $fault $when $phase: $command ended with $status, $serving serves, settled in $((SECONDS - started)) s; $(tr '\n' ' ' <"$world/shared/judged" | tr -s ' ' | cut -c1-110)"
}

for fault in "${faults[@]}"; do
  if [ -n "${REHOME_ALL:-}" ] || [ -n "${PHASES:-}" ]; then
    for phase in "${phases[@]}"; do one_fault "$fault" before "$phase"; done
  else
    one_fault "$fault" "$([ $((RANDOM % 2)) = 0 ] && echo before || echo after)" "${phases[$((RANDOM % ${#phases[@]}))]}"
  fi
done
say "$n passed, 0 failed"
