"""Advantage estimators, whitening and KL terms over masked tokens.

All arrays are [B, T] and indexed by token; `mask` is 1 on the tokens that
take part. What stands at masked positions never matters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types


def gae(rewards, values, mask, gamma: float, lam: float):
  """Generalised advantage estimation over masked tokens (arXiv 1506.02438).

    delta_t = r_t + gamma V(next) - V_t
    A_t     = delta_t + gamma lambda A(next)

  where "next" is the next token with mask 1 (the policy's next token, across
  any observation in between), and V = A = 0 behind the last one.

  Args:
    rewards: [B, T] float32.
    values: [B, T] float32, value of the state in which token t was chosen.
    mask: [B, T] float32.
    gamma: discount per policy token.
    lam: lambda.

  Returns:
    (advantages, returns = advantages + values), [B, T] float32, 0 where
    masked.
  """
  assert rewards.ndim == 2 and rewards.shape == values.shape == mask.shape
  on = mask > 0

  def step(carry, inputs):
    next_value, next_advantage = carry
    reward, value, here = inputs
    delta = reward + gamma * next_value - value
    advantage = delta + gamma * lam * next_advantage
    carry = (
      jnp.where(here, value, next_value),
      jnp.where(here, advantage, next_advantage),
    )
    return carry, jnp.where(here, advantage, 0.0)

  zeros = jnp.zeros(rewards.shape[0], jnp.float32)
  _, advantages = jax.lax.scan(
    step, (zeros, zeros), (rewards.T, values.T, on.T), reverse=True
  )
  advantages = advantages.T
  return advantages, jnp.where(on, advantages + values, 0.0)


def gae_released(rewards, values, mask, gamma: float, lam: float):
  """GAE as released: the recursion runs over every position (quirk C1).

  Args and returns as `gae`, except that nothing is masked inside; returns are
  not masked either.
  """
  del mask
  return gae(rewards, values, jnp.ones_like(rewards), gamma, lam)


def grpo(rewards, mask, group):
  """Group-relative advantages (arXiv 2402.03300).

    A_b = (R_b - mean of its group) / (std of its group + 1e-6)

  R_b is the sum of the row's rewards; the std is unbiased. A group of one
  keeps its raw score, as in the released code.

  Args:
    rewards: [B, T] float32.
    mask: [B, T] float32.
    group: [B] int32, rows of one question share a number.

  Returns:
    [B, T] float32, the row's advantage on every masked-in token.
  """
  total = jnp.where(mask > 0, rewards, 0.0).sum(-1)
  same = (group[:, None] == group[None]).astype(jnp.float32)
  count = same.sum(-1)
  mean = same @ total / count
  square = (same * (total[None] - mean[:, None]) ** 2).sum(-1)
  std = jnp.sqrt(square / jnp.maximum(count - 1, 1.0))
  alone = count == 1
  mean, std = jnp.where(alone, 0.0, mean), jnp.where(alone, 1.0, std)
  scores = (total - mean) / (std + 1e-6)
  return jnp.where(mask > 0, scores[:, None], 0.0)


def reinforce(rewards, mask, gamma: float):
  """Discounted return to go minus the batch mean (REINFORCE with baseline).

  Args:
    rewards: [B, T] float32.
    mask: [B, T] float32.
    gamma: discount per policy token.

  Returns:
    [B, T] float32, 0 where masked.
  """
  returns, _ = gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)
  return jnp.where(mask > 0, returns - masked_mean(returns, mask), 0.0)


def masked_mean(x, mask):
  """Mean over masked-in entries; 0 when there are none."""
  on = mask > 0
  count = on.sum(dtype=jnp.float32)
  return jnp.where(on, x, 0.0).sum() / jnp.maximum(count, 1.0)


def whiten(x, mask):
  """Shifts and scales masked-in entries to mean 0 and variance 1.

    (x - mean) / sqrt(unbiased variance + 1e-8)

  With fewer than two entries only the mean is removed.
  """
  on = mask > 0
  count = on.sum(dtype=jnp.float32)
  mean = masked_mean(x, mask)
  centred = jnp.where(on, x - mean, 0.0)
  variance = (centred**2).sum() / jnp.maximum(count - 1, 1.0)
  scale = jnp.where(count > 1, jax.lax.rsqrt(variance + 1e-8), 1.0)
  return centred * scale


KL_ESTIMATORS = ("kl", "abs", "mse", "low_var_kl")


def kl_penalty(logp, reference_logp, estimator: str):
  """Per-token estimate of KL(policy || reference).

    kl: log p - log q          abs: |log p - log q|
    mse: (log p - log q)^2 / 2
    low_var_kl: clip(q/p - log(q/p) - 1, -10, 10)  (Schulman's k3)
  """
  gap = logp - reference_logp
  if estimator == "kl":
    return gap
  if estimator == "abs":
    return jnp.abs(gap)
  if estimator == "mse":
    return 0.5 * jnp.square(gap)
  if estimator == "low_var_kl":
    return jnp.clip(jnp.exp(-gap) + gap - 1.0, -10.0, 10.0)
  raise types.UserError(
    f"kl_estimator must be one of {KL_ESTIMATORS}, got {estimator!r}"
  )


@dataclasses.dataclass(frozen=True)
class KlController:
  """Coefficient of the KL penalty; adaptive per arXiv 1909.08593, eq. 10.

  Attributes:
    kind: "fixed" or "adaptive".
    target: KL that the adaptive controller aims at.
    horizon: trajectories over which it moves.
  """

  kind: str = "fixed"
  target: float = 0.1
  horizon: float = 10000.0

  def __post_init__(self):
    if self.kind not in ("fixed", "adaptive"):
      raise types.UserError(
        f"ppo.kl_controller must be fixed or adaptive, got {self.kind!r}"
      )

  def update(self, coefficient: float, kl: float, count: int) -> float:
    """Next coefficient after `count` trajectories with mean KL `kl`."""
    if self.kind == "fixed":
      return coefficient
    error = float(np.clip(kl / self.target - 1.0, -0.2, 0.2))
    return coefficient * (1.0 + error * count / self.horizon)
