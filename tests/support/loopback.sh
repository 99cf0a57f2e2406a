# For who is not root: the two servers of lib.sh are two directories of this account on loopback. Source it after lib.sh; what is not
# written here is as there. Old and new have a PostgreSQL, an nginx and a shop each; rehome sees two sites of one machine.
pg_bin=/usr/lib/postgresql/15/bin
PATH=$PATH:/usr/sbin:/sbin
files_at() { echo "$world/$1/files"; }

make_world() {
  world=$(mktemp -d /tmp/rehome-loopback.XXXXXX)
  trap 'status=$?; stop_world; exit $status' EXIT
  trap 'exit 130' INT TERM
  mkdir -p "$world/shared" "$world/boot"
  local ports host
  # Below the range of outgoing connections, one of which could take a port before its server does.
  read -r -a ports <<<"$(python3 -c '
import random, socket
found = set()
while len(found) < 6:
    s, p = socket.socket(), random.randrange(10000, 30000)
    try: s.bind(("127.0.0.1", p)); found.add(p)
    except OSError: pass
    s.close()
print(*found)')"
  front_old=${ports[0]} gate_old=${ports[1]} shop_old=${ports[2]} front_new=${ports[3]} gate_new=${ports[4]} shop_new=${ports[5]}
  LOAD_TO=127.0.0.1:$front_old
  for host in old new; do mkdir -p "$world/$host"/{pg,nginx,files,run}; done
}
stop_world() {
  local p q host side
  for p in "${!background[@]}"; do
    ! lives "$p" || for q in $(descendants "$p"); do kill "$q" 2>/dev/null || true; done
  done
  background=() running=()
  [ -n "$world" ] || return 0
  # Where a run was not brought to its end.
  for side in source target; do
    for p in $(pgrep -u "$(id -u)" -f -- "--state $world/state/$side( |\$)"); do kill -9 "$p" 2>/dev/null || true; done
  done
  for host in old new; do
    [ ! -x "$world/$host/stop" ] || "$world/$host/stop" || true
    [ ! -s "$world/$host/nginx/pid" ] || kill "$(cat "$world/$host/nginx/pid")" 2>/dev/null || true
    [ ! -e "$world/$host/pg/data/postmaster.pid" ] || "$pg_bin/pg_ctl" -D "$world/$host/pg/data" -m immediate -s stop || true
  done
  rm -rf "$world"
  world=
}

is_on() { true; }
proxy_of() { echo "$world/$1/nginx/site.conf"; }
no_files_left() { # HOST: and no processes
  local side=$world/state/source
  [ "$1" = old ] || side=$world/state/target
  [ ! -e "$side" ] || fail "state is left of $1"
  ! pgrep -u "$(id -u)" -f -- "--state $side( |\$)" || fail "processes are left of $1"
}
on() { shift; env XDG_STATE_HOME="$world/xdg" "$@"; }
pg() { local what=$1 host=$2; shift 3; "$pg_bin/$what" -X -h "$world/$host/pg" -U postgres "$@"; }
site() { # conninfo HOST
  echo "host=$world/$2/pg user=shop dbname=shop connect_timeout=3"
}

start_pg() { # HOST
  local dir=$world/$1/pg
  "$pg_bin/initdb" -D "$dir/data" -U postgres -A trust -E UTF8 --locale=C.UTF-8 >/dev/null
  cat >>"$dir/data/postgresql.conf" <<CONF
listen_addresses = ''
unix_socket_directories = '$dir'
wal_level = logical
max_replication_slots = 20
max_wal_senders = 20
max_worker_processes = 20
shared_buffers = 64MB
CONF
  "$pg_bin/pg_ctl" -D "$dir/data" -l "$dir/log" -w -s start
}
start_nginx() { # HOST FRONT SHOP
  local dir=$world/$1/nginx
  cat >"$dir/nginx.conf" <<CONF
worker_processes 1;
pid $dir/pid;
error_log $dir/error.log;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path $dir/body; proxy_temp_path $dir/proxy; fastcgi_temp_path $dir/fastcgi; uwsgi_temp_path $dir/uwsgi; scgi_temp_path $dir/scgi;
  include $dir/site.conf;
}
CONF
  cat >"$dir/site.conf" <<CONF
