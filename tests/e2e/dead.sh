#!/usr/bin/env bash
# A crashed application at the side that serves: status says it, and it is no obstacle to the way back; nor is what it answers there.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
make_world
both_sites -- --tables 4 --rows 100
write_yaml
sed -i 's/, canary: read}/}/' "$yaml"   # checks before the switch alone
rehome -q begin
rehome -q switch
on new sh -c 'kill -9 $(cat /run/shop/pid)'
sleep 0.2
rehome status >"$world/shared/status.out"
grep -q "service shop does NOT run on the target, which serves" "$world/shared/status.out" || { cat "$world/shared/status.out"; fail "status does not say that the service is dead"; }
rehome reverse >"$world/shared/reverse.out"
grep -q "service shop does not run on the target: nothing to freeze" "$world/shared/reverse.out" || { cat "$world/shared/reverse.out"; fail "reverse does not say that there was nothing to freeze"; }
site health old >/dev/null
rehome -q cancel
say "1 passed, 0 failed"
