"""A small search agent on the embedded world, from nothing, on a laptop.

  bash launch/quickstart.sh            (or, inside the environment:)
  python -m stepsearch_jax.train --config=configs/quickstart.py \
    --workdir=runs/quickstart

Hardware: 2 CPU cores. Time and score: see the README's table.
Outcome-only PPO with the same budget:
  --config=configs/quickstart.py:method=ppo
"""

from collections.abc import Callable

import ml_collections

from configs import arguments, common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """Config with arguments `method` and `runlocal` (seconds, not minutes)."""
  arg = arguments.parse_arg(arg, method="steppo", runlocal=False)
  config = common.base()
  config.method = arg.method
  config.total_steps = 60

  config.model.dtype = "float32"
  config.model.remat = "none"
  config.model.size = dict(
    family="qwen2", hidden=128, mlp=256, layers=3, heads=4, kv_heads=2,
    vocab=1024, tied=True,
  )

  config.retrieval.topk = 1  # One sentence: the query decides.
  config.rollout.template = "compact"
  config.rollout.max_turns = 6
  config.rollout.retrieval_delay = 8
  config.rollout.slots = 64
  config.rollout.context = 160
  config.rollout.block = 8
  config.rollout.max_prompt = 36
  config.rollout.max_turn = 14
  config.rollout.max_observation = 20
  config.rollout.answer_room = 8
  config.rollout.extend_rows = (4, 16, 64)
  config.rollout.extend_tokens = (20,)

  # Until more of it gains little: rewards teach what demonstrations cannot.
  config.warm_start.steps = 600
  config.warm_start.lr = 3e-3
  config.warm_start.trajectories = 16000
  config.warm_start.rows = 24
  config.warm_start.row_length = 160

  config.batch.questions = 64
  config.ppo.mini_batch = 32
  config.ppo.micro_rows = 8
  # The paper has 1: then all that comes later counts for every token, and the
  # value model has less of it to explain (.18 of the variance, .37 with .95).
  config.ppo.lam = 0.95
  config.ppo.policy_lr = 5e-5
  config.ppo.value_lr = 1e-3
  config.ppo.policy_warmup_ratio = 0.05

  config.eval.every = 10
  config.checkpoint.every = 20

  if arg.runlocal:
    config.total_steps = 2
    config.warm_start.steps = 4
    config.warm_start.trajectories = 64
    config.batch.questions = 8
    config.ppo.mini_batch = 8
    config.rollout.slots = 8
    config.rollout.compile_ahead = False
    config.data.eval_limit = 8
  return config


def sweep(add: Callable[..., None]) -> None:
  """Three seeds of StePPO and of the outcome-only baseline."""
  for method in ("steppo", "ppo"):
    for seed in range(3):
      add(arg=f"method={method}", seed=seed)
