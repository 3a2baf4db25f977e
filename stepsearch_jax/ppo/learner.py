"""The StePPO learner: rollout batch in, updated models out.

Three kinds of compiled program: forward and accumulate, each over packed rows
[micro_rows, row_length] and over fewer rows at the end of a mini-batch, and
apply. Longer, shorter or fewer trajectories change how many times they run,
never what is compiled: both sizes run in the first step.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import (
  advantages,
  batch_metrics,
  batching,
  estimators,
  forward,
  kl,
  masked,
  packer,
  specs,
  trainable,
  weighting,
)
from stepsearch_jax.ppo.model_losses import Share
from stepsearch_jax.ppo.records import (
  Experience,
  LearnerState,
  Masks,
  MicroBatch,
  MiniBatch,
)
from stepsearch_jax.ppo.trained_model import TrainedModel


class Learner:
  """Holds the compiled programs; state goes in and comes out.

  Attributes:
    spec: what it was told.
    policy: the policy's programs.
    value: the value model's; None where the estimator needs none.
  """

  def __init__(
    self, policy_config: decoder.DecoderConfig,
    value_config: decoder.DecoderConfig, spec: specs.LearnerSpec,
    mesh: sharding.DeviceMesh,
  ):
    """Prepares the programs; nothing is compiled yet."""
    self.spec = spec
    self._mesh = mesh
    self._replicated = sharding.replicated(mesh)
    self._packer = packer.Packer(spec, mesh)
    self._estimator = estimators.find(spec.estimator.name)
    self._compute = jax.jit(
      functools.partial(advantages.compute, self._estimator, spec)
    )
    self.policy = TrainedModel(
      trainable.Trainable("policy", policy_config, spec.policy.adapter), spec,
      mesh,
    )
    self.value = None
    if self._estimator.needs_values:
      self.value = TrainedModel(
        trainable.Trainable("value", value_config, spec.value.adapter), spec,
        mesh,
      )
    self._reference_forward = jax.jit(
      functools.partial(
        forward.policy, config=policy_config, temperature=spec.temperature
      ),
      out_shardings=self._replicated,
    )

  @property
  def models(self) -> dict[str, TrainedModel]:
    """The models in training by role."""
    found = {"policy": self.policy, "value": self.value}
    return {role: model for role, model in found.items() if model is not None}

  def start(
    self, policy: types.Tree, reference: types.Tree, key: jax.Array
  ) -> LearnerState:
    """The first state of a run.

    Args:
      policy: parameters to start from; the value model starts from its trunk.
      reference: see `init_state`.
      key: of the value head and of adapters.
    """
    first = {
      role: model.trainable.init(policy, key)
      for role, model in self.models.items()
    }
    return self.init_state(first["policy"], first.get("value"), reference)

  def init_state(
    self, policy: types.Tree, value: types.Tree, reference: types.Tree
  ) -> LearnerState:
    """Fresh optimizers around what is trained, placed on the mesh.

    Args:
      policy: what is trained of it, see `trainable.Trainable.init`.
      value: likewise; None unless the estimator needs values.
      reference: parameters of the frozen policy, on the mesh already or not;
        kept as they are. None in a state that only says how one looks.
    """
    return LearnerState(
      step=self._scalar(np.int32(0)),
      kl_coef=self._scalar(np.float32(self.spec.kl.coef)),
      policy=self.policy.start(policy),
      value=None if self.value is None else self.value.start(value),
      reference=reference,
    )

  def abstract_state(self) -> LearnerState:
    """Shapes and places of a state, the reference included."""
    def scalar(dtype):
      return jax.ShapeDtypeStruct((), dtype, sharding=self._replicated)

    return LearnerState(
      step=scalar(jnp.int32),
      kl_coef=scalar(jnp.float32),
      policy=self.policy.abstract(),
      value=None if self.value is None else self.value.abstract(),
      reference=trainable.abstract_reference(
        self.policy.trainable.config, self._mesh
      ),
    )

  def whole_policy(self, state: LearnerState) -> types.Tree:
    """The whole policy of a state, for rollouts."""
    if self.spec.policy.adapter is None:
      return state.policy.params
    policy = self.policy.trainable
    return trainable.whole_model(
      policy, state.policy.params, state.reference, policy.config.dtype
    )

  def lowered(
    self, platforms: tuple[str, ...] | None = None
  ) -> dict[str, jax.stages.Lowered]:
    """Every large program by name, lowered but not compiled.

    Args:
      platforms: for other platforms than the mesh's.
    """

    def lower(program, *arguments):
      return program.trace(*arguments).lower(lowering_platforms=platforms)

    batch = self.spec.batch
    shape = (batch.micro_rows, batch.row_length)
    micro = MicroBatch.abstract(shape, sharding.batch(self._mesh))
    reference = self.abstract_state().reference
    with sharding.scope(self._mesh):
      found = {
        "reference_forward": lower(self._reference_forward, reference, micro)
      }
      for model in self.models.values():
        found |= model.lowered(lower, reference, micro)
    return found

  def _scalar(self, value):
    return sharding.put(value, self._replicated)

  def prepare(
    self, state: LearnerState, batch: types.RolloutBatch
  ) -> tuple[Experience, dict[str, float]]:
    """Evaluates a batch under all models and estimates advantages.

    Args:
      state: current models.
      batch: rollouts with token rewards.

    Returns:
      (experience, metrics), seconds of each model among them.
    """
    spec = self.spec
    now, frozen, values, metrics = self._evaluate(state, batch)
    masks = Masks.of(batch, spec.estimator.scope)
    coefficient = float(jax.device_get(state.kl_coef))
    inputs = estimators.Inputs(
      rewards=batch.token_rewards, logp=now.logp, masks=masks,
      values=np.zeros_like(now.logp) if values is None else values,
      group=batch.group, turn=batch.turn, anchor=batch.anchor,
      searches=batch.searches,
    )
    paid = np.float32(coefficient if spec.kl.in_reward else 0.0)
    found = jax.device_get(self._compute(inputs, frozen.logp, paid))
    self._estimator.check_finite(inputs, found.estimates)
    metrics |= found.metrics
    if now.entropy is not None:
      entropy = masked.mean(now.entropy, masks.policy)
      metrics["actor/entropy"] = entropy
      metrics |= batch_metrics.rollout_mismatch(batch, now.logp)
    metrics["critic/kl_coeff"] = coefficient
    experience = Experience(
      batch, masks, now.logp, frozen.logp, values, found.estimates.advantages,
      found.estimates.returns, found.estimates.value_weights,
      float(found.metrics["critic/kl"]), now.entropy,
    )
    metrics |= batch_metrics.old_logp_by_advantage(experience)
    metrics = jax.device_get(metrics)
    return experience, {name: float(v) for name, v in metrics.items()}

  def _evaluate(self, state: LearnerState, batch: types.RolloutBatch):
    """(policy's output, reference's, values or None, metrics) of a batch."""
    packing = self._packer.packing(batch, range(len(batch.tokens)))
    metrics = {"forward/padding_share": packing.padding_share}
    with sharding.scope(self._mesh):
      micros = self._packer.both_sizes(
        "scores", self._packer.micros(packing, batch)
      )

      def over_batch(phase, program, *params):
        """One model over the whole batch, back in its rows."""
        began = time.perf_counter()
        parts = jax.device_get([program(*params, micro) for micro in micros])
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        metrics[f"timing_s/{phase}"] = time.perf_counter() - began
        return jax.tree.map(packing.unpack, whole)

      params, reference = state.policy.params, state.reference
      if self._uses_recorded(state):
        now = forward.PolicyOutput(batch.rollout_logp, None)
      elif self.spec.policy.adapter is None:  # One program for both.
        now = over_batch("old_log_prob", self._reference_forward, params)
      else:
        now = over_batch(
          "old_log_prob", self.policy.forward, params, reference
        )
      frozen = over_batch("ref", self._reference_forward, reference)
      values = None
      if self.value is not None:
        values = over_batch(
          "values", self.value.forward, state.value.params, reference
        )
    return now, frozen, values, metrics

  def update(
    self, state: LearnerState, experience: Experience, lr_scale: float = 1.0
  ) -> tuple[LearnerState, dict[str, Any]]:
    """Runs all epochs and mini-batches; the models of `state` are donated.

    Args:
      state: current models and optimizers.
      experience: from `prepare`.
      lr_scale: multiplies both learning rates (see the sentinel's rollback).

    Returns:
      (new state, metrics).
    """
    spec = self.spec
    step = int(jax.device_get(state.step))
    train_policy = step >= spec.critic_warmup
    history = []
    rows, size = len(experience.batch.tokens), spec.batch.mini_batch
    minis: list[MiniBatch] = []
    with sharding.scope(self._mesh):
      for epoch in range(spec.batch.epochs):
        for number, start in enumerate(range(0, rows, size)):
          if not epoch:  # Later ones find it on the device.
            part = np.arange(start, min(start + size, rows))
            minis.append(self._mini_batch(experience, part))
          state, metrics = self._optimizer_step(
            state, minis[number], train_policy, lr_scale
          )
          history.append(metrics)
    coefficient = kl.next_coefficient(
      spec.kl, float(jax.device_get(state.kl_coef)), experience.kl, rows
    )
    history = jax.device_get(history)
    metrics = {
      name: np.mean([m[name] for m in history]) for name in history[0]
    }
    if self._uses_recorded(state):
      metrics |= batch_metrics.of_first_update(history[0])
    state = dataclasses.replace(
      state,
      step=self._scalar(np.int32(step + 1)),
      kl_coef=self._scalar(np.float32(coefficient)),
    )
    return state, metrics

  def _uses_recorded(self, state: LearnerState) -> bool:
    """Whether log-probabilities of the rollout stand for the policy's.

    A step that leaves the policy alone evaluates it for the metrics.
    """
    step = int(jax.device_get(state.step))
    recorded = self.spec.loss.old_logp == specs.OldLogp.ROLLOUT
    return recorded and step >= self.spec.critic_warmup

  def _mini_batch(self, experience: Experience, rows: np.ndarray) -> MiniBatch:
    """Packs `rows` for an optimizer step."""
    batch, spec = experience.batch, self.spec
    weights = weighting.of_mini_batch(experience, rows, spec)
    # In a mean over micro-batches it matters who is in which: as released.
    micro_mean = specs.MicroWeighting.MICRO_MEAN
    packing = self._packer.packing(
      batch, rows, share=spec.loss.micro_weighting != micro_mean
    )
    micros = self._packer.micros(
      packing, batch, logp=experience.logp,
      reference_logp=experience.reference_logp, values=experience.values,
      advantages=experience.advantages, returns=experience.returns,
      value_weights=experience.value_weights, weights=weights.policy,
      llds_weights=weights.llds,
    )
    tokens = {
      "policy": batch.policy_mask[rows].sum(),
      "value": (experience.value_weights[rows] > 0).sum(),
    }
    turns = batching.count_turns(batch.turn[rows])
    return MiniBatch(micros, tokens, turns, packing.padding_share)

  def _optimizer_step(self, state, mini: MiniBatch, train_policy, lr_scale):
    """Updates the models on a mini-batch."""
    seen = {"update/padding_share": mini.padding_share}
    # One model after the other: only one set of gradients exists at a time.
    for role, model in self.models.items():
      if role == "policy" and not train_policy:
        continue
      share = Share(*map(
        np.float32, (mini.tokens[role], mini.turns, len(mini.micros))
      ))
      trained, metrics = model.update(
        getattr(state, role), state.reference,
        self._packer.both_sizes(role, mini.micros), share, lr_scale
      )
      state = dataclasses.replace(state, **{role: trained})
      seen |= metrics
    return state, seen
