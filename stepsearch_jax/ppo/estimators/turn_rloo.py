"""Leave-one-out baselines per turn, right also where the policy stops."""

from __future__ import annotations

import jax

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface, turns


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Centers every turn's reward on the other rows, then adds up later ones.

    r~_{i,n} = r_{i,n} - mean_{j != i} r_{j,n}
    A_{i,n}  = sum_{m >= n} r~_{i,m}

  A row that ended before turn n counts as r = 0 there, and the sum runs on
  behind its own end. With a baseline over only those rows that reached turn n
  the choice to stop would change its own baseline.
  """
  del spec
  returns = turns.returns_to_go(turns.rewards(inputs), 1.0)
  # The sum of centered rewards is the centered sum.
  advantages = jax.lax.map(
    lambda column: groups.leave_one_out(column, inputs.group), returns.T
  ).T
  found = turns.spread(advantages, inputs.turn)
  return interface.Estimates(found, found)
