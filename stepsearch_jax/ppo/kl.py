"""KL to the frozen reference: estimates per token, and their weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.ppo import specs


def penalty(
  logp: jax.Array, reference_logp: jax.Array, estimator: str
) -> jax.Array:
  """Estimates KL(policy || reference) per token.

    kl: log p - log q          abs: |log p - log q|
    mse: (log p - log q)^2 / 2
    low_var_kl: clip(q/p - log(q/p) - 1, -10, 10)  (Schulman's k3)

  Args:
    logp: log p of sampled tokens.
    reference_logp: log q of the same tokens.
    estimator: a `specs.KlEstimator`.

  Returns:
    An array like `logp`.
  """
  gap = logp - reference_logp
  match specs.KlEstimator(estimator):
    case specs.KlEstimator.KL:
      return gap
    case specs.KlEstimator.ABS:
      return jnp.abs(gap)
    case specs.KlEstimator.MSE:
      return 0.5 * jnp.square(gap)
    case specs.KlEstimator.LOW_VAR_KL:
      return jnp.clip(jnp.exp(-gap) + gap - 1.0, -10.0, 10.0)


def next_coefficient(
  spec: specs.KlSpec, coefficient: float, kl: float, count: int
) -> float:
  """Returns the weight of the KL after an update.

  Fixed, or adaptive per arXiv 1909.08593, eq. 10.

  Args:
    spec: which controller, its target and horizon.
    coefficient: the weight so far.
    kl: mean KL that was measured.
    count: trajectories of the update.
  """
  if spec.controller == "fixed":
    return coefficient
  error = float(np.clip(kl / spec.target - 1.0, -0.2, 0.2))
  return coefficient * (1.0 + error * count / spec.horizon)
