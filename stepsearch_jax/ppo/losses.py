"""Losses per token: pure functions of arrays, without averages.

What a micro-batch makes of them is in `model_losses.py`.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TokenLoss:
  """A clipped loss per token, and 1.0 where the clipped branch was larger."""

  loss: jax.Array
  clipped: jax.Array


def masked_sum(x, mask):
  """Sum over masked-in entries; what lies elsewhere never matters."""
  return jnp.where(mask > 0, x, 0.0).sum()


def policy_loss(log_ratio, advantages, clip_ratio: float) -> TokenLoss:
  """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7).

    -min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = exp(log_ratio)

  Args:
    log_ratio: log-probability now minus before; finite everywhere.
    advantages: of the same shape.
    clip_ratio: eps.
  """
  assert log_ratio.shape == advantages.shape
  ratio = jnp.exp(log_ratio)
  plain = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
  return TokenLoss(
    jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)
  )


def value_loss(values, old_values, returns, clip: float) -> TokenLoss:
  """Clipped squared error of the value model per token.

    0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

  Args:
    values: now.
    old_values: before the update.
    returns: what they are fitted to.
    clip: c.
  """
  assert values.shape == old_values.shape == returns.shape
  near = jnp.clip(values, old_values - clip, old_values + clip)
  plain, clipped = (values - returns) ** 2, (near - returns) ** 2
  return TokenLoss(
    0.5 * jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)
  )


def imitation_loss(logp, mask):
  """Negative log-likelihood of the masked tokens, summed."""
  return -masked_sum(logp, mask)
