#!/usr/bin/env bash
# The commands as a person uses them, under load: migrate; resume after a killed begin, also from the other server; Ctrl-C and a closed
# terminal; cancel within a copy; --at, --when-ready and a stale plan; the price of a cold service; write canaries; and the two ways
# out when a host is gone for good.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

phase_is() { # PHASE SERVES
  rehome --json status >"$world/shared/status" || true
  python3 - "$world/shared/status" "$1" "$2" <<'P' || { cat "$world/shared/status"; fail "the run is not '$1' with the $2 serving"; }
import json, sys
s = json.loads(open(sys.argv[1]).readline())
sys.exit((s["phase"], s.get("serves", "none")) != (sys.argv[2], sys.argv[3]))
P
}
# Starts rehome in a session of its own, as a terminal would; its pid as its host sees it is in $world/shared/NAME.pid.
start() { # NAME ARGUMENTS...
  local name=$1
  shift
  rm -f "$world/shared/$name.pid"
  (
    status=0
    on "${CONTROLLER:-new}" ${TERMINAL:-setsid} sh -c "echo \$\$ >'$world/shared/$name.pid.new'; mv '$world/shared/$name.pid.new' '$world/shared/$name.pid'; exec '$bin/rehome' --file '$yaml' --json $*" \
      >"$world/shared/$name.out" 2>&1 || status=$?
    echo $status >"$world/shared/$name.status"
  ) &
  started=$!
  spawned "$name"
  for _ in $(seq 200); do [ -s "$world/shared/$name.pid" ] && break; sleep 0.05; done
}
signal() { on "${CONTROLLER:-new}" kill "-$2" "$(cat "$world/shared/$1.pid")"; }
said() { grep -qE "$2" "$world/shared/$1.out" || { tail -5 "$world/shared/$1.out"; fail "$1 does not say '$2'"; }; }
when() { # NAME PATTERN: waits until it is in what NAME has said
  for _ in $(seq 1200); do
    if grep -qE "$2" "$world/shared/$1.out" 2>/dev/null; then return; fi
    [ -d "/proc/$started" ] || { tail -5 "$world/shared/$1.out"; fail "$1 ended before it said '$2'"; }
    sleep 0.05
  done
  fail "$1 never says '$2'"
}
ends() { # NAME STATUS...
  local name=$1 got
  shift
  wait "$started" || true
  got=$(cat "$world/shared/$name.status")
  [[ " $* " == *" $got "* ]] || { tail -5 "$world/shared/$name.out"; fail "$name ended with $got and not with $*"; }
}
copying='"id":"copy db".*"state":"started"|"state":"started".*"id":"copy db"'
kept() { judge all "$1" all >"$world/shared/judged" 2>&1 || { cat "$world/shared/judged"; fail "clients were not told the truth"; }; } # HOST[:HOST]

make_world
# What a terminal window is: shows what the program in it says, and is closed by SIGUSR1. Ends as the program does.
cat >"$world/shared/terminal.py" <<'P'
import os, pty, signal, sys
pid, master = pty.fork()
if pid == 0: os.execvp(sys.argv[2], sys.argv[2:])
signal.signal(signal.SIGUSR1, lambda *_: os.close(master))
open(sys.argv[1], "w").write(str(os.getpid()))
try:
    while data := os.read(master, 65536): os.write(1, data)
except OSError: pass
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.exit(status if status >= 0 else 128 - status)
P
both_sites -- --tables 10 --rows 2000
# Enough to copy that a signal meets it: written at a limited rate.
sql old shop "CREATE TABLE bulk(id int PRIMARY KEY, t text); INSERT INTO bulk SELECT g, repeat(md5(g::text), 30) FROM generate_series(1, 12000) g" >/dev/null
sql old shop "ALTER TABLE bulk OWNER TO shop" >/dev/null
MAX_PAUSE=8s write_yaml
good=$world/shared/good.yaml
cp "$yaml" "$good"
sed -i 's/limits: {jobs: 2}/limits: {jobs: 2, bandwidth: 3MB}/' "$yaml"
load all 20 --keep-alive

