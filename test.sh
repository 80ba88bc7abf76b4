#!/usr/bin/env bash
# Installs what is needed and runs the whole test suite; further words go to pytest: ./test.sh -k noise
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
set_up requirements.txt requirements-dev.txt
"$PY" -m ruff check .
"$PY" -m ruff format --check .
exec "$PY" -m pytest "$@"
