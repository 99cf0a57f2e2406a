#!/usr/bin/env bash
# What a person gets wrong, on two real servers: every mistake ends with the documented exit status, a message that names the
# object and says what to do next, and with nothing changed on either site. And no password is seen in any argument list, log,
# journal or report, with servers that log every statement.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Everything that a command may not change at a host, as text.
state_of() { # HOST
  local host=$1 database
  on "$host" bash -c '
    find /var/lib /srv /root /tmp /run /etc/nginx /etc/ssh /var/spool/cron \( -path "/var/lib/postgresql/*" -o -path "/run/*.pid" \
      -o -path "$1" -o -path "$2" -o -path "$3" -o -path "/var/lib/nginx/*" -o -path "/run/lock" -o -path /tmp/.X11-unix -o -name "hsperf*" \) -prune -o -printf "%p %y %m %u:%g\n" | LC_ALL=C sort
    find /etc/nginx /etc/ssh /root/.ssh /srv /var/lib/boot.d /var/spool/cron -type f -exec sha256sum {} + | LC_ALL=C sort
    for p in /proc/[0-9]*; do
      case $(cat $p/comm 2>/dev/null) in bash | sh | find | sort | sha256sum | cat | tr | nsenter | runuser | psql | sshd | "") continue ;; esac
      a=$(tr "\0" " " <$p/cmdline 2>/dev/null)
      case $a in "" | "postgres: "*) ;; *) echo "process $a" ;; esac
    done | LC_ALL=C sort' state "$repo" "$world" "$bin"
  for database in postgres shop; do
    [ "$(sql "$host" postgres "SELECT count(*) FROM pg_database WHERE datname = '$database'")" = 1 ] || continue
    sql "$host" $database "
      SELECT 'slot', slot_name, plugin FROM pg_replication_slots ORDER BY 2;
      SELECT 'publication', pubname FROM pg_publication ORDER BY 2;
      SELECT 'subscription', subname FROM pg_subscription ORDER BY 2;
      SELECT 'role', r.* FROM pg_authid r ORDER BY rolname;
      SELECT 'database', datname, datallowconn, datacl FROM pg_database ORDER BY 2;
      SELECT 'setting', name, setting FROM pg_settings WHERE source <> 'default' AND name NOT LIKE 'application%' ORDER BY 2;
      SELECT 'schema', nspname, nspacl FROM pg_namespace WHERE nspname NOT LIKE 'pg_temp%' AND nspname NOT LIKE 'pg_toast_temp%' ORDER BY 2;
      SELECT 'trigger', tgrelid::regclass, tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 2, 3;
      SELECT 'event trigger', evtname FROM pg_event_trigger ORDER BY 2;
      SELECT 'origin', roname FROM pg_replication_origin ORDER BY 2;
      SELECT 'relation', oid::regclass, relreplident, relacl FROM pg_class WHERE relnamespace NOT IN ('pg_catalog'::regnamespace, 'pg_toast'::regnamespace) ORDER BY 2"
  done
}
remember_state() { local h; for h in old new; do state_of $h >"$world/shared/before.$h"; done; }
unchanged() { # CASE
  local h i
  for h in old new; do
    # Processes end a moment after the command that was connected to them.
    for i in 1 2 3 4 5 6 7 8; do
      state_of $h >"$world/shared/after.$h"
      if diff "$world/shared/before.$h" "$world/shared/after.$h" >"$world/shared/changes"; then break; fi
      sleep 0.5
    done
    [ ! -s "$world/shared/changes" ] || { cat "$world/shared/changes"; fail "$1: something was changed on $h"; }
  done
}

