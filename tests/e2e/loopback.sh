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
finish there
judge there old:new there
load back 30 --keep-alive
sleep 1
rehome -q reverse
sleep 1
finish back
judge back new:old back -- there
rehome -q switch
sequences_ahead new old
rehome -q complete --anyway
nothing_left new
nothing_left old fenced
rehome -q complete --unfence-source
nothing_left old
say "1 passed, 0 failed"