say "Ctrl-C within a copy, and cancel"
start begin begin
when begin "$copying"
sleep 0.5
signal begin INT
ends begin 130
said begin 'resume|cancel'
phase_is begun source
start cancel cancel
when cancel '"value":"cancelling"'
signal cancel KILL
ends cancel 137
phase_is cancelling source
for command in resume begin switch; do
  rehome $command >"$world/shared/refused.out" 2>&1 && fail "$command in a run that is being cancelled"
  said refused "rehome cancel goes on"
done
rehome -q cancel
[ "$(sql new postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'")" = 0 ] || fail "the target's database is left"
for h in old new; do nothing_left $h; done
on new sh -c 'rm -rf /srv/shop/*'
kept old

say "a closed terminal stops nothing; kill -9 within the copy of migrate; resume, from the old server"
TERMINAL="python3 $world/shared/terminal.py $world/shared/terminal.pid" start begin migrate
when begin "$copying"
on new readlink "/proc/$(cat "$world/shared/begin.pid")/fd/1" | grep -q ^/dev/pts/ || fail "begin is not in a terminal"
on new kill -USR1 "$(cat "$world/shared/terminal.pid")"
sleep 1
[ -d "/proc/$started" ] || fail "a closed terminal ended begin"
signal begin KILL
ends begin 137
phase_is begun source
yaml_from_old "$good"
CONTROLLER=old rehome resume >"$world/shared/resume.out" 2>&1 || { cat "$world/shared/resume.out"; fail "resume from the other server"; }
said resume "of migrate are left: rehome verify, rehome switch"
! grep -q "snapshot .* is lost" "$world/shared/resume.out" || { cat "$world/shared/resume.out"; fail "the killed controller's snapshot was not used"; }
CONTROLLER=old phase_is following source
yaml=$good
phase_is following source
rehome -q verify
kept old

say "a plan that is stale says which fact changed"
rehome plan --out "$world/shared/friday.plan" >/dev/null
sed -i 's/^max_pause: 8s/max_pause: 9s/' "$yaml"
status=0
rehome switch --plan "$world/shared/friday.plan" >"$world/shared/stale.out" 2>&1 || status=$?
[ $status = 9 ] || { cat "$world/shared/stale.out"; fail "switch with a stale plan ended with $status"; }
said stale 'rehome.yaml: was "[0-9a-f]+", is "[0-9a-f]+"'
[ "$(grep -c ': was ' "$world/shared/stale.out")" = 1 ] || { cat "$world/shared/stale.out"; fail "it names more than the fact that changed"; }
sed -i 's/^max_pause: 9s/max_pause: 8s/' "$yaml"

say "Ctrl-C while waiting for the time, and within the pause"
start at switch --at "$(date -d '+3 minutes' +%H:%M)"
sleep 2
signal at INT
ends at 130
said at "waiting until 20[0-9-]+ [0-9:]+ [A-Z]+"
rehome switch --at "2026-02-31 22:00" >"$world/shared/at.out" 2>&1 && fail "a switch on a day that there is not"
said at "no day of that month"
start late switch --at "$(date -d '+3 minutes' +%H:%M)"
when late "waiting until"
rehome -q verify --store receipts
ends late 8
said late "took over this run while this one waited"
phase_is following source
cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "after marker" ] && kill -INT "\$(cat '$world/shared/interrupted.pid')"
exit 0
H
chmod 755 "$world/shared/hook"
REHOME_FAULT_HOOK=$world/shared/hook start interrupted switch
ends interrupted 10 130
said interrupted "source serves as before"
phase_is following source
kept old

