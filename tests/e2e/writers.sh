#!/usr/bin/env bash
# Writers that go past the service, in the ways that a fence or a follower may miss: a transaction with an old snapshot, long ones, a
# superuser's open session, one that calls itself a replica, large objects, changes of the schema, tables made under the fence.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

writers() { # NAME KINDS...: on old, where the programs that write past the service are
  local name=$1
  shift
  on old "$bin/rehome-writers" --db "$(site conninfo old 5432)" --admin-db "$(pg conninfo old 5432 shop)" \
    --history "$world/shared/$name.writes" --every-ms 25 --long-ms 600 "$@" >"$world/shared/$name.writers" 2>"$world/shared/$name.writers.err" &
  spawned "$name"
}
judge_writers() { # HOST NAMES...
  local host=$1 args=() n
  shift
  for n in "$@"; do args+=(--judge "$world/shared/$n.writes"); done
  on "$host" "$bin/rehome-writers" "${args[@]}" --serving "$(pg conninfo "$host" 5432 shop)" >"$world/shared/judged" ||
    { cat "$world/shared/judged"; fail "what was acknowledged to a writer is not on $host"; }
  cat "$world/shared/judged"
}

make_world
both_sites -- --tables 5 --rows 500
on old "$bin/rehome-writers" --init --db "$(site conninfo old 5432)"
MAX_PAUSE=8s write_yaml

say "every kind but changes of the schema"
load all 20 --keep-alive
writers first --repeatable-read 2 --long 1 --superuser 1 --replica-role 1 --large-objects 1
rehome -q begin
rehome switch --when-ready
sequences_ahead new old
sleep 2
finish first
judge_writers new first
say "and back"
rehome -q reverse
sequences_ahead old new
rehome -q verify

say "the schema changes: no switch before what is concerned is copied again"
writers second --ddl 1 --superuser 1
sleep 3
finish second
rehome -q switch >"$world/shared/out" 2>&1 && fail "switched in spite of a changed schema"
grep -q "copied again" "$world/shared/out" || { cat "$world/shared/out"; fail "switch does not say what is to be copied again"; }
rehome -q resume --recopy
rehome -q verify

say "a table made under the fence"
cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "after soft fence" ] || exit 0
(ssh old "PGPASSWORD='$(pg password old)' psql -q '$(pg conninfo old 5432 shop)' -v ON_ERROR_STOP=1 -v VERBOSITY=verbose -c 'CREATE TABLE made_under_the_fence (n int PRIMARY KEY); INSERT INTO made_under_the_fence VALUES (1)'" >'$world/shared/fenced' 2>&1 && echo acknowledged >>'$world/shared/fenced'; touch '$world/shared/fenced.done') </dev/null >/dev/null 2>&1 &
# The pause goes on once the statement has come to the server, or has its answer.
for i in \$(seq 40); do
  [ ! -e '$world/shared/fenced.done' ] || { touch '$world/shared/under'; break; }
  ssh old "cd / && runuser -u postgres -- psql -qAtc \"SELECT 'there' FROM pg_stat_activity WHERE query LIKE 'CREATE TABLE made_under_the_fence%'\"" | grep -q there && { touch '$world/shared/under'; break; }
  sleep 0.02
done
H
chmod 755 "$world/shared/hook"
on new sh -c "REHOME_FAULT_HOOK='$world/shared/hook' exec '$bin/rehome' --file '$yaml' switch --when-ready"
[ -e "$world/shared/under" ] || fail "nothing was tried under the fence"
for i in $(seq 100); do [ ! -e "$world/shared/fenced.done" ] || break; sleep 0.1; done
[ -e "$world/shared/fenced.done" ] || fail "whoever makes a table under the fence has no answer after 10 s"
if grep -q acknowledged "$world/shared/fenced"; then
  [ "$(sql new shop "SELECT count(*) FROM made_under_the_fence")" = 1 ] || fail "a table was acknowledged under the fence, and is not on the new side"
else
  # The server's own word, and not that of a program which could not ask it.
  grep -qE "(ERROR|FATAL): +[0-9A-Z]{5}: |server closed the connection|terminating connection" "$world/shared/fenced" || { cat "$world/shared/fenced"; fail "neither acknowledged nor refused by the server"; }
fi
say "   the server said: $(head -1 "$world/shared/fenced")"
judge_writers new first second
finish all
judge all old:new all
rehome -q complete --anyway
nothing_left new
nothing_left old fenced

say "changes of the schema blocked by choice"
make_second() { stop_world; make_world; both_sites -- --tables 3 --rows 100; DDL=block MAX_PAUSE=5s write_yaml; }
make_second
rehome -q begin
sql old shop "CREATE TABLE blocked (n int)" 2>"$world/shared/refused" && fail "the schema was changed though it is blocked"
grep -q "being moved" "$world/shared/refused" || { cat "$world/shared/refused"; fail "refused, with another error"; }
rehome -q switch
sql new shop "CREATE TABLE blocked (n int)" >/dev/null
rehome -q complete --anyway
nothing_left new
nothing_left old fenced
say "1 passed, 0 failed"
