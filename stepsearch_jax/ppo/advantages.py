"""From rewards, values and log-probabilities to advantages and returns."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax.ppo import estimators, kl, masked, specs


@flax.struct.dataclass
class Advantages:
  """Estimates of a batch, and metrics by name ([] float32)."""

  estimates: estimators.Estimates
  metrics: dict[str, jax.Array]


def compute(
  estimator: estimators.Estimator, spec: specs.LearnerSpec,
  inputs: estimators.Inputs, reference_logp: jax.Array, kl_coef: jax.Array,
) -> Advantages:
  """Subtracts the KL from the rewards and runs the estimator.

  Args:
    estimator: which one.
    spec: learner settings.
    inputs: the batch; `rewards` without KL, `values` not masked yet.
    reference_logp: [B, T] log-probabilities under the reference.
    kl_coef: [] float32, weight of the KL in the reward.
  """
  masks = inputs.masks
  on = masks.policy > 0
  gap = kl.penalty(inputs.logp, reference_logp, spec.kl.estimator)
  gap = jnp.where(on, gap, 0.0)
  inputs = dataclasses.replace(
    inputs,
    rewards=inputs.rewards - kl_coef * gap,
    values=jnp.where(masks.value > 0, inputs.values, 0.0),
  )
  estimates = estimator(inputs, spec.estimator)
  # Where values are fitted; the returns of turn_gae are 0 elsewhere.
  fitted = jnp.where(estimates.value_weights > 0, masks.advantage, 0.0)
  per_row = gap.sum(-1) / jnp.maximum(on.sum(-1, dtype=jnp.float32), 1.0)
  metrics = {
    "critic/kl": per_row.mean(),
    "critic/rewards/mean": inputs.rewards.sum(-1).mean(),
    "critic/vf_explained_var": explained_variance(
      inputs.values, estimates.returns, fitted
    ),
  }
  for name, x, mask in (
    ("advantages", estimates.advantages, masks.advantage),
    ("returns", estimates.returns, fitted), ("values", inputs.values, fitted),
  ):
    inside = mask > 0
    metrics[f"critic/{name}/mean"] = masked.mean(x, mask)
    metrics[f"critic/{name}/max"] = jnp.where(inside, x, -jnp.inf).max()
    metrics[f"critic/{name}/min"] = jnp.where(inside, x, jnp.inf).min()
  return Advantages(estimates, metrics)


def explained_variance(
  values: jax.Array, returns: jax.Array, mask: jax.Array
) -> jax.Array:
  """Share of the variance of returns that values explain, [].

    1 - var(returns - values) / var(returns)

  1 for perfect values, 0 for constant ones, negative for harmful ones.
  """
  error = jnp.where(mask > 0, returns - values, 0.0)
  unexplained = masked.variance(error, mask) / jnp.maximum(
    masked.variance(returns, mask), 1e-6
  )
  return 1.0 - unexplained
