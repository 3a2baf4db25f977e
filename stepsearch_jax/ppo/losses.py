"""Clipped policy and value losses as sums over masked tokens.

Every function returns sums, so that micro-batches divided by the token count
of the whole mini-batch add up to its mean exactly.
"""

from __future__ import annotations

import jax.numpy as jnp


def _total(x, mask):
  return jnp.where(mask > 0, x, 0.0).sum()


def policy_loss(logp, old_logp, advantages, mask, clip_ratio: float):
  """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), summed.

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = exp(logp - old_logp)

  Args:
    logp, old_logp, advantages, mask: [B, T] float32.
    clip_ratio: eps.

  Returns:
    (loss sum, count of clipped tokens, sum of old_logp - logp), scalars.
  """
  assert logp.shape == old_logp.shape == advantages.shape == mask.shape
  gap = jnp.where(mask > 0, logp - old_logp, 0.0)
  ratio = jnp.exp(gap)
  plain = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
  loss = _total(jnp.maximum(plain, clipped), mask)
  hit = _total((clipped > plain).astype(jnp.float32), mask)
  return loss, hit, _total(-gap, mask)


def value_loss(values, old_values, returns, mask, clip: float):
  """Clipped squared error of the value model, summed.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

  Returns:
    (loss sum, count of clipped tokens), scalars.
  """
  assert values.shape == old_values.shape == returns.shape == mask.shape
  near = jnp.clip(values, old_values - clip, old_values + clip)
  plain, clipped = (values - returns) ** 2, (near - returns) ** 2
  loss = 0.5 * _total(jnp.maximum(plain, clipped), mask)
  return loss, _total((clipped > plain).astype(jnp.float32), mask)


def imitation_loss(logp, mask):
  """Negative log-likelihood of the masked tokens, summed."""
  return -_total(logp, mask)
