"""StePPO beside PPO where answers are rarely right.

  stepsearch study --config=configs/weak_start_study.py --workdir=studies/weak

The study of credit_study.py from a start that has imitated for a third of the
time: it still mostly fails, so that the answer's reward is rare. How long was
decided before any run learned, by what starts of 100, 150 and 200 steps answer
of the validation questions of the tuning seed: none, .08 and .21. All arms have
one learning rate that was not tuned; from the better start it hardly mattered.

Hardware: 2 CPU cores per run. Time and score: see README.md.
"""

from collections.abc import Callable

import ml_collections

from configs import credit_study

BASELINES = credit_study.BASELINES
TUNING_SEED = credit_study.TUNING_SEED

sweep = credit_study.sweep


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The other study's config with a third of its imitation; same arguments."""
  config = credit_study.get_config(arg)
  config.warm_start.steps //= 3
  config.ppo.policy_lr = 1e-4
  return config


def study(
  add: Callable[..., None], config: ml_collections.ConfigDict
) -> None:
  """Lists the arms; the first one is the start."""
  groups = dict(questions=config.batch.questions // 4, rollouts=4)
  add("start", seeds=5, total_steps=0)
  # As long as training, by the clock; see credit_study.py.
  add("imitation for the same time", seeds=5, total_steps=0,
      warm_start=dict(steps=config.warm_start.steps * 3 // 2))
  add("ppo", seeds=5, method="ppo")
  add("grpo", seeds=5, method="grpo", batch=groups)
  add("steppo", seeds=5, method="steppo")
  add("steppo without penalty", seeds=5, method="steppo",
      reward=dict(redundancy_penalty=False))
  add("ppo + bonus per search", seeds=5, method="ppo",
      reward=dict(search_bonus=0.1))
