#!/usr/bin/env bash
# What `rehome check` finds, each provoked on real servers: every finding has its id, names its object, and says how to mend it.
# Check changes nothing, whatever it finds, and a setting that needs a restart of a server least of all.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

make_world

# A locale, an account and units that only one host has.
on old bash -c 'set -e
  mkdir /var/lib/locale; cp -a /usr/lib/locale/. /var/lib/locale/; cp -a /usr/lib/locale/C.utf8 /var/lib/locale/xx_XX.utf8
  mount --bind /var/lib/locale /usr/lib/locale
  cp /etc/passwd /run/passwd; echo "plain:x:4242:4242::/var/lib/plain:/bin/bash" >>/run/passwd; mount --bind /run/passwd /etc/passwd
  mkdir -p /var/lib/plain/.ssh; cp /root/.ssh/authorized_keys /var/lib/plain/.ssh/; chown -R 4242:4242 /var/lib/plain; chmod 700 /var/lib/plain/.ssh'
on new bash -c 'set -e
  mkdir -p /var/lib/units; mount --bind /var/lib/units /etc/systemd/system
  printf "[Service]\nEnvironmentFile=/var/lib/worker.env\nExecStart=/bin/true\n" >/etc/systemd/system/worker.service
  printf "# old in a comment\nDATABASE_URL=postgresql://app:app-secret@10.77.0.1:5432/bad\n" >/var/lib/worker.env
  printf "[Service]\nExecStart=/bin/true --mode older --at bold.example\n" >/etc/systemd/system/other.service
  mkdir -p /var/lib/postgresql; mount -t tmpfs -o size=110m,mode=755 tmpfs /var/lib/postgresql; chown postgres /var/lib/postgresql
  mkdir -p /srv/small; mount -t tmpfs -o size=4m,nr_inodes=5 tmpfs /srv/small
  # A file system without extended attributes and ACLs, one that is read-only, a file where a directory shall be.
  mkdir -p /srv/bare /srv/sealed; mount -t ramfs ramfs /srv/bare; mount --bind -o ro /srv/sealed /srv/sealed; touch /srv/file; mkdir /srv/letters; touch /srv/letters/one
  mount --bind /dev/null /usr/bin/rsync'

pg init old 15 5432 cron.database_name=bad max_prepared_transactions=4 max_connections=20 max_locks_per_transaction=10 \
  autovacuum_freeze_max_age=100000 autovacuum_naptime=1 autovacuum_vacuum_cost_delay=100 autovacuum_vacuum_cost_limit=1 \
  autovacuum_analyze_threshold=1000000000 autovacuum_vacuum_threshold=1000000000 autovacuum_vacuum_insert_threshold=-1 &
servers=$!
pg init new 15 5432 wal_level=replica max_replication_slots=1 max_wal_senders=0 max_logical_replication_workers=0 max_worker_processes=0
wait $servers

sql old postgres "CREATE DATABASE bad TEMPLATE template0 LC_COLLATE 'xx_XX.UTF-8' LC_CTYPE 'C.UTF-8'" >/dev/null
for n in $(seq 130); do echo "CREATE TABLE t$n(id int PRIMARY KEY);"; done | pg psql old 5432 -q -d bad -f - >/dev/null
sql old bad "
  CREATE TABLE keyless(a int);
  CREATE TABLE keyless_json(a json);
  CREATE TABLE derived(doc jsonb, id text GENERATED ALWAYS AS (doc->>'id') STORED PRIMARY KEY);
  CREATE UNLOGGED TABLE sessions(id int PRIMARY KEY);
  CREATE TABLE big(id int PRIMARY KEY, t text);
  INSERT INTO big SELECT g, repeat('x', 100) FROM generate_series(1, 450000) g;
  CREATE COLLATION german (provider = libc, locale = 'xx_XX.UTF-8');
  CREATE TABLE words(id int PRIMARY KEY, w text COLLATE german);
  CREATE FOREIGN DATA WRAPPER nothing;
  CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing;
  CREATE FOREIGN TABLE far(a int) SERVER elsewhere;
  SELECT lo_create(4711);
  INSERT INTO pg_extension(oid, extname, extowner, extnamespace, extrelocatable, extversion) VALUES
    (900001, 'pg_cron', 10, 'public'::regnamespace, false, '1.6'), (900002, 'nosuch', 10, 'public'::regnamespace, false, '1.0');
  CREATE SCHEMA cron; CREATE TABLE cron.job(jobid int PRIMARY KEY, database text, active boolean); INSERT INTO cron.job VALUES (1, 'bad', true);
  CREATE ROLE weak LOGIN PASSWORD 'weak'" >/dev/null
