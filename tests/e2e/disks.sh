#!/usr/bin/env bash
# Disks that are full: the target's (files, PostgreSQL), the one that holds the source's record, and the source's WAL. Nothing is
# lost, the source serves, status says what is wrong, and after room is made the run goes on. Within the pause each of them meets one
# phase, drawn with a printed seed; with REHOME_ALL every phase.   SEED=n PHASES="name;..." choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
seed=${SEED:-$RANDOM}
RANDOM=$seed
say "seed $seed"
IFS=';' read -r -a phases <<<"${PHASES:-soft fence;freeze;marker;catch up;compare;arm reverse;read canary;seal;hard fence;open}"

# A small disk at /disk/NAME, a folder of which is at the path: what fills it lies beside.
disk() { on "$1" sh -c "mkdir -p '/tmp/disk/$4' '$2' && mount -t tmpfs -o size=$3,mode=755 tmpfs '/tmp/disk/$4' && mkdir '/tmp/disk/$4/at' && mount --bind '/tmp/disk/$4/at' '$2'"; }
fill() { # HOST NAME
  on "$1" sh -c "! cat /dev/zero >'/tmp/disk/$2/filler' 2>/dev/null" || fail "the disk $2 on $1 did not get full"
  [ "$(on "$1" df --output=avail "/tmp/disk/$2" | tail -n 1)" -eq 0 ] || fail "the disk $2 on $1 has room left"
}
make_room() { on "$1" rm -f "/tmp/disk/$2/filler"; }
status_says() { # PATTERN: within 40 s
  local i
  for i in $(seq 40); do
    rehome status >"$world/shared/status" 2>&1 || true
    if grep -qiE "$1" "$world/shared/status"; then return 0; fi
    sleep 1
  done
  cat "$world/shared/status"
  fail "status does not say: $1"
}
ended_with() { # STATUS ONE OF...
  local status=$1
  shift
  [[ " $* " == *" $status "* ]] || { cat "$world/shared/out"; fail "it ended with $status and not with one of $*"; }
}
serves_old() {
  sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null || fail "the source takes no writes"
  rehome status --json | python3 -c 'import json, sys; sys.exit(json.loads(sys.stdin.readline())["serves"] != "source")' || fail "status does not say that the source serves"
}
follows_again() {
  local i
  for i in $(seq 60); do
    if rehome status --json 2>/dev/null | python3 -c '
import json, sys
s = json.loads(sys.stdin.readline())["stores"]
sys.exit(0 if s and all(v.get("following") and not v.get("trouble") for v in s.values()) else 1)'; then return 0; fi
    sleep 1
  done
  rehome status || true
  fail "it does not follow again"
}

make_world
bindir=$("$support/pg.sh" bindir 15)
disk old /var/lib/rehome 24M state
disk new /srv/shop 256M files
disk new /var/lib/rehome 24M state
disk new /var/lib/postgresql 900M pg
disk old /var/lib/postgresql 900M pg
make_hook
both_sites -- --tables 5 --rows 500
MAX_PAUSE=5s write_yaml
sed -i 's/^limits: .*/limits: {jobs: 2, wal_kept: 64MB}/' "$yaml"

say "the target's disk is full while files are copied"
on old sh -c 'head -c 16M /dev/urandom >/srv/shop/large.bin'
fill new files
load all 20 --keep-alive
rehome -q begin >"$world/shared/out" 2>&1 && fail "begin succeeded on a full disk"
grep -qE "has .* free, and the source holds" "$world/shared/out" || { cat "$world/shared/out"; fail "begin does not say why"; }
make_room new files
rehome -q begin

say "the target's files: full while it follows"
fill new files
on old sh -c 'head -c 1M /dev/urandom >/srv/shop/second.bin'
status_says "no space|space left"
rehome -q switch >"$world/shared/out" 2>&1 && status=0 || status=$?
ended_with $status 14
grep -q "No space left on device" "$world/shared/out" || { cat "$world/shared/out"; fail "switch does not say why"; }
serves_old
make_room new files
follows_again

say "the target's PostgreSQL: full while it follows"
fill new pg
sql old shop "UPDATE products SET name = name || repeat('x', 2000)" >/dev/null
status_says "^ *db .*(no space left|follower is not connected|does not answer)"
rehome -q switch >"$world/shared/out" 2>&1 && status=0 || status=$?
ended_with $status 5 7 11 14
serves_old
make_room new pg
pg start new 15 5432
rehome -q resume --recopy
follows_again

say "the record's disk: full at a switch"
fill old state
rehome -q switch >"$world/shared/out" 2>&1 && status=0 || status=$?
ended_with $status 10 15
grep -qi "no space left" "$world/shared/out" || { cat "$world/shared/out"; fail "switch does not say why"; }
serves_old
make_room old state
for i in $(seq 30); do rehome -q resume >"$world/shared/out" 2>&1 && break; sleep 1; done
follows_again

