"""Does step-wise credit help? StePPO beside PPO, GRPO and plain imitation.

  stepsearch study --config=configs/credit_study.py --workdir=studies/credit

Every seed has one start, an imitation of imperfect demonstrations, that all
arms share. All arms that learn from rewards play the same number of rollouts
and take the same number of optimizer steps; each chooses its learning rate
from the same three values on the validation split. Beside them: the start, the
start without retrieval (random passages) and with gold passages, imitation of
the same demonstrations for about the same time, behind the start and in one
schedule from nothing, and imitation of clean ones.

Hardware: 2 CPU cores per run. Time and score: see the table in README.md.
"""

from collections.abc import Callable

import ml_collections

from configs import quickstart

BASELINES = ("ppo", "imitation for the same time")
TUNING_SEED = 1000  # Takes part in no comparison.
# Around the quickstart's. Of 5e-5, 1e-4 and 2e-4 the smallest was best.
RATES = (2.5e-5, 5e-5, 1e-4)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
  """The quickstart's config with 1,000 test questions; same arguments."""
  config = quickstart.get_config(arg)
  if config.data.eval_limit == 0:
    config.data.world.heldout = 1000
    config.eval.every = 20
  return config


def study(
  add: Callable[..., None], config: ml_collections.ConfigDict
) -> None:
  """Lists the arms of a study around `config`; the first one is the start."""
  groups = dict(questions=config.batch.questions // 4, rollouts=4)
  # 300 more steps of imitation took 277 s, 60 training steps 259 s (means of
  # five seeds, commit eeeec51).
  imitated = config.warm_start.steps
  add("start", seeds=10, total_steps=0)
  add("closed book", seeds=5, total_steps=0,
      rollout=dict(documents="random"))
  add("gold passages", seeds=5, total_steps=0,
      rollout=dict(documents="gold"))
  add("imitation for the same time", seeds=5, total_steps=0,
      warm_start=dict(steps=imitated // 2))  # From the start on.
  add("imitation in one schedule", seeds=5, from_start=False, total_steps=0,
      warm_start=dict(steps=imitated * 3 // 2))
  add("clean imitation", seeds=5, from_start=False, total_steps=0,
      warm_start=dict(steps=imitated * 3 // 2, wording="usual", whole=0.0,
                      repeat=0.0, give_up=0.0))
  add("ppo", seeds=10, rates=RATES, method="ppo")
  add("grpo", seeds=10, rates=RATES, method="grpo",
      batch=groups)
  add("reinforce", seeds=5, rates=RATES, method="reinforce")
  add("steppo", seeds=10, rates=RATES, method="steppo")
  add("steppo without gain", seeds=5, rates=RATES, method="steppo",
      reward=dict(information_gain=False))
  add("steppo without penalty", seeds=5, rates=RATES, method="steppo",
      reward=dict(redundancy_penalty=False))
  add("steppo without keys", seeds=5, rates=RATES, method="steppo",
      reward=dict(search_key_reward=False))
  add("ppo + bonus per search", seeds=10, rates=RATES, method="ppo",
      reward=dict(search_bonus=0.1))
  for method in ("turn_ppo", "bilevel", "tips"):
    add(method, seeds=5, rates=RATES, method=method)
  for method in ("igpo", "gigpo", "turn_rloo", "stratified", "llds_grpo"):
    add(method, seeds=5, rates=RATES, method=method, batch=groups)
  # Equal rollouts leave no room to ask for more: its clip-higher and no KL.
  add("dapo", seeds=5, rates=RATES, method="dapo",
      batch=groups | dict(dynamic_limit=1))
  add("grpo + step rewards", seeds=5, rates=RATES, method="grpo",
      batch=groups, reward=dict(outcome_only=False))


def sweep(add: Callable[..., None]) -> None:
  """The two sides of the main comparison, one seed each."""
  for method in ("ppo", "steppo"):
    add(arg=f"method={method}")
