"""GAE over turns, then over the tokens of each turn (RAGEN)."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import masked, specs
from stepsearch_jax.ppo.estimators import gae, interface, turn_gae, turns


@interface.estimator(needs_values=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Token GAE inside each turn, which ends in the turn's return.

  The return of a turn is its advantage over turns (discount `turn_gamma`)
  plus the value at its first token. It is the one reward of the turn's last
  token: the rewards of its tokens are in it already.
  """
  mask = inputs.masks.policy
  found = turn_gae.over_turns(inputs, spec.turn_gamma, spec.lam)
  count = inputs.anchor.shape[1]
  last = turns.last_tokens(inputs.turn)
  per_turn = turns.sums(found.returns, inputs.turn, count)
  rewards = last * turns.spread(per_turn, inputs.turn)
  raw = gae.gae(
    rewards, inputs.values, mask, spec.gamma, spec.lam, ends=last
  )
  returns = jnp.where(mask > 0, raw + inputs.values, 0.0)
  return interface.Estimates(masked.whiten(raw, mask), returns, mask)
