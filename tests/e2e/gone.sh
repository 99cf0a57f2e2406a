#!/usr/bin/env bash
# The target's host is lost for good in the fallback window: a person says so, the source serves again and tells what the lag was. When
# the lost host comes back all the same, it takes no writes.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
make_world
both_sites -- --tables 5 --rows 500
MAX_PAUSE=5s write_yaml
load all 20 --keep-alive
rehome -q begin
rehome -q switch --when-ready
# The agents sample the lag every five seconds, and tell each other.
sleep 8
finish "$all_pid"
sleep 2
hosts power-cut "$world" new
# The person sits at the old server now.
sed -e 's/^source: .*/source: {local: true, boot: "directory:\/var\/lib\/boot.d"}/' -e 's/^target: .*/target: {ssh: root@new, boot: "directory:\/var\/lib\/boot.d"}/' "$yaml" >"$world/shared/from-old.yaml"
yaml=$world/shared/from-old.yaml
CONTROLLER=old
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null 2>&1 && fail "the old side takes writes though nobody said that the new one is gone"
rehome reverse --target-is-gone >"$world/shared/out" 2>&1 && fail "opened without a person's word"
rehome reverse --target-is-gone --confirm new >"$world/shared/out" 2>&1 || { cat "$world/shared/out"; fail "reverse --target-is-gone"; }
cat "$world/shared/out"
grep -qE "db was .* behind at" "$world/shared/out" || fail "it does not say what the lag was"
site health old
load again 20 --keep-alive
sleep 3
finish "$again_pid"
hosts power-on "$world" new
for i in $(seq 30); do
  sleep 1
  sql new shop "INSERT INTO probe(side, at_us) VALUES ('new', 1)" >/dev/null 2>"$world/shared/refused" || break
done
grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; fail "the host that came back takes writes"; }
judge all old target again -- all
grep -qE '"failed": ?0[,}]' "$world/shared/all.verdict" || {
  cat "$world/shared/again.json" "$world/shared/again.err"
  grep -v '"outcome":"ok"' "$world/shared/again.history" | head -3
  on old sh -c 'tail -n 5 /var/log/nginx/*error* /var/log/shop*'
  fail "the side that was opened again does not take every order"
}
say "1 passed, 0 failed"
