#!/usr/bin/env bash
# The shop and what stands around it, in a host of hosts.sh that has a server of pg.sh.
#
#   site.sh account WORLD HOST PGPORT               the shop's password file; for a side whose database comes by a move
#   site.sh database WORLD HOST PGPORT [OPTION...]  account, role and database `shop`; OPTIONs go to rehome-shop --init
#   site.sh shop WORLD HOST [LISTEN]                starts the shop (127.0.0.1:8000), now and at every boot
#   site.sh nginx WORLD HOST [SERVER]               nginx on port 80 in front of SERVER (127.0.0.1:8000), likewise
#   site.sh health WORLD HOST                       GET /health from admin through that host's nginx; waits up to 10 s
#   site.sh conninfo WORLD HOST PGPORT              the application's own, for use inside any of the three places
#
# In the host: files in /srv/shop, pid in /run/shop/pid, /var/lib/shop/{start,stop} start and stop it. It runs as
# www-data. The role's password is the same in all of a world, because a move takes it along.
set -euo pipefail
support=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=${REHOME_BIN:-$(cd "$support/../.." && pwd)/build/dev/bin}
die() { echo "site.sh: $*" >&2; exit 1; }
[ $# -ge 3 ] || { sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | grep -v '^set'; exit 2; }
command=$1 world=$2 host=$3
shift 3
enter() { "$support/hosts.sh" enter "$world" "$host" "$@"; }
psql() { "$support/pg.sh" psql "$world" "$host" "$port" "$@"; }
address() { case $host in old) echo 10.77.0.1 ;; new) echo 10.77.0.2 ;; *) die "no site $host" ;; esac; }

account() {
  [ -f "$world/shop-password" ] || (umask 077; head -c 12 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$world/shop-password")
  enter bash -s <<E
set -e
install -d -o www-data -g www-data -m 755 /var/lib/shop /srv/shop
(umask 077; echo '*:*:*:shop:$(cat "$world/shop-password")' >/var/lib/shop/pgpass)
chown www-data /var/lib/shop/pgpass
echo 'host=127.0.0.1 port=$port user=shop dbname=shop passfile=/var/lib/shop/pgpass connect_timeout=3' >/var/lib/shop/conninfo
E
}

case $command in
  account) port=$1; account ;;
  database)
    port=$1
    shift
    account
    psql >/dev/null <<E
CREATE ROLE shop LOGIN PASSWORD '$(cat "$world/shop-password")';
CREATE DATABASE shop OWNER shop;
E
    enter runuser -u www-data -- "$bin/rehome-shop" --init --db "$(enter cat /var/lib/shop/conninfo)" "$@" ;;
  shop)
    listen=${1:-127.0.0.1:8000}
    enter bash -s <<E
set -e
[ -e /var/lib/shop/side ] || echo source >/var/lib/shop/side
cat >/var/lib/shop/start <<'S'
#!/bin/sh
install -d -o www-data -g www-data /run/shop
[ ! -e /run/shop/pid ] || ! kill -0 "\$(cat /run/shop/pid)" 2>/dev/null || exit 0
rm -f /run/shop/pid
setsid runuser -u www-data -- "$bin/rehome-shop" --listen $listen --db "\$(cat /var/lib/shop/conninfo)" \\
  --files /srv/shop --threads 16 --pid-file /run/shop/pid \\
  --probe-side \$(cat /var/lib/shop/side) --probe-log /var/log/shop-probes </dev/null >>/var/log/shop.log 2>&1 &
for i in \$(seq 200); do [ ! -s /run/shop/pid ] || exit 0; sleep 0.05; done
echo "the shop did not start: \$(tail -1 /var/log/shop.log)" >&2
exit 1
S
cat >/var/lib/shop/stop <<'S'
#!/bin/sh
pid=\$(cat /run/shop/pid 2>/dev/null) || exit 0
kill "\$pid" 2>/dev/null
for i in \$(seq 400); do kill -0 "\$pid" 2>/dev/null || exit 0; sleep 0.05; done
kill -9 "\$pid"
S
chmod 755 /var/lib/shop/start /var/lib/shop/stop
ln -sf /var/lib/shop/start /var/lib/boot.d/50-shop
/var/lib/shop/start
E
    ;;
  nginx)
    server=${1:-127.0.0.1:8000}
    enter bash -s <<E
set -e
cat >/etc/nginx/nginx.conf <<'N'
user www-data;
worker_processes 1;
pid /run/nginx.pid;
error_log /var/log/nginx/error.log notice;
events { worker_connections 4096; }
http {
  access_log /var/log/nginx/access.log;
  include /etc/nginx/mime.types;
  include /etc/nginx/sites-enabled/*;
}
N
cat >/etc/nginx/sites-enabled/shop <<'N'
upstream shop {
    server $server;
    keepalive 16;
}
map \$http_upgrade \$shop_connection { default upgrade; "" ""; }
server {
    listen 80;
    client_max_body_size 0;
    location / {
        proxy_pass http://shop;
        proxy_http_version 1.1;
        proxy_set_header Host \$host;
        proxy_set_header Upgrade \$http_upgrade;
        proxy_set_header Connection \$shop_connection;
        proxy_read_timeout 300s;
    }
}
N
printf '#!/bin/sh\nexec nginx\n' >/var/lib/boot.d/60-nginx
chmod 755 /var/lib/boot.d/60-nginx
if [ -s /run/nginx.pid ]; then nginx -s reload; else nginx; fi
E
    ;;
  health)
    for _ in $(seq 100); do
      # Not curl's own retries: it would take a 503 for an answer, or the connection for the service.
      if "$support/hosts.sh" enter "$world" admin curl -fsS -m 2 "http://$(address)/health" 2>/dev/null; then exit 0; fi
      sleep 0.1
    done
    die "$host is not healthy: $("$support/hosts.sh" enter "$world" admin curl -sS -m 2 "http://$(address)/health" 2>&1)" ;;
  conninfo) echo "host=$(address) port=$1 user=shop dbname=shop password=$(cat "$world/shop-password")" ;;
  *) die "no command $command" ;;
esac