sql old bad "SELECT pg_create_logical_replication_slot('others', 'pgoutput')" >/dev/null
sql old bad "CREATE SUBSCRIPTION inbound CONNECTION 'host=127.0.0.1 port=1 dbname=none' PUBLICATION none WITH (connect = false)" >/dev/null 2>&1
sql old bad "ALTER SUBSCRIPTION inbound ENABLE" >/dev/null
sql old bad "CREATE TRIGGER same BEFORE UPDATE ON t3 FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger(); ALTER TABLE t3 ENABLE ALWAYS TRIGGER same;
  CREATE TRIGGER other BEFORE UPDATE ON t3 FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger(); ALTER TABLE t3 ENABLE REPLICA TRIGGER other" >/dev/null
sql old bad "CREATE PUBLICATION everything FOR ALL TABLES" >/dev/null
sql old postgres "CREATE DATABASE words TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de' LOCALE 'C.UTF-8'" >/dev/null
sql new postgres "CREATE DATABASE words TEMPLATE template0 LOCALE 'C.UTF-8'" >/dev/null
# A hundred thousand transactions later every table is old enough; at that pace its vacuum lasts for minutes.
sql old bad "DO \$\$ BEGIN FOR i IN 1..101000 LOOP BEGIN INSERT INTO t2 VALUES (i); EXCEPTION WHEN division_by_zero THEN END; END LOOP; END \$\$" >/dev/null
pg psql old 5432 -q -d bad -c "BEGIN; INSERT INTO t1 VALUES (1); PREPARE TRANSACTION 'left over'" >/dev/null
sql new postgres "CREATE ROLE weak LOGIN PASSWORD 'weak'" >/dev/null
sql new postgres "CREATE DATABASE bad TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'" >/dev/null
sql new bad "CREATE TABLE mine(a int); CREATE SCHEMA cron; CREATE TABLE cron.job(jobid int PRIMARY KEY, database text, active boolean); INSERT INTO cron.job VALUES (1, 'bad', true);
  INSERT INTO pg_extension(oid, extname, extowner, extnamespace, extrelocatable, extversion) VALUES (900001, 'pg_cron', 10, 'public'::regnamespace, false, '1.6')" >/dev/null

on old bash -c 'set -e
  mkdir -p /srv/data/inner /srv/data/many
  mount -t tmpfs tmpfs /srv/data/inner
  for i in 1 2 3 4 5 6 7 8 9; do echo $i >/srv/data/many/$i; done
  truncate -s 100M /srv/data/large
  mkdir -p /srv/half/one /srv/half/two; truncate -s 600M /srv/half/one/file /srv/half/two/file
  echo 1 >/run/of-root.pid
  mkdir -p -m 700 /srv/secret/below; chmod 700 /srv/secret
  mkdir /srv/attributes /srv/one /srv/two; touch /srv/attributes/one; setfattr -n user.one -v 1 /srv/attributes/one; setfacl -m u:1:r /srv/attributes/one
  chown plain /srv/data/many/1'
# Somebody at the target works with the source's database.
on new env PGPASSWORD=weak setsid psql -h 10.77.0.1 -U weak -d bad -c "SELECT pg_sleep(120)" >/dev/null 2>&1 &
spawned beside
on new setsid python3 -m http.server --bind 127.0.0.1 8100 --directory /srv/small >/dev/null 2>&1 &
spawned beside

on old setsid python3 -c 'import time; f = open("/srv/attributes/one", "w"); time.sleep(600)' >/dev/null 2>&1 &
background+=($!)
for i in $(seq 100); do
  [ -z "$(sql old postgres "SELECT 1 FROM pg_stat_activity WHERE query LIKE '%to prevent wraparound%' AND backend_type = 'autovacuum worker' LIMIT 1")" ] || break
  sleep 0.1
done

