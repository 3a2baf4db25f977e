"""GAE over turns (Turn-PPO, VAGEN): a turn is one action."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax.ppo import masked, specs
from stepsearch_jax.ppo.estimators import gae, interface, turns


@flax.struct.dataclass
class TurnAdvantages:
  """GAE over turns, [B, T]; 0 but at the first policy token of each turn.

  Attributes:
    advantages: A_t, not whitened.
    returns: A_t + V_t.
    first: 1 on those tokens.
  """

  advantages: jax.Array
  returns: jax.Array
  first: jax.Array


def over_turns(
  inputs: interface.Inputs, gamma: float, lam: float
) -> TurnAdvantages:
  """Computes GAE with one step per turn.

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

  r_t is the sum of the turn's token rewards and V_t the value at its first
  policy token. A turn whose reward is 0 is a turn like any other.
  """
  first = turns.first_tokens(inputs.turn)
  rewards = turns.spread(turns.rewards(inputs), inputs.turn)
  found = gae.gae(rewards, inputs.values, first, gamma, lam)
  returns = jnp.where(first > 0, found + inputs.values, 0.0)
  return TurnAdvantages(found, returns, first)


@interface.estimator(needs_values=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Whitens once per turn; values are trained at first tokens only."""
  found = over_turns(inputs, spec.gamma, spec.lam)
  white = masked.whiten(found.advantages, found.first)
  per_turn = turns.sums(white, inputs.turn, inputs.anchor.shape[1])
  return interface.Estimates(
    turns.spread(per_turn, inputs.turn), found.returns, found.first
  )
