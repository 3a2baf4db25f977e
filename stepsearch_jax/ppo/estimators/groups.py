"""Statistics of rows within their groups, for estimators that compare rows."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax.ppo.estimators import interface

# Sums of float32 rewards in another order differ by less than this, of the
# largest reward or of 1.
_ROUNDING = 1e-6


@flax.struct.dataclass
class Statistics:
  """Of the group of each row, [B].

  Attributes:
    count: rows of the group.
    mean: mean over them.
    std: unbiased standard deviation, 0 for a group of one.
    equal: all rows of the group have the same score, to rounding. What
      compares rows has to say exactly 0 then: divided by a std that is
      nothing but rounding, the rounding would be an advantage.
  """

  count: jax.Array
  mean: jax.Array
  std: jax.Array
  equal: jax.Array


def row_totals(inputs: interface.Inputs) -> jax.Array:
  """Sum of the rewards of each row's policy tokens, [B]."""
  return jnp.where(inputs.masks.policy > 0, inputs.rewards, 0.0).sum(-1)


def statistics(scores, group) -> Statistics:
  """Computes the statistics of each row's group.

  Args:
    scores: [B] float32.
    group: [B] int32, rows of one group share a number.
  """
  inside = group[:, None] == group[None]
  same = inside.astype(jnp.float32)
  count = same.sum(-1)
  mean = same @ scores / count
  square = (same * (scores[None] - mean[:, None]) ** 2).sum(-1)
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1.0))
  apart = jnp.where(inside, jnp.abs(scores[None] - scores[:, None]), 0.0)
  size = jnp.where(inside, jnp.abs(scores)[None], 0.0).max(-1)
  equal = apart.max(-1) <= _ROUNDING * jnp.maximum(size, 1.0)
  return Statistics(count, mean, std, equal)