before() { for h in old new; do sql $h postgres "SELECT name, setting FROM pg_settings WHERE source <> 'default' ORDER BY 1; SELECT slot_name FROM pg_replication_slots; SELECT datname FROM pg_database; SELECT pubname FROM pg_publication; SELECT evtname FROM pg_event_trigger"; on $h cat /var/lib/postgresql/15/main/postgresql.auto.conf; on $h find /srv -printf '%p %s %m %T@ %C@\n' | sort; done; }
before >"$world/shared/before"
say "provoked"

# found FILE NAME... with lines "id<TAB>object<TAB>mend" on standard input: each is among the findings, and those with an error or
# warning all have a mend.
found() {
  cat >"$world/shared/expected"
  python3 - "$1" "$world/shared/expected" <<'P'
import json, re, sys
findings = [e for e in map(json.loads, open(sys.argv[1])) if e.get("kind") == "finding"]
bad = [f"no mend: {f}" for f in findings if f["level"] != "note" and not f["mend"]]
bad += [f"a secret: {f}" for f in findings if "app-secret" in json.dumps(f)]
n = 0
for line in open(sys.argv[2]):
    level, id, where, mend = line.rstrip("\n").split("\t")
    n += 1
    if not any(f["id"] == id and f["level"] == level and re.search(where, f["object"] + ": " + f["message"]) and re.search(mend, f["mend"]) for f in findings):
        bad.append(f"not found: {level} {id} {where} / {mend}; of that id there are {[f for f in findings if f['id'] == id]}")
if bad:
    print("\n".join(bad)); sys.exit(1)
print(f"ok  {n} findings of {len(findings)}")
P
}
checked() { # STATUS: check --json, its exit status
  local status=0
  rehome --json check >"$world/shared/findings" 2>"$world/shared/findings.err" || status=$?
  [ $status = "$1" ] || { cat "$world/shared/findings" "$world/shared/findings.err"; fail "check ended with $status instead of $1"; }
}

yaml=$world/shared/rehome.yaml
cat >"$yaml" <<'E'
name: bad
source: {ssh: root@old, boot: none}
target: {local: true, boot: none, psql: /usr/bin/no-psql, state: /srv/letters}
link: {from: target, to: root@old}
stores:
  - name: db
    postgres: {databases: [bad], host: /run/postgresql, os_user: postgres}
  - name: files
    files: {path: /srv/data, target: /srv/small}
  - name: attributes
    files: {path: /srv/attributes, target: /srv/bare}
  - name: sealed
    files: {path: /srv/one, target: /srv/sealed}
  - name: none
    files: {path: /srv/none}
  - name: file
    files: {path: /srv/two, target: /srv/file}
services:
  - name: app
    command: {start: [/bin/true], stop: [/bin/true], pid_file: /run/app.pid}
traffic:
  - name: web
    gate: {listen: "127.0.0.1:8100", application: "127.0.0.1:8000"}