# While the source yields; whoever serves afterwards, a reverse from the target leads back.
full_in_the_pause() { # HOST DISK PHASE
  local host=$1 disk=$2 phase=$3 name=p$((++n)) status now= may_fail= i
  load $name 20 --keep-alive
  probe $name
  sleep 0.5
  hook_at "before $phase"
  REHOME_FAULT_HOOK=$world/shared/hook rehome -q switch >"$world/shared/out" 2>&1 &
  spawned switch
  local switch=$!
  hook_asks || { cat "$world/shared/out"; fail "the switch does not come to $phase"; }
  fill "$host" "$disk"
  touch "$world/shared/hook.done"
  wait $switch && status=0 || status=$?
  ended_with $status 0 7 10 11 14 15 16
  # A PostgreSQL that could not write has ended: its server's supervisor, and room, bring it back.
  make_room "$host" "$disk"
  [ "$disk" != pg ] || { on "$host" runuser -u postgres -- "$bindir/pg_isready" -q -h /run/postgresql || pg start "$host" 15 5432; }
  for i in $(seq 60); do if now=$(settled following); then break; fi; sleep 1; done
  [ -n "$now" ] || { rehome status || true; cat "$world/shared/out"; fail "the disk $disk of $host full before $phase: the run does not come to rest"; }
  rehome -q resume || { sleep 3; rehome -q resume; } || fail "the disk $disk of $host full before $phase: resume"
  # The service's own: the one of the side that served until then, and of the one that served before there was room.
  case "$disk $host $now" in "pg old "* | "files new new" | "pg new new") may_fail=1 ;; esac
  finish $name
  MAY_FAIL=$may_fail judge $name old:"$now" $name -- ${histories[@]+"${histories[@]}"} >"$world/shared/judged" 2>&1 || { cat "$world/shared/out" "$world/shared/judged"; fail "the disk $disk of $host full before $phase"; }
  histories+=($name)
  say "ok  the disk $disk of $host full before $phase: switch ended with $status, $now serves; $(tr '\n' ' ' <"$world/shared/judged" | tr -s ' ' | cut -c1-110)"
  [ "$now" = old ] || { rehome -q reverse && follows_again; }
}
n=0 histories=(all)
finish all
for full in "new files" "new pg" "new state" "old state" "old pg"; do
  drawn=("${phases[$((RANDOM % ${#phases[@]}))]}")
  [ -z "${REHOME_ALL:-}${PHASES:-}" ] || drawn=("${phases[@]}")
  for phase in "${drawn[@]}"; do full_in_the_pause $full "$phase"; done
done
load rest 20 --keep-alive

say "the source's WAL: a follower that stays away loses its slot, not the source its disk"
pg stop new 15 5432
on old sh -c 'for i in $(seq 12); do runuser -u postgres -- psql -h /run/postgresql -d shop -qc "SELECT pg_logical_emit_message(false, \$\$fill\$\$, repeat(\$\$x\$\$, 8000000))" >/dev/null; done'
for i in $(seq 40); do
  [ "$(sql old postgres "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'rehome%f'")" = 0 ] && break
  sleep 1
done
[ "$(sql old postgres "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'rehome%f'")" = 0 ] || fail "the slot keeps more WAL than wal_kept"
pg start new 15 5432
status_says "is gone|copied again"
rehome -q switch >"$world/shared/out" 2>&1 && status=0 || status=$?
ended_with $status 7 11
serves_old
rehome -q resume --recopy
follows_again
rehome -q verify
# The warm shop's pool holds connections to the server that was stopped: each answers the check with one error, and it is asked again.
# What the reserve left is filled as well. The last lines may find place in the journal's last block, and mostly do not.
say "the journal's disk: full when the switch is decided; it is told all the same"
hook_at "after open"
REHOME_FAULT_HOOK=$world/shared/hook rehome --json switch >"$world/shared/out" 2>&1 &
spawned switch
switch=$!
hook_asks || fail "the switch does not come to its end"
on old sh -c '! cat /dev/zero >>/tmp/disk/state/filler' 2>/dev/null || fail "the disk did not get full"
touch "$world/shared/hook.done"
for i in $(seq 60); do ! grep -qE "the journal could not be written|\"what\":\"switch\"" "$world/shared/out" || break; sleep 0.05; done
make_room old state
wait $switch || { tail -n 5 "$world/shared/out"; fail "the switch that was decided ended with $?"; }
grep -h -o "the journal could not be written[^,]*" "$world/shared/out" || true
rehome --json status | grep -q '"phase":"switched"' || fail "the journal was not written when there was room"
finish rest
cat "$world/shared/rest.json"
judge rest old:new rest -- "${histories[@]}"
rehome -q complete --anyway
nothing_left new
nothing_left old fenced
say "1 passed, 0 failed"