say "a failing write canary after the commit reverses by itself"
cp "$good" "$world/shared/canary.yaml"
yaml=$world/shared/canary.yaml
sed -i 's#^checks:#checks:\n  - {name: cart, command: [/bin/false], where: target, canary: write, timeout: 1s}#' "$yaml"
cat >"$world/shared/hook" <<H
#!/bin/sh
# The second pause is the way back: it is stopped, so that resume has to do it.
[ "\$1 \$2" = "after marker" ] || exit 0
echo >>'$world/shared/pauses'
[ \$(wc -l <'$world/shared/pauses') != 2 ] || kill -INT "\$(cat '$world/shared/canary.pid')"
H
sql old shop "ALTER TABLE bulk ADD COLUMN more int DEFAULT 7" >/dev/null
rehome -q switch >"$world/shared/changed.out" 2>&1 && fail "a switch with a table that changed its columns"
said changed "must be copied again before a switch"
at=$(date -d '+20 seconds' +%s)
REHOME_FAULT_HOOK=$world/shared/hook start canary switch --recopy --at "$(date -d "@$at" +%H:%M:%S)"
ends canary 13
said canary "write canary cart failed.* the way back failed too: .*target serves"
said canary "waiting until 20"
python3 - "$world/shared/canary.out" "$at" <<'P' || fail "switch --at did not begin at its time"
import json, sys
first = [e["from_us"] for e in map(json.loads, (l for l in open(sys.argv[1]) if l.startswith("{"))) if e.get("kind") == "phase"][0]
late = first / 1e6 - int(sys.argv[2])
sys.exit(f"{late} s late" if not 0 <= late < 60 else 0)
P
phase_is switched target
[ "$(sql new shop "SELECT more FROM bulk WHERE id = 1")" = 7 ] || fail "switch --recopy copied nothing again"
# From a third machine, which has seen nothing of it.
sed -e 's/^target: {local: true/target: {ssh: root@new/' "$yaml" >"$world/shared/third.yaml"
yaml=$world/shared/third.yaml
status=0
CONTROLLER=admin rehome -q resume >"$world/shared/canary.out" 2>&1 || status=$?
[ $status = 10 ] || { cat "$world/shared/canary.out"; fail "resume after a failing write canary ended with $status"; }
said canary "write canary cart failed"
said canary "reversed: the source serves, nothing is lost"
yaml=$good
phase_is following source
kept new:old

say "a cold service's start is in the plan and in the prediction"
yaml=$world/shared/cold.yaml
# Nothing that it answers can be checked before it runs.
sed -e 's/^    warm: true/    warm: false\n    start_time: 8s/' -e '/^checks:/d' -e '/canary: read/d' "$good" >"$yaml"
rehome --json plan >"$world/shared/plan.out"
python3 - "$world/shared/plan.out" <<'P'
import json, sys
pause = [e for e in map(json.loads, open(sys.argv[1])) if e.get("kind") == "plan"][-1]["pause"]
sys.exit(f"the plan leaves the start out: {pause}" if pause["ms"] < 8000 or not any("start_time" in r for r in pause["reasons"]) else 0)
P
rehome -q switch >"$world/shared/cold.out" 2>&1 && fail "a switch began whose predicted pause is too long"
said cold "predicted pause of [89].* is above max_pause"
phase_is following source

