"""REINFORCE with the other rows of the group as baseline (RLOO)."""

from __future__ import annotations

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A_i = R_i - mean of the other rows' R (arXiv 2402.14740); alone, 0."""
  del spec
  scores = groups.leave_one_out(groups.row_totals(inputs), inputs.group)
  return groups.per_row(scores, inputs)
