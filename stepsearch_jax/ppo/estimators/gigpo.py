"""Group-in-group policy optimization (GiGPO, arXiv 2505.10978)."""

from __future__ import annotations

import jax

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface, turns


def anchor_scores(returns: jax.Array, anchor: jax.Array) -> jax.Array:
  """z-score of every turn's return among turns that began in its state.

  Args:
    returns: [B, U] float32, return of each turn.
    anchor: [B, U] int32, equal numbers are equal states; -1 is no turn.

  Returns:
    [B, U] float32; 0 for a turn that is alone in its state, for equal returns
    and where there is no turn. A state that a row meets twice counts twice.
  """
  everyone, states = returns.reshape(-1), anchor.reshape(-1)

  def row(inputs):  # A row at a time: all pairs of turns would be too many.
    own, state = inputs
    inside = (state[:, None] == states[None]) & (state[:, None] >= 0)
    return groups.z_score(own, groups.within(inside, own, everyone))

  return jax.lax.map(row, (returns, anchor))


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A = z_group(R) + turn_weight z_state(G_t), G_t discounted by turn."""
  total = groups.row_totals(inputs)
  episode = groups.z_score(total, groups.statistics(total, inputs.group))
  returns = turns.returns_to_go(turns.rewards(inputs), spec.turn_gamma)
  step = turns.spread(anchor_scores(returns, inputs.anchor), inputs.turn)
  found = groups.per_row(episode, inputs).advantages
  found = found + spec.turn_weight * step
  return interface.Estimates(found, found)
