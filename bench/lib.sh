# What the benches that run in a world share: source it before tests/e2e/lib.sh. The release build where there is one, and how busy
# the machine is.
if [ -z "${REHOME_BIN:-}" ]; then
  for preset in release dev; do
    REHOME_BIN=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/build/$preset/bin
    [ ! -x "$REHOME_BIN/rehome" ] || break
  done
fi
[ -x "$REHOME_BIN/rehome" ] || { echo "build first: cmake --build --preset release" >&2; exit 1; }
export REHOME_BIN
program() { echo "rehome $(git -C "$repo" rev-parse --short HEAD 2>/dev/null || echo unknown), the build in $REHOME_BIN"; }
# Ticks of all processors so far: busy, and all.
cpu() { awk '/^cpu / { for (i = 2; i <= 9; i++) all += $i; print all - $5 - $6, all }' /proc/stat; }
# A measurement at an offered load says something where that load leaves most of the machine idle.
cpu_report='
def share_of_cpu(file, measures):
    ticks = [tuple(map(int, line.split())) for line in open(file)]
    share = sum(c - a for a, _, c, _ in ticks) / max(1, sum(d - b for _, b, _, d in ticks))
    print(f"busy under the load, without a switch or a copy: {100 * share:.0f} % of the machine")
    if share > 0.25: print("WARNING: THE LOAD, OR OTHER WORK, USES MORE THAN A QUARTER OF THIS MACHINE: WHAT IS MEASURED HERE IS ITS QUEUE", file=sys.stderr)
    measures.append({"name": "share of the machine that is busy without a switch or a copy", "ours": share, "rival": 0.25, "ratio": share / 0.25, "unit": "share"})
'
