#!/usr/bin/env bash
# Lint, types and tests, on CPU. Arguments go to pytest, for instance
#   bash launch/test.sh -m "not slow"      bash launch/test.sh -k rollout
# Without arguments, a table at the end says how many lines of each module ran.
set -euo pipefail
source "$(dirname "$0")/venv.sh"
ensure_venv test
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
export COVERAGE_CORE=sysmon  # Cheap from Python 3.12 on.
.venv/bin/ruff check .
.venv/bin/mypy
[ $# -gt 0 ] || set -- --cov --cov-report=term
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
