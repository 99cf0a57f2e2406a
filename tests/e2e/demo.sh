#!/usr/bin/env bash
# The README's first command: it ends well and in time, and its verdict says what its clients were told, on both ways.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$out"
echo old >verdict.json
REHOME_PRESET=none-such "$repo/demo" --json verdict.json >/dev/null 2>&1 && { echo "a demo without programs ended well"; exit 1; }
[ ! -e verdict.json ] || { echo "a demo that failed left the verdict of another one"; exit 1; }
SECONDS=0
"$repo/demo" --json verdict.json --keep-report report.html
# 180 s on an idle machine; ./check runs other tests beside it.
[ $SECONDS -lt 540 ] || { echo "the demo took $SECONDS s"; exit 1; }
grep -q '</html>' report.html
python3 - <<'P'
import json, sys
verdict = json.load(open("verdict.json"))
for way in ("switch", "reverse"):
    v = verdict[way]
    bad = {k: v[k] for k in ("lost", "doubled", "failed", "both_accepting") if v[k]}
    if bad or v["acknowledged"] < 100 or v["longest_wait_ms"] <= 0 or "resets" not in v: sys.exit(f"{way}: {v}")
P
echo "1 passed, 0 failed"
