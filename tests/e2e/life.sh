#!/usr/bin/env bash
# Every life of a migration, under load: begin and cancel; begin, verify, switch, reverse, reverse back, complete. The judge
# looks at what the clients were told after each, and pg_dump and rsync at both sides.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

same_schema() {
  # Sorted, since rows come in the order in which they were written. The newest pg_dump of this machine reads both sides; sequences run ahead by their margin, and our own objects are not the shop's.
  local host
  for host in old new; do
    on $host runuser -u postgres -- pg_dump -h /run/postgresql -d shop "$@" --exclude-schema=rehome --no-publications --no-subscriptions |
      grep -vE "^SELECT pg_catalog.setval|rehome_|^-- Dumped|^.(un)?restrict|REPLICA IDENTITY" | grep -v '^$' | LC_ALL=C sort >"$world/shared/dump.$host"
  done
  diff "$world/shared/dump.old" "$world/shared/dump.new" >"$world/shared/dump.diff" || { head -40 "$world/shared/dump.diff"; fail "pg_dump of both sides differs"; }
}
same_files() {
  local out
  out=$(on "$1" rsync -aHAXc --delete -ni /srv/shop/ "root@$2:/srv/shop/")
  [ -z "$out" ] || { printf '%s\n' "$out" | head; fail "rsync finds differences"; }
}
make_world
both_sites -- --tables 40 --rows 5000 --large-objects 2 --unlogged --keyless
write_yaml

say "begin and cancel"
load cancelled 40 --keep-alive
rehome -q begin
rehome -q cancel
sleep 1
finish cancelled
judge cancelled old cancelled
nothing_left old
nothing_left new
[ "$(sql new postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'")" = 0 ] || fail "the target's database is left after cancel"
on new sh -c 'rm -rf /srv/shop/*'

say "begin, verify, switch"
load all 40 --keep-alive
rehome -q begin
# What the followers use leads to a superuser of the other server: it is for the server's account alone.
directory=$(on new sh -c 'echo /var/lib/rehome-pg-*')
on new runuser -u nobody -- psql -h "$directory" -U postgres -d shop -qAtc 'SELECT current_user' >"$world/shared/nobody" 2>&1 && fail "nobody gets through $directory"
grep -q "Permission denied" "$world/shared/nobody" || { cat "$world/shared/nobody"; fail "nobody was refused by something else than $directory"; }
rehome -q verify
moves() { # NAME FROM:TO COMMAND: with the verdict on it, while clients go on
  probe "$1"
  sleep 0.5
  rehome -q "$3"
  sleep 1
  finish "$1"
  judge "$1" "$2" all -- cancelled
}
moves there old:new switch
say "reverse"
moves back new:old reverse
say "and switched once more"
moves again old:new switch
rehome status
finish all
cat "$world/shared/all.json"
judge all new all -- cancelled
sleep 1
rehome -q verify
same_files new old
same_schema --exclude-table-data=public.sessions
rehome -q complete --anyway
nothing_left new
nothing_left old fenced
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" 2>"$world/shared/refused" && fail "the old side takes writes after complete"
grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; fail "the old side refuses with another error"; }
rehome -q complete --unfence-source
nothing_left old
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null
rehome report --out "$world/shared/report.html"
say "1 passed, 0 failed"
