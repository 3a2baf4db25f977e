"""Rows compared with rows of as many searches (arXiv 2510.06214)."""

from __future__ import annotations

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Blends the z-score in the stratum with the z-score in the group.

    A_i = blend z_stratum(R_i) + (1 - blend) z_group(R_i)

  A stratum is the rows of one question with the same number of answered
  searches; alone in it, z is 0. The published blend is not known.
  """
  total = groups.row_totals(inputs)
  whole = groups.z_score(total, groups.statistics(total, inputs.group))
  stratum = groups.z_score(
    total, groups.statistics(total, inputs.group, inputs.searches)
  )
  blend = spec.strata_blend
  return groups.per_row(blend * stratum + (1.0 - blend) * whole, inputs)
