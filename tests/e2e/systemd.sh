#!/usr/bin/env bash
# Both servers with systemd as their first process, and real reboots: while following, inside the pause, and in the fallback window.
# After each the right side serves, the wrong one refuses and its unit does not start; and complete leaves nothing. Under load.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# What a distribution's packages would have installed, in place of the world's boot scripts.
install_units() { # HOST
  on "$1" bash -s <<'E'
set -e
mountpoint -q /etc/systemd   # the host's own, and not this machine's
unit() { cat >"/etc/systemd/system/$1"; }
unit postgresql.service <<'U'
[Service]
Type=forking
PIDFile=/var/lib/postgresql/15/main/postmaster.pid
ExecStart=/var/lib/boot.d/20-postgresql-15-5432
KillMode=mixed
KillSignal=SIGINT
[Install]
WantedBy=multi-user.target
U
unit shop.service <<'U'
[Unit]
After=postgresql.service
[Service]
Type=forking
PIDFile=/run/shop/pid
ExecStart=/var/lib/shop/start
Restart=on-failure
RestartSec=1
[Install]
WantedBy=multi-user.target
U
unit nginx.service <<'U'
[Service]
Type=forking
PIDFile=/run/nginx.pid
ExecStart=/usr/sbin/nginx
KillMode=mixed
[Install]
WantedBy=multi-user.target
U
[ ! -s /run/shop/pid ] || /var/lib/shop/stop
kill "$(cat /run/nginx.pid)"
while [ -e /run/nginx.pid ]; do sleep 0.02; done
E
  pg stop "$1" 15 5432
  on "$1" bash -c 'systemctl daemon-reload; systemctl -q enable postgresql.service shop.service nginx.service; systemctl start postgresql.service nginx.service'
}
systemd_of() { on "$1" systemctl show --value -p "$2" "$3"; }
booted() { # HOST: up again, and its agent ready before what serves
  local host=$1 unit agent
  # A unit that the agent starts in this moment is no trouble; one that failed is.
  unit=$(on "$host" systemctl is-system-running || true)
  [ "$unit" != degraded ] || { on "$host" systemctl --failed --no-pager; fail "units failed when $host booted"; }
  agent=$(on "$host" sh -c 'cd /etc/systemd/system; ls rehome-shop-*.service')
  [ "$(systemd_of "$host" ActiveState "$agent")" = active ] || fail "the agent's unit is not up on $host"
  for unit in nginx.service shop.service; do
    [ "$(systemd_of "$host" ActiveState $unit)" = active ] || continue
    [ "$(systemd_of "$host" ExecMainStartTimestampMonotonic $unit)" -ge "$(systemd_of "$host" ActiveEnterTimestampMonotonic "$agent")" ] ||
      fail "$unit started before the agent was ready on $host"
  done
}
serves() { # HOST: it, and not the other one
  local host=$1 other=old
  [ "$host" = new ] || other=new
  site health "$host" >/dev/null
  site health "$other" >/dev/null   # forwarded through the link
  [ "$(systemd_of "$host" ActiveState shop.service)" = active ] || fail "shop.service does not run on $host, which serves"
  if sql "$other" shop "INSERT INTO probe(side, at_us) VALUES ('$other', 1)" 2>"$world/shared/refused"; then fail "$other takes writes while $host serves"; fi
  grep -q "does not serve" "$world/shared/refused" || { cat "$world/shared/refused"; fail "$other refuses with another error"; }
}
not_started() { # HOST: its unit does not start, not even by hand
  on "$1" systemctl start shop.service || true
  [ "$(systemd_of "$1" ActiveState shop.service)" = inactive ] || fail "shop.service runs on $1, which does not serve"
  [ "$(systemd_of "$1" ConditionResult shop.service)" = no ] || fail "another reason than the start condition on $1"
}
settled() { # HOST: waits until it serves and both agents are at rest
  local i
  for i in $(seq 80); do
    rehome --json status 2>/dev/null | python3 -c '
import json, sys
s = json.loads(sys.stdin.readline())
for side in ("source", "target"):
    a = s[side]
    if "missing" in a or not a["link"].get("up") or a["attempt"].get("phase") not in ("serving", "closed") or not a["attempt"].get("settled", True): sys.exit(1)
    if (a.get("gate") or {}).get("state", "OPEN_LOCAL") not in ("OPEN_LOCAL", "OPEN_PEER"): sys.exit(1)
if any(not v.get("following") for v in s["stores"].values()): sys.exit(1)
sys.exit(s["serves"] != {"old": "source", "new": "target"}[sys.argv[1]])' "$1" && return
    sleep 0.25
  done
  rehome status || true
  for h in old new; do on $h sh -c 'tail -15 /var/lib/rehome/shop/*/log/agent.log' || true; done
  fail "$1 does not serve, or something does not follow, after 20 s"
}
reboot() { # HOST
  say "   $1 reboots"
  hosts shutdown "$world" "$1"
  hosts power-on "$world" "$1"
  booted "$1"
}

