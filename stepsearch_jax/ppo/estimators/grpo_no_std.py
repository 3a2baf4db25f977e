"""GRPO without division by the standard deviation (Dr.GRPO)."""

from __future__ import annotations

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A_i = R_i - mean of the group (arXiv 2503.20783); alone, 0."""
  del spec
  total = groups.row_totals(inputs)
  return groups.per_row(
    groups.center(total, groups.statistics(total, inputs.group)), inputs
  )
