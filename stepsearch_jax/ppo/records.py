"""Settings, state and batches of the learner."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import adapters
from stepsearch_jax.ppo import advantages as adv


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
  """Settings of the update; see `configs/common.py` for the plain ones.

  Attributes:
    estimator: "gae" (StePPO, PPO), "grpo" or "reinforce".
    kl_in_reward: subtract kl_coef * KL from every token's reward.
    kl_loss_coef: weight of KL as a loss (GRPO).
    mini_batch: trajectories per optimiser step.
    micro_rows, row_length: shape of one forward/backward pass.
    policy_warmup, value_warmup: optimiser steps.
    critic_warmup: training steps that leave the policy alone.
    mask_scope: "policy" tokens, or "attended" response tokens, for GAE,
      whitening and value loss (released: C1, C2, C10).
    micro_weighting: "token", or "micro_mean" (released: C8).
    first_lr_zero: released warm-up (C9).
    policy_adapter, value_adapter: train adapters on the reference instead of
      the whole model.
  """

  estimator: str = "gae"
  gamma: float = 1.0
  lam: float = 1.0
  clip_ratio: float = 0.2
  value_clip: float = 0.5
  entropy_coef: float = 0.001
  kl_coef: float = 0.001
  kl_estimator: str = "kl"
  kl_controller: str = "fixed"
  kl_target: float = 0.1
  kl_horizon: float = 10000.0
  kl_in_reward: bool = True
  kl_loss_coef: float = 0.0
  ppo_epochs: int = 1
  mini_batch: int = 32
  micro_rows: int = 16
  row_length: int = 4096
  temperature: float = 1.0
  policy_lr: float = 5e-7
  value_lr: float = 5e-7
  policy_warmup: int = 0
  value_warmup: int = 0
  weight_decay: float = 0.01
  grad_clip: float = 1.0
  critic_warmup: int = 0
  mask_scope: str = "policy"
  micro_weighting: str = "token"
  first_lr_zero: bool = False
  policy_adapter: adapters.AdapterSpec | None = None
  value_adapter: adapters.AdapterSpec | None = None

  def __post_init__(self):
    for field, allowed in (
      ("estimator", ("gae", "grpo", "reinforce")),
      ("kl_estimator", adv.KL_ESTIMATORS),
      ("kl_controller", ("fixed", "adaptive")),
      ("mask_scope", ("policy", "attended")),
      ("micro_weighting", ("token", "micro_mean")),
    ):
      if getattr(self, field) not in allowed:
        raise types.UserError(
          f"ppo.{field} must be one of {allowed}, got {getattr(self, field)!r}"
        )


@flax.struct.dataclass
class LearnerState:
  """Everything that training changes.

  Attributes:
    step: [] int32, calls of `update`.
    policy: what is trained of the policy (see `variants.Variant`).
    value: likewise of the value model; None without one.
    policy_opt, value_opt: optimiser states.
    kl_coef: [] float32.
  """

  step: jax.Array
  policy: Any
  value: Any
  policy_opt: Any
  value_opt: Any
  kl_coef: jax.Array


@dataclasses.dataclass
class Experience:
  """A scored batch: [B, T] float32 host arrays by token, and its mean KL.

  `scope` masks the value loss; it is the policy mask except in the released
  preset (see `scopes`). `reference` holds the frozen policy's parameters.
  """

  batch: types.RolloutBatch
  logp: np.ndarray
  reference_logp: np.ndarray
  values: np.ndarray
  advantages: np.ndarray
  returns: np.ndarray
  scope: np.ndarray
  kl: float
  reference: Any


def scopes(
  batch: types.RolloutBatch, mask_scope: str
) -> tuple[np.ndarray, np.ndarray]:
  """Masks [B, T] of (GAE and whitening, value model and its loss).

  Both are the policy mask, unless the released code's are asked for
  ("attended"): all response tokens, and for the value model, whose mask is
  shifted by one there, also the token behind them (C2, C10).
  """
  if mask_scope == "policy":
    return batch.policy_mask, batch.policy_mask
  steps = np.arange(batch.tokens.shape[1])[None]
  first = (batch.policy_mask > 0).argmax(axis=1)[:, None]
  inside = (steps >= first) & (steps < batch.lengths[:, None])
  inside &= batch.policy_mask.any(axis=1)[:, None]
  late = inside.copy()
  late[:, 1:] |= inside[:, :-1]
  return inside.astype(np.float32), late.astype(np.float32)


@flax.struct.dataclass
class Micro:
  """One packed micro-batch, all [micro_rows, row_length]."""

  tokens: jax.Array
  segment_ids: jax.Array
  positions: jax.Array
  mask: jax.Array
  scope: jax.Array
  logp: jax.Array
  reference_logp: jax.Array
  values: jax.Array
  advantages: jax.Array
  returns: jax.Array
