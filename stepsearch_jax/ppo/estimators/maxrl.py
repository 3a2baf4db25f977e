"""Group-relative advantages divided by the group's mean (MaxRL)."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface

_LEAST = 1e-6  # Mean reward below which a group counts as a failure.


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A_i = (R_i - mean) / mean; 0 where the mean is not positive.

  Rare successes weigh more: with rewards of 0 and 1 this follows the gradient
  of log p(success) and not of p(success).
  """
  del spec
  total = groups.row_totals(inputs)
  stats = groups.statistics(total, inputs.group)
  works = stats.mean > _LEAST
  scores = groups.center(total, stats) / jnp.where(works, stats.mean, 1.0)
  return groups.per_row(jnp.where(works, scores, 0.0), inputs)