E
# A server whose files only it sees, as in a container: it has its own by relative names.
on old mount -t tmpfs tmpfs /var/lib/postgresql/15
checked 4
on old umount /var/lib/postgresql/15
T=$'\t'
found "$world/shared/findings" <<E
error${T}postgres.data_directory${T}source.*/var/lib/postgresql/15/main cannot be seen${T}mount its data directory
error${T}postgres.wal_level${T}target.*replica${T}wal_level = logical, then restart
error${T}postgres.max_replication_slots${T}target.*is 1${T}ALTER SYSTEM SET max_replication_slots
error${T}postgres.max_wal_senders${T}target.*is 0${T}ALTER SYSTEM SET max_wal_senders
error${T}postgres.max_logical_replication_workers${T}target${T}ALTER SYSTEM SET max_logical
error${T}postgres.max_worker_processes${T}target${T}ALTER SYSTEM SET max_worker
error${T}postgres.max_locks_per_transaction${T}source${T}max_locks_per_transaction = [0-9]+, then restart
error${T}postgres.prepared${T}source.*left over${T}ROLLBACK PREPARED
warning${T}postgres.wraparound${T}source: an anti-wraparound autovacuum runs${T}wait for its end
warning${T}postgres.wraparound${T}source: database bad.*due.*public.big${T}VACUUM .FREEZE.
note${T}postgres.keyless${T}database bad.*tables without a usable replica identity${T}
error${T}postgres.identity_full${T}database bad.*keyless_json.*json${T}primary key
error${T}postgres.generated_identity${T}database bad.*public.derived .id.${T}key of plain columns
warning${T}postgres.unlogged${T}database bad.*1 unlogged${T}logged
warning${T}postgres.large_objects${T}database bad.*1 large object${T}plan
error${T}postgres.always_triggers${T}database bad.*public.t3: same${T}ALTER TABLE public.t3 ENABLE TRIGGER same
error${T}postgres.replica_triggers${T}database bad.*public.t3: other${T}ALTER TABLE public.t3 DISABLE TRIGGER other
error${T}postgres.all_tables${T}database bad.*publication everything, slot others${T}its tables by name
warning${T}postgres.foreign_slots${T}database bad.*others${T}target
error${T}postgres.subscriptions${T}database bad.*inbound${T}DISABLE
warning${T}postgres.pg_cron${T}source: database bad.*pg_cron${T}cron.unschedule
warning${T}postgres.pg_cron${T}target.*pg_cron${T}cron.unschedule
note${T}postgres.foreign_tables${T}database bad.*far${T}
error${T}postgres.extension${T}target.*nosuch${T}install
error${T}postgres.collation${T}target.*locale xx_XX.UTF-8 of database bad${T}locale-gen
error${T}postgres.collation${T}target.*collation .*german${T}locale-gen
error${T}postgres.not_empty${T}target: database bad.*mine${T}drop or rename
error${T}postgres.encoding${T}target: database bad.*LATIN1.*UTF8${T}drop it
error${T}postgres.space${T}target.*/var/lib/postgresql${T}make room
error${T}postgres.psql${T}target.*psql${T}postgresql-client
warning${T}postgres.client_on_target${T}target.*psql \(process [0-9]+${T}point it
warning${T}postgres.unit_on_target${T}unit worker.service.*/var/lib/worker.env.*10.77.0.1${T}target's own server
error${T}files.space${T}target: /srv/small${T}room
error${T}files.inodes${T}target: /srv/small${T}inodes
error${T}files.xattrs${T}target: /srv/bare.*has 1${T}use a file system that does
error${T}files.acls${T}target: /srv/bare.*has 1${T}use a file system that does
error${T}files.read_only${T}target: /srv/sealed${T}mount it writable
error${T}files.missing${T}source: /srv/none.*no such directory${T}correct the store's path
error${T}files.missing${T}target: /srv/file.*not a directory${T}correct the path
note${T}files.writers${T}source: /srv/attributes.*python3 .process [0-9]+${T}services
error${T}files.mount${T}source: /srv/data.*/srv/data/inner${T}exclude .*/inner.*as a store instead of the tree
warning${T}files.owners${T}target.*plain${T}useradd.*owner: number
error${T}files.rsync${T}target${T}install
error${T}agent.supervisor${T}source${T}boot: to cron
error${T}agent.supervisor${T}target${T}directory:
error${T}traffic.port_in_use${T}target: traffic web.*127.0.0.1:8100.*python3${T}another port
error${T}traffic.application${T}source.*traffic web.*127.0.0.1:8000${T}start the application
error${T}site.state${T}target: state /srv/letters.*: one${T}empty, or not there
E
grep -q other.service "$world/shared/findings" && fail "a unit that only has a similar word was named"

on new bash -c 'echo "upstream lone { server 127.0.0.1:8500; } server { listen 127.0.0.1:80; location / { proxy_pass http://lone; } }" >/etc/nginx/sites-enabled/lone
  sed -i "1i master_process off;" /etc/nginx/nginx.conf; nginx'

# An account and a role without rights. The locales and the port that were wrong stay wrong: only what is new is looked for.
cat >"$yaml" <<'E'
name: bad
source: {ssh: plain@old, boot: systemd}
target: {local: true, boot: "directory:/no/boot.d"}
link: {from: target, to: nobody@old}
stores:
  - name: db
    postgres: {databases: [bad], host: 127.0.0.1, user: weak, password: {env: WEAK}}
  - name: files
    files: {path: /srv/data, target: /srv/small, exclude: [/inner/]}
  - name: secret
    files: {path: /srv/secret, target: /srv/not-secret}
  - name: nowhere
    files: {path: /srv/attributes, target: /proc/rehome}
services:
  - name: app
    command: {start: [/no/such], stop: [/bin/true], pid_file: /run/of-root.pid}
traffic:
  - name: low
    gate: {listen: "127.0.0.1:81", application: "127.0.0.1:8000"}
  - name: socket
    gate: {take: unix_socket, listen: "unix:/srv/gate.sock", application: "unix:/srv/app.sock"}
  - name: far
    gate: {take: unix_socket, listen: "unix:/srv/data/inner/gate.sock", application: "unix:/srv/data/app.sock"}
  - name: strange
    gate: {listen: "192.0.2.1:8100", application: "127.0.0.1:8000"}
  - name: same
    gate: {listen: "127.0.0.1:8400", application: "0.0.0.0:8400"}
  - name: lone
    nginx: {files: [/etc/nginx/sites-enabled/lone], application: "127.0.0.1:8500", gate: "127.0.0.1:8501", front: "http://127.0.0.1/"}
  - name: port
    gate: {take: redirect, listen: "127.0.0.1:8200", application: "127.0.0.1:8300"}
E
WEAK=weak checked 4
found "$world/shared/findings" <<E
error${T}link.ssh${T}target to nobody@old${T}key
error${T}agent.supervisor${T}source.*cannot write into /etc/systemd/system${T}boot: to cron
error${T}agent.supervisor${T}target.*there is no directory /no/boot.d${T}at boot
error${T}traffic.port${T}target: traffic strange.*192.0.2.1:8100${T}no interface
error${T}service.rights${T}source: service app.*another account${T}root, or that account
error${T}traffic.port_rights${T}source: traffic low.*127.0.0.1:81${T}port from 1024
error${T}unix_socket.rights${T}source.*traffic socket.*/srv/app.sock${T}root
error${T}unix_socket.application${T}source.*traffic socket.*/srv/app.sock is not a socket${T}start the application
error${T}unix_socket.file_system${T}source.*traffic far.*two file systems${T}beside the application
error${T}unix_socket.directory${T}target.*traffic far.*No such file${T}make it
error${T}traffic.same_address${T}source.*traffic same.*127.0.0.1:8400.*0.0.0.0:8400${T}another address
error${T}nginx.workers${T}target.*traffic lone.*no worker${T}master_process on
error${T}redirect.iptables${T}source.*traffic port${T}root
error${T}store${T}store secret: .*/srv/secret.*Permission denied${T}able to read it
error${T}service.missing${T}source.*/no/such${T}correct the command
warning${T}service.freeze${T}source.*cannot be frozen as a whole${T}root
error${T}files.not_writable${T}target: /proc/rehome.*no file can be made${T}root
error${T}postgres.superuser${T}source.*weak is not a superuser${T}SUPERUSER
error${T}postgres.superuser${T}target.*weak is not a superuser${T}SUPERUSER
warning${T}files.root${T}source.*not root${T}use root
warning${T}files.watch${T}source.*cannot be followed${T}root
E

# Another provider of locales in a database that is there already; one that the target's server does not have.
on new mount -o remount,size=1g /var/lib/postgresql
pg init new 13 5434
yaml_of() { # DATABASE SOURCE TARGET: keys of the two servers
  cat >"$yaml" <<E
name: newer
source: {ssh: ${AS:-root}@old, boot: none}
target: {local: true, boot: "directory:/var/lib/boot.d"}
link: {from: target, to: root@old}
stores:
  - name: db
    postgres:
      databases: [$1]
      source: {$2}
      target: {$3}
E
}
here() { echo "host: /run/postgresql, os_user: postgres, port: $1"; }
yaml_of words "$(here 5432)" "$(here 5432)"
checked 4
found "$world/shared/findings" <<E
warning${T}agent.supervisor${T}source.*nothing starts the agent again${T}boot: to cron
warning${T}postgres.locale${T}target: database words.*C.UTF-8 libc, .*C.UTF-8 icu de${T}drop it
E
# Each has the room that it needs, beside that server and beside each other they have not.
yaml_of words "$(here 5432)" "$(here 5432)"
cat >>"$yaml" <<'E'
  - name: one
    files: {path: /srv/half/one, target: /var/lib/postgresql/one}
  - name: two
    files: {path: /srv/half/two, target: /var/lib/postgresql/two}
E
checked 4
found "$world/shared/findings" <<E
error${T}site.space${T}target: the file system of /var/lib/postgresql.*needs 1.*db .*, one .*, two ${T}another path
E
! grep -qE '(files|postgres).space' "$world/shared/findings" || fail "one of them alone was said to be too large"
yaml_of words "$(here 5432)" "$(here 5434)"
checked 4
found "$world/shared/findings" <<E
error${T}postgres.locale_provider${T}target.*database words.*13 does not have${T}PostgreSQL 15 or later
warning${T}postgres.downgrade${T}target.*13.*15${T}newer
E
AS=plain yaml_of words "host: '::1', password: {env: OLD}" "host: '[::1]', password: {env: NEW}"
OLD=$(pg password old) NEW=$(on new cat /var/lib/postgresql/superuser-password) checked 4
found "$world/shared/findings" <<E
warning${T}postgres.locale${T}target: database words${T}drop it
error${T}postgres.passfile${T}source.*no file with the other server's password${T}server's account
E
yaml_of wrods "$(here 5432)" "$(here 5432)"
checked 4
found "$world/shared/findings" <<E
error${T}postgres.database${T}source: database wrods.*does not exist${T}did you mean words
E
yaml_of words "$(here 5999)" "host: 10.77.0.2, user: nobody"
checked 4
found "$world/shared/findings" <<E
error${T}postgres.connect${T}source.*5999${T}is the server running
error${T}postgres.connect${T}target.*nobody${T}pg_hba.conf
E
before | diff "$world/shared/before" - || fail "check changed something"

# Devices, to where their like cannot be made.
on new sh -c 'mkdir /srv/devices; mknod /srv/devices/null c 1 3'
cat >"$yaml" <<'E'
name: newer
source: {local: true, boot: none}
target: {ssh: plain@old, boot: none}
link: {from: source, to: plain@old}
stores:
  - name: files
    files: {path: /srv/devices, target: /tmp/devices}
E
checked 4
found "$world/shared/findings" <<E
error${T}files.devices${T}target: /tmp/devices.*1 device${T}exclude
warning${T}files.root${T}target.*nothing closes the tree${T}root
E

# A source newer than pg_dump and than the target. Its server first needs the room of the other.
pg stop old 15 5432
pg init old 17 5433
sql17() { pg psql old 5433 -qAt -v ON_ERROR_STOP=1 "$@"; }
sql17 -c "CREATE DATABASE newer TEMPLATE template0 LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'" >/dev/null
yaml_of newer "$(here 5433)" "$(here 5432)"
checked 4
found "$world/shared/findings" <<E
error${T}postgres.pg_dump${T}15.*17${T}postgresql-client-17
error${T}postgres.pg_restore${T}15.*17${T}postgresql-client-17
warning${T}postgres.downgrade${T}target.*15.*17${T}newer
error${T}postgres.locale_provider${T}target.*database newer.*15 does not have${T}PostgreSQL 17 or later
E

# Versions that are not known: an old one, and one that calls itself newer on its way here.
pg init old 12 5435
cat >"$world/shared/newer.py" <<'P'
import socket, threading
listener = socket.create_server(("127.0.0.1", 5499))
def carry(a, b, change):
    while data := a.recv(65536): b.sendall(change(data))
    b.shutdown(socket.SHUT_WR)
while True:
    client, server = listener.accept()[0], socket.create_connection(("10.77.0.1", 5433))
    threading.Thread(target=carry, args=(client, server, lambda d: d), daemon=True).start()
    threading.Thread(target=carry, args=(server, client, lambda d: d.replace(b"17.10", b"19.10")), daemon=True).start()
P
on new setsid python3 "$world/shared/newer.py" >"$world/shared/newer.out" 2>&1 &
background+=($!)
for i in $(seq 100); do on new bash -c ': </dev/tcp/127.0.0.1/5499' 2>/dev/null && break; sleep 0.1; done
yaml_of newer "$(here 5435)" "host: 127.0.0.1, port: 5499, password: {env: PASSWORD}"
PASSWORD=$(pg password old) checked 4
found "$world/shared/findings" <<E
error${T}postgres.version${T}source.*12.22 is older than 13${T}pg_upgrade
error${T}postgres.version${T}target.*19.10 is newer.*18${T}newer rehome
E
say "every finding was seen"
