"""REINFORCE with the batch mean as baseline."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import masked, specs
from stepsearch_jax.ppo.estimators import gae, interface


@interface.estimator()
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """Discounted return to go minus its mean over the batch's policy tokens."""
  mask = inputs.masks.policy
  returns = gae.returns_to_go(inputs.rewards, mask, spec.gamma)
  centered = returns - masked.mean(returns, mask)
  advantages = jnp.where(mask > 0, centered, 0.0)
  return interface.Estimates(advantages, advantages)
