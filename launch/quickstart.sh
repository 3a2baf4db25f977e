#!/usr/bin/env bash
# Trains a small search agent from nothing on this machine: world, tokenizer,
# warm start, StePPO, evaluation. Arguments go to the trainer, for instance
#   bash launch/quickstart.sh --workdir=runs/seed1 --config.seed=1
set -euo pipefail
case " $* " in
  *" --help "* | *" -h "*) sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
esac
source "$(dirname "$0")/venv.sh"
ensure_venv
workdir=(--workdir=runs/quickstart)
for argument in "$@"; do
  case "$argument" in --workdir=* | --workdir) workdir=() ;; esac
done
exec .venv/bin/python -m stepsearch_jax.train \
  --config=configs/quickstart.py "${workdir[@]}" "$@"
