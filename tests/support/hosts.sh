#!/usr/bin/env bash
# Two servers and an administrator's machine, on one machine: each is a set of namespaces with its own network,
# processes, home, /etc/ssh, /etc/nginx, /var/lib, /var/log, /srv, /run, /tmp and cgroups. As root.
#
#   hosts.sh new                          prints a fresh world directory (nothing runs yet)
#   hosts.sh up WORLD [--for PID] [--systemd]   starts old, new and admin in a fresh or new directory; with --for, the
#                                         world goes when that process does; with --systemd, the first process of old and new is
#                                         systemd, with no units but the targets and what /etc/systemd/system there holds
#   hosts.sh enter WORLD HOST COMMAND...  runs a command there, working directory /, HOME=/root
#   hosts.sh path WORLD HOST /PATH        where a host's file is on this machine (not for /run and kept paths)
#   hosts.sh pid WORLD HOST               the host's first process; fails when the host is off
#   hosts.sh power-cut WORLD HOST         kills the first process: the host falls silent, as without power
#   hosts.sh shutdown WORLD HOST          an orderly one, of a host with systemd; power-on boots it again
#   hosts.sh power-on WORLD HOST          boots it again from its directories; returns after /var/lib/boot.d
#   hosts.sh link WORLD down|up           between old and new only: admin still reaches both, and carriers stay up
#   hosts.sh wire WORLD DELAY LOSS RATE   one-way delay in ms, loss in percent, rate in Mbit/s (0: none); or: off
#   hosts.sh down WORLD [--force]         ends what it started and removes the directory; safe twice. Refuses to end the
#                                         world of a process that runs (up --for), unless that one is asking
#
# old is 10.77.0.1 and new is 10.77.0.2; root logs in with ssh from each of the three to both, by address or name. admin
# is where clients and a controller on a third machine run. /run/booted exists once /var/lib/boot.d/* were run, in
# order, each for at most a minute; their output is in /var/log/boot.log. The repository, the cache and
# WORLD/shared are at the same path everywhere. Every network is a namespace of its own, so that many worlds can run.
set -euo pipefail

support=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$support/../.." && pwd)
bin=${REHOME_BIN:-$repository/build/dev/bin}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/rehome-test
places=(old new admin)
private=(root srv tmp var/lib var/log var/spool etc/ssh etc/nginx)

die() { echo "hosts.sh: $*" >&2; exit 1; }
address() { case $1 in old) echo 10.77.0.1 ;; new) echo 10.77.0.2 ;; *) die "no host $1: old, new or admin" ;; esac; }
world_id() { cat "$1/world" 2>/dev/null || die "$1 is not a world"; }

# A pid alone may by now be somebody else's: with the time it started it is not.
identity() {
  local s
  s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -r -a s <<<"${s##*) }"
  # Of one that ends while it is read there may be less.
  [ "${s[0]:-Z}" != Z ] && [ -n "${s[19]:-}" ] && echo "${s[19]}"
}
remember() { echo "$1 $(identity "$1")" >"$2"; }
recall() {  # FILE: the pid in it, when that process is still the same one
  local pid since
  read -r pid since 2>/dev/null <"$1" || return 1
  [ -n "$since" ] && [ "$(identity "$pid")" = "$since" ] && echo "$pid"
}

cgroup_roots() {  # where a host gets a cgroup of its own: the v2 tree, and v1's freezer
  awk '$3 == "cgroup2" || ($3 == "cgroup" && $4 ~ /(^|,)freezer(,|$)/) {print $2}' /proc/self/mounts
}
cgroups_of() { local root; for root in $(cgroup_roots); do echo "$root/rehome-$1"; done; }

init_of() { recall "$1/$2/init.pid" || die "$2 is off"; }
in_net() { local pid; pid=$(init_of "$1" "$2"); shift 2; nsenter -t "$pid" -n -- "$@"; }

