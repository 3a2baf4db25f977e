"""Metrics of a batch that warn before rewards do (numpy)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.ppo import weighting
from stepsearch_jax.ppo.records import Experience


def rollout_mismatch(
  batch: types.RolloutBatch, logp: np.ndarray
) -> dict[str, float]:
  """Compares log-probabilities of the rollout with those of training.

  With top-k or top-p the rollout samples from another distribution than the
  one that is trained, and the difference shows that and not an error.

  Args:
    batch: rollouts, with `rollout_logp`.
    logp: [B, T] log-probabilities of the same tokens by the trainer.

  Returns:
    Mean and maximum of the absolute difference, the k3 estimate of
    KL(rollout || training), the share of ratios outside [0.9, 1.1]. Empty
    without policy tokens.
  """
  on = batch.policy_mask > 0
  if not on.any():
    return {}
  gap = (logp - batch.rollout_logp)[on].astype(np.float64)
  ratio = np.exp(np.clip(gap, -20.0, 20.0))
  return {
    "rollout_mismatch/mean": float(np.abs(gap).mean()),
    "rollout_mismatch/max": float(np.abs(gap).max()),
    "rollout_mismatch/k3": float((ratio - 1.0 - gap).mean()),
    "rollout_mismatch/outside": float(((ratio < 0.9) | (ratio > 1.1)).mean()),
  }


def of_first_update(metrics: Mapping[str, float]) -> dict[str, float]:
  """What recorded log-probabilities leave unknown until the first update.

  Its first optimizer step evaluates the policy that sampled, on the mini-batch.

  Args:
    metrics: of that step.

  Returns:
    Entropy and, but for the maximum, `rollout_mismatch`.
  """
  return {
    "actor/entropy": metrics["actor/token_entropy"],
    "rollout_mismatch/mean": metrics["actor/logp_change"],
    "rollout_mismatch/k3": metrics["actor/logp_k3"],
    "rollout_mismatch/outside": metrics["actor/logp_outside"],
  }


def old_logp_by_advantage(experience: Experience) -> dict[str, float]:
  """Mean log-probability of tokens in good and in bad rows.

  Likelihood that falls on good rows comes before a collapse
  (arXiv 2512.04220). A kind of row that the batch lacks is left out.
  """
  mask = experience.masks.policy
  mean = weighting.row_advantages(experience.advantages, mask)
  found = {}
  for name, rows in (("positive", mean > 0), ("negative", mean < 0)):
    inside = (mask > 0) & rows[:, None]
    if inside.any():
      found[f"actor/old_logp/{name}"] = float(experience.logp[inside].mean())
  return found
