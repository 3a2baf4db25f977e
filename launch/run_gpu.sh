#!/usr/bin/env bash
# Trains on GPUs: on this machine, or as a SLURM job on several.
#
#   bash launch/run_gpu.sh --workdir=runs/3b --config=configs/stepsearch_qwen2_5_3b.py
#   bash launch/run_gpu.sh --slurm --nodes=2 --gpus=8 -- --workdir=/shared/3b \
#     --config=configs/stepsearch_qwen2_5_3b.py
#
# --slurm submits a job that requeues itself when it is preempted (the trainer
# saves on SIGTERM and exits with code 75); --time=24:00:00 limits it. --dry_run
# prints what would run. --workdir, --config and what follows `--` go to
# python -m stepsearch_jax.train.
set -euo pipefail
cd "$(dirname "$0")/.."

slurm="" nodes=1 gpus=8 time="24:00:00" dry_run="" rest=()
while [ $# -gt 0 ]; do
  case "$1" in  # "--nodes 2" means "--nodes=2".
    --nodes | --gpus | --time | --workdir | --config)
      [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 1; }
      set -- "$1=$2" "${@:3}" ;;
  esac
  case "$1" in
    --slurm) slurm=1 ;;
    --nodes=*) nodes="${1#*=}" ;;
    --gpus=*) gpus="${1#*=}" ;;
    --time=*) time="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    --help | -h) sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    --workdir=* | --config=* | --config.*) rest+=("$1") ;;
    --) shift; rest+=("$@"); break ;;
    *) echo "error: unknown argument $1; trainer flags go behind --" >&2; exit 1 ;;
  esac
  shift
done
[ "${#rest[@]}" -gt 0 ] || { echo "error: no trainer flags" >&2; exit 1; }

train=(.venv/bin/python -m stepsearch_jax.train "${rest[@]}")
if [ -z "$slurm" ]; then
  if [ -n "$dry_run" ]; then
    printf '%q ' "${train[@]}"; echo
    exit 0
  fi
  source launch/venv.sh
  ensure_venv gpu
  code=75
  # Preempted by a signal to the trainer alone: go on where it stopped.
  while [ "$code" = 75 ]; do
    code=0
    "${train[@]}" || code=$?
  done
  exit "$code"
fi

script=$(cat <<SBATCH
#!/usr/bin/env bash
#SBATCH --job-name=stepsearch
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --time=$time
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
# Not killed when the first task ends: at a preemption each still saves.
srun --kill-on-bad-exit=0 $(printf '%q ' "${train[@]}")--multihost
code=\$?
if [ "\$code" = 75 ]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$code"
SBATCH
)
if [ -n "$dry_run" ]; then
  echo "$script"
  exit 0
fi
source launch/venv.sh
ensure_venv gpu
sbatch <<<"$script"
