"""Guards of a training run: signs of trouble, and where a NaN began.

Search agents collapse in a few known ways (answers without tags, endless
invalid actions, entropy at zero, exploding KL or gradients, falling reward),
and a few signs come before. The sentinel looks at the metrics of every step
and says in a sentence which limit was broken for `patience` steps in a row;
what happens then is the run's decision.
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
from stepsearch_jax.run import signs
from stepsearch_jax.types import expect

ACTIONS = ("off", "warn", "halt", "rollback")


class CollapseError(RuntimeError):
  """The run collapsed and was asked to halt."""


@dataclasses.dataclass(frozen=True)
class MonitorSpec:
  """What counts as a collapse, and what a run does about it.

  Attributes:
    action: "off", "warn", "halt" or "rollback".
    lr_factor: multiplies both learning rates at each rollback.
    rollbacks: how many before the run halts.
    limits: see `signs.Limits`.
  """

  action: str
  lr_factor: float
  rollbacks: int
  limits: signs.Limits

  def __post_init__(self):
    expect(self.action in ACTIONS, "sentinel.action",
           f"one of {ACTIONS}", self.action)
    expect(0 < self.lr_factor <= 1, "sentinel.lr_factor",
           "a factor above 0 and at most 1", self.lr_factor)
    expect(self.rollbacks >= 0, "sentinel.rollbacks", "0 or more",
           self.rollbacks)


@dataclasses.dataclass(frozen=True)
class Alarm:
  """A limit that was broken.

  Attributes:
    message: a sentence for the user.
    since: the first step of the streak.
    collapse: whether the run has collapsed; else it is an early sign.
    new: whether this is the first step at which the sentence holds.
  """

  message: str
  since: int
  collapse: bool
  new: bool


class Sentinel:
  """Counts broken limits from step to step."""

  def __init__(
    self, limits: signs.Limits, state: Mapping[str, Any] | None = None
  ):
    """Starts afresh, or from the `state` of an interrupted run."""
    self._limits = limits
    self._checks = signs.collapses(limits) + signs.signs(limits)
    state = state or {}
    self._since: dict[str, int] = dict(state.get("since", {}))
    self._best: float | None = state.get("best")
    self._kept: list[str] = list(state.get("kept", []))
    self._kl: list[float] = list(state.get("kl", []))
    self.alarms: list[Alarm] = []  # Of the newest step.
    self.trouble_since = 0

  @property
  def state(self) -> dict[str, Any]:
    """JSON-able memory, for the checkpoint."""
    return {"since": dict(self._since), "best": self._best,
            "kept": list(self._kept), "kl": list(self._kl)}

  def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Alarms of this step, collapses first.

    Args:
      step: optimizer steps done.
      metrics: verl-named metrics of the step.
    """
    metrics = dict(metrics) | self._derived(step, metrics)
    checks, reward = list(self._checks), metrics["critic/score/mean"]
    if self._best is not None:
      checks.insert(0, signs.check(
        "critic/score/mean", "below", self._best - self._limits.reward_drop,
        f"the mean reward is {{value:.3g}} since step {{since}}, after "
        f"{self._best:.3g} at its best", collapse=True,
      ))
    self._best = reward if self._best is None else max(self._best, reward)
    self.alarms = []
    for check in checks:
      if check.metric not in metrics:
        continue  # For instance while only the value model trains.
      if not check.is_broken(metrics[check.metric]):
        self._since.pop(check.metric, None)
        if check.metric not in self._kept:
          self._kept.append(check.metric)
        continue
      self._note(check, step, metrics[check.metric])
    collapsed = [alarm.since for alarm in self.alarms if alarm.collapse]
    if collapsed:
      self.trouble_since = min(collapsed)
    return self.alarms

  def _note(self, check: signs.Check, step: int, value: float) -> None:
    """Counts a broken limit, and adds the alarm once it lasts."""
    since = self._since.setdefault(check.metric, step)
    lasted = step - since + 1
    message = check.alarm(value, since, check.metric in self._kept)
    if message and lasted >= self._limits.patience:
      self.alarms.append(Alarm(
        message, since, check.collapse, new=lasted == self._limits.patience
      ))

  def _derived(
    self, step: int, metrics: Mapping[str, float]
  ) -> dict[str, float]:
    """Metrics that need more than the step's own."""
    found = {}
    explained = metrics.get("critic/vf_explained_var")
    if "critic/kl" in metrics:
      self._kl = [*self._kl, metrics["critic/kl"]][-self._limits.patience - 1 :]
      found["growth of critic/kl"] = self._kl[-1] - self._kl[0]
    # Of a run without a value model all values are 0.
    learns = "critic/vf_loss" in metrics and step > self._limits.settling
    if learns and explained is not None:
      found["settled critic/vf_explained_var"] = explained
    return found


def must_roll_back(
  spec: MonitorSpec, alarms: Sequence[Alarm], rollbacks: int
) -> bool:
  """Reports the new alarms of a step and decides what happens.

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
    if alarm.new:
      logging.warning("%s %s", "collapse?" if alarm.collapse else "watch out:",
                      alarm.message)
  collapses = [alarm for alarm in alarms if alarm.collapse]
  if not collapses or spec.action == "warn":
    return False
  if spec.action == "halt" or rollbacks >= spec.rollbacks:
    raise CollapseError(
      f"{collapses[0].message}: halted"
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
