"""Settings and batches for tests of the learner and its callers."""

import dataclasses

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.ppo import specs


def optimizer_spec(role, **changes):
  spec = specs.OptimizerSpec(
    role=role, learning_rate=1e-2, warmup=0, first_rate_zero=False,
    weight_decay=0.01, grad_clip=1.0, adapter=None,
  )
  return dataclasses.replace(spec, **changes)


SPEC = specs.LearnerSpec(
  estimator=specs.EstimatorSpec(
    name="gae", gamma=1.0, lam=1.0, scope="policy", turn_gamma=0.95,
    turn_weight=1.0, strata_blend=0.5,
  ),
  loss=specs.LossSpec(
    clip_ratio=0.2, clip_ratio_high=0.0, dual_clip=0.0, ratio="token",
    aggregation="token", llds_coef=0.0, llds_answer_weight=0.2,
    old_logp="recompute", importance_cap=2.0, value_clip=0.5,
    entropy_coef=0.001, micro_weighting="token",
  ),
  kl=specs.KlSpec(
    in_reward=True, coef=0.1, estimator="kl",
    loss_estimator="low_var_kl", controller="fixed", target=0.1,
    horizon=10000.0,
  ),
  policy=optimizer_spec("policy"),
  value=optimizer_spec("value"),
  batch=specs.BatchSpec(epochs=1, mini_batch=4, micro_rows=2, row_length=48),
  temperature=1.0,
  critic_warmup=0,
)


def learner_spec(**changes):
  """SPEC with fields of its parts changed.

  Args:
    **changes: `part__field=value`, or `field=value` of the learner itself;
      `adam__field` changes both optimizers.
  """
  parts = {}
  for name, value in changes.items():
    part, _, field = name.partition("__")
    if not field:
      parts[part] = value
      continue
    for owner in ("policy", "value") if part == "adam" else (part,):
      whole = parts.get(owner, getattr(SPEC, owner))
      parts[owner] = dataclasses.replace(whole, **{field: value})
  return dataclasses.replace(SPEC, **parts)


def rollout_batch(policy_mask, token_rewards=None, tokens=None, lengths=None,
                  **changes):
  """A batch around a mask; every run of policy tokens is a turn."""
  mask = np.asarray(policy_mask, np.float32)
  rows, width = mask.shape
  on = mask > 0
  starts = on & ~np.pad(on, ((0, 0), (1, 0)))[:, :-1]
  turn = np.where(on, np.cumsum(starts, axis=1) - 1, -1).astype(np.int32)
  turns = -(-max(int(turn.max(initial=0)) + 1, 1) // 8) * 8
  numbers = np.arange(rows * turns, dtype=np.int32).reshape(rows, turns)
  last = np.where(on.any(1), turn.max(1), -1).astype(np.int32)
  fields = dict(
    tokens=np.zeros((rows, width), np.int32) if tokens is None else tokens,
    lengths=np.full(rows, width, np.int32) if lengths is None else lengths,
    policy_mask=mask,
    token_rewards=np.zeros_like(mask) if token_rewards is None
    else np.asarray(token_rewards, np.float32),
    rollout_logp=np.zeros_like(mask),
    group=np.arange(rows, dtype=np.int32) // 2,
    turn=turn,
    anchor=np.where(np.arange(turns) <= last[:, None], numbers, -1),
    searches=np.maximum(last, 0),
    # The last policy token of each row is its answer.
    answer_start=np.where(
      on.any(1), width - 1 - np.argmax(on[:, ::-1], 1), width
    ).astype(np.int32),
  )
  return types.RolloutBatch(**(fields | changes))
