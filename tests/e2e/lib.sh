# What the end-to-end tests and the demo share: a world with an old and a new server, a shop on the old one, clients, and the
# judge. Source it; every function works on the world in $world. Needs root.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
bin=${REHOME_BIN:-$repo/build/dev/bin}
support=$repo/tests/support
world=
declare -A background=() running=() # what we started: pid to the moment it did; name to pids

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
  for p in "${!background[@]}"; do ! lives "$p" || kill "$p" 2>/dev/null || true; done
  background=() running=()
  [ -n "$world" ] || return 0
  if [ -n "${KEEP_WORLD:-}" ]; then say "world kept: $world" >&2; else hosts down "$world"; fi
  world=
}

# A pid alone may by now be somebody else's: with the time it started it is not.
started_at() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 0; s=(${s##*) }); echo "${s[19]}"; }
lives() { [ -n "${background[$1]:-}" ] && [ "$(started_at "$1")" = "${background[$1]}" ]; }
spawned() { # NAME: what was just put into the background; `finish NAME` ends it, and stop_world at the latest
  background[$!]=$(started_at $!)
  running[$1]+=" $!"
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
  on new sh -c 'mkdir -p /var/lib/shop; echo target >/var/lib/shop/side'
  hosts enter "$world" old cat /var/lib/shop/start >"$world/shared/start"
  hosts enter "$world" old cat /var/lib/shop/stop >"$world/shared/stop"
  on new sh -c "cp '$world/shared/start' '$world/shared/stop' /var/lib/shop/; chmod 755 /var/lib/shop/start /var/lib/shop/stop"
  keep_proxies
}
proxy_of() { hosts path "$world" "$1" /etc/nginx/sites-enabled/shop; }
keep_proxies() { local h; for h in old new; do cp "$(proxy_of $h)" "$world/shared/proxy.$h"; done; } # as they are before begin

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
  spawned "$name"
}
# Ends the background programs of that name, politely, and waits for them: one that broke down has told us nothing.
finish() { # NAME
  local pid p status
  for pid in ${running[$1]}; do
    # The program itself, not the shells around it: those would end first, and with them what it still prints.
    ! lives "$pid" || for p in $(descendants "$pid"); do
      case $(cat "/proc/$p/comm" 2>/dev/null) in rehome-* | python3) kill -TERM "$p" 2>/dev/null || true ;; esac
    done
    wait "$pid" && status=0 || status=$?
    unset "background[$pid]"
    [ $status = 0 ] || { tail -n 3 "$world/shared/$1".*err >&2 || true; fail "$1: a program of the test ended with $status"; }
  done
  [ ! -e "$world/shared/$1.probes" ] || collect_file_probes "$1"
  unset "running[$1]"
}
# What a host that lost its power has forgotten of them is missing; not what the other side wrote down.
collect_file_probes() { # NAME
  local h
  for h in old new; do
    ! is_on $h || on $h sh -c '[ ! -e /var/log/shop-probes ] || { mv /var/log/shop-probes /var/log/shop-probed; sleep 0.1; cat /var/log/shop-probed; rm /var/log/shop-probed; }' >>"$world/shared/$1.file-probes"
  done
}
# Stops the program with that pid in a host and wakes it after SECONDS; OUTER is the `on HOST` that runs it, which stops with it.
nap() { # HOST PID SECONDS OUTER
  local p status=0
  on "$1" sh -c 'kill -STOP $1 && for i in $(seq 500); do ! grep -q "^State:.T" /proc/$1/status || exit 0; sleep 0.01; done; exit 1' sh "$2" || status=1
  sleep "$3"
  for p in $(descendants "$4"); do kill -CONT "$p" 2>/dev/null || true; done
  return $status
}
kill_there() { # HOST PID: it was there, and is no more
  on "$1" sh -c 'kill -9 $1 && for i in $(seq 500); do [ -e /proc/$1 ] && ! grep -q "^State:.Z" /proc/$1/status 2>/dev/null || exit 0; sleep 0.01; done; exit 1' sh "$2"
}
descendants() { local c; for c in $(pgrep -P "$1"); do descendants "$c"; done; echo "$1"; }

