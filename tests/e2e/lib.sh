# What the end-to-end tests and the demo share: a world with an old and a new server, a shop on the old one, clients, and the
# judge. Source it; every function works on the world in $world. Needs root.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${REHOME_BIN:-$repo/build/dev/bin}
support=$repo/tests/support
world=${world:-}

on() { local host=$1; shift; "$support/hosts.sh" enter "$world" "$host" "$@"; }

make_world() {
  world=$(mktemp -d "${TMPDIR:-/tmp}/rw.XXXXXX")
  trap 'status=$?; stop_world; exit $status' EXIT
  trap 'exit 130' INT TERM
  "$support/hosts.sh" up "$world"
}

stop_world() {
  [ -n "$world" ] && [ -e "$world" ] || return 0
  if [ -n "${KEEP_WORLD:-}" ]; then echo "world kept: $world" >&2; return 0; fi
  "$support/hosts.sh" down "$world"
}

# pg HOST [MAJOR]: a server on port 5432, socket in /var/lib/pg, started again by a reboot.
pg() {
  local host=$1 major=${2:-15}
  on "$host" "$support/pg.sh" init "$major" /var/lib/pg 5432 "${@:3}"
  on "$host" "$support/pg.sh" start "$major" /var/lib/pg
  on "$host" sh -c "mkdir -p /var/lib/boot.d; printf '#!/bin/sh\nrm -f /var/lib/pg/data/postmaster.pid\nexec %s start %s /var/lib/pg\n' '$support/pg.sh' $major >/var/lib/boot.d/10-postgresql; chmod 755 /var/lib/boot.d/10-postgresql"
}

sql() { local host=$1 database=$2; shift 2; on "$host" psql -X -qAt -v ON_ERROR_STOP=1 -h /var/lib/pg -U postgres -d "$database" -c "$*"; }

# shop HOST: the service, as a boot script starts it too.
shop_start() {
  local host=$1
  on "$host" sh -c "mkdir -p /srv/shop/files; cat >/var/lib/boot.d/50-shop <<'S'
#!/bin/sh
# As a unit with ConditionPathExists=!not-serving would: the old side does not start again after a switch.
[ -e /var/lib/rehome/shop/source/not-serving ] && exit 0
[ -e /var/lib/rehome/shop/target/not-serving ] && exit 0
exec setsid $bin/rehome-shop --listen 127.0.0.1:8000 --db 'host=127.0.0.1 port=5432 user=shop password=shop-secret dbname=shop' --files /srv/shop/files --pid-file /run/shop.pid </dev/null >>/var/log/shop.log 2>&1 &
S
chmod 755 /var/lib/boot.d/50-shop; /var/lib/boot.d/50-shop"
  for _ in $(seq 100); do on "$host" sh -c 'exec 3<>/dev/tcp/127.0.0.1/8000' 2>/dev/null || on "$host" curl -sf -o /dev/null http://127.0.0.1:8000/health && return 0; sleep 0.05; done
  echo "the shop on $host does not answer" >&2
  on "$host" tail -5 /var/log/shop.log >&2
  return 1
}

make_shop() { # options of rehome-shop --init
  sql old postgres "CREATE ROLE shop LOGIN PASSWORD 'shop-secret'"
  sql old postgres "CREATE DATABASE shop OWNER shop"
  on old "$bin/rehome-shop" --init --db 'host=127.0.0.1 port=5432 user=shop password=shop-secret dbname=shop' "$@"
  shop_start old
}

proxy() { # nginx on HOST, port 80
  local host=$1
  on "$host" sh -c "mkdir -p /etc/nginx/sites-enabled /var/log/nginx /var/lib/nginx; rm -f /etc/nginx/sites-enabled/*
cat >/etc/nginx/nginx.conf <<'C'
worker_processes 1;
pid /run/nginx.pid;
error_log /var/log/nginx/error.log;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 100000; include /etc/nginx/sites-enabled/*; }
C
cat >/etc/nginx/sites-enabled/shop <<'C'
# The shop's front door.
upstream shop {
    server 127.0.0.1:8000;
    keepalive 16;
}
server {
    listen 80;
    location / {
        proxy_pass http://shop;
        proxy_http_version 1.1;
        proxy_set_header Connection \"\";
        proxy_read_timeout 60s;
    }
}
C
printf '#!/bin/sh\nexec nginx\n' >/var/lib/boot.d/60-nginx; chmod 755 /var/lib/boot.d/60-nginx; nginx"
}

# rehome.yaml as the person on the new server writes it. STORES, SERVICES and TRAFFIC may be replaced.
write_yaml() {
  cat >"$world/rehome.yaml" <<EOF_YAML
name: shop
source: {ssh: root@old, boot: "directory:/var/lib/boot.d"}
target: {local: true, boot: "directory:/var/lib/boot.d"}
link: {from: target, to: root@old}
stores:
  - name: db
    postgres: {databases: [shop], host: /var/lib/pg, os_user: postgres, ddl: ${DDL:-refuse}}
${FILES_STORE-  - name: receipts
    files: {path: /srv/shop/files\}}
services:
  - name: shop
    command:
      start: [/var/lib/boot.d/50-shop]
      pid_file: /run/shop.pid
${TRAFFIC-traffic:
  - name: web
    nginx: {files: [/etc/nginx/sites-enabled/shop], application: "127.0.0.1:8000", gate: "127.0.0.1:8001", front: "http://127.0.0.1/health"\}}
checks:
  - {name: health, http: "http://127.0.0.1:8000/health", status: 200, canary: read}
max_pause: ${MAX_PAUSE:-3s}
drain_deadline: ${DRAIN:-5s}
limits: {jobs: 2}
EOF_YAML
  cp "$world/rehome.yaml" "$world/new/srv/rehome.yaml"
}

rehome() { on new "$bin/rehome" --file /srv/rehome.yaml "$@"; }

load_start() { # HOST RATE [options]
  on "$1" "$bin/rehome-load" --url-address "${LOAD_TO:-10.77.0.1:80}" --rate "$2" --clients 16 --history "$world/history.$1" --retry-after-ms 200 "${@:3}" >"$world/load.$1.json" 2>"$world/load.$1.err" &
  load_pid=$!
}
load_stop() {
  # The namespace's entry passes no signal on: the load itself is asked by the pid that it has here.
  pkill_children "$load_pid" TERM
  wait "$load_pid" || { cat "$world"/load.*.err >&2; return 1; }
}
pkill_children() { local c; for c in $(pgrep -P "$1"); do kill -s "$2" "$c" 2>/dev/null || true; done; kill -s "$2" "$1" 2>/dev/null || true; }

say() { printf '%s\n' "$*"; }
passed=0
ok() { passed=$((passed + 1)); say "ok $passed - $*"; }
fail() { say "not ok - $*"; exit 1; }
