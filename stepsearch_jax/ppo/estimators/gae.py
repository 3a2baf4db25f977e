"""Generalized advantage estimation over policy tokens (arXiv 1506.02438)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepsearch_jax.ppo import masked, specs
from stepsearch_jax.ppo.estimators import interface


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float,
  lam: float, ends: jax.Array | None = None,
) -> jax.Array:
  """Computes advantages token by token, from the last to the first.

    delta_t = r_t + gamma V(next) - V_t
    A_t     = delta_t + gamma lambda A(next)

  where "next" is the next token with mask 1 (the policy's next token, across
  any observation in between), and V = A = 0 behind the last one.

  Args:
    rewards: [B, T] float32.
    values: [B, T] float32, value of the state in which token t was chosen.
    mask: [B, T] float32.
    gamma: discount per masked-in token.
    lam: lambda.
    ends: [B, T] float32, 1 on tokens behind which V = A = 0 also where a next
      token exists; None for the last token alone.

  Returns:
    [B, T] float32 advantages, 0 where masked.
  """
  assert rewards.ndim == 2 and rewards.shape == values.shape == mask.shape
  on = mask > 0

  def step(carry, inputs):
    next_value, next_advantage = carry
    reward, value, here, end = inputs
    if end is not None:
      next_value = jnp.where(end, 0.0, next_value)
      next_advantage = jnp.where(end, 0.0, next_advantage)
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    carry = (
      jnp.where(here, value, next_value),
      jnp.where(here, advantage, next_advantage),
    )
    return carry, jnp.where(here, advantage, 0.0)

  zeros = jnp.zeros(rewards.shape[0], jnp.float32)
  end = None if ends is None else (ends > 0).T
  _, advantages = jax.lax.scan(
    step, (zeros, zeros), (rewards.T, values.T, on.T, end), reverse=True
  )
  return advantages.T


def credited(rewards: jax.Array, mask: jax.Array) -> jax.Array:
  """Adds rewards of masked-out tokens to the last masked-in token before.

  An outcome can lie on an end-of-text token that is not trained.

  Args:
    rewards: [B, T] float32.
    mask: [B, T] float32.

  Returns:
    [B, T] float32, 0 where masked.
  """

  def step(pending, inputs):
    reward, here = inputs
    pending = pending + reward
    return jnp.where(here, 0.0, pending), jnp.where(here, pending, 0.0)

  zeros = jnp.zeros(rewards.shape[0], jnp.float32)
  _, found = jax.lax.scan(
    step, zeros, (rewards.T, (mask > 0).T), reverse=True
  )
  return found.T


def returns_to_go(
  rewards: jax.Array, mask: jax.Array, gamma: float
) -> jax.Array:
  """Discounted sums of later rewards, [B, T]: GAE with lambda 1 and V = 0."""
  rewards = credited(rewards, mask)
  return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)


@interface.estimator(needs_values=True)
def estimate(
  inputs: interface.Inputs, spec: specs.EstimatorSpec
) -> interface.Estimates:
  """StePPO and PPO: whitened GAE, returns = raw advantages + values."""
  masks = inputs.masks
  rewards = credited(inputs.rewards, masks.value)
  raw = gae(rewards, inputs.values, masks.value, spec.gamma, spec.lam)
  returns = jnp.where(masks.value > 0, raw + inputs.values, 0.0)
  return interface.Estimates(masked.whiten(raw, masks.advantage), returns)