# The pid inside HOST of a program of ours, by the start of its command line; nothing where it does not run.
agent_pid() { pid_of "$1" "rehome-agent-[0-9a-f]* serve --state"; }
gate_pid() { pid_of "$1" "rehome-gate-[0-9a-f]* --state"; }
pid_of() { # HOST PATTERN
  on "$1" sh -c 'for p in /proc/[0-9]*; do if tr "\0" " " 2>/dev/null <$p/cmdline | grep -q "$1"; then echo ${p#/proc/}; break; fi; done' sh "$2" 2>/dev/null || true
}
pg_kill() { kill_there "$1" "$(on "$1" head -1 /var/lib/postgresql/15/main/postmaster.pid)"; }
is_on() { hosts pid "$world" "$1" >/dev/null 2>&1; }

# Makes of YAML what a person who sits at the old server writes, and $yaml that.
yaml_from_old() { # YAML
  sed -e 's/^source: .*/source: {local: true, boot: "directory:\/var\/lib\/boot.d"}/' -e 's/^target: .*/target: {ssh: root@new, boot: "directory:\/var\/lib\/boot.d"}/' "$1" >"$world/shared/from-old.yaml"
  yaml=$world/shared/from-old.yaml
}

# NAME: probe writers on both sides: to the databases from admin, to the files in the service itself; their histories are in
# $world/shared/NAME.probes and NAME.file-probes
probe() {
  local h
  for h in old new; do on $h install -D -o www-data -g www-data /dev/null /var/log/shop-probes; done
  # A host without power answers nothing: the probe's connection to it must end all the same.
  local quick="keepalives_idle=1 keepalives_interval=1 keepalives_count=3 tcp_user_timeout=4000"
  on admin "$bin/rehome-probe" --source "$(site conninfo old 5432) $quick" --target "$(site conninfo new 5432) $quick" --every-ms 20 \
    --history "$world/shared/$1.probes" >"$world/shared/$1.probe.out" 2>"$world/shared/$1.probe.err" &
  spawned "$1"
}

# Stops a command before or after a phase: `REHOME_FAULT_HOOK=$world/shared/hook rehome ...` waits there until shared/hook.done.
make_hook() {
  cat >"$world/shared/hook" <<H
#!/bin/sh
[ "\$1 \$2" = "\$(cat '$world/shared/hook.at')" ] || exit 0
[ ! -e '$world/shared/hook.asks' ] || exit 0
touch '$world/shared/hook.asks'
i=0
while [ ! -e '$world/shared/hook.done' ] && [ \$i -lt 2000 ]; do sleep 0.01; i=\$((i+1)); done
H
  chmod 755 "$world/shared/hook"
}
hook_at() { # "before|after PHASE": once
  rm -f "$world/shared/hook.asks" "$world/shared/hook.done"
  echo "$1" >"$world/shared/hook.at"
}
hook_asks() { # within 60 s
  local i
  for i in $(seq 6000); do [ ! -e "$world/shared/hook.asks" ] || return 0; sleep 0.01; done
  return 1
}
number() { python3 -c 'import json, sys; print(round(json.load(open(sys.argv[2]))[sys.argv[1]]))' "$@"; } # KEY JSON-FILE

settled() { # prints the side that serves when both agents have come to rest
  rehome status --json 2>/dev/null | python3 -c '
import json, sys
s = json.loads(sys.stdin.readline())
if "missing" in s["source"] or "missing" in s["target"]: sys.exit(1)
for side in ("source", "target"):
    a = s[side]
    if "record" not in a or not a["link"].get("up"): sys.exit(1)
    if a["attempt"].get("phase") not in ("serving", "closed", "refused", "prepared") or not a["attempt"].get("settled", True): sys.exit(1)
    g = a.get("gate") or {}
    if "state" in g and g["state"] not in ("OPEN_LOCAL", "OPEN_PEER"): sys.exit(1)
if len(sys.argv) > 1 and any(v.get("trouble") or not v.get("following") for v in s["stores"].values()): sys.exit(1)
print({"source": "old", "target": "new"}[s["serves"]])' "$@"
}

