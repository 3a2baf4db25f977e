"""Rewards of a user's own function, `config.reward.function`.

  def reward(question, turns, answer):
    return outcome, [reward of each turn]

It is called once per rollout with what the policy was asked (`types.Question`),
its turns (`types.Turn`: action, content, documents, ...) and its answer, or
None. The outcome is paid at the last token that the policy wrote, a turn's
reward at the token that closed the turn's action.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from stepsearch_jax import types, user_functions

FIELD = "reward.function"


@dataclasses.dataclass(frozen=True)
class Earned:
  """What a function pays for one trajectory."""

  outcome: float
  turns: list[float]


def check(reference: str) -> None:
  """Raises a UserError unless `reference` names a function or is empty."""
  if reference:
    user_functions.load(FIELD, reference)


def earned(reference: str, trajectory: types.Trajectory) -> Earned:
  """Returns what the function pays for a trajectory.

  Raises:
    UserError: it raised, or returned something else; names the function, the
      trajectory and the value.
  """
  function = user_functions.load(FIELD, reference)
  question = trajectory.question
  of = f"question {question.id!r}, episode {trajectory.episode}"
  try:
    found = function(question, tuple(trajectory.turns), trajectory.answer)
  except Exception as error:
    raise types.UserError(
      f"{FIELD} {reference!r} raised {type(error).__name__}: "
      f"{types.first_line(error)} ({of})"
    ) from error
  checked = _checked(found, len(trajectory.turns))
  if checked is None:
    value = " ".join(repr(found).split())
    raise types.UserError(
      f"{FIELD} {reference!r}: expected (outcome, rewards of "
      f"{len(trajectory.turns)} turns) as finite numbers for {of}, got "
      f"{value[:200]}"
    )
  return checked


def _checked(found: Any, turns: int) -> Earned | None:
  """Returns numbers, or None where they are something else."""
  try:
    outcome, per_turn = found
    earned = Earned(float(outcome), [float(x) for x in per_turn])
  except (TypeError, ValueError):
    return None
  fits = len(earned.turns) == turns
  return earned if fits and all(
    math.isfinite(x) for x in (earned.outcome, *earned.turns)
  ) else None


def tokens(earned: Earned, trajectory: types.Trajectory) -> np.ndarray:
  """Returns [T] float32, what is paid at each token."""
  paid = np.zeros(len(trajectory.tokens), np.float32)
  for turn, reward in zip(trajectory.turns, earned.turns, strict=True):
    paid[turn.action_position] += reward
  written = np.nonzero(trajectory.policy_mask)[0]
  if len(written):
    paid[written[-1]] += earned.outcome
  return paid
