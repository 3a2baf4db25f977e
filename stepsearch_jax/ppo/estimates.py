"""From rewards, values and log-probabilities to advantages and returns."""

from __future__ import annotations

import jax.numpy as jnp

from stepsearch_jax.ppo import advantages as adv
from stepsearch_jax.ppo.records import LearnerSpec


def estimate(
  spec: LearnerSpec, rewards, values, logp, reference, mask, scope,
  value_scope, group, kl_coef,
):
  """Advantages and returns of a whole batch.

  Args:
    spec: learner settings.
    rewards: [B, T] token rewards without KL.
    values: [B, T] state values; zeros without a value model.
    logp: [B, T] log-probabilities under the policy.
    reference: [B, T] likewise under the reference.
    mask: [B, T] policy mask.
    scope: [B, T] where GAE and whitening look (see `records.scopes`).
    value_scope: [B, T] where the value model is trained.
    group: [B] int32, the question of each row.
    kl_coef: [] float32, weight of the KL penalty in the reward.

  Returns:
    (advantages [B, T], returns [B, T], metrics by name).
  """
  on = mask > 0
  kl = adv.kl_penalty(logp, reference, spec.kl_estimator)
  kl = jnp.where(on, kl, 0.0)
  shaped = rewards - kl_coef * kl
  values = jnp.where(value_scope > 0, values, 0.0)
  if spec.estimator == "gae":
    of_gae = adv.gae if spec.mask_scope == "policy" else adv.gae_released
    advantages, returns = of_gae(shaped, values, scope, spec.gamma, spec.lam)
    advantages = adv.whiten(advantages, scope)
  elif spec.estimator == "grpo":
    advantages = returns = adv.grpo(shaped, mask, group)
  else:
    advantages = returns = adv.reinforce(shaped, mask, spec.gamma)
  per_row = kl.sum(-1) / jnp.maximum(on.sum(-1, dtype=jnp.float32), 1.0)
  error = jnp.where(scope > 0, returns - values, 0.0)

  def variance(x):
    return adv.masked_mean((x - adv.masked_mean(x, scope)) ** 2, scope)

  unexplained = variance(error) / jnp.maximum(variance(returns), 1e-6)
  metrics = {
    "critic/kl": per_row.mean(),
    "critic/rewards/mean": shaped.sum(-1).mean(),
    "critic/vf_explained_var": 1.0 - unexplained,
  }
  for name, x in (("advantages", advantages), ("returns", returns),
                  ("values", values)):
    metrics[f"critic/{name}/mean"] = adv.masked_mean(x, scope)
    metrics[f"critic/{name}/max"] = jnp.where(scope > 0, x, -jnp.inf).max()
    metrics[f"critic/{name}/min"] = jnp.where(scope > 0, x, jnp.inf).min()
  return advantages, returns, metrics
