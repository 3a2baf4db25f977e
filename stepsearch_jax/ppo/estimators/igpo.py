"""Information-gain policy optimization (IGPO, arXiv 2510.14967)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import groups, interface, turns


def turn_scores(
  rewards: jax.Array, there: jax.Array, group: jax.Array
) -> jax.Array:
  """z-score of every turn's reward among all turns of its group.

  Args:
    rewards: [B, U] float32, reward of each turn.
    there: [B, U] bool, the turn happened.
    group: [B] int32.

  Returns:
    [B, U] float32; 0 where there is no turn, and among equal rewards.
  """
  everyone = rewards.reshape(-1)
  owner = jnp.where(there, group[:, None], -1).reshape(-1)

  def row(inputs):  # A row at a time: all pairs of turns would be too many.
    own, here, number = inputs
    inside = here[:, None] & (owner == number)[None]
    return groups.z_score(own, groups.within(inside, own, everyone))

  return jnp.where(there, jax.lax.map(row, (rewards, there, group)), 0.0)


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A_t = sum of the z-scores of turn t and the later ones.

  The mean and std are over all turns of the group, the last ones with their
  outcome among them. A turn whose reward is 0 is a turn like any other. Biased
  where the policy decides when to stop: a turn more costs, or pays, by how far
  it lies from the mean turn, whatever the sum of the rewards.
  """
  del spec
  scores = turn_scores(
    turns.rewards(inputs), inputs.anchor >= 0, inputs.group
  )
  found = turns.spread(turns.returns_to_go(scores, 1.0), inputs.turn)
  return interface.Estimates(found, found)