# judge NAME HOST [history names... [-- names of histories of before]]: the verdict on what the clients were told, when HOST serves.
# HOST is old:new where old served first, and new took over. Some orders must have been acknowledged (AT_LEAST, 20), and none have
# failed (but with MAY_FAIL): clients wait instead. The probes of that name are judged with it.
judge() { 
  local name=$1 first=${2%:*} host=${2#*:} args=() h other=old which=--history
  shift 2
  for h in "$@"; do
    if [ "$h" = -- ]; then which=--earlier; else args+=($which "$world/shared/$h.history"); fi
  done
  [ "$host" = new ] || other=new
  if is_on $other; then
    h=$(sql $other postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'") || fail "$other does not say whether it has the shop's database"
    # Before begin and after cancel there is no second database to look for an order in.
    [ "$h" = 0 ] || args+=(--other "$(site conninfo $other 5432)")
    [ "$first" = "$host" ] || sequences_ahead "$host" "$first"
  fi
  if [ -e "$world/shared/$name.probes" ]; then
    args+=(--probes "$world/shared/$name.probes" --file-probes "$world/shared/$name.file-probes" --sides)
    for h in $(printf '%s\n' "$first" "$host" | uniq); do args+=("$([ "$h" = old ] && echo source || echo target)"); done
  fi
  [ -n "${MAY_FAIL:-}" ] || args+=(--none-failed)
  on "$host" "$bin/rehome-history-check" "${args[@]}" --files "$(files_at "$host")" --serving "$(site conninfo "$host" 5432)" \
    --at-least "${AT_LEAST:-20}" --json "$world/shared/$name.verdict"
}

# The next number of each sequence of HOST lies beyond every number that OTHER gave out.
sequences_ahead() { # HOST OTHER
  local h
  # OTHER first: HOST only goes on from there.
  for h in "$2" "$1"; do
    sql "$h" shop "SELECT sequencename, increment_by, coalesce(last_value, start_value), last_value IS NOT NULL FROM pg_sequences WHERE schemaname = 'public'" >"$world/shared/sequences.$h" ||
      fail "the sequences of $h cannot be read"
  done
  python3 - "$world/shared/sequences.$1" "$world/shared/sequences.$2" <<'P' || fail "$1 may give numbers again that $2 gave out"
import sys
def read(file): return {n: (int(step), int(last), called == "t") for n, step, last, called in (line.strip().split("|") for line in open(file))}
ours, theirs = (read(f) for f in sys.argv[1:])
bad = ["no sequences that were drawn from"] if len(theirs) < 5 or not any(called for _, _, called in theirs.values()) else []
for name, (step, last, called) in theirs.items():
    if not called: continue
    if name not in ours: bad.append(name + " is missing"); continue
    nxt = ours[name][1] + (step if ours[name][2] else 0)
    if (nxt - last) * step <= 0: bad.append(f"{name}: {last} was given out, and the next is {nxt}")
for b in bad: print(b)
sys.exit(bool(bad))
P
}

# Nothing of rehome is on HOST, and its proxy is as it was. After complete the source keeps its fence, until --unfence-source.
nothing_left() { # HOST [fenced]
  local host=$1 what="slots and subscriptions" query="(SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_subscription)" database=postgres
  if [ -z "${2:-}" ] && [ "$(sql "$host" postgres "SELECT count(*) FROM pg_database WHERE datname = 'shop'")" = 1 ]; then
    database=shop what+=", publications, triggers and schemas"
    query+=" + (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'rehome%') + (SELECT count(*) FROM pg_event_trigger) + (SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'rehome%')"
  fi
  query=$(sql "$host" $database "SELECT $query") || fail "$host does not say what is left"
  [ "$query" = 0 ] || fail "$query $what are left on $host"
  cmp "$(proxy_of "$host")" "$world/shared/proxy.$host" || fail "the proxy of $host is not as it was"
  [ -n "${2:-}" ] || no_files_left "$host"
}
no_files_left() { # HOST: and no processes
  local pids
  # What stays is the journal, for the report.
  on "$1" sh -c '! ls -d /var/lib/rehome/* /var/lib/rehome-pg-* 2>/dev/null | grep -vx /var/lib/rehome/archive' || fail "files of rehome are left on $1"
  pids=$(agent_pid "$1")$(gate_pid "$1")
  [ -z "$pids" ] || fail "an agent or a gate is left on $1: $pids"
}
