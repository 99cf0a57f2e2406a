#!/usr/bin/env bash
# Every life of a migration, under load: begin and cancel; begin, verify, switch, reverse, reverse back, complete. The judge
# looks at what the clients were told after each, and pg_dump and rsync at both sides.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

same_schema() {
  # Sorted, since rows come in the order in which they were written. The newest pg_dump of this machine reads both sides; sequences run ahead by their margin, and our own objects are not the shop's.
  local host
  for host in old new; do
    on $host runuser -u postgres -- pg_dump -h /run/postgresql -d shop "$@" --exclude-schema=rehome --no-publications --no-subscriptions |
      grep -vE "^SELECT pg_catalog.setval|rehome_|^-- Dumped|^.(un)?restrict|REPLICA IDENTITY|^REVOKE ALL ON FUNCTION pg_catalog.lo|^-- Name: FUNCTION lo|^--$" | grep -v '^$' | LC_ALL=C sort >"$world/shared/dump.$host"
  done
  diff "$world/shared/dump.old" "$world/shared/dump.new" >"$world/shared/dump.diff" || { head -40 "$world/shared/dump.diff"; fail "pg_dump of both sides differs"; }
}
same_files() {
  local out
  out=$(on "$1" rsync -aHAXc --delete -ni /srv/shop/ "root@$2:/srv/shop/")
  [ -z "$out" ] || { printf '%s\n' "$out" | head; fail "rsync finds differences"; }
}
# What a run changes outside its own schema, and puts back.
settings() { # HOST
  sql "$1" postgres "SELECT name, setting FROM pg_settings ORDER BY 1" | grep -v '^transaction_'
  on "$1" cat /var/lib/postgresql/15/main/postgresql.auto.conf
}
identities() { sql "$1" shop "SELECT oid::regclass, relreplident FROM pg_class WHERE relkind IN ('r', 'p') AND oid >= 16384 AND relnamespace::regnamespace::text <> 'rehome' ORDER BY oid::regclass::text COLLATE \"C\""; } # HOST
as_before() { # HOST WITH-IDENTITIES-OF...
  local h
  settings "$1" >"$world/shared/now"
  diff "$world/shared/settings.$1" "$world/shared/now" || fail "the settings of $1's server are not as before begin"
  for h in old "${@:2}"; do
    identities "$h" >"$world/shared/now"
    diff "$world/shared/identities" "$world/shared/now" || fail "the replica identities of $h are not as before begin"
  done
}
reloaded() { # TIMES: nginx at each host, so far
  local h n
  for h in old new; do
    n=$(on $h grep -c "(SIGHUP) received" /var/log/nginx/error.log) || true
    [ "$n" = "$1" ] || fail "nginx of $h was reloaded $n times and not $1"
  done
}
# As a tool does that installs configurations: its own file again, and a reload.
past_the_gate() { # HOST COMMAND, which is refused until resume has led it through again
  cp "$world/shared/proxy.$1" "$(proxy_of $1)"
  on $1 nginx -s reload
  rehome -q "$2" >"$world/shared/astray" 2>&1 && fail "$2 went ahead with a proxy that leads past the gate"
  grep -q "sites-enabled/shop was changed since begin" "$world/shared/astray" || { cat "$world/shared/astray"; fail "$2 was refused for another reason"; }
  rehome -q resume
  cmp -s "$world/shared/proxy.$1" "$(proxy_of $1)" && fail "resume did not lead the proxy of $1 through its gate again"
  true
}
make_world
both_sites -- --tables 40 --rows 5000 --large-objects 2 --unlogged --keyless
write_yaml
for h in old new; do settings $h >"$world/shared/settings.$h"; done
identities old >"$world/shared/identities"
grep -q "|d" "$world/shared/identities" || fail "no replica identities were read"

say "begin and cancel"
load cancelled 40 --keep-alive
rehome -q begin
reloaded 1
[ "$(settings old)" != "$(cat "$world/shared/settings.old")" ] && [ "$(identities old)" != "$(cat "$world/shared/identities")" ] || fail "begin changes nothing that can be put back"
rehome -q cancel
reloaded 2
for h in old new; do as_before $h; done
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
  rehome -q --json "$3" >"$world/shared/$1.out"
  python3 - "$world/shared/$1.out" "$3" <<'P' || fail "the pause of $3"
import json, sys
pause = [e["pause_ms"] for e in map(json.loads, open(sys.argv[1])) if e.get("kind") == "result"][-1]
print(f"   the pause of {sys.argv[2]}: {pause:.0f} ms")
sys.exit(not 0 < pause <= 2000)
P
  sleep 1
  finish "$1"
  judge "$1" "$2" all -- cancelled
}
past_the_gate old switch
moves there old:new switch
say "reverse"
past_the_gate new reverse
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
reloaded 5
rehome -q complete --anyway
reloaded 6
for h in old new; do as_before $h new; done
nothing_left new
nothing_left old fenced
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" 2>"$world/shared/refused" && fail "the old side takes writes after complete"
grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; fail "the old side refuses with another error"; }
rehome -q complete --unfence-source
nothing_left old
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null
rehome report --out "$world/shared/report.html"
say "1 passed, 0 failed"