# refused CASE STATUS [PATTERN...] -- ARGUMENTS...: rehome, with the file as it is now, ends with STATUS and says what every
# PATTERN matches. Runs beside the others until judged, which looks that nothing was changed.
cases=()
refused() {
  local n=${#cases[@]} patterns=() case=$1 want=$2
  shift 2
  while [ "$1" != -- ]; do patterns+=("$1"); shift; done
  shift
  local own=$world/shared/case$n
  rm -rf "$own"
  mkdir "$own"
  # The name tells the person which file: it stays.
  if [ -e "$yaml" ]; then cp "$yaml" "$own/"; fi
  printf '%s\n' "${patterns[@]}" >"$own/patterns"
  echo "$want" >"$own/want"
  (
    status=0
    timeout 90 "$support/hosts.sh" enter "$world" new "$bin/rehome" --file "$own/$(basename "$yaml")" "$@" >"$own/said" 2>&1 || status=$?
    echo $status >"$own/status"
  ) &
  echo $! >"$own/pid"
  cases+=("$case")
}
judged() {
  local n own p
  for n in "${!cases[@]}"; do
    own=$world/shared/case$n
    wait "$(cat "$own/pid")"
    [ "$(cat "$own/status")" = "$(cat "$own/want")" ] || { cat "$own/said"; fail "${cases[$n]}: status $(cat "$own/status") instead of $(cat "$own/want")"; }
    while read -r p; do
      grep -qE -- "$p" "$own/said" || { cat "$own/said"; fail "${cases[$n]}: it does not say '$p'"; }
    done <"$own/patterns"
    say "ok  ${cases[$n]}"
  done
  unchanged "$(IFS=,; echo "${cases[*]}")"
  cases=()
}
# A file like the good one but for a sed program.
but() { yaml=$world/shared/case.yaml; sed -E "$1" "$world/shared/rehome.yaml" >"$yaml"; }

make_world
both_sites -- --tables 5 --rows 100
MAX_PAUSE=8s write_yaml
good=$yaml
rehome -q check
remember_state

say "the file"
yaml=$world/shared/none.yaml
refused "no such file" 3 "none.yaml" "write one|--file|-f" -- begin
printf 'name: shop\nsource: {ssh: root@old\ntarget: local\n' >"$world/shared/case.yaml"
yaml=$world/shared/case.yaml
refused "broken YAML" 3 "case.yaml:[0-9]+:[0-9]+" -- begin
but 's/^max_pause/max_paus/; s/  - name: db/  - nam: db/; s/warm: true/warm: perhaps/; s/^drain_deadline: 5s/drain_deadline: 5/'
refused "four mistakes at once" 3 "case.yaml:[0-9]+:1: .*max_paus\b" "did you mean.*max_pause" "case.yaml:[0-9]+:[0-9]+: .*nam\b" \
  "case.yaml:[0-9]+:[0-9]+: .*warm" "case.yaml:[0-9]+:[0-9]+: .*drain_deadline|drain_deadline.*5" -- check
refused "an unknown command" 2 "did you mean switch" -- swich
but 's/os_user: postgres/user: postgres, password: secret/'
refused "a password in the file" 3 "case.yaml:[0-9]+:[0-9]+" "env" -- begin

say "the examples of --help"
mkdir "$world/shared/nothing"
examples=0
for command in check plan begin status verify switch reverse complete cancel migrate resume report; do
  while read -r line; do
    status=0
    (cd "$world/shared/nothing" && eval "'$bin/rehome'${line#rehome}") >"$world/shared/example" 2>&1 </dev/null || status=$?
    [ $status = 3 ] || { cat "$world/shared/example"; fail "'$line' ended with $status where there is no rehome.yaml"; }
    examples=$((examples + 1))
  done < <("$bin/rehome" $command --help | sed -n 's/^  \(rehome .*\)/\1/p')
done
[ $examples -ge 25 ] || fail "only $examples examples"
say "ok  $examples examples"

say "passwords"
but 's#host: /run/postgresql, os_user: postgres#host: 127.0.0.1, password: {env: MOVER_PASSWORD}#'
refused "no such variable" 4 "MOVER_PASSWORD is not set" "shell that starts rehome" -- begin
MOVER_PASSWORD=wrong refused "a wrong password from the environment" 4 "source: .*database" "password authentication failed" "check user, os_user and password" -- begin
of_file() { but "s#host: /run/postgresql, os_user: postgres#host: 127.0.0.1, password: {file: $world/shared/$1}#"; }
(umask 022; echo wrong >"$world/shared/open-password")
(umask 077; echo wrong >"$world/shared/wrong-password")
of_file no-password
refused "no such password file" 4 "password file .*/shared/no-password" "0600" -- begin
of_file open-password
refused "a password file that others can read" 4 "can be read by others" "chmod 0600" -- begin
of_file wrong-password
refused "a wrong password from a file" 4 "password authentication failed" -- check

say "what is to be moved"
but 's/\[shop\]/[shpo]/'
refused "a database that is not there" 4 "source: database shpo: it does not exist" "did you mean shop" -- begin
but 's#path: /srv/shop#path: /srv/shpo#'
refused "a directory that is not there" 4 "source: /srv/shpo: there is no such directory" "correct" -- begin
judged
yaml=$good
sql new postgres "CREATE DATABASE shop" >/dev/null
sql new shop "CREATE TABLE mine(a int)" >/dev/null
on new touch /srv/shop/mine
remember_state
refused "a target that is not empty" 4 "target: database shop.*not empty.*mine" "drop or rename" "target: /srv/shop: the directory is not empty" "move away" -- begin
but 's/root@old, boot/root@10.77.0.99, boot/; s/^link.*$/link: {from: target, to: root@10.77.0.99}/'
refused "a host that does not answer" 5 "source.*10.77.0.99" "by hand" -- begin
judged
sql new postgres "DROP DATABASE shop" >/dev/null
on new rm /srv/shop/mine

say "the way there"
yaml=$good
on new cp /root/.ssh/known_hosts /root/.ssh/kept
on new bash -c 'ssh-keygen -q -t ed25519 -N "" -f /root/.ssh/other; sed -i "s#^old,10.77.0.1 .*#old,10.77.0.1 $(cut -d" " -f1,2 /root/.ssh/other.pub)#" /root/.ssh/known_hosts; rm /root/.ssh/other*'
remember_state
refused "a host key that changed" 6 "root@old: the host key is not the one in known_hosts" "ssh-keygen -R" -- begin
judged
on new mv /root/.ssh/kept /root/.ssh/known_hosts
on new bash -c 'ssh-keygen -q -t ed25519 -N "a person" -f /root/.ssh/locked'
on old bash -c "cat >>/root/.ssh/authorized_keys" <"$world/new/fs/root/.ssh/locked.pub"
# An account without rights, known to this host only.
on old bash -c 'cp /etc/passwd /run/passwd; echo "plain:x:4242:4242::/var/lib/plain:/bin/bash" >>/run/passwd; mount --bind /run/passwd /etc/passwd
  mkdir -p /var/lib/plain/.ssh; cp /root/.ssh/authorized_keys /var/lib/plain/.ssh/; chown -R 4242:4242 /var/lib/plain; chmod 700 /var/lib/plain/.ssh'
on old setsid python3 -m http.server --bind 127.0.0.1 8001 --directory /srv/shop >/dev/null 2>&1 &
spawned beside
for _ in $(seq 100); do on old bash -c 'exec 3<>/dev/tcp/127.0.0.1/8001' 2>/dev/null && break; sleep 0.05; done
remember_state
but 's#^link.*$#link: {from: target, to: root@old, key: /root/.ssh/locked}#'
refused "a link whose key needs a person" 4 "link: target to root@old" "without a person" "ssh-keygen|key:" -- begin
but 's/root@old, boot/plain@old, boot/; s/^link.*$/link: {from: target, to: plain@old}/'
refused "an account without rights" 4 "source" "root, or sudo|not root" -- begin
yaml=$good
refused "a gate's port that is in use" 4 "127.0.0.1:8001" "python3" "another port|stop" -- begin
judged
on new sh -c 'rm /root/.ssh/locked*'
on old sh -c 'umount /etc/passwd; rm -rf /var/lib/plain /run/passwd
  for p in /proc/[0-9]*; do tr "\0" " " <$p/cmdline 2>/dev/null | grep -q "^python3 -m http.server" && kill ${p#/proc/}; done; true'

say "secrets: a begin with passwords, while both servers log every statement"
secret=s$(head -c 9 /dev/urandom | od -An -tx1 | tr -d ' \n')
for h in old new; do
  sql $h postgres "CREATE ROLE mover SUPERUSER LOGIN PASSWORD '$secret'" >/dev/null
  sql $h postgres "ALTER SYSTEM SET log_statement = 'all'" >/dev/null
  sql $h postgres "SELECT pg_reload_conf()" >/dev/null
done
remember_state
(umask 077; echo "$secret" >"$world/shared/password")
but "s#host: /run/postgresql, os_user: postgres#host: 127.0.0.1, user: mover, source: {password: {env: MOVER_PASSWORD}}, target: {password: {file: $world/shared/password}}#"
python3 - "$secret" "$world/shared/sampler" <<'P' &
import os, sys, time
secret, out = sys.argv[1].encode(), sys.argv[2]
me, seen, rounds = os.getpid(), set(), 0
while not os.path.exists(out + ".end"):
    rounds += 1
    for p in os.listdir("/proc"):
        if not p.isdigit() or int(p) == me: continue
        try: line = open(f"/proc/{p}/cmdline", "rb").read()
        except OSError: continue
        if secret in line: seen.add(line.replace(b"\0", b" "))
    time.sleep(0.005)
open(out, "wb").write(b"%d rounds\n" % rounds + b"\n".join(seen))
P
sampler=$!
spawned sampler
export MOVER_PASSWORD=$secret
rehome --json begin >"$world/shared/begin.out" 2>&1 || { tail -5 "$world/shared/begin.out"; fail "begin with passwords"; }
rehome -q verify
rehome switch >"$world/shared/switch.out" 2>&1 || { tail -5 "$world/shared/switch.out"; fail "switch with passwords"; }
rehome -q reverse >/dev/null
rehome report --out "$world/shared/report.html" >/dev/null
rehome --json status >"$world/shared/status.out"
touch "$world/shared/sampler.end"
wait $sampler
rounds=$(head -1 "$world/shared/sampler")
[ "$(wc -l <"$world/shared/sampler")" -le 1 ] && ! grep -q "$secret" "$world/shared/sampler" || { cat "$world/shared/sampler"; fail "the password was seen in an argument list"; }
[ "${rounds%% *}" -gt 50 ] || fail "the argument lists were looked at $rounds times only"
for f in begin.out switch.out status.out report.html; do
  [ -s "$world/shared/$f" ] || fail "$f is empty"
  ! grep -q "$secret" "$world/shared/$f" || fail "the password is in $f"
done
for h in old new; do
  on $h grep -q 'statement: ' /var/log/postgresql/postgresql-15-5432.log || fail "the server on $h logs no statements"
  left=$(on $h grep -rlF "$secret" /var/log /var/lib/rehome /tmp /run /srv /etc/nginx 2>/dev/null || true)
  for f in $left; do
    case $f in
      /var/lib/rehome/*/credentials/*) [ "$(on $h stat -c %a "$f")" = 600 ] || fail "$f on $h can be read by others" ;;
      "$world/shared/"*) ;;   # the person's own file and what this test compares with
      *) fail "the password is in $f on $h" ;;
    esac
  done
  ! sql $h postgres "SELECT subconninfo FROM pg_subscription" | grep -q "$secret" || fail "the password is in a subscription of $h"
done
say "ok  ${rounds%% *} looks at all argument lists, both server logs, journal, report: no password"

say "two at once"
remember_state
refused "a second begin" 8 "a run of 'shop' is there already" "resume.*cancel" -- begin
judged
status=0
# Nobody ends it, and nobody reads it any more.
timeout 60 "$support/hosts.sh" enter "$world" new "$bin/rehome" --file "$yaml" --json status --watch 2>/dev/null | head -n 1 >/dev/null || status=${PIPESTATUS[0]}
[ $status = 0 ] || fail "status --watch before a closed pipe ended with $status"
pids=()
for n in 1 2; do
  (set +e; rehome --json switch >"$world/shared/both.$n" 2>&1; echo $? >"$world/shared/both.$n.status") &
  pids+=($!)
done
wait "${pids[@]}"
statuses=("$(cat "$world/shared/both.1.status")" "$(cat "$world/shared/both.2.status")")
say "two switches at once ended with ${statuses[*]}"
won=0
for n in 1 2; do
  case ${statuses[$((n - 1))]} in
    0) won=$((won + 1)) ;;
    7 | 8 | 10) grep -qE "another controller|serves already|is not possible now" "$world/shared/both.$n" || { tail -3 "$world/shared/both.$n"; fail "the one that lost does not say why"; } ;;
    *) tail -3 "$world/shared/both.$n"; fail "the one that lost ended with ${statuses[$((n - 1))]}" ;;
  esac
done
[ $won -le 1 ] || fail "both switches say that they succeeded"
rehome -q resume
[ $won = 1 ] || rehome -q switch
site health new >/dev/null
rehome --json status | grep -q '"serves":"target"' || fail "the target does not serve after two switches"
say "all refused, nothing changed"
