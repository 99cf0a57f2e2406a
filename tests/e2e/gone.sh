#!/usr/bin/env bash
# A host is lost for good, and a person says so: the target's in the fallback window, and the source's before any switch. The other side
# serves again and tells what may be missing. When the lost host comes back all the same, it takes no writes. And a run is ended from
# the one side that is left: cancel and complete.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
refuses() { # HOST: it comes to that by itself
  local i
  for i in $(seq 30); do
    sleep 1
    sql "$1" shop "INSERT INTO probe(side, at_us) VALUES ('$1', 1)" >/dev/null 2>"$world/shared/refused" || break
  done
  grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; on "$1" sh -c 'tail -n 20 /var/lib/rehome/shop/*/log/agent.log'; fail "the host that came back takes writes"; }
}
new_world() {
  stop_world
  CONTROLLER=new
  make_world
  both_sites -- --tables 5 --rows 500
  MAX_PAUSE=5s write_yaml
}

say "the target is lost in the fallback window"
new_world
load all 20 --keep-alive
# All in one command.
rehome --json migrate >"$world/shared/out" 2>&1 || { tail -5 "$world/shared/out"; fail "migrate"; }
grep -q '"kind":"verify"' "$world/shared/out" || fail "migrate compares nothing"
rehome --json status | grep -q '"phase":"switched"' || fail "migrate does not end with the target serving"
sql new shop "INSERT INTO probe(side, at_us) VALUES ('new', 1)" >/dev/null
# The agents sample the lag every five seconds, and tell each other.
sleep 8
finish all
sleep 2
hosts power-cut "$world" new
# The person sits at the old server now.
yaml_from_old "$yaml"
CONTROLLER=old
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null 2>&1 && fail "the old side takes writes though nobody said that the new one is gone"
rehome reverse --target-is-gone >"$world/shared/out" 2>&1 && fail "opened without a person's word"
# It is decided at once, and true when the stores are open.
pg stop old 15 5432
status=0
rehome reverse --target-is-gone --confirm new >"$world/shared/out" 2>&1 || status=$?
[ $status = 16 ] && grep -q "serves, and it does not yet: .*5432" "$world/shared/out" || { cat "$world/shared/out"; fail "reverse --target-is-gone ended with $status while the source's database is down"; }
pg start old 15 5432
rehome reverse --target-is-gone --confirm new >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "reverse --target-is-gone"; }
cat "$world/shared/out"
grep -qE "db was .* behind at" "$world/shared/out" || fail "it does not say what the lag was"
site health old
load again 20 --keep-alive
sleep 3
finish again
hosts power-on "$world" new
refuses new
judge again new:old again -- all || {
  cat "$world/shared/again.json" "$world/shared/again.err"
  grep -v '"outcome":"ok"' "$world/shared/again.history" | head -3
  on old sh -c 'tail -n 5 /var/log/nginx/*error* /var/log/shop*'
  fail "the side that was opened again does not hold or take every order"
}

say "the source is lost before any switch"
new_world
sql old shop "CREATE MATERIALIZED VIEW totals AS SELECT count(*) AS n FROM orders" >/dev/null
load before 20 --keep-alive
# The files first: what their part of the opening has to do keeps no other store's from its own.
python3 - "$yaml" <<'P'
import sys
text = open(sys.argv[1]).read()
db, files, rest = (text.index(word) for word in ("  - name: db\n", "  - name: receipts\n", "services:\n"))
open(sys.argv[1], "w").write(text[:db] + text[files:rest] + text[db:files] + text[rest:])
P
rehome -q begin
sleep 3
finish before
sleep 3
orders=$(sql old shop "SELECT count(*) FROM orders")
hosts power-cut "$world" old
rehome resume --source-is-gone >"$world/shared/out" 2>&1 && fail "opened without a person's word"
rehome resume --source-is-gone --confirm old >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "resume --source-is-gone"; }
cat "$world/shared/out"
grep -q "until the link went down" "$world/shared/out" || fail "it does not say what may be missing"
[ "$(sql new shop "SELECT n FROM totals")" = "$orders" ] || fail "the materialized view is not refreshed"
site health new
LOAD_TO=10.77.0.2:80 load after 20 --keep-alive
sleep 3
finish after
hosts power-on "$world" old
refuses old
judge after old:new after -- before
for _ in $(seq 30); do [ "$(settled)" != new ] || break; sleep 1; done
[ "$(settled)" = new ] || { rehome status; fail "the agents have not finished what a person decided"; }
! on old sh -c ': >>/srv/shop/late' 2>/dev/null || fail "the tree of the host that came back takes writes"
[ "$(sql new shop "SELECT count(*) FROM pg_subscription WHERE subenabled")" = 0 ] || fail "the side that was opened still follows the host that came back"

say "the target is lost before a switch: cancel from the source alone"
new_world
load here 20 --keep-alive
rehome -q begin
hosts power-cut "$world" new
yaml_from_old "$yaml"
CONTROLLER=old
rehome cancel >"$world/shared/out" 2>&1 && fail "cancelled without the target"
rehome cancel --target-is-gone >"$world/shared/out" 2>&1 && fail "cancelled without a person's word"
rehome cancel --target-is-gone --confirm new >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "cancel --target-is-gone"; }
grep -q "target: all that rehome made there" "$world/shared/out" || { cat "$world/shared/out"; fail "it does not say what is left"; }
finish here
nothing_left old
judge here old here

say "the source is lost after the switch: complete from the target alone"
new_world
rehome -q begin
rehome -q switch
hosts power-cut "$world" old
rehome complete --anyway >"$world/shared/out" 2>&1 && fail "completed without the source"
rehome complete --source-is-gone --confirm old >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "complete --source-is-gone"; }
nothing_left new
rehome status >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "status after the end, with the old server off"; }
grep -q "the last run's journal: " "$world/shared/out" || { cat "$world/shared/out"; fail "status does not name the last journal"; }
rehome report --out "$world/shared/report.html" >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "report after the end, with the old server off"; }
sql new shop "INSERT INTO probe(side, at_us) VALUES ('new', 1)" >/dev/null || fail "the target takes no writes"
rehome report --out "$world/shared/report.html" >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "report after complete, with the old server off"; }
grep -q "/archive/" <(rehome --json status) || fail "status does not say where the journal is"
say "4 passed, 0 failed"
