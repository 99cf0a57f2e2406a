#!/usr/bin/env bash
# The life across versions of PostgreSQL, under load: 13 to 15, 15 to 17, 15 to 18. Judged by what clients were told, and by a
# script that describes catalogue and rows of both sides, since no pg_dump here reads all of them.   PAIRS="13:15 ..." choose.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
n=0
same() { # both sides at rest
  local host
  for host in old new; do
    pg psql $host 5432 -qAtX -v ON_ERROR_STOP=1 -d shop <"$support/fingerprint.sql" | LC_ALL=C sort >"$world/shared/print.$host"
  done
  [ "$(wc -l <"$world/shared/print.old")" -gt 100 ] || fail "the fingerprint is empty"
  diff "$world/shared/print.old" "$world/shared/print.new" >"$world/shared/print.diff" || { head -20 "$world/shared/print.diff"; fail "the sides differ"; }
}
for pair in ${PAIRS:-13:15 15:17 15:18}; do
  old=${pair%:*} new=${pair#*:}
  say "PostgreSQL $old to $new"
  make_world
  both_sites "$old" "$new" -- --tables 10 --rows 1000 --large-objects 2 --unlogged --keyless
  MAX_PAUSE=5s write_yaml
  load all 20 --keep-alive
  rehome -q begin
  rehome -q verify
  rehome -q switch --when-ready
  sequences_ahead new old
  sleep 1
  rehome -q reverse
  sequences_ahead old new
  sleep 1
  rehome -q switch --when-ready
  sleep 1
  finish all
  judge all old:new all
  # At rest; the follower is a moment behind.
  sleep 2
  rehome -q verify
  same
  rehome -q complete --anyway
  nothing_left new
  nothing_left old fenced
  rehome -q complete --unfence-source
  nothing_left old
  stop_world
  n=$((n + 1))
done
say "$n passed, 0 failed"
