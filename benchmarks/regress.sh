#!/usr/bin/env bash
# Measures the quick figures and compares their ratios (not times: machines differ) with those in benchmarks/speed.json.
# A ratio that got worse by more than 10 % is measured a second time, and the better of the two counts.
#
#   ./benchmarks/regress.sh [flags of speed.py, as --only training]
#
# Exit codes: 0 no ratio lost, 1 one did (each is listed), 2 nothing to compare with or a wrong flag, 3 could not measure.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh
find_python requirements.txt || { echo "error: no Python with what requirements.txt asks for; run ./test.sh once" >&2; exit 2; }
NEW=$(mktemp -d)
trap 'rm -rf "$NEW"' EXIT
for turn in 1 2; do
  code=0
  "$PY" benchmarks/speed.py --quick "$@" --out "$NEW/$turn.json" --page "" >&2 || code=$?
  [ "$code" -eq 0 ] || exit $((code == 2 ? 2 : 3))
  "$PY" benchmarks/_speed_table.py "$NEW"/*.json --against benchmarks/speed.json || code=$?
  [ "$code" -eq 1 ] || exit "$code"
done
exit 1
