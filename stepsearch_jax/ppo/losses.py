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


def masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over masked-in entries; what lies elsewhere never matters."""
  return jnp.where(mask > 0, x, 0.0).sum()


def turn_numbers(segment_ids: jax.Array, turn: jax.Array) -> jax.Array:
  """Numbers the turns of packed rows from 1 on, [R, S] int32.

  Args:
    segment_ids: [R, S] int32, 1.. for the trajectories of a row.
    turn: [R, S] int32, turn of each policy token in its trajectory; -1
      elsewhere.

  Returns:
    [R, S] int32; a token that is not the policy's has any number.
  """
  width = turn.shape[1]
  keys = segment_ids * (width + 1) + jnp.maximum(turn, 0)
  keys = jnp.where(turn >= 0, keys, -1)
  newest = jax.lax.cummax(keys, axis=1)
  before = jnp.pad(newest, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  return jnp.cumsum(newest > before, axis=1, dtype=jnp.int32)


def group_sums(x: jax.Array, mask: jax.Array, numbers: jax.Array) -> jax.Array:
  """Sums masked-in entries of equal number: [R, S] to [R, S + 1].

  Args:
    x: [R, S] float32.
    mask: [R, S].
    numbers: [R, S] int32 in 0..S.
  """
  sums = jax.vmap(
    lambda row, ids: jax.ops.segment_sum(row, ids, row.shape[0] + 1)
  )
  return sums(jnp.where(mask > 0, x, 0.0), numbers)


def log_ratio(
  logp: jax.Array, old_logp: jax.Array, mask: jax.Array,
  numbers: jax.Array | None = None,
) -> jax.Array:
  """Log of the probability ratio of each token, 0 where masked.

  Without `numbers` a token's own. With them every token has the mean over the
  tokens of its number (trajectory or turn) as value, and its own gradient:

    s = exp(mean(logp - old_logp)),   ratio = sg[s] pi / sg[pi]

  (GSPO, arXiv 2507.18071, eq. 14), the log at most 10.

  Args:
    logp, old_logp, mask: [R, S] float32.
    numbers: [R, S] int32 in 0..S; None for ratios of tokens.
  """
  assert logp.shape == old_logp.shape == mask.shape
  gap = jnp.where(mask > 0, logp - old_logp, 0.0)
  if numbers is None:
    return gap
  count = group_sums(jnp.ones_like(gap), mask, numbers)
  means = group_sums(gap, mask, numbers) / jnp.maximum(count, 1.0)
  mean = jnp.take_along_axis(means, numbers, axis=1)
  fixed = jax.lax.stop_gradient
  found = jnp.where(mask > 0, gap - fixed(gap) + fixed(mean), 0.0)
  return jnp.minimum(found, 10.0)


def truncate(log_ratio: jax.Array, cap: float) -> jax.Array:
  """Bounds a ratio by `cap` as an importance weight.

  The value is min(ratio, cap); unlike clipping it keeps its gradient.
  """
  excess = jnp.maximum(log_ratio - jnp.log(jnp.float32(cap)), 0.0)
  return log_ratio - jax.lax.stop_gradient(excess)


def policy_loss(
  log_ratio: jax.Array, advantages: jax.Array, low: float, high: float,
  dual: float = 0.0,
) -> TokenLoss:
  """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7).

    -min(rho A, clip(rho, low, high) A),  rho = exp(log_ratio)

  Where A < 0, at most -dual A (dual clip, arXiv 1912.09729).

  Args:
    log_ratio: [R, S], finite everywhere.
    advantages: [R, S].
    low: 1 - eps_low.
    high: 1 + eps_high.
    dual: bound of the ratio where A < 0; 0 for none.
  """
  assert log_ratio.shape == advantages.shape
  ratio = jnp.exp(log_ratio)
  plain = -advantages * ratio
  clipped = -advantages * jnp.clip(ratio, low, high)
  loss = jnp.maximum(plain, clipped)
  if dual:
    bounded = jnp.minimum(loss, -advantages * dual)
    loss = jnp.where(advantages < 0, bounded, loss)
  return TokenLoss(loss, (clipped > plain).astype(jnp.float32))


@flax.struct.dataclass
class LikelihoodDrop:
  """How far tokens have become less likely, and in which turns.

  Attributes:
    loss: [R, S], what each token adds to LLDS before weights.
    turns: [], number of turns that became less likely as a whole.
  """

  loss: jax.Array
  turns: jax.Array


def likelihood_drop(
  logp: jax.Array, old_logp: jax.Array, mask: jax.Array, numbers: jax.Array
) -> LikelihoodDrop:
  """LLDS per token (arXiv 2512.04220).

    [sum of d over the turn > 0] max(0, d),   d = old_logp - logp

  Args:
    logp, old_logp, mask: [R, S] float32.
    numbers: [R, S] int32, from `turn_numbers`.
  """
  drop = jnp.where(mask > 0, old_logp - logp, 0.0)
  fell = group_sums(jax.lax.stop_gradient(drop), mask, numbers) > 0
  inside = jnp.take_along_axis(fell, numbers, axis=1) & (mask > 0)
  return LikelihoodDrop(
    jnp.where(inside, jnp.maximum(drop, 0.0), 0.0),
    fell.sum(dtype=jnp.float32),
  )


def value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float
) -> TokenLoss:
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


def imitation_loss(logp: jax.Array, mask: jax.Array) -> jax.Array:
  """Negative log-likelihood of the masked tokens, summed."""
  return -masked_sum(logp, mask)
