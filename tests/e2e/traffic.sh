#!/usr/bin/env bash
# A bare service, taken by redirect: clients that open a connection for each request see nothing of begin, cancel, a begin that is
# killed half-way, a switch and a reboot of the old host; an event stream is cut by choice, and counted; complete sees the clients.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

rules() { on "$1" iptables -t mangle -S PREROUTING | grep -c rehome: || true; }
no_rules() { local h; for h in old new; do [ "$(rules $h)" = 0 ] || fail "rules are left on $h after $1"; done; }
clients() { # NAME ADDRESS: 200 requests a second from admin until it is told to end
  on admin python3 "$world/shared/clients.py" "$2" >"$world/shared/$1.json" 2>"$world/shared/$1.err" &
  spawned "$1"
}
end_clients() { # NAME: none failed; prints who answered
  finish "$1"
  python3 - "$1" "$world/shared/$1.json" <<'P'
import json, sys
r = json.load(open(sys.argv[2]))
print(f"  {sys.argv[1]}: {r}")
sys.exit(f"requests failed: {r}" if r["failed"] or sum(r["by"].values()) < 100 else 0)
P
}

make_world
cat >"$world/shared/app.py" <<'P'
import http.server, os, sys, time
class App(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def do_GET(self):
        body = sys.argv[1].encode()
        self.send_response(200)
        if self.path == "/events":
            self.end_headers()
            while True:
                self.wfile.write(b"data: " + body + b"\n\n")
                time.sleep(0.1)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    def handle_error(self, *a): pass
server = Server(("0.0.0.0", 9000), App)
open("/run/app.pid", "w").write(str(os.getpid()))
server.serve_forever()
P
cat >"$world/shared/clients.py" <<'P'
import collections, json, signal, socket, sys, threading, time
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *a: stop.set())
by, why, lock, longest = collections.Counter(), collections.Counter(), threading.Lock(), [0.0]
def one():
    s = socket.create_connection((sys.argv[1], 9000), 15)
    with s:
        s.settimeout(15)
        s.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        answer = b""
        while chunk := s.recv(4096): answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head: raise OSError("answered " + head[:40].decode("latin1"))
    return body.decode()
def client():
    while not stop.is_set():
        began = time.time()
        try:
            name = one()
            with lock: by[name] += 1
        except OSError as e:
            with lock: why[str(e)] += 1
        took = time.time() - began
        with lock: longest[0] = max(longest[0], took)
        stop.wait(max(0, 0.04 - took))
threads = [threading.Thread(target=client) for _ in range(8)]
for t in threads: t.start()
while not stop.is_set(): time.sleep(0.1)
for t in threads: t.join()
print(json.dumps({"by": by, "failed": sum(why.values()), "why": why, "longest_ms": round(1000 * longest[0])}))
P
for host in old new; do
  on $host bash -s <<E
set -e
mkdir -p /srv/app && head -c 200000 /dev/urandom >/srv/app/file
cat >/var/lib/app-start <<'S'
#!/bin/sh
[ ! -e /run/app.pid ] || ! kill -0 "\$(cat /run/app.pid)" 2>/dev/null || exit 0
rm -f /run/app.pid
setsid python3 "$world/shared/app.py" $host </dev/null >/var/log/app.log 2>&1 &
for i in \$(seq 200); do [ ! -s /run/app.pid ] || exit 0; sleep 0.05; done
exit 1
S
printf '#!/bin/sh\nkill -9 "\$(cat /run/app.pid)"\n' >/var/lib/app-stop
chmod 755 /var/lib/app-start /var/lib/app-stop
ln -sf /var/lib/app-start /var/lib/boot.d/zz-app
E
done
on new sh -c 'rm -rf /srv/app/*'
on old /var/lib/app-start
yaml=$world/shared/rehome.yaml
cat >"$yaml" <<E
name: bare
source: {ssh: root@old, boot: "directory:/var/lib/boot.d"}
target: {local: true, boot: "directory:/var/lib/boot.d"}
link: {from: target, to: root@old}
stores:
  - name: tree
    files: {path: /srv/app}
services:
  - name: app
    command: {start: [/var/lib/app-start], stop: [/var/lib/app-stop], pid_file: /run/app.pid}
traffic:
  - name: api
    gate: {application: "0.0.0.0:9000", listen: "127.0.0.1:9001", take: redirect}
    longer_requests: cut
max_pause: 4s
drain_deadline: 1s
E
rehome plan >"$world/shared/plan.out"
for kind in "keep-alive clients" "long requests" uploads "event streams" websockets; do
  grep -q "$kind" "$world/shared/plan.out" || { cat "$world/shared/plan.out"; fail "the plan does not say what happens to $kind"; }
done

