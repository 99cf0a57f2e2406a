# What the end-to-end tests and the demo share: a world with an old and a new server, a shop on the old one, clients, and the
# judge. Source it; every function works on the world in $world. Needs root.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${REHOME_BIN:-$repo/build/dev/bin}
support=$repo/tests/support
world=
background=()

hosts() { "$support/hosts.sh" "$@"; }
on() { local host=$1; shift; hosts enter "$world" "$host" "$@"; }
site() { local what=$1 host=$2; shift 2; "$support/site.sh" "$what" "$world" "$host" "$@"; }
pg() { local what=$1 host=$2; shift 2; "$support/pg.sh" "$what" "$world" "$host" "$@"; }
sql() { local host=$1 database=$2; shift 2; pg psql "$host" 5432 -qAt -v ON_ERROR_STOP=1 -d "$database" -c "$*"; }

files_at() { echo /srv/shop; } # HOST: where its shop keeps receipts

say() { printf '%s\n' "$*"; }
fail() { say "FAILED: $*"; exit 1; }

make_world() { # [--systemd]
  world=$(hosts new)
  trap 'status=$?; stop_world; exit $status' EXIT
  trap 'exit 130' INT TERM
  hosts up "$world" --for $$ "$@"
}
stop_world() {
  local p
  for p in "${background[@]}"; do kill "$p" 2>/dev/null || true; done
  [ -n "$world" ] || return 0
  if [ -n "${KEEP_WORLD:-}" ]; then say "world kept: $world" >&2; else hosts down "$world"; fi
}

# both_sites [MAJOR_OLD MAJOR_NEW] [-- options of rehome-shop --init]: servers, proxies, and the shop on old.
both_sites() {
  local old=15 new=15
  if [ $# -ge 2 ] && [ "$1" != -- ]; then old=$1 new=$2; shift 2; fi
  [ "${1:-}" != -- ] || shift
  pg init old "$old" 5432
  pg init new "$new" 5432
  site nginx old
  site nginx new
  site database old 5432 "$@"
  site shop old
  # The same account on the new server; its database comes with the move, so the shop is installed and not started.
  site account new 5432
  on new bash -c 'mkdir -p /var/lib/shop'
  hosts enter "$world" old cat /var/lib/shop/start >"$world/shared/start"
  hosts enter "$world" old cat /var/lib/shop/stop >"$world/shared/stop"
  on new sh -c "cp '$world/shared/start' '$world/shared/stop' /var/lib/shop/; chmod 755 /var/lib/shop/start /var/lib/shop/stop"
}

# What the person on the new server writes. NO_FILES, NO_TRAFFIC, DDL, MAX_PAUSE, DRAIN and JOBS change it.
write_yaml() {
  yaml=$world/shared/rehome.yaml
  {
    cat <<E
name: shop
source: {ssh: root@old, boot: "directory:/var/lib/boot.d"}
target: {local: true, boot: "directory:/var/lib/boot.d"}
link: {from: target, to: root@old}
stores:
  - name: db
    postgres: {databases: [shop], host: /run/postgresql, os_user: postgres, ddl: ${DDL:-refuse}}
E
    [ -n "${NO_FILES:-}" ] || cat <<E
  - name: receipts
    files: {path: /srv/shop}
E
    cat <<E
services:
  - name: shop
    command: {start: [/var/lib/shop/start], stop: [/var/lib/shop/stop], pid_file: /run/shop/pid}
    warm: true
E
    [ -n "${NO_TRAFFIC:-}" ] || cat <<E
traffic:
  - name: web
    nginx: {files: [/etc/nginx/sites-enabled/shop], application: "127.0.0.1:8000", gate: "127.0.0.1:8001", front: "http://127.0.0.1/health"}
E
    cat <<E
checks:
  - {name: health, http: "http://127.0.0.1:8000/health", status: 200, canary: read}
E
    [ -n "${NO_TRAFFIC:-}" ] || cat <<E
  - {name: front-door, http: /health, status: 200, canary: read}
E
    cat <<E
max_pause: ${MAX_PAUSE:-2s}
drain_deadline: ${DRAIN:-5s}
limits: {jobs: ${JOBS:-2}}
E
  } >"$yaml"
}

rehome() { on "${CONTROLLER:-new}" "$bin/rehome" --file "$yaml" "$@"; }

# load NAME RATE [options]: clients on admin; their history is in $world/shared/NAME.history
load() {
  local name=$1 rate=$2
  shift 2
  on admin "$bin/rehome-load" --url-address "${LOAD_TO:-10.77.0.1:80}" --rate "$rate" --clients 32 --history "$world/shared/$name.history" \
    --retry-after-ms 500 --prefix "$name" "$@" >"$world/shared/$name.json" 2>"$world/shared/$name.err" &
  eval "${name}_pid=$!"
  background+=($!)
}
# Ends a background program of ours inside a host, politely, and waits for it.
finish() {
  local pid=$1 p
  # The program itself, not the shells around it: those would end first, and with them what it still prints.
  for p in $(descendants "$pid"); do
    case $(cat "/proc/$p/comm" 2>/dev/null) in rehome-*) kill -TERM "$p" 2>/dev/null || true ;; esac
  done
  wait "$pid"
}
# Stops the program with that pid in a host and wakes it after SECONDS; OUTER is the `on HOST` that runs it, which stops with it.
nap() { # HOST PID SECONDS OUTER
  local p
  on "$1" kill -STOP "$2"
  sleep "$3"
  for p in $(descendants "$4"); do kill -CONT "$p" 2>/dev/null || true; done
}
descendants() { local c; for c in $(pgrep -P "$1"); do descendants "$c"; done; echo "$1"; }

