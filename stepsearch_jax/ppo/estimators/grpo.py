"""Group-relative policy optimization (arXiv 2402.03300)."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Every policy token of a row gets the row's z-score in its group.

    A_b = (R_b - mean of its group) / (std of its group + 1e-6)

  R_b is the sum of the row's rewards, the std is unbiased. A group of one
  keeps its raw score, as in the released code.
  """
  del spec
  total = groups.row_totals(inputs)
  stats = groups.statistics(total, inputs.group)
  alone = total / (1.0 + 1e-6)
  scores = jnp.where(stats.count == 1, alone, groups.z_score(total, stats))
  return groups.per_row(scores, inputs)
