"""State of the learner, and batches on their way through it.

Shapes use the axis letters of `stepsearch_jax.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.ppo import specs


@flax.struct.dataclass
class Trained:
  """One model in training.

  Attributes:
    params: what is trained of it (see `trainable.Trainable`).
    opt: state of its optimizer.
  """

  params: Any
  opt: Any


@flax.struct.dataclass
class LearnerState:
  """Everything that an update reads and changes, and the frozen reference.

  Attributes:
    step: [] int32, calls of `Learner.update`.
    kl_coef: [] float32, weight of the KL in the reward.
    policy: the policy.
    value: the value model; None where the estimator needs none.
    reference: parameters of the frozen policy, in the compute type.
  """

  step: types.Leaf
  kl_coef: types.Leaf
  policy: Trained
  value: Trained | None
  reference: Any

  def split(self) -> SavedState:
    """Returns the parts that a checkpoint stores: all but the reference."""
    return SavedState(
      policy=self.policy.params,
      rest=dataclasses.replace(
        self, policy=dataclasses.replace(self.policy, params=None),
        reference=None,
      ),
    )


@flax.struct.dataclass
class SavedState:
  """A learner state as checkpoints keep it.

  The policy lies apart, so that evaluation reads nothing else. The reference
  never changes: a run writes it once, beside its checkpoints.

  Attributes:
    policy: `LearnerState.policy.params`.
    rest: the state without policy parameters and reference.
  """

  policy: Any
  rest: LearnerState

  def join(self, reference: types.Tree) -> LearnerState:
    """Returns the state that was split, around the run's reference."""
    return dataclasses.replace(
      self.rest, reference=reference,
      policy=dataclasses.replace(self.rest.policy, params=self.policy),
    )


@flax.struct.dataclass
class Masks:
  """Which tokens take part in what, [B, T] float32 each.

  All three are the policy mask, except in the released preset.

  Attributes:
    policy: sampled tokens; policy loss, KL and entropy.
    advantage: where advantages are whitened and measured.
    value: where values exist; the recursion of the estimator and value loss.
  """

  policy: types.Leaf
  advantage: types.Leaf
  value: types.Leaf

  @classmethod
  def of(cls, batch: types.RolloutBatch, scope: str) -> Masks:
    """Builds the masks of a batch; the only place that does.

    With the released scope, advantages are about all response tokens and
    values, whose mask the released code shifts by one, also about the token
    behind them (C1, C2, C10: see the quirk table in
    stepsearch_jax/README.md).

    Args:
      batch: rollouts.
      scope: a `specs.MaskScope`.
    """
    policy = batch.policy_mask
    if scope == specs.MaskScope.POLICY:
      return cls(policy, policy, policy)
    steps = np.arange(batch.tokens.shape[1])[None]
    first = np.argmax(policy > 0, axis=1, keepdims=True)
    inside = np.asarray(steps >= first) & (steps < batch.lengths[:, None])
    inside &= np.any(policy, axis=1, keepdims=True)
    late = inside.copy()
    late[:, 1:] |= inside[:, :-1]
    return cls(policy, inside.astype(np.float32), late.astype(np.float32))


@dataclasses.dataclass
class Experience:
  """A batch with everything that an update needs of it.

  Attributes:
    batch: the rollouts.
    masks: which tokens take part.
    logp: [B, T] log-probabilities under the policy before the update.
    reference_logp: [B, T] likewise under the reference.
    values: [B, T] values before the update; None without a value model.
    advantages: [B, T], 0 where the policy mask is.
    returns: [B, T], what values are fitted to.
    value_weights: [B, T], weight of each token in the value loss.
    kl: mean KL to the reference, per token.
    entropy: [B, T] of the policy before the update; None where recorded
      log-probabilities save that pass.
  """

  batch: types.RolloutBatch
  masks: Masks
  logp: types.Leaf
  reference_logp: types.Leaf
  values: types.Leaf | None
  advantages: types.Leaf
  returns: types.Leaf
  value_weights: types.Leaf
  kl: float
  entropy: np.ndarray | None = None


@flax.struct.dataclass
class MicroBatch:
  """Packed rows of one pass, all [R, S].

  Attributes:
    tokens: int32.
    segment_ids: int32, 1.. for the trajectories of a row, 0 for padding,
      `attention.PREFIX` for what they begin with, if the row holds it once.
    positions: int32, place within the trajectory.
    policy_mask: float32, sampled tokens.
    turn: int32, turn of each policy token in its trajectory; -1 elsewhere.
    weights: float32, weight of each token in the mean of the policy's loss.
    llds_weights: float32, its weight in the LLDS penalty.
    value_weights: float32, its weight in the value loss.
    logp: float32, log-probabilities before the update.
    reference_logp: float32, likewise under the reference.
    values: float32, values before the update.
    advantages: float32.
    returns: float32.
  """

  tokens: types.Leaf
  segment_ids: types.Leaf
  positions: types.Leaf
  policy_mask: types.Leaf
  turn: types.Leaf
  weights: types.Leaf
  llds_weights: types.Leaf
  value_weights: types.Leaf
  logp: types.Leaf
  reference_logp: types.Leaf
  values: types.Leaf
  advantages: types.Leaf
  returns: types.Leaf

  @classmethod
  def empty(cls, shape: tuple[int, int]) -> MicroBatch:
    """Returns rows of padding alone."""
    found = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), cls.abstract(shape, None)
    )
    return dataclasses.replace(found, turn=found.turn - 1)

  @classmethod
  def abstract(
    cls, shape: tuple[int, int], where: jax.sharding.Sharding | None
  ) -> MicroBatch:
    """Returns shapes and places instead of arrays, for lowering programs."""
    whole = ("tokens", "segment_ids", "positions", "turn")
    return cls(**{
      field.name: jax.ShapeDtypeStruct(
        shape, np.int32 if field.name in whole else np.float32, sharding=where
      )
      for field in dataclasses.fields(cls)
    })


@dataclasses.dataclass(frozen=True)
class MiniBatch:
  """The trajectories of an optimizer step, packed and on the device.

  Attributes:
    micros: micro-batches of packed rows.
    tokens: trained tokens, by role of the model.
    turns: policy turns.
    padding_share: of the places of all rows.
  """

  micros: Sequence[MicroBatch]
  tokens: dict[str, float]
  turns: int
  padding_share: float
