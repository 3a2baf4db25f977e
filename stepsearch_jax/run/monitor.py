"""Guards of a training run: collapse alarms, and where a NaN began.

Search agents collapse in a few known ways (answers without tags, endless
invalid actions, entropy at zero, exploding KL or gradients, falling reward).
The sentinel looks at the metrics of every step and says which limit was broken
for `patience` steps in a row; what happens then is the run's decision.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from stepsearch_jax import files

ACTIONS = ("off", "warn", "halt", "rollback")


class CollapseError(RuntimeError):
  """The run collapsed and was asked to halt."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What counts as a collapse; see `configs/common.py` for the defaults.

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

  @property
  def state(self) -> dict[str, Any]:
    """JSON-able memory, for the checkpoint."""
    return {"since": dict(self._since), "best": self._best}

  def observe(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """Alarms of this step.

    Args:
      step: optimiser steps done.
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
    return alarms


class Rollbacks:
  """The list of a run's rollbacks, on file so that a restart knows them."""

  def __init__(self, path: epath.Path):
    """Reads the file, if there is one."""
    self._path = path
    self._rows = json.loads(path.read_text()) if path.exists() else []

  def __len__(self) -> int:
    """How often the run went back."""
    return len(self._rows)

  def add(self, since: int, to: int, write: bool = True) -> None:
    """Notes that trouble from step `since` on sent the run back to `to`."""
    self._rows.append({"since": since, "to": to})
    if not write:
      return
    files.write_text(self._path, json.dumps(self._rows) + "\n")


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def first_nonfinite(**groups) -> str:
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
