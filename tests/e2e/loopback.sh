#!/usr/bin/env bash
# Without root: two sites of one account on loopback, the life of ./demo under load. As root it runs itself as nobody, from a copy that
# nobody can read.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ "$(id -u)" = 0 ]; then
  copy=$(mktemp -d /tmp/rehome-loopback-bin.XXXXXX)
  trap 'rm -rf "$copy"' EXIT
  mkdir "$copy/tests"
  cp -r "${REHOME_BIN:-$here/../../build/dev/bin}" "$copy/bin"
  cp -r "$here" "$here/../support" "$copy/tests/"
  chmod -R a+rX "$copy"
  cd /
  setpriv --reuid=nobody --regid=nogroup --clear-groups env HOME=/nonexistent REHOME_BIN="$copy/bin" bash "$copy/tests/e2e/loopback.sh"
  exit
fi
. "$here/lib.sh"
. "$here/../support/loopback.sh"
make_world
both_sites -- --tables 10 --rows 2000
write_yaml
load there 30 --keep-alive
sleep 1
rehome check >"$world/shared/check" 2>&1 || { cat "$world/shared/check"; fail "check"; }
grep -q "cannot be frozen as a whole" "$world/shared/check" || { cat "$world/shared/check"; fail "check does not say what is weaker without root"; }
rehome -q begin
rehome -q verify
rehome -q switch
sleep 1
finish "$there_pid"
judge there new source there
load back 30 --keep-alive
sleep 1
rehome -q reverse
sleep 1
finish "$back_pid"
judge back old target back -- there
for name in there back; do grep -qE '"failed": ?0[,}]' "$world/shared/$name.verdict" || fail "requests failed"; done
rehome -q switch
rehome -q complete --anyway
[ "$(sql old postgres "SELECT count(*) FROM pg_replication_slots")$(sql new postgres "SELECT count(*) FROM pg_subscription")" = 00 ] || fail "slots or subscriptions are left"
! pgrep -u "$(id -u)" -f "$world/state" || fail "processes are left"
say "1 passed, 0 failed"
