"""The outcome compared in groups, other rewards where they were paid."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import specs
from stepsearch_jax.ppo.estimators import gae, groups, interface, turns


@interface.estimator(needs_groups=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """A_k = z_group(outcome) + the turn's reward, on the tokens that it fell on.

  The outcome (IG-Search, arXiv 2604.15148) is what the row's last policy token
  earned. A turn's reward is the sum of what its other tokens earned; those
  that earned nothing get the outcome's z-score alone. The KL belongs in the
  loss: in the reward it would fall on every token.
  """
  del spec
  on = inputs.masks.policy > 0
  later = jnp.cumsum(on[:, ::-1], axis=1)[:, ::-1]
  last = on & (later == 1)
  rewards = gae.credited(inputs.rewards, inputs.masks.policy)
  outcome = jnp.where(last, rewards, 0.0).sum(-1)
  score = groups.z_score(outcome, groups.statistics(outcome, inputs.group))
  local = jnp.where(last, 0.0, rewards)
  per_turn = turns.sums(local, inputs.turn, inputs.anchor.shape[1])
  own = jnp.where(local != 0, turns.spread(per_turn, inputs.turn), 0.0)
  found = groups.per_row(score, inputs).advantages + own
  return interface.Estimates(found, found)
