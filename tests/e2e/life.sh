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
clean() { # verdict file: nothing lost, doubled, failed, both accepting
  python3 - "$1" <<'P'
import json, sys
v = json.load(open(sys.argv[1]))
bad = {k: v[k] for k in ("lost", "doubled", "failed", "both_accepting") if v.get(k)}
sys.exit(f"{sys.argv[1]}: {bad}" if bad else 0)
P
}
nothing_left() { # HOST
  local host=$1
  [ "$(sql $host postgres "SELECT count(*) FROM pg_replication_slots")" = 0 ] || fail "slots are left on $host"
  [ "$(sql $host postgres "SELECT count(*) FROM pg_subscription")" = 0 ] || fail "subscriptions are left on $host"
  on $host grep -q gate /etc/nginx/sites-enabled/shop && fail "nginx still goes to a gate on $host"
  return 0
}

make_world
both_sites -- --tables 40 --rows 5000 --large-objects 2 --unlogged --keyless
write_yaml

say "begin and cancel"
load cancelled 40 --keep-alive
rehome -q begin
rehome -q cancel
sleep 1
finish "$cancelled_pid"
judge cancelled old source cancelled
clean "$world/shared/cancelled.verdict"
nothing_left old
nothing_left new
[ "$(sql new postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'")" = 0 ] || fail "the target's database is left after cancel"
[ "$(sql old shop "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'rehome%'")" = 0 ] || fail "triggers are left after cancel"
on old test ! -e /var/lib/rehome/shop || fail "state is left after cancel"
on new sh -c 'rm -rf /srv/shop/*'

say "begin, verify, switch"
load all 40 --keep-alive
probe first
rehome -q begin
# What the followers use leads to a superuser of the other server: it is for the server's account alone.
directory=$(on new sh -c 'echo /var/lib/rehome-pg-*')
on new runuser -u nobody -- psql -h "$directory" -U postgres -d shop -qAtc 'SELECT current_user' >"$world/shared/nobody" 2>&1 && fail "nobody gets through $directory"
grep -q "Permission denied" "$world/shared/nobody" || { cat "$world/shared/nobody"; fail "nobody was refused by something else than $directory"; }
rehome -q verify
rehome -q switch
sleep 1
say "reverse"
rehome -q reverse
sleep 1
say "and switched once more"
rehome -q switch
sleep 1
rehome status
finish "$first_pid" || true
finish "$all_pid"
cat "$world/shared/all.json"
mv "$world/shared/first.probes" "$world/shared/probes.kept"
judge all new source cancelled all
clean "$world/shared/all.verdict"
sleep 1
rehome -q verify
same_files new old
same_schema --exclude-table-data=public.sessions
rehome -q complete --anyway
nothing_left new
nothing_left old
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" 2>"$world/shared/refused" && fail "the old side takes writes after complete"
grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; fail "the old side refuses with another error"; }
rehome -q complete --unfence-source
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null
rehome report --out "$world/shared/report.html"
say "1 passed, 0 failed"
