#!/usr/bin/env bash
# Two servers on one machine: network, mount, uts and pid namespaces, each with its own /var/lib, /srv, /run,
# /etc/ssh, /etc/nginx, /root/.ssh and an sshd on port 22, joined by a veth pair. Needs root. Many worlds run side by side: names are
# random, and addresses repeat because each world has its own networks.
#   hosts.sh up WORLD            makes the world in the directory WORLD (kept short: unix sockets), starts both hosts
#   hosts.sh enter WORLD HOST command...      HOST is old or new
#   hosts.sh link WORLD down|up
#   hosts.sh wire WORLD DELAY_MS LOSS_PERCENT RATE_MBIT   a slow and lossy wire in place of the veth pair
#   hosts.sh power-cut WORLD HOST             kills the host's first process: all of it ends at once
#   hosts.sh power-on WORLD HOST              boots it again: sshd, then the programs of /var/lib/boot.d in order
#   hosts.sh down WORLD          ends all that it started and removes the world; safe twice
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
old_ip=10.77.0.1
new_ip=10.77.0.2

ip_of() { if [ "$1" = old ]; then echo $old_ip; else echo $new_ip; fi; }
ns_of() { echo "$(cat "$1/id")-$2"; }

boot() { # WORLD HOST
  local world=$1 host=$2 root=$1/$2 ns
  ns=$(ns_of "$world" "$host")
  rm -rf "$root/run"
  mkdir -p "$root"/{varlib,srv,run/sshd,root-ssh,etc-ssh,etc-nginx,varlog}
  chmod 700 "$root/root-ssh"
  : >"$root/ready"
  # The first process is a bash that reaps orphans; when it is killed the kernel ends the whole host.
  setsid ip netns exec "$ns" unshare -m -u -p --fork --mount-proc --propagation private \
    bash -c '
      set -e
      host=$1 root=$2
      exec 7>>"$root/ready"   # the world may lie under a directory that is covered below
      hostname "$host"
      mount --bind "$root/varlib" /var/lib
      mount --bind "$root/srv" /srv
      mount --bind "$root/run" /run
      mount --bind "$root/root-ssh" /root/.ssh
      mount --bind "$root/etc-ssh" /etc/ssh
      mount --bind "$root/etc-nginx" /etc/nginx
      mount --bind "$root/varlog" /var/log
      # ip netns exec mounts a fresh /sys without the cgroups; freezing services needs them.
      mount -t tmpfs tmpfs /sys/fs/cgroup 2>/dev/null && mkdir -p /sys/fs/cgroup/freezer && mount -t cgroup -o freezer cgroup /sys/fs/cgroup/freezer || true
      cd /
      /usr/sbin/sshd -E /var/log/sshd.log
      if [ -d /var/lib/boot.d ]; then
        for program in /var/lib/boot.d/*; do [ -x "$program" ] && "$program" >>/var/log/boot.log 2>&1 </dev/null; done
      fi
      echo up >&7
      exec 7>&-
      trap : CHLD
      while :; do sleep 3600 & wait $! || true; done' host "$host" "$root" >"$root/init.log" 2>&1 </dev/null &
  local outer=$!
  disown
  for _ in $(seq 500); do
    [ -s "$root/ready" ] && break
    kill -0 $outer 2>/dev/null || { echo "hosts.sh: $host did not boot:" >&2; cat "$root/init.log" >&2; return 1; }
    sleep 0.02
  done
  [ -s "$root/ready" ] || { echo "hosts.sh: $host did not boot in 10 s:" >&2; cat "$root/init.log" >&2; return 1; }
  pgrep -P $outer >"$root/init.pid"
}

up() {
  local world=$1 id ns host
  mkdir -p "$world"
  id=rh$(od -An -N3 -tx1 /dev/urandom | tr -d ' \n')
  echo "$id" >"$world/id"
  mkdir -p /root/.ssh
  for host in old new; do ip netns add "$id-$host"; done
  ip link add veth0 netns "$id-old" type veth peer name veth0 netns "$id-new"
  for host in old new; do
    ns=$id-$host
    ip -n "$ns" link set lo up
    ip -n "$ns" addr add "$(ip_of $host)/24" dev veth0
    ip -n "$ns" link set veth0 up
    mkdir -p "$world/$host"/{etc-ssh,root-ssh,etc-nginx}
    cp -r /etc/nginx/. "$world/$host/etc-nginx/"
    ssh-keygen -q -t ed25519 -N '' -C "$host" -f "$world/$host/etc-ssh/ssh_host_ed25519_key"
    ssh-keygen -q -t ed25519 -N '' -C "root@$host" -f "$world/$host/root-ssh/id_ed25519"
    cat >"$world/$host/etc-ssh/sshd_config" <<C
ListenAddress $(ip_of $host):22
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxStartups 100
C
  done
  for host in old new; do
    cat "$world/old/root-ssh/id_ed25519.pub" "$world/new/root-ssh/id_ed25519.pub" >"$world/$host/root-ssh/authorized_keys"
    for peer in old new; do
      echo "$(ip_of $peer),$peer $(cut -d' ' -f1,2 "$world/$peer/etc-ssh/ssh_host_ed25519_key.pub")"
    done >"$world/$host/root-ssh/known_hosts"
    printf 'Host old\n  HostName %s\nHost new\n  HostName %s\nHost *\n  User root\n' $old_ip $new_ip >"$world/$host/root-ssh/config"
    chmod 600 "$world/$host/root-ssh/"*
  done
  boot "$world" old
  boot "$world" new
}

power_cut() {
  local world=$1 host=$2 pid
  [ -s "$world/$host/init.pid" ] || return 0
  pid=$(cat "$world/$host/init.pid")
  kill -9 "$pid" 2>/dev/null || true
  for _ in $(seq 500); do kill -0 "$pid" 2>/dev/null || break; sleep 0.01; done
  rm -f "$world/$host/init.pid"
}

down() {
  local world=$1 host id
  [ -s "$world/id" ] || { rm -rf "$world"; return 0; }
  id=$(cat "$world/id")
  if [ -s "$world/wire.pid" ]; then kill "$(cat "$world/wire.pid")" 2>/dev/null || true; fi
  for host in old new; do
    power_cut "$world" "$host"
    ip netns del "$id-$host" 2>/dev/null || true
    rmdir /sys/fs/cgroup/freezer/rehome-"$id"-* 2>/dev/null || true
  done
  rm -rf "$world"
}

case ${1:-} in
  up) up "$2" ;;
  down) down "$2" ;;
  enter)
    world=$2 host=$3; shift 3
    exec nsenter -t "$(cat "$world/$host/init.pid")" -n -m -u -p -- "$@" ;;
  link) for host in old new; do
      ns=$(ns_of "$2" $host)
      if ip -n "$ns" link show tap0 >/dev/null 2>&1; then ip -n "$ns" link set tap0 "$3"; else ip -n "$ns" link set veth0 "$3"; fi
    done ;;
  wire)
    world=$2 program=${REHOME_WIRE:-$here/../../build/dev/bin/rehome-wire}
    ip -n "$(ns_of "$world" old)" link del veth0
    mkfifo "$world/wire.fifo"
    setsid "$program" "$(ns_of "$world" old)" "$(ns_of "$world" new)" tap0 "${3:-0}" "${4:-0}" "${5:-0}" <>"$world/wire.fifo" >"$world/wire.out" 2>&1 &
    echo $! >"$world/wire.pid"; disown
    for _ in $(seq 200); do grep -q ready "$world/wire.out" && break; sleep 0.02; done
    for host in old new; do
      ip -n "$(ns_of "$world" $host)" addr add "$(ip_of $host)/24" dev tap0
      ip -n "$(ns_of "$world" $host)" link set tap0 up
    done ;;
  power-cut) power_cut "$2" "$3" ;;
  power-on) boot "$2" "$3" ;;
  *) sed -n '2,15p' "$0" >&2; exit 2 ;;
esac