# Runs as the first process of the new namespaces; becomes the init. The mounts may hide the world's own path (it may be
# under /tmp), so they start from the working directory.
inside() {
  set -euo pipefail
  local name=$1 fs=$2 ready=$3 init=$4 host_init=$5 dir
  shift 5
  hostname "$name"
  exec 9>"$ready"
  for dir in "$@"; do  # what must be at the same path as outside
    case $dir in
      /tmp/* | /root/* | /srv/* | /var/lib/* | /var/log/* | /var/spool/*)
        mkdir -p "$fs$dir"
        mount --rbind "$dir" "$fs$dir" ;;
      /run/*) echo "hosts.sh: $dir is under /run, which every host has of its own" >&2; exit 1 ;;
    esac
  done
  cd "$fs"
  local of_this_machine
  for dir in root srv var/lib var/log var/spool etc/ssh etc/nginx; do
    [ -d "/$dir" ] || continue
    mount -c --rbind "./$dir" "/$dir"
  done
  mount -c --bind ./etc/hosts /etc/hosts
  [ ! -d /dev/shm ] || mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  local kind options
  while read -r _ of_this_machine kind options _; do
    case $kind in
      cgroup2) umount "$of_this_machine" && mount -t cgroup2 cgroup2 "$of_this_machine" ;;
      cgroup) [[ ,$options, != *,freezer,* ]] ||
        { umount "$of_this_machine" && mount -t cgroup -o freezer cgroup "$of_this_machine"; } ;;
    esac
  done <<<"$(grep -E ' cgroup2? ' /proc/self/mounts)"
  # The kernel does not boot again, so it would say that this host has not.
  cat /proc/sys/kernel/random/uuid >./boot_id
  mount -c --bind ./boot_id /proc/sys/kernel/random/boot_id
  mount -t tmpfs -o mode=755 tmpfs /run
  mkdir -p /run/sshd /run/lock
  [ "$name" != admin ] || init=plain
  [ "$init" = plain ] || mounts_for_systemd
  mount -c --rbind ./tmp /tmp
  cd /
  [ "$name" = admin ] || /usr/sbin/sshd -E /var/log/sshd.log
  [ "$init" = plain ] || become_systemd
  echo up >&9
  exec "$host_init" 9
}

# systemd as the first process, from the host's directory. Its own units would set up a machine (udev, sysctl, the removal of what
# is in /tmp): only targets are left of them, and no generator, which would make units of this machine's init scripts.
mounts_for_systemd() {
  local d
  mkdir -p /run/machine
  for d in /dev /etc/systemd "$(readlink -f /lib/systemd/system)" "$(readlink -f /lib/systemd/system-generators)"; do
    stat -c %d:%i "$d" >"/run/machine/${d//\//_}"
  done
  mkdir -p dev units generators etc/systemd/system
  mount -t tmpfs -o mode=755 tmpfs dev
  mkdir dev/pts dev/shm
  for d in null zero full random urandom tty; do touch "dev/$d"; mount --bind "/dev/$d" "dev/$d"; done
  ln -s /proc/self/fd dev/fd
  mount -t devpts devpts dev/pts -o newinstance,ptmxmode=666
  ln -s pts/ptmx dev/ptmx
  mount -t tmpfs -o mode=1777 tmpfs dev/shm
  mount --rbind ./dev /dev
  if [ ! -e etc/machine-id ]; then
    cp -P /lib/systemd/system/*.target /lib/systemd/system/systemd-{poweroff,reboot,exit}.service /lib/systemd/system/*.slice units/
    printf '[Manager]\nDefaultStandardOutput=null\nDefaultTimeoutStopSec=20s\n' >etc/systemd/system.conf
    tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
  fi
  mount -c --bind ./units "$(readlink -f /lib/systemd/system)"
  mount -c --bind ./generators "$(readlink -f /lib/systemd/system-generators)"
  mount -c --bind ./etc/systemd /etc/systemd
  [ ! -e /etc/machine-id ] || mount -c --bind ./etc/machine-id /etc/machine-id
  umount -R /sys/fs/cgroup
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
}
become_systemd() {
  local dir
  # Without its own directories it would start, and write into, what this machine has.
  for dir in /dev /etc/systemd "$(readlink -f /lib/systemd/system)" "$(readlink -f /lib/systemd/system-generators)"; do
    mountpoint -q "$dir" && [ "$(stat -c %d:%i "$dir")" != "$(cat /run/machine/"${dir//\//_}")" ] || { echo "hosts.sh: $dir is this machine's own" >&2; exit 1; }
  done
  # It holds the other end of the pipe until the host is up.
  (
    for _ in $(seq 1000); do
      case $(systemctl is-system-running 2>/dev/null) in running | degraded) break ;; esac
      sleep 0.05
    done
    touch /run/booted
    echo booted >&9
  ) </dev/null >/dev/null 2>&1 &
  echo up >&9
  exec env -i container=rehome-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=null --show-status=0 9>&-
}

place_up() {  # WORLD HOST: starts it and connects it
  local world=$1 name=$2 id fs line init outer address
  id=$(world_id "$world")-$name
  fs=$world/$name/fs
  rm -f "$world/$name/ready" "$world/$name/go"
  mkfifo "$world/$name/ready" "$world/$name/go"
  exec 7<>"$world/$name/ready" 6<>"$world/$name/go"
  (
    exec 7>&- 6>&-
    for group in $(cgroups_of "$id"); do
      mkdir -p "$group" 2>/dev/null && echo "$BASHPID" >"$group/cgroup.procs" || true
    done
    exec setsid unshare --net --mount --uts --ipc --pid --cgroup --fork --kill-child --mount-proc --propagation private \
      bash -c "$(declare -f inside mounts_for_systemd become_systemd); read -r _ <\"\$0\"; inside \"\$@\"" "$world/$name/go" "$name" "$fs" \
      "$world/$name/ready" "$(cat "$world/init" 2>/dev/null || echo plain)" "$bin/rehome-host-init" "$repository" "$bin" "$cache" "$world/shared"
  ) </dev/null >>"$world/$name/init.out" 2>&1 &
  outer=$!
  disown
  for _ in $(seq 500); do
    # Until it has become unshare, its children are those of the lines above.
    [ "$(cat "/proc/$outer/comm" 2>/dev/null)" = unshare ] && init=$(cat "/proc/$outer/task/$outer/children") && [ -n "$init" ] && break
    sleep 0.01
  done
  init=${init%% *}
  [ -n "$init" ] || die "$name did not start: $(tail -3 "$world/$name/init.out")"
  remember "$outer" "$world/$name/outer.pid"
  remember "$init" "$world/$name/init.pid"
  nsenter -t "$init" -n -- ip link set lo up
  if [ "$name" = admin ]; then
    switch_up "$world"
  else
    # The address of the card stays over a reboot, so that nobody's neighbour table goes stale.
    address=$(address "$name")
    in_net "$world" admin ip -batch - <<E
link add l-$name type veth peer name eth0 address 02:00:00:00:00:0${address##*.} netns $init
link set l-$name master br-$name up
E
    nsenter -t "$init" -n -- ip -batch - <<E
addr add $address/24 dev eth0
link set eth0 up
E
  fi
  echo go >&6
  for line in up booted; do
    for _ in $(seq 120); do
      read -r -t 1 -u 7 got && break
      identity "$init" >/dev/null || break
    done
    [ "${got:-}" = "$line" ] || die "$name did not boot: $(tail -3 "$world/$name/init.out")"
  done
  exec 7>&- 6>&-
}

# admin holds a bridge for each host and a trunk between the two, which `link` and `wire` cut, delay or replace. It has an
# address on both bridges, and a route to each host that does not use the trunk.
switch_up() {
  in_net "$1" admin ip -batch - <<'E'
link add br-old address 02:00:00:00:01:01 type bridge mcast_snooping 0
link add br-new address 02:00:00:00:01:02 type bridge mcast_snooping 0
addr add 10.77.0.251/32 dev br-old
addr add 10.77.0.252/32 dev br-new
link set br-old up
link set br-new up
route add 10.77.0.1 dev br-old src 10.77.0.251
route add 10.77.0.2 dev br-new src 10.77.0.252
E
  # An address is answered for on its own bridge only, or clients of one host would come through the trunk.
  in_net "$1" admin sh -c 'echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore; echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce'
  trunk_plain "$1"
}
trunk_plain() {
  in_net "$1" admin ip -batch - <<'E'
link add t-old type veth peer name t-new
link set t-old master br-old up
link set t-new master br-new up
E
}

keys() {  # WORLD: every place gets a key; both hosts accept all three; all know both hosts' keys
  local world=$1 name fs
  for name in "${places[@]}"; do
    fs=$world/$name/fs
    mkdir -p "$fs/root/.ssh" "$fs/etc/ssh"
    chmod 711 "$fs/root"
    chmod 700 "$fs/root/.ssh"
    ssh-keygen -q -t ed25519 -N '' -C "root@$name" -f "$fs/root/.ssh/id_ed25519"
    ssh-keygen -q -t ed25519 -N '' -C "$name" -f "$fs/etc/ssh/ssh_host_ed25519_key"
    printf '127.0.0.1 localhost\n10.77.0.1 old\n10.77.0.2 new\n10.77.0.251 admin\n' >"$fs/etc/hosts"
    : >"$fs/etc/ssh/ssh_config"
    [ "$name" != admin ] || continue
    cat >"$fs/etc/ssh/sshd_config" <<E
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 100
Subsystem sftp internal-sftp
E
  done
  for name in "${places[@]}"; do
    fs=$world/$name/fs/root/.ssh
    cat "$world"/{old,new,admin}/fs/root/.ssh/id_ed25519.pub >"$fs/authorized_keys"
    chmod 600 "$fs/authorized_keys"
    for host in old new; do
      echo "$host,$(address "$host") $(cut -d' ' -f1,2 "$world/$host/fs/etc/ssh/ssh_host_ed25519_key.pub")"
    done >"$fs/known_hosts"
  done
}

fresh() { local dir; dir=$(mktemp -d "${TMPDIR:-/tmp}/rehome-world.XXXXXX"); echo "${dir##*.}" >"$dir/world"; echo "$dir"; }

up() {
  local world=$1 name dir
  [ "$(id -u)" = 0 ] || die "namespaces need root"
  [ -x "$bin/rehome-host-init" ] || die "$bin/rehome-host-init is not there: build first"
  [[ $world = /* ]] || die "$world: an absolute path is needed"
  if [ ! -e "$world/world" ]; then
    # Of a directory that has other things in it, down must never remove anything.
    mkdir -p "$world"
    [ -z "$(ls -A "$world")" ] || die "$world is not empty"
    echo "$(basename "$world")-$(head -c 4 /dev/urandom | od -An -tx1 | tr -d ' ')" >"$world/world"
  fi
  [ ! -d "$world/old" ] || die "$world is up already"
  # Before anything runs: whoever is killed half-way leaves nothing behind.
  if [ "${2:-}" = --for ]; then
    touch "$world/coming"
    (exec setsid bash -c 'tail --pid="$1" -f /dev/null; while [ -e "$2/coming" ] && [ -e "/proc/$3" ]; do sleep 0.1; done; exec "$0" down "$2"' \
      "$support/hosts.sh" "$3" "$world" $$) \
      </dev/null >/dev/null 2>&1 &
    remember $! "$world/guard.pid"
    remember "$3" "$world/owner.pid"
    disown
  fi
  mkdir -p "$world/shared" "$cache"
  chmod 755 "$world"
  chmod 1777 "$world/shared"
  for name in "${places[@]}"; do
    for dir in "${private[@]}"; do mkdir -p "$world/$name/fs/$dir"; done
    chmod 1777 "$world/$name/fs/tmp"
    mkdir -p "$world/$name/fs/var/lib/boot.d" "$world/$name/fs/var/spool/cron/crontabs"
    [ ! -d /etc/nginx ] || cp -a /etc/nginx/. "$world/$name/fs/etc/nginx/"
    rm -rf "$world/$name/fs/etc/nginx/sites-enabled"
    mkdir -p "$world/$name/fs/etc/nginx/sites-enabled" "$world/$name/fs/var/log/nginx" "$world/$name/fs/var/lib/nginx"
  done
  keys "$world"
  [[ " $* " != *" --systemd "* ]] || echo systemd >"$world/init"
  for name in admin old new; do place_up "$world" "$name"; done
  rm -f "$world/coming"
}

enter() {
  local world=$1 name=$2 pid group
  pid=$(init_of "$world" "$name")
  shift 2
  for group in $(cgroups_of "$(world_id "$world")-$name"); do
    echo $$ >"$group/cgroup.procs" 2>/dev/null || true
  done
  unset XDG_CACHE_HOME XDG_STATE_HOME XDG_CONFIG_HOME XDG_RUNTIME_DIR TMPDIR SSH_AUTH_SOCK SSH_CONNECTION SSH_CLIENT
  export HOME=/root USER=root LOGNAME=root PATH="$PATH:/usr/sbin:/sbin"
  exec nsenter -t "$pid" -n -m -u -i -p -C -- "$@"
}

# Kills the first process, and with it all of the namespace. A v1 freezer would hold a killed process for ever.
place_off() {
  local world=$1 name=$2 group state pid file
  for group in $(cgroups_of "$(world_id "$world")-$name"); do
    [ ! -d "$group" ] || find "$group" -name freezer.state 2>/dev/null | while read -r state; do
      echo THAWED >"$state" 2>/dev/null || true
    done
  done
  for file in init outer; do
    pid=$(recall "$world/$name/$file.pid") || continue
    [ "$file" = outer ] || kill -9 "$pid" 2>/dev/null || true
    for i in $(seq 1000); do
      identity "$pid" >/dev/null || break
      [ "$i" != 500 ] || kill -9 "$pid" 2>/dev/null || true
      sleep 0.01
    done
  done
  # A frozen cgroup that is found again by its name would be frozen after the boot.
  for group in $(cgroups_of "$(world_id "$world")-$name"); do
    [ ! -d "$group" ] || find "$group" -mindepth 1 -depth -type d -exec rmdir {} + 2>/dev/null || true
  done
  rm -f "$world/$name/init.pid" "$world/$name/outer.pid"
}

power_cut() {
  local world=$1 name=$2
  address "$name" >/dev/null
  init_of "$world" "$name" >/dev/null
  # The cable first: what dies must not be able to say goodbye.
  in_net "$world" admin ip link del "l-$name"
  place_off "$world" "$name"
}

shut_down() {
  local world=$1 name=$2 pid i
  pid=$(init_of "$world" "$name")
  "$support/hosts.sh" enter "$world" "$name" systemctl --no-block poweroff 2>/dev/null
  for i in $(seq 3000); do
    identity "$pid" >/dev/null || break
    sleep 0.01
  done
  ! identity "$pid" >/dev/null || die "$name does not shut down"
  in_net "$world" admin ip link del "l-$name" 2>/dev/null || true
  place_off "$world" "$name"
}

power_on() {
  local world=$1 name=$2
  address "$name" >/dev/null
  ! recall "$world/$name/init.pid" >/dev/null || die "$name is on"
  find "$world/$name/fs/tmp" -mindepth 1 -delete 2>/dev/null || true
  place_up "$world" "$name"
}

wire() {
  local world=$1
  shift
  local running
  running=$(recall "$world/wire.pid" || true)
  if [ "$1" = off ]; then
    [ -n "$running" ] || return 0
    kill "$running"
    while identity "$running" >/dev/null; do sleep 0.01; done
    rm -f "$world/wire.pid" "$world/shared/wire"
    trunk_plain "$world"
    return
  fi
  [ $# = 3 ] || die "wire WORLD DELAY_MS LOSS_PERCENT RATE_MBIT"
  if [ -z "$running" ]; then
    mkfifo "$world/shared/wire"
    in_net "$world" admin ip link del t-old
    exec 5<>"$world/shared/wire"
    "$support/hosts.sh" enter "$world" admin "$bin/rehome-wire" t-old t-new <&5 >"$world/wire.out" 2>&1 5>&- &
    local outer=$!
    disown
    for _ in $(seq 500); do
      grep -q ready "$world/wire.out" && break
      kill -0 "$outer" 2>/dev/null || die "rehome-wire: $(cat "$world/wire.out")"
      sleep 0.01
    done
    # nsenter forked into the pid namespace: the child is the wire itself.
    running=$(cat "/proc/$outer/task/$outer/children")
    remember "${running%% *}" "$world/wire.pid"
    in_net "$world" admin ip -batch - <<'E'
link set t-old master br-old up
link set t-new master br-new up
E
  fi
  printf 'delay %s\nloss %s\nrate %s\n' "$1" "$2" "$3" 1<>"$world/shared/wire"
}

asked_by() {  # PID: is it this process or one that it descends from
  local pid=$$
  while [ "$pid" != 0 ]; do
    [ "$pid" != "$1" ] || return 0
    pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status" 2>/dev/null) && [ -n "$pid" ] || return 1
  done
  return 1
}

down() {
  local world=$1 name group pid id
  [ -f "$world/world" ] || return 0
  # Somebody who clears up all worlds that lie about must not end the one in which a test is running.
  if [ "${2:-}" != --force ] && pid=$(recall "$world/owner.pid") && ! asked_by "$pid"; then
    die "$world is in use by process $pid; --force ends it all the same"
  fi
  id=$(world_id "$world")
  if pid=$(recall "$world/guard.pid"); then
    # The guard itself calls this when its time has come.
    if [ "$pid" != $$ ]; then
      name=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || true)
      kill "$pid" ${name:+$name} 2>/dev/null || true
    fi
  fi
  for name in old new admin; do place_off "$world" "$name"; done
  for name in "${places[@]}"; do
    for group in $(cgroups_of "$id-$name"); do
      for _ in $(seq 100); do
        [ -d "$group" ] || break
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.02
      done
    done
  done
  rm -rf --one-file-system "$world"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  new) fresh ;;
  up) up "$@" ;;
  enter) enter "$@" ;;
  path) echo "$1/$2/fs$3" ;;
  pid) init_of "$1" "$2" ;;
  power-cut) power_cut "$@" ;;
  shutdown) shut_down "$@" ;;
  power-on) power_on "$@" ;;
  link)
    case $2 in down | up) in_net "$1" admin ip link set t-old "$2" ;; *) die "link WORLD down|up" ;; esac ;;
  wire) wire "$@" ;;
  down) down "$@" ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
