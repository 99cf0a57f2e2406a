#!/usr/bin/env bash
# The service that takes over has sessions that died with a restart of its server, one in each of its threads: they are found before
# the pause, and no client meets one after it.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
make_world
both_sites -- --tables 4 --rows 100
write_yaml
rehome -q begin
at_once() { # every thread of new's shop at work: each opens its session
  on new bash -c 'for i in $(seq 32); do curl -s -m 10 -o /dev/null -w "%{http_code}\n" http://127.0.0.1:8000/health & done; wait'
}
# A switch that backs out leaves the shop at new running.
printf '#!/bin/sh\n[ "$1 $2" != "before drain" ] || kill -INT $PPID\n' >"$world/shared/hook"
chmod 755 "$world/shared/hook"
status=0
REHOME_FAULT_HOOK=$world/shared/hook rehome -q switch 2>"$world/shared/backed-out" || status=$?
[ $status = 10 ] || { cat "$world/shared/backed-out"; fail "the switch that was stopped in the pause ended with $status"; }
[ "$(at_once | sort -u)" = 200 ] || fail "the shop at new does not answer"
pg_kill new
pg start new 15 5432
load warm 25 --keep-alive
sleep 1
rehome switch
sleep 1
finish warm
judge warm new warm
say "1 passed, 0 failed"
