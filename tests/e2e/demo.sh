#!/usr/bin/env bash
# The README's first command: it ends well, and its verdict says what its clients were told, on both ways.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$out"
"$repo/demo" --json verdict.json --keep-report report.html
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
