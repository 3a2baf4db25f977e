"""What every advantage estimator is given and gives back.

An estimator is a function of (Inputs, EstimatorSpec) that returns Estimates.
It is called inside `jax.jit`, on the whole batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.ppo import records, specs

# What a function is tried out on; any numbers will do.
_TRIED_TOKENS, _TRIED_TURNS = 64, 8


@flax.struct.dataclass
class Inputs:
  """A scored batch, as estimators see it.

  Attributes:
    rewards: [B, T] float32, reward of each token, the KL of policy tokens
      already subtracted where it is part of the reward. Other tokens have 0,
      except sampled ones that are not trained (reward.eos = dropped): theirs
      belongs to the last policy token before (`gae.credited`).
    values: [B, T] float32, value of the state in which token t was chosen;
      zeros without a value model.
    logp: [B, T] float32, log-probabilities of the sampled tokens.
    masks: which tokens take part (all three are the policy mask, except in
      the released preset).
    group: [B] int32, equal for the rollouts of one question.
    turn: [B, T] int32, turn of each policy token from 0 on, -1 elsewhere.
    anchor: [B, U] int32, state in which each turn began; equal numbers are
      equal states of one question, -1 is a turn that did not happen.
    searches: [B] int32, searches that were answered.
  """

  rewards: types.Leaf
  values: types.Leaf
  logp: types.Leaf
  masks: records.Masks
  group: types.Leaf
  turn: types.Leaf
  anchor: types.Leaf
  searches: types.Leaf


@flax.struct.dataclass
class Estimates:
  """What an estimator makes of a batch, [B, T] float32 each.

  Attributes:
    advantages: by policy token; a token's weight in the policy loss is part
      of its advantage.
    returns: what the value model is fitted to.
    value_weights: weight of each token in the value loss, which is a mean over
      the tokens of positive weight; None for 1 wherever values exist.
  """

  advantages: types.Leaf
  returns: types.Leaf
  value_weights: types.Leaf | None = None


Function = Callable[[Inputs, specs.EstimatorSpec], Estimates]


@dataclasses.dataclass(frozen=True)
class Estimator:
  """An estimator function and what it needs.

  Attributes:
    function: (Inputs, EstimatorSpec) -> Estimates.
    needs_values: a value model is trained beside the policy.
    needs_groups: it compares rollouts of one question, so that there must be
      several.
    name: for messages.
  """

  function: Function
  needs_values: bool = False
  needs_groups: bool = False
  name: str = ""

  def __call__(self, inputs: Inputs, spec: specs.EstimatorSpec) -> Estimates:
    """Runs the function and checks what it returns.

    Returns:
      Estimates in float32, `value_weights` filled in.

    Raises:
      UserError: a user's function raised, or returned something else.
    """
    try:
      found = self.function(inputs, spec)
    except Exception as error:
      if ":" not in self.name:
        raise  # One of ours: a bug.
      raise types.UserError(
        f"estimator {self.name!r} raised {type(error).__name__}: "
        f"{types.first_line(error)}"
      ) from error
    if not isinstance(found, Estimates):
      raise types.UserError(
        f"estimator {self.name!r} must return Estimates(advantages, returns), "
        f"got {type(found).__name__}"
      )
    if found.value_weights is None:
      found = dataclasses.replace(found, value_weights=inputs.masks.value)
    shape = inputs.rewards.shape
    return Estimates(**{
      field.name: self._checked(field.name, getattr(found, field.name), shape)
      for field in dataclasses.fields(Estimates)
    })

  def try_out(self, spec: specs.EstimatorSpec, rows: int) -> None:
    """Traces the function once, which costs next to nothing.

    Args:
      spec: of the run.
      rows: trajectories of a step.

    Raises:
      UserError: as in a step.
    """
    tokens = (rows, _TRIED_TOKENS)
    floats, ints = (
      functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
      for dtype in (jnp.float32, jnp.int32)
    )
    jax.eval_shape(lambda inputs: self(inputs, spec), Inputs(
      rewards=floats(tokens), values=floats(tokens), logp=floats(tokens),
      masks=records.Masks(*[floats(tokens)] * 3), group=ints((rows,)),
      turn=ints(tokens), anchor=ints((rows, _TRIED_TURNS)),
      searches=ints((rows,)),
    ))

  def check_finite(self, inputs: Inputs, found: Estimates) -> None:
    """Raises a UserError for the first value of a user's that is no number.

    Args:
      inputs, found: on the host; what came from inputs that are no numbers
        themselves is not the function's fault.
    """
    given = (inputs.rewards, inputs.values, inputs.logp)
    if ":" not in self.name or not all(np.isfinite(x).all() for x in given):
      return
    for field in dataclasses.fields(Estimates):
      array = getattr(found, field.name)
      wrong = np.argwhere(~np.isfinite(array))
      if len(wrong):
        row, token = map(int, wrong[0])
        raise types.UserError(
          f"estimator {self.name!r}: {field.name} of trajectory {row} of the "
          f"step, token {token}, is {array[row, token]}, expected a number; "
          f"its group is {int(inputs.group[row])}, its rewards sum up to "
          f"{float(inputs.rewards[row].sum()):g}"
        )

  def _checked(self, field: str, array: Any, shape) -> jax.Array:
    given = getattr(array, "shape", type(array).__name__)
    if given != shape:
      raise types.UserError(
        f"estimator {self.name!r}: {field} must have shape {shape} "
        f"[trajectories, tokens], got {given}"
      )
    return jnp.asarray(array).astype(jnp.float32)


def estimator(
  needs_values: bool = False, needs_groups: bool = False
) -> Callable[[Function], Estimator]:
  """Marks a function as an estimator and says what it needs."""

  def mark(function: Function) -> Estimator:
    return Estimator(function, needs_values, needs_groups)

  return mark
