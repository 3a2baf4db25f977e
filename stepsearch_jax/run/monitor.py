"""Guards of a training run: collapse alarms, and where a NaN began.

Search agents collapse in a few known ways (answers without tags, endless
invalid actions, entropy at zero, exploding KL or gradients, falling reward).
The sentinel looks at the metrics of every step and says which limit was broken
for `patience` steps in a row; what happens then is the run's decision.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.ppo import records
from stepsearch_jax.types import expect

ACTIONS = ("off", "warn", "halt", "rollback")


class CollapseError(RuntimeError):
  """The run collapsed and was asked to halt."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What counts as a collapse; see `configs/common.py`.

  Attributes:
    invalid_share: most questions with an invalid action.
    unanswered_share: most questions without a closed answer.
    entropy: least policy entropy, in nats.
    kl: largest KL to the reference, in nats per token.
    grad_norm: largest gradient norm of the policy before clipping.
    reward_drop: largest fall of the mean score below its best so far.
    patience: steps in a row that break a limit before it is an alarm.
  """

  invalid_share: float
  unanswered_share: float
  entropy: float
  kl: float
  grad_norm: float
  reward_drop: float
  patience: int

  def __post_init__(self):
    expect(self.patience >= 1, "sentinel.patience", "1 or more steps",
           self.patience)


@dataclasses.dataclass(frozen=True)
class MonitorSpec:
  """What counts as a collapse, and what a run does about it.

  Attributes:
    action: "off", "warn", "halt" or "rollback".
    lr_factor: multiplies both learning rates at each rollback.
    rollbacks: how many before the run halts.
    limits: see `Limits`.
  """

  action: str
  lr_factor: float
  rollbacks: int
  limits: Limits

  def __post_init__(self):
    expect(self.action in ACTIONS, "sentinel.action",
           f"one of {ACTIONS}", self.action)
    expect(0 < self.lr_factor <= 1, "sentinel.lr_factor",
           "a factor above 0 and at most 1", self.lr_factor)
    expect(self.rollbacks >= 0, "sentinel.rollbacks", "0 or more",
           self.rollbacks)


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A limit that was broken; `since` is the first step of the streak."""

  message: str
  since: int


class Sentinel:
  """Counts broken limits from step to step."""

  def __init__(self, limits: Limits, state: Mapping[str, Any] | None = None):
    """Starts afresh, or from the `state` of an interrupted run."""
    self._limits = limits
    state = state or {}
    self._since: dict[str, int] = dict(state.get("since", {}))
    self._best: float | None = state.get("best")
    self.trouble_since = 0

  @property
  def state(self) -> dict[str, Any]:
    """JSON-able memory, for the checkpoint."""
    return {"since": dict(self._since), "best": self._best}

  def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Alarms of this step.

    Args:
      step: optimizer steps done.
      metrics: verl-named metrics of the step.
    """
    limits, reward = self._limits, metrics["critic/score/mean"]
    floor = None if self._best is None else self._best - limits.reward_drop
    checks = [
      ("env/invalid_share", "above", limits.invalid_share),
      ("env/unanswered_share", "above", limits.unanswered_share),
      ("actor/entropy", "below", limits.entropy),
      ("critic/kl", "above", limits.kl),
      ("actor/grad_norm", "above", limits.grad_norm),
    ]
    if floor is not None:
      checks.append(("critic/score/mean", "below", floor))
    self._best = reward if self._best is None else max(self._best, reward)
    alarms = []
    for name, side, limit in checks:
      if name not in metrics:
        continue  # For instance while only the value model trains.
      value = metrics[name]
      broken = value > limit if side == "above" else value < limit
      if not broken:
        self._since.pop(name, None)
        continue
      since = self._since.setdefault(name, step)
      if step - since + 1 >= limits.patience:
        alarms.append(Alarm(
          f"{name} = {value:.4g} is {side} {limit:.4g} since step {since}",
          since,
        ))
    if alarms:
      self.trouble_since = min(alarm.since for alarm in alarms)
    return alarms


def must_roll_back(
  spec: MonitorSpec, alarms: Sequence[Alarm], rollbacks: int
) -> bool:
  """Reports the alarms of a step and decides what happens.

  Args:
    spec: what the run does about a collapse.
    alarms: of this step.
    rollbacks: how often the run went back already.

  Returns:
    Whether the run has to go back to an older checkpoint.

  Raises:
    CollapseError: it has to halt.
  """
  if spec.action == "off":
    return False
  for alarm in alarms:
    logging.warning("collapse? %s", alarm.message)
  if not alarms or spec.action == "warn":
    return False
  if spec.action == "halt" or rollbacks >= spec.rollbacks:
    raise CollapseError(
      f"{alarms[0].message}: halted"
      + (f" after {rollbacks} rollbacks" if rollbacks else "")
      + "; the last checkpoints stand (limits: config.sentinel)"
    )
  return True


class Rollbacks:
  """The list of a run's rollbacks, on file so that a restart knows them.

  A rollback is noted before it happens and marked as done after it, so that a
  run that is killed in between still goes back, at the lower rate.
  """

  def __init__(self, path: epath.Path):
    """Reads the file, if there is one."""
    self._path = path
    self._rows = json.loads(path.read_text()) if path.exists() else []

  def __len__(self) -> int:
    """How often the run went back."""
    return len(self._rows)

  @property
  def pending(self) -> int | None:
    """Step before which the run still has to go back; None if it has not."""
    if not self._rows or self._rows[-1]["done"]:
      return None
    return self._rows[-1]["before"]

  def begin(self, before: int, write: bool = True) -> None:
    """Notes that the run goes back to a checkpoint before step `before`."""
    self._rows.append({"before": before, "done": False})
    self._write(write)

  def finish(self, write: bool = True) -> None:
    """Notes that the newest rollback has happened."""
    self._rows[-1]["done"] = True
    self._write(write)

  def _write(self, write: bool) -> None:
    if write:
      files.write_text(self._path, json.dumps(self._rows) + "\n")


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def first_nonfinite(**groups: types.Tree) -> str:
  """Names the first tensor that holds a NaN or an infinity.

  Args:
    **groups: pytrees in the order in which the data flow through them.

  Returns:
    For instance "policy/trunk/layers/mlp/up_kernel", or "" if all are finite.
  """
  for group, tree in groups.items():
    flags = jax.device_get(_finite(tree))
    for path, fine in jax.tree_util.tree_leaves_with_path(flags):
      if not fine:
        return group + "".join(
          f"/{getattr(key, 'key', getattr(key, 'name', key))}" for key in path
        )
  return ""


def first_nonfinite_of(
  experience: records.Experience, learner: records.LearnerState
) -> str:
  """The first tensor of a step that is not finite, in data-flow order."""
  return first_nonfinite(
    token_rewards=experience.batch.token_rewards,
    logp=experience.logp,
    reference_logp=experience.reference_logp,
    values=experience.values,
    advantages=experience.advantages,
    policy=learner.policy.params,
    value=None if learner.value is None else learner.value.params,
  )