say "a begin that is killed half-way, and cancel"
clients first 10.77.0.1
on new sh -c "echo \$\$ >'$world/shared/controller.pid'; exec '$bin/rehome' --file '$yaml' -q begin" >"$world/shared/begin.out" 2>&1 &
begin_pid=$!
spawned begin
# At its first rule, which is the target's: the source has none.
on new timeout 60 sh -c "until iptables -t mangle -S PREROUTING | grep -q rehome; do :; done; kill -9 \$(cat '$world/shared/controller.pid')" || fail "begin put no rule in"
wait $begin_pid && fail "begin was not killed"
rehome -q cancel
no_rules "a cancelled half of begin"
on new sh -c 'kill -9 "$(cat /run/app.pid)" 2>/dev/null; rm -rf /run/app.pid /srv/app/*; true'
say "begin and cancel"
rehome -q begin
[ "$(rules old) $(rules new)" = "1 1" ] || fail "begin put no rule in"
sleep 1
rehome -q cancel
no_rules cancel
on new sh -c 'kill -9 "$(cat /run/app.pid)" 2>/dev/null; rm -rf /run/app.pid /srv/app/*; true'
end_clients first

say "begin and switch, with an event stream open, and a client that was there before"
cat >"$world/shared/older.py" <<'P'
import http.client, time
c, n = http.client.HTTPConnection("10.77.0.1", 9000, timeout=20), 0
try:
    while True:
        c.request("GET", "/")
        body = c.getresponse().read().decode()
        # Another connection would be another client.
        if n == 0: s = c.sock
        if c.sock is not s: raise OSError("closed")
        n += 1
        time.sleep(0.1)
except (OSError, http.client.HTTPException) as e:
    print(n, body, type(e).__name__, e)
P
on admin python3 "$world/shared/older.py" >"$world/shared/older" 2>&1 &
background+=($!)
older=$!
sleep 0.5
clients second 10.77.0.1
rehome -q begin
on admin curl -sN http://10.77.0.1:9000/events >"$world/shared/events" 2>/dev/null &
spawned events
events=$!
sleep 3
rehome status >"$world/shared/status"
grep -q "1 connection is open for longer than requests have to finish (1.0 s).*it is cut at the switch" "$world/shared/status" || { cat "$world/shared/status"; fail "status does not tell of the stream"; }
grep -q "1 connection to the application does not come through the gate.*a switch ends it" "$world/shared/status" || { cat "$world/shared/status"; fail "status does not tell of the client of before"; }
# Where nothing may be cut, the switch does not begin: nobody has waited for it.
sed 's/longer_requests: cut/longer_requests: back_out/' "$yaml" >"$world/shared/careful.yaml"
(yaml=$world/shared/careful.yaml; rehome -q switch) >"$world/shared/careful.out" 2>&1 && fail "a switch began that had to back out"
grep -q "no switch now: 1 connection is open .*a switch would back out" "$world/shared/careful.out" || { cat "$world/shared/careful.out"; fail "the refusal does not say why"; }
kill -0 $events || fail "the stream was cut all the same"
kill -0 $older || { cat "$world/shared/older"; fail "the client of before begin was not left alone"; }
rehome --json switch >"$world/shared/switch.json"
wait $events || true
wait $older
grep -qE "^[0-9]{2,} old " "$world/shared/older" || { cat "$world/shared/older"; fail "the client of before begin did not stay with the application"; }
python3 - "$world/shared/switch.json" <<'P'
import json, sys
l = [e for e in map(json.loads, open(sys.argv[1])) if e.get("kind") == "result"][-1]["ledger"]
print("  ledger:", l)
sys.exit(f"the ledger is wrong: {l}" if l["cut"] != 1 or l["held"] == 0 or l["longest_wait_ms"] < 100 or l["dropped"] or l["resets"] or l["past_gate"] != 1 else 0)
P
rehome -q report --out "$world/shared/report.html"
grep -A1 "Past the gate</th>" "$world/shared/report.html" | grep -q '<td class="n">1</td></tr>$' || { grep -A1 "Past the gate</th>" "$world/shared/report.html"; fail "the report does not tell of the client of before"; }
sleep 1
rehome -q complete >"$world/shared/complete.out" 2>&1 && fail "complete did not see the clients of the old address"
grep -q "came to the source's address" "$world/shared/complete.out" || { cat "$world/shared/complete.out"; fail "complete refused for another reason"; }
rehome status | grep -q "connections came to this address in the last minute" || fail "status does not tell of the clients at the old address"
end_clients second

say "the old host reboots"
hosts power-cut "$world" old
hosts power-on "$world" old
for i in $(seq 100); do [ "$(rules old)" = 0 ] || break; sleep 0.1; done
[ "$(rules old)" = 1 ] || fail "the rule did not come back after a reboot"
# Its link comes back by itself; who came meanwhile waits.
[ "$(on admin curl -sS -m 20 http://10.77.0.1:9000/)" = new ] || fail "the old address does not lead to the new side"
clients third 10.77.0.1
sleep 2
end_clients third
clients fourth 10.77.0.2
sleep 1
rehome -q complete --anyway
no_rules complete
sleep 1
end_clients fourth
say "1 passed, 0 failed"
