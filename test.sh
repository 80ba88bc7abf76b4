#!/usr/bin/env bash
# Installs what is needed and runs the whole test suite; further words go to pytest: ./test.sh -k noise
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
set_up requirements.txt requirements-dev.txt
"$PY" -m ruff check .
"$PY" -m ruff format --check .
if [ $# -gt 0 ]; then exec "$PY" -m pytest "$@"; fi

# Two halves side by side, since most tests use one core: those that start and kill whole runs, with a few others, take as long as the rest.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RUNS=(tests/test_{resume,run_sh,scripts,inputs,audit,ieg,ieg_images,ieg_seg,lpl,image_labels}.py)
LOG=$(mktemp)
trap 'rm -f "$LOG"; kill $(jobs -p) 2>/dev/null || true' EXIT
"$PY" -m pytest "${RUNS[@]}" >"$LOG" 2>&1 &
CODE=0
"$PY" -m pytest "${RUNS[@]/#/--ignore=}" || CODE=$?
wait $! || CODE=$?
cat "$LOG"
exit $CODE
