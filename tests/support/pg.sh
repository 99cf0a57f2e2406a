#!/usr/bin/env bash
# PostgreSQL servers in the hosts of hosts.sh.
#
#   pg.sh init WORLD HOST MAJOR PORT [SETTING=VALUE...]  makes a cluster, starts it, and has every boot start it
#   pg.sh start|stop WORLD HOST MAJOR PORT               now; a boot starts it in any case
#   pg.sh psql WORLD HOST PORT ARGUMENTS...              as its superuser, through the socket
#   pg.sh conninfo WORLD HOST PORT DATABASE              superuser's, over TCP, for use inside either host or admin
#   pg.sh password WORLD HOST                            the superuser's password, also in the host's
#                                                        /var/lib/postgresql/superuser-password
#   pg.sh bindir MAJOR                                   where its programs are, fetched first if need be
#
# MAJOR 15 is Debian's, others come from fetch-pg.sh (no psql and no pg_dump: Debian's are used).
# Data are in /var/lib/postgresql/MAJOR/main, or MAJOR/PORT for a second cluster of that major. Peer on the socket in
# /run/postgresql, scram over TCP. wal_level is logical unless a SETTING says otherwise; fsync is on.
set -euo pipefail
support=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hosts() { "$support/hosts.sh" "$@"; }
die() { echo "pg.sh: $*" >&2; exit 1; }

bindir() { "$support/fetch-pg.sh" "$1"; }

data() {  # WORLD HOST MAJOR PORT: the cluster's directory inside the host
  local d=/var/lib/postgresql/$3/$4
  [ -d "$(hosts path "$1" "$2" "$d")" ] && echo "$d" || echo "/var/lib/postgresql/$3/main"
}
control() {  # WORLD HOST MAJOR PORT start|stop
  local bin data
  bin=$(bindir "$3")
  data=$(data "$1" "$2" "$3" "$4")
  if [ "$5" = start ]; then
    hosts enter "$1" "$2" "/var/lib/boot.d/20-postgresql-$3-$4"
  else
    hosts enter "$1" "$2" runuser -u postgres -- "$bin/pg_ctl" -D "$data" -m fast -w -t 60 -s stop
  fi
}

init() {
  local world=$1 host=$2 major=$3 port=$4 bin data setting
  shift 4
  bin=$(bindir "$major")
  data=/var/lib/postgresql/$major/main
  [ ! -d "$(hosts path "$world" "$host" "$data")" ] || data=/var/lib/postgresql/$major/$port
  hosts enter "$world" "$host" bash -s -- "$bin" "$data" "$major" "$port" "$@" <<'E'
set -euo pipefail
bin=$1 data=$2 major=$3 port=$4
shift 4
password=/var/lib/postgresql/superuser-password
install -d -o postgres -g postgres -m 755 /var/lib/postgresql "${data%/*}" /var/log/postgresql
cd /
if [ ! -f $password ]; then
  (umask 077; head -c 18 /dev/urandom | base64 >$password)
  chown postgres $password
fi
runuser -u postgres -- "$bin/initdb" -D "$data" -U postgres -A scram-sha-256 --pwfile=$password --data-checksums \
  --no-sync -E UTF8 --locale=C.UTF-8 >/dev/null
cat >>"$data/postgresql.conf" <<C
listen_addresses = '*'
port = $port
unix_socket_directories = '/run/postgresql'
wal_level = logical
max_connections = 200
max_wal_senders = 20
max_replication_slots = 20
max_worker_processes = 16
shared_buffers = 64MB
C
for setting; do echo "${setting%%=*} = '${setting#*=}'" >>"$data/postgresql.conf"; done
cat >"$data/pg_hba.conf" <<C
local all all peer
local replication all peer
host all all 127.0.0.1/32 scram-sha-256
host all all ::1/128 scram-sha-256
host all all 10.77.0.0/24 scram-sha-256
host replication all 127.0.0.1/32 scram-sha-256
host replication all 10.77.0.0/24 scram-sha-256
C
mkdir -p /var/lib/boot.d
boot=/var/lib/boot.d/20-postgresql-$major-$port
# After a power cut the pid in postmaster.pid may by chance be that of another server: nothing of the last boot lives.
cat >$boot <<C
#!/bin/sh
install -d -o postgres -g postgres -m 2775 /run/postgresql
cd /
runuser -u postgres -- "$bin/pg_ctl" -D "$data" status >/dev/null 2>&1 && exit 0
[ -e /run/booted ] || rm -f "$data/postmaster.pid"
exec runuser -u postgres -- "$bin/pg_ctl" -D "$data" -l /var/log/postgresql/postgresql-$major-$port.log -w -t 50 -s start
C
chmod 755 $boot
$boot
E
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  init) [ $# -ge 4 ] || die "init WORLD HOST MAJOR PORT"; init "$@" ;;
  start | stop) [ $# -eq 4 ] || die "$command WORLD HOST MAJOR PORT"; control "$@" "$command" ;;
  psql)
    world=$1 host=$2 port=$3
    shift 3
    exec "$support/hosts.sh" enter "$world" "$host" runuser -u postgres -- \
      psql -X -qAt -v ON_ERROR_STOP=1 -h /run/postgresql -p "$port" -d postgres "$@" ;;
  conninfo)
    case $2 in old) address=10.77.0.1 ;; new) address=10.77.0.2 ;; *) die "no host $2" ;; esac
    echo "host=$address port=$3 user=postgres dbname=$4 password=$("$0" password "$1" "$2")" ;;
  password) cat "$(hosts path "$1" "$2" /var/lib/postgresql/superuser-password)" ;;
  bindir) bindir "$1" ;;
  *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
