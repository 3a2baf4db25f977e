#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice: makes the slice, installs this checkout on
# all its workers, runs the trainer on all of them, and starts over (resuming)
# when the slice is preempted.
#
#   bash launch/run_tpu.sh --name=search --zone=us-west4-a --type=v5litepod-16 \
#     --bucket=gs://bucket/run -- \
#     --config=configs/stepsearch_qwen2_5_3b.py --config.data.train=gs://...
#
# Needs an authenticated gcloud. --spot takes a preemptible slice, --dry_run
# prints the commands instead of running them. What follows `--` goes to
# python -m stepsearch_jax.train, as on one machine.
set -euo pipefail
cd "$(dirname "$0")/.."

name="" zone="" type="" bucket="" spot="" dry_run="" retries=100
version="v2-alpha-tpuv5-lite"
usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; }
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --retries=*) retries="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; trainer flags go behind --" >&2; exit 1 ;;
  esac
  shift
done
for field in name zone type bucket; do
  [ -n "${!field}" ] || { echo "error: --$field is missing" >&2; exit 1; }
done

run() {
  if [ -n "$dry_run" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpu() { run gcloud compute tpus tpu-vm "$@" --zone="$zone"; }

case "$bucket" in
  gs://?*) ;;
  *) echo "error: --bucket must begin with gs://, got $bucket: every worker" \
       "writes there" >&2; exit 1 ;;
esac
[ $# -gt 0 ] || { echo "error: no trainer flags behind --" >&2; exit 1; }
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then
  echo "warning: uncommitted changes are not shipped, HEAD is" >&2
fi

flags=$(printf '%q ' "$@")
train="cd stepsearch_jax && .venv/bin/python -m stepsearch_jax.train \
--multihost --workdir=$bucket $flags"
setup="mkdir -p stepsearch_jax && tar xzf stepsearch_jax.tgz -C stepsearch_jax \
&& cd stepsearch_jax && bash -c 'source launch/venv.sh && ensure_venv tpu'"

archive=$(mktemp -d)/stepsearch_jax.tgz
run git archive --format=tar.gz --output="$archive" HEAD

attempt=0
while :; do
  state=""
  [ -n "$dry_run" ] || state=$(gcloud compute tpus tpu-vm describe "$name" \
    --zone="$zone" --format='value(state)' 2>/dev/null || true)
  if [ "$state" = PREEMPTED ] || [ "$state" = TERMINATED ]; then
    tpu delete "$name" --quiet
    state=""
  fi
  code=0
  if [ -z "$state" ]; then
    tpu create "$name" --accelerator-type="$type" --version="$version" \
      ${spot:+--spot} || code=$?
  fi
  if [ "$code" = 0 ]; then
    tpu scp "$archive" "$name:" --worker=all || code=$?
    [ "$code" != 0 ] || tpu ssh "$name" --worker=all --command="$setup" || code=$?
    [ "$code" != 0 ] || tpu ssh "$name" --worker=all --command="$train" || code=$?
  fi
  [ "$code" = 0 ] && break
  # 1 is the trainer's own error; everything else may be a lost machine.
  if [ "$code" = 1 ] || [ "$attempt" -ge "$retries" ]; then
    echo "error: ended with code $code; the same command resumes" >&2
    exit "$code"
  fi
  attempt=$((attempt + 1))
  echo "code $code: trying again ($attempt of $retries)" >&2
  sleep 30
done
[ -n "$dry_run" ] || echo "done; checkpoints and metrics: $bucket"