say "switch --when-ready and --plan waits for a long transaction, and for an agent; Ctrl-C in the decision comes too late"
yaml=$world/shared/sql.yaml
sed "s#^checks:#checks:\n  - {name: second, command: [sh, -c, \"[ -e '$world/shared/asked' ] || { touch '$world/shared/asked'; exit 1; }\"], where: target}\n  - {name: any, sql: select id from public.bulk limit 0, store: db}\n  - {name: sell, sql: \"insert into public.bulk values (-2, 'canary')\", store: db, where: target, canary: write}#" "$good" >"$yaml"
rehome plan --out "$world/shared/friday.plan" >/dev/null
{
  echo "BEGIN; INSERT INTO bulk VALUES (-1, 'long');"
  while [ ! -e "$world/shared/enough" ]; do sleep 0.1; done
  echo "COMMIT;"
} | pg psql old 5432 -q -d shop >/dev/null &
long=$!
sleep 2
cat >"$world/shared/hook" <<H
#!/bin/sh
# Too late to be heeded: it is being decided.
[ "\$1 \$2" != "before open" ] || kill -INT "\$(cat '$world/shared/ready.pid')"
H
REHOME_FAULT_HOOK=$world/shared/hook start ready switch --when-ready --patience 60s --plan "$world/shared/friday.plan"
when ready "writing transaction is open since"
# Its agent is away, and comes back when the one that keeps it alive is woken.
supervisor=$(pid_of old "rehome-agent-[0-9a-f]* supervise --state")
on old kill -STOP "$supervisor"
kill_there old "$(agent_pid old)"
when ready "not yet: source"
on old kill -CONT "$supervisor"
# What takes over has ended since it was looked at.
sleep 4
on new sh -c 'kill -9 "$(cat /run/shop/pid)"'
touch "$world/shared/enough"
wait $long
ends ready 0
said ready "predicted to be .*: micro-fence \(lock, marker, proof, let go\) took [0-9]"
said ready "predicted to be .* takes [0-9]+\.[0-9] ms"
said ready '"kind":"pause".*"result":"switched"|"result":"switched".*"kind":"pause"'
phase_is switched target
[ "$(sql new shop "SELECT t FROM bulk WHERE id = -1")" = long ] || fail "the long transaction's row is not on the target"
[ "$(sql new shop "SELECT t FROM bulk WHERE id = -2")" = canary ] || fail "the write canary in SQL wrote nothing"
[ -e "$world/shared/asked" ] || fail "the check that fails at first was not asked"
yaml=$good
kept old:new

say "a reverse whose answer was lost, asked for again, does not turn back"
cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "after open" ] && kill -KILL "\$(cat '$world/shared/lost.pid')"
exit 0
H
REHOME_FAULT_HOOK=$world/shared/hook start lost reverse
ends lost 137
rehome reverse >"$world/shared/again.out"
said again "the source serves already"
phase_is following source
rehome reverse >"$world/shared/again.out" 2>&1 && fail "a reverse to the target"
said again "nothing to reverse"
kept new:old

say "the source loses its power after the commit: the target is opened by a person"
cat >"$world/shared/hook" <<H
#!/bin/sh
# Cuts the link as soon as the commit may have been sent, so that it could not finish by itself.
[ "\$1 \$2" = "after hard fence" ] || exit 0
touch '$world/shared/asks'
i=0; while [ ! -e '$world/shared/done' ] && [ \$i -lt 500 ]; do sleep 0.01; i=\$((i+1)); done
H
rm -f "$world/shared/asks" "$world/shared/done"
REHOME_FAULT_HOOK=$world/shared/hook start gone switch
for _ in $(seq 2000); do [ -e "$world/shared/asks" ] && break; sleep 0.01; done
hosts power-cut "$world" old
touch "$world/shared/done"
wait $started || true
finish all
status=0
rehome -q resume --source-is-gone >"$world/shared/noconfirm.out" 2>&1 || status=$?
[ $status != 0 ] || fail "the target was opened without a person's word"
rehome --json status >"$world/shared/status" || true
host=$(python3 -c 'import json,sys; print(json.loads(open(sys.argv[1]).readline())["source"].get("missing", {}).get("message", "it is there"))' "$world/shared/status")
[[ $host == *old* ]] || { cat "$world/shared/status"; fail "status does not say that old is missing"; }
rehome resume --source-is-gone --confirm old >"$world/shared/forced.out" 2>&1 || { cat "$world/shared/forced.out"; fail "resume --source-is-gone"; }
site health new >/dev/null
sql new shop "INSERT INTO probe(side, at_us) VALUES ('new', 1)" >/dev/null || fail "the target takes no writes"
MAY_FAIL=1 kept new
say "every command did what it says"
