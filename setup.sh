# Sourced by run.sh and test.sh: sets PY to a Python that satisfies the requirements.
# PYTHON=..., VIRTUAL_ENV or CONDA_PREFIX is used as it is if it does; else .venv is made here and filled.

satisfied() { # python, requirement files...
  [ -x "$(command -v "$1")" ] && "$1" - "${@:2}" <<'CHECK' 2>/dev/null
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
if sys.version_info < (3, 11):
    sys.exit(1)
for path in sys.argv[1:]:
    for line in open(path):
        line = line.split("#")[0].strip()
        if line:
            need = Requirement(line)
            try:
                if not need.specifier.contains(version(need.name), prereleases=True):
                    sys.exit(1)
            except PackageNotFoundError:
                sys.exit(1)
CHECK
}

find_python() { # requirement files...: sets PY if there is a Python that satisfies them; makes and installs nothing
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    satisfied "$PYTHON" "$@" || { echo "error: PYTHON=$PYTHON lacks what $* ask for; install them there or unset PYTHON" >&2; exit 2; }
    PY=$PYTHON; return
  fi
  for candidate in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" "$PWD/.venv/bin/python"; do
    [ -n "$candidate" ] && satisfied "$candidate" "$@" && { PY=$candidate; return; }
  done
  return 1
}

set_up() { # requirement files...
  local candidate base=""
  if find_python "$@"; then return; fi
  PY=$PWD/.venv/bin/python
  if [ ! -x "$PY" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { base=$candidate; break; }
    done
    [ -n "$base" ] || { echo "error: no Python 3.11 or newer found; install one, or name it with PYTHON=..." >&2; exit 2; }
    echo "making .venv with $("$base" --version)"
    "$base" -m venv .venv || { rm -rf .venv; echo "error: $base -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
  fi
  echo "installing $*, several GB with the CUDA build of torch"
  "$PY" -m pip install --quiet --disable-pip-version-check "${@/#/-r}" ||
    { echo "error: pip could not install $*; its message stands above" >&2; exit 2; }
}