# The pid inside HOST of a program of ours, by the start of its command line; nothing where it does not run.
agent_pid() { pid_of "$1" "rehome-agent-[0-9a-f]* serve --state"; }
gate_pid() { pid_of "$1" "rehome-gate-[0-9a-f]* --state"; }
pid_of() { # HOST PATTERN
  on "$1" sh -c 'for p in /proc/[0-9]*; do if tr "\0" " " 2>/dev/null <$p/cmdline | grep -q "$1"; then echo ${p#/proc/}; break; fi; done' sh "$2" 2>/dev/null || true
}
pg_kill() { on "$1" sh -c 'kill -9 $(head -1 /var/lib/postgresql/15/main/postmaster.pid)'; }

# Makes of YAML what a person who sits at the old server writes, and $yaml that.
yaml_from_old() { # YAML
  sed -e 's/^source: .*/source: {local: true, boot: "directory:\/var\/lib\/boot.d"}/' -e 's/^target: .*/target: {ssh: root@new, boot: "directory:\/var\/lib\/boot.d"}/' "$1" >"$world/shared/from-old.yaml"
  yaml=$world/shared/from-old.yaml
}

probe() { # NAME: probe writers on both sides, from admin
  # A host without power answers nothing: the probe's connection to it must end all the same.
  local quick="keepalives_idle=1 keepalives_interval=1 keepalives_count=3 tcp_user_timeout=4000"
  on admin "$bin/rehome-probe" --source "$(site conninfo old 5432) $quick" --target "$(site conninfo new 5432) $quick" --every-ms 20 \
    --history "$world/shared/$1.probes" >"$world/shared/$1.probe.out" 2>&1 &
  eval "${1}_pid=$!"
  background+=($!)
}

# judge NAME HOST YIELDED [history names... [-- names of histories of before]]: the verdict on what the clients were told, when HOST serves
judge() {
  local name=$1 host=$2 yielded=$3
  shift 3
  local args=() h other=old which=--history
  for h in "$@"; do
    if [ "$h" = -- ]; then which=--earlier; else args+=($which "$world/shared/$h.history"); fi
  done
  [ "$host" = new ] || other=new
  # Before begin and after cancel there is no second database to look for an order in.
  if [ "$(sql $other postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'")" = 1 ]; then args+=(--other "$(site conninfo $other 5432)"); fi
  if [ -e "$world/shared/$name.probes" ]; then args+=(--probes "$world/shared/$name.probes" --yielding-side "$yielded"); fi
  on "$host" "$bin/rehome-history-check" "${args[@]}" --files "$(files_at "$host")" --serving "$(site conninfo "$host" 5432)" \
    --json "$world/shared/$name.verdict"
}
