"""Scores compared within groups, for estimators that compare rows or turns."""

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
  """Of the group of each score, [N].

  Attributes:
    count: scores of the group; 0 for one that is in no group.
    mean: mean over them.
    std: unbiased standard deviation, 0 for a group of one.
    equal: all scores of the group are the same, to rounding. What compares
      rows has to say exactly 0 then: divided by a std that is nothing but
      rounding, the rounding would be an advantage.
  """

  count: jax.Array
  mean: jax.Array
  std: jax.Array
  equal: jax.Array


def row_totals(inputs: interface.Inputs) -> jax.Array:
  """Sum of the rewards of each row, untrained tokens included, [B]."""
  return inputs.rewards.sum(-1)


def per_row(scores: jax.Array, inputs: interface.Inputs) -> interface.Estimates:
  """Gives every policy token its row's score [B]."""
  found = jnp.where(inputs.masks.policy > 0, scores[:, None], 0.0)
  return interface.Estimates(found, found)


def within(
  inside: jax.Array, scores: jax.Array, everyone: jax.Array
) -> Statistics:
  """Computes the statistics of the group of each score.

  Args:
    inside: [N, M] bool, which of `everyone` are of the same group.
    scores: [N] float32.
    everyone: [M] float32, the scores that groups are made of.
  """
  same = inside.astype(jnp.float32)
  count = same.sum(-1)
  # Accelerators would multiply in half precision.
  total = jnp.matmul(same, everyone, precision="highest")
  mean = total / jnp.maximum(count, 1.0)
  square = (same * (everyone[None] - mean[:, None]) ** 2).sum(-1)
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1.0))
  apart = jnp.where(inside, jnp.abs(everyone[None] - scores[:, None]), 0.0)
  size = jnp.where(inside, jnp.abs(everyone)[None], 1.0).max(-1)
  equal = apart.max(-1) <= _ROUNDING * jnp.maximum(size, 1.0)
  return Statistics(count, mean, std, equal)


def statistics(scores: jax.Array, *keys: jax.Array) -> Statistics:
  """Statistics of rows [B] that agree in all `keys` ([B] int32 each)."""
  inside = jnp.ones((scores.shape[0],) * 2, bool)
  for key in keys:
    inside &= key[:, None] == key[None]
  return within(inside, scores, scores)


def center(scores: jax.Array, stats: Statistics) -> jax.Array:
  """Score minus the mean of its group; exactly 0 among equals and alone."""
  return jnp.where(stats.equal, 0.0, scores - stats.mean)


def z_score(scores: jax.Array, stats: Statistics) -> jax.Array:
  """(score - mean) / (std + 1e-6); exactly 0 among equals and alone."""
  return center(scores, stats) / (stats.std + 1e-6)


def leave_one_out(scores: jax.Array, group: jax.Array) -> jax.Array:
  """Score minus the mean of the other rows of its group; alone, 0.

  x_i - mean of the others = (x_i - mean of all) n / (n - 1)
  """
  stats = statistics(scores, group)
  factor = stats.count / jnp.maximum(stats.count - 1.0, 1.0)
  return center(scores, stats) * factor
