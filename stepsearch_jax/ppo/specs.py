"""Settings of the learner: values only, every one from the config.

No field has a default here: `configs/common.py` holds them. A value that
cannot work raises a UserError that names its config field.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable

from stepsearch_jax import types
from stepsearch_jax.models import adapters

_BUSY_TOKENS = 4096  # A pass over so many keeps a device busy.


class KlEstimator(enum.StrEnum):
  """Per-token estimate of KL(policy || reference); see `kl.penalty`."""

  KL = "kl"
  ABS = "abs"
  MSE = "mse"
  LOW_VAR_KL = "low_var_kl"


class MaskScope(enum.StrEnum):
  """Tokens that advantages and values are about; see `records.Masks`."""

  POLICY = "policy"  # Sampled tokens.
  ATTENDED = "attended"  # All response tokens, as released.


class Ratio(enum.StrEnum):
  """What a probability ratio is of; see `losses.log_ratio`."""

  TOKEN = "token"
  SEQUENCE = "sequence"
  TURN = "turn"


class Aggregation(enum.StrEnum):
  """How the tokens of a mini-batch become one loss; see `weighting`."""

  TOKEN = "token"
  SEQUENCE = "sequence"
  CONSTANT = "constant"


class OldLogp(enum.StrEnum):
  """Where the log-probabilities before the update come from."""

  RECOMPUTE = "recompute"
  ROLLOUT = "rollout"


class MicroWeighting(enum.StrEnum):
  """How the micro-batches of one optimizer step are averaged."""

  TOKEN = "token"  # Every token of the mini-batch counts the same.
  MICRO_MEAN = "micro_mean"  # Every micro-batch does, as released.


def choose(field: str, value: str, allowed: Iterable[str]) -> None:
  """Raises a UserError unless `value` is one of `allowed`."""
  names = [str(name) for name in allowed]
  types.expect(value in names, field, f"one of {', '.join(names)}", value)


def within(field: str, value: float, low: float, high: float = math.inf,
           above: bool = False) -> None:
  """Raises a UserError unless low <= value <= high.

  Args:
    field: config field that holds the value.
    value: what was given; NaN is never right.
    low: smallest value.
    high: largest value.
    above: `low` itself is not allowed.
  """
  bound = f"more than {low:g}" if above else f"{low:g} or more"
  if high < math.inf:
    bound += f", at most {high:g}"
  inside = low <= value <= high and not (above and value == low)
  types.expect(inside, field, bound, value)


@dataclasses.dataclass(frozen=True)
class EstimatorSpec:
  """How rewards become advantages.

  Attributes:
    name: key of `estimators.REGISTRY`.
    gamma: discount per policy token.
    lam: lambda of generalized advantage estimation.
    scope: tokens that advantages and values are about.
    turn_gamma: discount per turn (bilevel_gae, gigpo).
    turn_weight: of the state's z-score beside the group's (gigpo).
    strata_blend: share of the stratum's z-score (stratified).
  """

  name: str
  gamma: float
  lam: float
  scope: str
  turn_gamma: float
  turn_weight: float
  strata_blend: float

  def __post_init__(self):
    within("ppo.gamma", self.gamma, 0, 1)
    within("ppo.lam", self.lam, 0, 1)
    choose("ppo mask scope", self.scope, MaskScope)
    within("ppo.turn_gamma", self.turn_gamma, 0, 1)
    within("ppo.turn_weight", self.turn_weight, 0)
    within("ppo.strata_blend", self.strata_blend, 0, 1)


@dataclasses.dataclass(frozen=True)
class LossSpec:
  """What one optimizer step minimizes.

  Attributes:
    clip_ratio: the probability ratio counts down to 1 - this.
    clip_ratio_high: and up to 1 + this; 0 for the same.
    dual_clip: where the advantage is negative, the ratio counts up to this; 0
      for no bound.
    ratio: what a ratio is of.
    aggregation: how tokens become one number.
    llds_coef: weight of the LLDS penalty; 0 for none.
    llds_answer_weight: of the tokens of the answer in it.
    old_logp: where the log-probabilities before the update come from.
    importance_cap: with recorded ones, the largest importance weight.
    value_clip: largest counted move of a value from its old one.
    entropy_coef: weight of the entropy bonus.
    micro_weighting: average over micro-batches.
  """

  clip_ratio: float
  clip_ratio_high: float
  dual_clip: float
  ratio: str
  aggregation: str
  llds_coef: float
  llds_answer_weight: float
  old_logp: str
  importance_cap: float
  value_clip: float
  entropy_coef: float
  micro_weighting: str

  def __post_init__(self):
    within("ppo.clip_ratio", self.clip_ratio, 0, 1, above=True)
    types.expect(
      self.clip_ratio_high == 0 or self.clip_ratio_high >= self.clip_ratio,
      "ppo.clip_ratio_high",
      f"0 or at least ppo.clip_ratio = {self.clip_ratio}",
      self.clip_ratio_high,
    )
    types.expect(
      self.dual_clip == 0 or self.dual_clip > 1, "ppo.dual_clip",
      "0 (none) or more than 1", self.dual_clip,
    )
    choose("ppo.ratio", self.ratio, Ratio)
    choose("ppo.aggregation", self.aggregation, Aggregation)
    within("ppo.llds_coef", self.llds_coef, 0)
    within("ppo.llds_answer_weight", self.llds_answer_weight, 0)
    choose("ppo.old_logp", self.old_logp, OldLogp)
    within("ppo.importance_cap", self.importance_cap, 1)
    within("ppo.value_clip", self.value_clip, 0, above=True)
    within("ppo.entropy_coef", self.entropy_coef, 0)
    choose("ppo micro weighting", self.micro_weighting, MicroWeighting)
    types.expect(
      self.micro_weighting == MicroWeighting.TOKEN
      or self.aggregation == Aggregation.TOKEN, "ppo.aggregation",
      "token with the released preset", self.aggregation,
    )

  @property
  def highest_ratio(self) -> float:
    """Upper end of the range in which the ratio counts."""
    return 1.0 + (self.clip_ratio_high or self.clip_ratio)


@dataclasses.dataclass(frozen=True)
class KlSpec:
  """The KL to the frozen reference, in the reward or as a loss.

  Attributes:
    in_reward: coef * KL is subtracted from every token's reward; otherwise it
      is added to the loss.
    coef: the weight, in the reward the first one where a controller moves it.
    estimator: estimate in the reward and in the metrics.
    loss_estimator: estimate in the loss.
    controller: "fixed", or "adaptive", see `kl.next_coefficient`.
    target: KL that the adaptive controller aims at.
    horizon: trajectories over which it moves.
  """

  in_reward: bool
  coef: float
  estimator: str
  loss_estimator: str
  controller: str
  target: float
  horizon: float

  def __post_init__(self):
    within("ppo.kl_coef", self.coef, 0)
    choose("ppo.kl_estimator", self.estimator, KlEstimator)
    # The expected gradient of log p - log q is zero: no loss at all.
    choose(
      "ppo.kl_loss_estimator", self.loss_estimator,
      [name for name in KlEstimator if name != KlEstimator.KL],
    )
    choose("ppo.kl_controller", self.controller, ("fixed", "adaptive"))
    within("ppo.kl_target", self.target, 0, above=True)
    within("ppo.kl_horizon", self.horizon, 0, above=True)
    types.expect(
      self.in_reward or self.controller == "fixed", "ppo.kl_controller",
      "fixed where ppo.kl_in_reward is False", self.controller,
    )

  @property
  def loss_coef(self) -> float:
    """Weight of the KL in the loss."""
    return 0.0 if self.in_reward else self.coef


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
  """AdamW of one model, and what of the model it trains.

  Attributes:
    role: "policy" or "value", for messages.
    learning_rate: after the warm-up.
    warmup: optimizer steps of linear warm-up.
    first_rate_zero: the first step changes nothing, as released (C9, see the
      quirk table in stepsearch_jax/README.md).
    weight_decay: decoupled, on every parameter.
    grad_clip: largest global norm of a gradient.
    adapter: size of the adapters on the reference that are trained instead of
      the whole model; None for the whole model.
  """

  role: str
  learning_rate: float
  warmup: int
  first_rate_zero: bool
  weight_decay: float
  grad_clip: float
  adapter: adapters.AdapterSpec | None

  def __post_init__(self):
    within(f"ppo.{self.role}_lr", self.learning_rate, 0)
    within(f"ppo.{self.role}_warmup_ratio", self.warmup, 0)
    within("ppo.weight_decay", self.weight_decay, 0)
    within("ppo.grad_clip", self.grad_clip, 0, above=True)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
  """Shapes and counts of passes over a batch.

  Attributes:
    epochs: times that every trajectory is trained on.
    mini_batch: trajectories per optimizer step.
    micro_rows: packed rows of one forward and backward pass.
    row_length: tokens of a packed row.
  """

  epochs: int
  mini_batch: int
  micro_rows: int
  row_length: int

  def __post_init__(self):
    within("ppo.epochs", self.epochs, 1)
    within("ppo.mini_batch", self.mini_batch, 1)
    within("ppo.micro_rows", self.micro_rows, 1)
    within("rollout.context", self.row_length, 1)

  def tail_rows(self, shards: int) -> int:
    """Rows of the smaller passes that end a mini-batch; see `micro_sizes`.

    Args:
      shards: data shards of the mesh, which must divide the rows.
    """
    # A quarter, or less where that keeps a device busy: less stays empty.
    rows = min(self.micro_rows // 4, -(-_BUSY_TOKENS // self.row_length))
    small = -(-rows // shards) * shards
    return small if 0 < small < self.micro_rows else self.micro_rows

  def optimizer_steps(self, trajectories: int) -> int:
    """Optimizer steps over a batch of so many trajectories."""
    return self.epochs * -(-trajectories // self.mini_batch)


@dataclasses.dataclass(frozen=True)
class LearnerSpec:
  """Everything that the learner is told.

  Attributes:
    estimator: from rewards to advantages.
    loss: what is minimized.
    kl: distance to the reference.
    policy: optimizer of the policy.
    value: optimizer of the value model; unused without one.
    batch: shapes of the passes.
    temperature: of the distribution that was sampled from.
    critic_warmup: training steps that leave the policy alone.
  """

  estimator: EstimatorSpec
  loss: LossSpec
  kl: KlSpec
  policy: OptimizerSpec
  value: OptimizerSpec
  batch: BatchSpec
  temperature: float
  critic_warmup: int

  def __post_init__(self):
    within("rollout.temperature", self.temperature, 0, above=True)
    within("ppo.critic_warmup", self.critic_warmup, 0)

  def pass_rows(self, shards: int) -> tuple[int, int]:
    """Rows of a micro-batch, and of those that end a mini-batch.

    Args:
      shards: data shards of the mesh.
    """
    whole = self.batch.micro_rows
    if self.loss.micro_weighting == MicroWeighting.MICRO_MEAN:
      return whole, whole  # A mean over micro-batches of one size.
    return whole, self.batch.tail_rows(shards)
