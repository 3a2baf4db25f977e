#!/usr/bin/env bash
# Lints and tests, on CPU. Arguments go to pytest, for instance
#   bash launch/test.sh -m "not slow"      bash launch/test.sh -k rollout
set -euo pipefail
source "$(dirname "$0")/venv.sh"
ensure_venv test
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2
.venv/bin/ruff check .
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