make_world --systemd
both_sites -- --tables 5 --rows 500
for h in old new; do install_units $h; done
on old systemctl start shop.service
site health old >/dev/null
MAX_PAUSE=8s write_yaml
sed -i -e 's/, boot: "directory:[^"]*"//' -e 's/^  - name: shop$/  - {name: shop, systemd: shop.service}/' -e '/^    command: {start/d' -e '/^    warm: true/d' "$yaml"
say "a hardened unit that would keep its view of the closed tree"
on new sh -c 'mkdir -p /etc/systemd/system/shop.service.d; printf "[Service]\nProtectSystem=strict\nReadWritePaths=/srv/shop\n" >/etc/systemd/system/shop.service.d/hard.conf; systemctl daemon-reload'
rehome check >"$world/shared/hard" 2>&1 && fail "check says nothing of it"
grep -q "ReadWritePaths /srv/shop meets /srv/shop" "$world/shared/hard" || { cat "$world/shared/hard"; fail "check says something else"; }
on new sh -c 'rm -r /etc/systemd/system/shop.service.d; systemctl daemon-reload'
rehome -q check
say "an account that may not touch units"
on old bash -c 'set -e
  cp /etc/passwd /run/passwd; echo "plain:x:4242:4242::/var/lib/plain:/bin/bash" >>/run/passwd; mount --bind /run/passwd /etc/passwd
  mkdir -p /var/lib/plain/.ssh; cp /root/.ssh/authorized_keys /var/lib/plain/.ssh/; chown -R 4242:4242 /var/lib/plain; chmod 700 /var/lib/plain/.ssh'
sed 's/root@old/plain@old/' "$yaml" >"$world/shared/plain.yaml"
(yaml=$world/shared/plain.yaml; rehome --json check) >"$world/shared/plain" 2>&1 && fail "check says nothing of it"
for id in service.rights agent.supervisor; do
  grep -q "\"id\":\"$id\",.*\"message\":\"this account cannot write into /etc/systemd/system" "$world/shared/plain" || { cat "$world/shared/plain"; fail "check does not say $id"; }
done
sed 's/^source: {/source: {boot: cron, /' "$yaml" >"$world/shared/cron.yaml"
(yaml=$world/shared/cron.yaml; rehome --json check) >"$world/shared/cron" 2>&1 || true
grep -q '"id":"agent.order"' "$world/shared/cron" || { cat "$world/shared/cron"; fail "check does not say that the units start before the agent"; }
on old bash -c 'umount /etc/passwd; rm -r /var/lib/plain'
load all 25 --keep-alive
probe first

say "following"
rehome -q begin
reboot old
settled old
serves old
reboot new
settled old
serves old

say "inside the pause"
cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "after marker" ] && [ ! -e '$world/shared/asks' ] || exit 0
touch '$world/shared/asks'
i=0
while [ ! -e '$world/shared/done' ] && [ \$i -lt 1000 ]; do sleep 0.01; i=\$((i+1)); done
H
chmod 755 "$world/shared/hook"
started=$SECONDS
(
  for _ in $(seq 3000); do [ -e "$world/shared/asks" ] && break; sleep 0.01; done
  hosts power-cut "$world" old
  touch "$world/shared/done"
  sleep 1
  hosts power-on "$world" old
  say "   old is on again after $((SECONDS - started)) s"
) &
breaker=$!
status=0
REHOME_FAULT_HOOK=$world/shared/hook rehome -q switch >"$world/shared/out" 2>&1 || status=$?
say "   after $((SECONDS - started)) s the switch ended with $status"
wait $breaker
[ -e "$world/shared/asks" ] || { cat "$world/shared/out"; fail "the switch did not come to its pause"; }
[ $status = 10 ] || [ $status = 16 ] || { cat "$world/shared/out"; fail "a switch whose source lost its power ended with $status"; }
booted old
settled old
say "   old serves again after $((SECONDS - started)) s"
rehome -q resume
settled old
serves old

say "switched"
rehome -q switch
settled new
serves new
not_started old
reboot old
not_started old
settled new
serves new
reboot new
settled new
serves new
not_started old
finish first
MAY_FAIL=1 judge first old:new all

say "reversed, since the application crashes on new whenever it is started"
on new sh -c 'cat >/etc/systemd/system/shop.service.d/60-broken.conf; systemctl daemon-reload; kill -9 "$(cat /run/shop/pid)"' <<'U'
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=
ExecStart=/bin/false
Restart=always
RestartSec=100ms
U
sleep 1
rehome -q reverse
on new sh -c 'rm /etc/systemd/system/shop.service.d/60-broken.conf; systemctl daemon-reload'
settled old
serves old
not_started new
rehome -q switch
settled new
serves new
finish all
MAY_FAIL=1 judge all old:new all
sleep 0.5
rehome -q verify

say "complete"
rehome -q complete --anyway
[ -z "$(on new sh -c 'ls -d /etc/systemd/system/*rehome* /etc/systemd/system/*/*rehome* /var/lib/rehome/shop 2>/dev/null')" ] || fail "something is left on new"
on new systemctl is-active -q shop.service || fail "the service does not run after complete"
site health new >/dev/null
hosts shutdown "$world" old
hosts power-on "$world" old
not_started old
rehome -q complete --unfence-source
left=$(on old sh -c 'ls -d /etc/systemd/system/*rehome* /etc/systemd/system/*/*rehome* /var/lib/rehome/shop 2>/dev/null' || true)
[ -z "$left" ] || fail "left on old: $left"
on old systemctl start shop.service
[ "$(systemd_of old ActiveState shop.service)" = active ] || fail "the old side's unit does not start after --unfence-source"
sql old shop "INSERT INTO probe(side, at_us) VALUES ('old', 1)" >/dev/null
for h in old new; do
  left=$(on $h systemctl list-units --all --no-legend 'rehome*')
  [ -z "$left" ] || fail "units of rehome are known on $h: $left"
  [ -z "$(on $h sh -c 'for p in /proc/[0-9]*; do tr "\0" " " <$p/cmdline 2>/dev/null | grep -E "^[^ ]*/rehome-(agent|gate)-"; done')" ] || fail "processes of rehome are left on $h"
done
say "nothing is left"
