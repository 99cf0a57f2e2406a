#!/usr/bin/env bash
# Proves that the test world does what the tests take for granted: orders under load are kept over a power cut, links
# and wires do what they say, the judge finds what was made to be lost, and nothing is left behind. As root, after a
# build; 20 s on an idle machine with two cores.
#   smoke.sh [RATE [SECONDS]]
set -euo pipefail
support=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${REHOME_BIN:-$(cd "$support/../.." && pwd)/build/dev/bin}
rate=${1:-100} seconds=${2:-5}
hosts() { timeout 150 "$support/hosts.sh" "$@"; }
pg() { timeout 150 "$support/pg.sh" "$@"; }
site() { timeout 150 "$support/site.sh" "$@"; }
say() { local ms=$(($(date +%s%N) / 1000000 - began)); printf '%4d.%d s  %s\n' $((ms / 1000)) $((ms % 1000 / 100)) "$*"; }
fail() { echo "smoke: FAILED: $*" >&2; exit 1; }
began=$(($(date +%s%N) / 1000000))

world=$(hosts new)
trap 'hosts down "$world"' EXIT
id=$(cat "$world/world")
hosts up "$world" --for $$
say "two hosts and admin are up"
namespaces=
for host in old new admin; do
  pid=$(hosts pid "$world" $host)
  for kind in net mnt pid ipc uts cgroup; do namespaces+="$(readlink "/proc/$pid/ns/$kind") "; done
done

for from in old new admin; do
  for to in old new; do
    [ "$(hosts enter "$world" $from timeout 10 ssh $to hostname)" = $to ] || fail "no ssh from $from to $to"
  done
done
connect() { hosts enter "$world" "$1" timeout "${3:-1}" bash -c "exec 3<>/dev/tcp/$2/22"; }
hosts link "$world" down
connect old 10.77.0.2 2>/dev/null && fail "the link is down, and old reaches new"
connect admin 10.77.0.2 || fail "admin does not reach new while the link is down"
hosts link "$world" up
connect old 10.77.0.2 5 || fail "the link is up, and old does not reach new"
hosts wire "$world" 30 0 0
started=$(date +%s%N)
connect old 10.77.0.2 5
took=$((($(date +%s%N) - started) / 1000000))
[ $took -ge 60 ] && [ $took -lt 500 ] || fail "a connection over 2 x 30 ms took $took ms"
hosts wire "$world" off
connect old 10.77.0.2 5 || fail "the wire is off, and old does not reach new"
say "ssh, link and wire work (a connection over 2 x 30 ms took $took ms)"

for host in old new; do
  pg init "$world" $host 15 5432
  site nginx "$world" $host
done
site database "$world" old 5432 --tables 200 --rows 1000 --large-objects 2 --unlogged --keyless
site account "$world" new 5432
for host in old new; do site shop "$world" $host; done
site health "$world" old >/dev/null
say "PostgreSQL, nginx and the shop are up on both, with 200 tables on old"

history=$world/shared/history writes=$world/shared/writes
application=$(site conninfo "$world" old 5432) superuser=$(pg conninfo "$world" old 5432 shop)
hosts enter "$world" admin "$bin/rehome-writers" --init --db "$application"
hosts enter "$world" admin timeout $((seconds + 60)) "$bin/rehome-writers" --db "$application" --admin-db "$superuser" \
  --history "$writes" --repeatable-read 1 --long 1 --superuser 1 --replica-role 1 --large-objects 1 --ddl 1 \
  --long-ms 300 --every-ms 50 --seconds "$seconds" >"$world/writers" &
hosts enter "$world" admin timeout $((seconds + 60)) "$bin/rehome-load" --url-address 10.77.0.1:80 --rate "$rate" \
  --clients 16 --seconds "$seconds" --history "$history" --keep-alive | sed 's/^/          /'
wait $!
echo "          direct writes: $(cat "$world/writers")"
say "loaded"

hosts power-cut "$world" old
connect admin 10.77.0.1 2>/dev/null && fail "old has no power, and answers"
hosts power-on "$world" old
site health "$world" old >/dev/null
say "old lost its power, and serves again"

judge() {
  hosts enter "$world" old timeout 60 "$bin/rehome-history-check" --history "$1" --files /srv/shop \
    --serving "$application" --json "$world/shared/verdict"
}
judge "$history" | sed 's/^/          /' || fail "the judge found faults"
acknowledged=$(python3 -c 'import json,sys; v = json.load(open(sys.argv[1])); print(v["acknowledged"] if not v["failed"] else -1)' \
  "$world/shared/verdict")
[ "$acknowledged" = $((rate * seconds)) ] || fail "$acknowledged orders acknowledged, not $((rate * seconds))"
judge_writes() { hosts enter "$world" admin timeout 60 "$bin/rehome-writers" --judge "$writes" --serving "$superuser"; }
judge_writes | sed 's/^/          /' || fail "direct writes are lost or doubled"

# The judge must be able to find fault: a row and a receipt that are taken away by hand.
key=$(python3 -c 'import json,sys; print([json.loads(l)["key"] for l in open(sys.argv[1])][int(sys.argv[2])])' "$history" 7)
hosts enter "$world" old find /srv/shop/receipts -name "$key.json" -delete
pg psql "$world" old 5432 -d shop -c "DELETE FROM order_lines WHERE order_id = (SELECT max(id) FROM orders)"
judge "$history" >"$world/judged" && fail "the judge missed a receipt and an order's lines"
grep -q '^lost  *2$' "$world/judged" || fail "two orders were spoilt, the judge says: $(cat "$world/judged")"
pg psql "$world" old 5432 -d shop -c "DELETE FROM direct_writes WHERE key = (SELECT min(key) FROM direct_writes WHERE kind = 'long')"
judge_writes >"$world/judged" && fail "the judge missed a row of a long transaction"
grep -q '^lost: long-' "$world/judged" || fail "a long transaction was spoilt, the judge says: $(cat "$world/judged")"
say "the judges find an order without a receipt, one without its lines, and a row that is gone"

hosts down "$world"
hosts down "$world"
[ ! -e "$world" ] || fail "$world is still there"
for link in /proc/[0-9]*/ns/{net,mnt,pid,ipc,uts,cgroup}; do
  ns=$(readlink "$link" 2>/dev/null) || continue
  [[ " $namespaces" != *" $ns "* ]] || fail "$link is in a namespace of the world: $(tr '\0' ' ' <"${link%/ns/*}/cmdline")"
done
! grep -l -F "$world" /proc/[0-9]*/mountinfo 2>/dev/null || fail "mounts of $world are left"
[ -z "$(find /sys/fs/cgroup -maxdepth 3 -name "rehome-$id-*" 2>/dev/null)" ] || fail "control groups are left"
! pgrep -f -- "$world" >/dev/null || fail "processes are left: $(pgrep -af -- "$world")"
say "nothing is left: no process, namespace, mount, control group or directory"