upstream shop {
    server 127.0.0.1:$3;
    keepalive 16;
}
server {
    listen 127.0.0.1:$2;
    client_max_body_size 0;
    location / {
        proxy_pass http://shop;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
    }
}
CONF
  nginx -e "$dir/error.log" -c "$dir/nginx.conf"
}
start_and_stop() { # HOST SHOP: what starts and ends its shop
  local dir=$world/$1
  cat >"$dir/start" <<SH
#!/bin/sh
[ ! -e '$dir/run/pid' ] || grep -qs '^State:[[:space:]]*[ZX]' "/proc/\$(cat '$dir/run/pid')/status" || ! kill -0 "\$(cat '$dir/run/pid')" 2>/dev/null || exit 0
rm -f '$dir/run/pid'
setsid '$bin/rehome-shop' --listen 127.0.0.1:$2 --db '$(site conninfo "$1")' --files '$dir/files' --threads 16 --pid-file '$dir/run/pid' </dev/null >>'$dir/shop.log' 2>&1 &
for i in \$(seq 200); do [ ! -s '$dir/run/pid' ] || exit 0; sleep 0.05; done
echo "the shop did not start: \$(tail -1 '$dir/shop.log')" >&2
exit 1
SH
  cat >"$dir/stop" <<SH
#!/bin/sh
pid=\$(cat '$dir/run/pid' 2>/dev/null) || exit 0
kill "\$pid" 2>/dev/null
for i in \$(seq 400); do kill -0 "\$pid" 2>/dev/null || exit 0; sleep 0.05; done
kill -9 "\$pid"
SH
  chmod 755 "$dir/start" "$dir/stop"
}
both_sites() { # [-- options of rehome-shop --init]
  [ "${1:-}" != -- ] || shift
  start_pg old
  start_pg new
  start_and_stop old "$shop_old"
  start_and_stop new "$shop_new"
  start_nginx old "$front_old" "$shop_old"
  start_nginx new "$front_new" "$shop_new"
  pg psql old 5432 -q -d postgres -c "CREATE ROLE shop LOGIN" -c "CREATE DATABASE shop OWNER shop"
  "$bin/rehome-shop" --init --db "$(site conninfo old)" "$@"
  "$world/old/start"
  keep_proxies
}
write_yaml() {
  local host side services="" traffic=""
  yaml=$world/shared/rehome.yaml
  for host in old new; do
    side=$([ $host = old ] && echo source || echo target)
    local front=front_$host gate=gate_$host shop=shop_$host dir=$world/$host
    services+="    $side: {command: {start: [$dir/start], stop: [$dir/stop], pid_file: $dir/run/pid}}"$'\n'
    traffic+="      $side: {files: [$dir/nginx/site.conf], conf: $dir/nginx/nginx.conf, application: \"127.0.0.1:${!shop}\", gate: \"127.0.0.1:${!gate}\", front: \"http://127.0.0.1:${!front}/health\"}"$'\n'
  done
  cat >"$yaml" <<YAML
name: shop
source: {local: true, state: $world/state/source, boot: "directory:$world/boot"}
target: {local: true, state: $world/state/target, boot: "directory:$world/boot"}
stores:
  - name: db
    postgres: {databases: [shop], source: {host: $world/old/pg}, target: {host: $world/new/pg}}
  - name: receipts
    files: {source: $world/old/files, target: $world/new/files}
services:
  - name: shop
$services
traffic:
  - name: web
    nginx:
      program: nginx
$traffic
checks:
  - {name: front-door, http: /health, status: 200, canary: read}
max_pause: ${MAX_PAUSE:-3s}
drain_deadline: ${DRAIN:-5s}
limits: {jobs: ${JOBS:-2}}
YAML
}
