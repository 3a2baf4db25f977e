"""The StePPO learner: rollout batch in, updated models out.

Three kinds of compiled program of one shape each ([micro_rows, row_length]
packed rows): score, accumulate gradients, apply. Longer, shorter or fewer
trajectories change how many times they run, never what is compiled; explicit
output shardings keep the state from one update a valid input to the next.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepsearch_jax import types
from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import advantages as adv
from stepsearch_jax.ppo import (
  batching,
  estimates,
  optimizer,
  records,
  scores,
  updates,
  variants,
)
from stepsearch_jax.ppo.records import (
  Experience,
  LearnerSpec,
  LearnerState,
  Micro,
)


class Learner:
  """Holds the compiled programs; state goes in and comes out."""

  def __init__(
    self,
    policy_config: decoder.DecoderConfig,
    value_config: decoder.DecoderConfig,
    spec: LearnerSpec,
    mesh,
  ):
    """Prepares the programs; nothing is compiled yet."""
    self.spec = spec
    self.variants = {
      "policy": variants.Variant("policy", policy_config, spec.policy_adapter),
      "value": variants.Variant("value", value_config, spec.value_adapter),
    }
    self._mesh = mesh
    self._controller = adv.KlController(
      spec.kl_controller, spec.kl_target, spec.kl_horizon
    )
    self._rates = {
      "policy": optimizer.warmup_schedule(
        spec.policy_lr, spec.policy_warmup, spec.first_lr_zero
      ),
      "value": optimizer.warmup_schedule(
        spec.value_lr, spec.value_warmup, spec.first_lr_zero
      ),
    }
    self._transforms = {
      kind: optimizer.adamw(rate, spec.weight_decay, spec.grad_clip)
      for kind, rate in self._rates.items()
    }
    self._init_shardings()
    # Replicated: every process packs, unpacks and estimates the whole batch.
    jit = functools.partial(jax.jit, out_shardings=self._replicated)
    of_policy = functools.partial(
      scores.of_policy, config=policy_config, temperature=spec.temperature
    )
    self._score_reference = jit(of_policy)
    self._scores = {
      "policy": jit(
        lambda params, reference, micro: of_policy(
          self.variants["policy"].model(params, reference), micro
        )
      ),
      "value": jit(
        lambda params, reference, micro: scores.of_value(
          self.variants["value"].model(params, reference), micro, value_config
        )
      ),
    }
    if spec.policy_adapter is None:  # Then both are one program.
      self._scores["policy"] = (
        lambda params, reference, micro: self._score_reference(params, micro)
      )
    self._programs = {
      kind: updates.compiled(
        self.variants[kind], spec, self._rates[kind], self._transforms[kind],
        self._shardings[kind], self._shardings[f"{kind}_opt"],
        self._replicated,
      )
      for kind in self._kinds
    }
    self._estimate = jax.jit(functools.partial(estimates.estimate, spec))

  @property
  def _kinds(self) -> tuple[str, ...]:
    """Models that are trained."""
    return ("policy", "value") if self.spec.estimator == "gae" else ("policy",)

  def _init_shardings(self) -> None:
    """Where every part of the trained models and their optimisers lives."""
    self._replicated = sharding.replicated(self._mesh)
    self._shardings, self._shapes = {}, {}
    for kind in self._kinds:
      variant, tx = self.variants[kind], self._transforms[kind]
      shapes = variant.shapes()
      placed = sharding.tree_shardings(self._mesh, variant.axes(), shapes)
      optimiser = jax.eval_shape(tx.init, shapes)
      self._shapes |= {kind: shapes, f"{kind}_opt": optimiser}
      self._shardings[kind] = placed
      self._shardings[f"{kind}_opt"] = optax.tree_map_params(
        tx, lambda _, where: where, optimiser, placed,
        transform_non_params=lambda _: self._replicated,
      )

  def start(self, policy, key: jax.Array) -> LearnerState:
    """The first state of a run.

    Args:
      policy: parameters to start from; the value model starts from its trunk.
      key: of the value head and of adapters.
    """
    given = {k: self.variants[k].init(policy, key) for k in self._kinds}
    return self.init_state(given["policy"], given.get("value"))

  def init_state(self, policy, value) -> LearnerState:
    """Fresh optimiser states around what is trained, placed on the mesh.

    Args:
      policy: see `variants.Variant.init`.
      value: likewise; None unless the estimator is "gae".
    """
    given = {"policy": policy, "value": value}
    state = {"value": None, "value_opt": None}
    for kind in self._kinds:
      # A copy, so that donating the state never frees the caller's arrays.
      state[kind] = sharding.put(given[kind], self._shardings[kind])
      state[f"{kind}_opt"] = jax.jit(
        self._transforms[kind].init,
        out_shardings=self._shardings[f"{kind}_opt"],
      )(state[kind])
    return LearnerState(
      step=self._scalar(np.int32(0)),
      kl_coef=self._scalar(np.float32(self.spec.kl_coef)),
      **state,
    )

  def abstract_state(self) -> dict[str, Any]:
    """Shapes and places of the trained models and their optimisers."""
    return {
      name: sharding.abstract(self._shapes[name], self._shardings[name])
      for name in self._shapes
    }

  def abstract_reference(self):
    """Shape and place of the frozen policy, in the compute type."""
    config = self.variants["policy"].config
    return variants.abstract_reference(config, self._mesh)

  def policy(self, state: LearnerState, reference):
    """The whole policy of a state, for rollouts."""
    if self.spec.policy_adapter is None:
      return state.policy
    return variants.whole_model(
      self.variants["policy"], state.policy, reference
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

    spec, state = self.spec, self.abstract_state()
    shape = (spec.micro_rows, spec.row_length)
    fields = {field.name: jnp.float32 for field in dataclasses.fields(Micro)}
    fields |= dict.fromkeys(("tokens", "segment_ids", "positions"), jnp.int32)
    where = sharding.batch(self._mesh)
    micro = Micro(**{
      name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
      for name, dtype in fields.items()
    })
    one = jax.ShapeDtypeStruct((), jnp.float32, sharding=self._replicated)
    reference = self.abstract_reference()
    found = {}
    with sharding.scope(self._mesh):
      found["reference_forward"] = lower(
        self._score_reference, reference, micro
      )
      for kind in self._kinds:
        if kind == "value" or self.spec.policy_adapter is not None:
          found[f"{kind}_forward"] = lower(
            self._scores[kind], state[kind], reference, micro
          )
        zero, accumulate, apply = self._programs[kind]
        grads, sums = jax.eval_shape(zero, state[kind])
        grads = sharding.abstract(grads, self._shardings[kind])
        sums = sharding.abstract(sums, self._replicated)
        found[f"{kind}_update"] = lower(
          accumulate, state[kind], reference, grads, sums, micro, one, one
        )
        found[f"{kind}_apply"] = lower(
          apply, state[kind], state[f"{kind}_opt"], grads, one
        )
    return found

  def _scalar(self, value):
    return sharding.put(value, self._replicated)

  def _packing(self, batch, rows) -> batching.Packing:
    lengths = batch.lengths
    if self.spec.mask_scope == "attended":
      # The released value model also scores the token behind the last.
      lengths = np.minimum(lengths + 1, batch.tokens.shape[1])
    return batching.pack(
      rows, lengths, batch.tokens.shape[1], self.spec.row_length,
      self.spec.micro_rows,
    )

  def _micros(self, packing, batch, **arrays):
    """Yields device micro-batches of a packing; absent arrays are zeros."""
    zeros = np.zeros(batch.tokens.shape, np.float32)
    names = ("logp", "reference_logp", "values", "advantages", "returns")
    packed = {name: packing.pack(arrays.get(name, zeros)) for name in names}
    packed["mask"] = packing.pack(batch.policy_mask)
    packed["scope"] = packing.pack(arrays.get("scope", batch.policy_mask))
    packed["tokens"] = packing.pack(batch.tokens)
    where = sharding.batch(self._mesh)
    for start in range(0, len(packing.source), self.spec.micro_rows):
      part = slice(start, start + self.spec.micro_rows)
      yield sharding.put(
        Micro(
          segment_ids=packing.segment_ids[part],
          positions=packing.positions[part],
          **{name: array[part] for name, array in packed.items()},
        ),
        where,
      )

  def prepare(
    self, state: LearnerState, reference, batch: types.RolloutBatch
  ) -> tuple[Experience, dict[str, float]]:
    """Scores a batch under policy, reference and value model.

    Args:
      state: current models.
      reference: frozen policy parameters.
      batch: rollouts with token rewards.

    Returns:
      (experience, metrics), seconds of each model among them.
    """
    spec, shape = self.spec, batch.tokens.shape
    packing = self._packing(batch, range(shape[0]))
    seconds = {}
    with sharding.scope(self._mesh):
      micros = list(self._micros(packing, batch))

      def score(phase, program, *params):
        """One model over the whole batch, back in its rows."""
        began = time.perf_counter()
        parts = jax.device_get([program(*params, micro) for micro in micros])
        whole = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        seconds[f"timing_s/{phase}"] = time.perf_counter() - began
        return jax.tree.map(lambda x: packing.unpack(x, shape), whole)

      logp, entropy = score(
        "old_log_prob", self._scores["policy"], state.policy, reference
      )
      reference_logp, _ = score("ref", self._score_reference, reference)
      values = np.zeros(shape, np.float32)
      if state.value is not None:
        values = score(
          "values", self._scores["value"], state.value, reference
        )
    scope, value_scope = records.scopes(batch, spec.mask_scope)
    coefficient = np.float32(state.kl_coef if spec.kl_in_reward else 0.0)
    advantages, returns, metrics = jax.device_get(
      self._estimate(
        batch.token_rewards, values, logp, reference_logp,
        batch.policy_mask, scope, value_scope, batch.group, coefficient,
      )
    )
    metrics["actor/entropy"] = float(
      adv.masked_mean(entropy, batch.policy_mask)
    )
    metrics["critic/kl_coeff"] = float(state.kl_coef)
    metrics["update/padding_share"] = packing.padding_share
    experience = Experience(
      batch, logp, reference_logp, values, advantages, returns,
      value_scope, float(metrics["critic/kl"]), reference,
    )
    return experience, {
      name: float(v) for name, v in (metrics | seconds).items()
    }

  def update(
    self, state: LearnerState, experience: Experience, lr_scale: float = 1.0
  ) -> tuple[LearnerState, dict[str, Any]]:
    """Runs all epochs and mini-batches; `state` is donated.

    Args:
      state: current models and optimisers.
      experience: from `prepare`.
      lr_scale: multiplies both learning rates (see the sentinel's rollback).

    Returns:
      (new state, metrics).
    """
    spec, batch = self.spec, experience.batch
    train_policy = int(state.step) >= spec.critic_warmup
    history = []
    rows = np.arange(len(batch.tokens))
    with sharding.scope(self._mesh):
      for _ in range(spec.ppo_epochs):
        for start in range(0, len(rows), spec.mini_batch):
          part = rows[start : start + spec.mini_batch]
          state, metrics = self._mini_batch(
            state, experience, part, train_policy, lr_scale
          )
          history.append(metrics)
    coefficient = self._controller.update(
      float(state.kl_coef), experience.kl, len(rows)
    )
    state = state.replace(
      step=self._scalar(np.int32(int(state.step) + 1)),
      kl_coef=self._scalar(np.float32(coefficient)),
    )
    return state, {
      name: np.mean([m[name] for m in jax.device_get(history)])
      for name in history[0]
    }

  def _mini_batch(self, state, experience, rows, train_policy, lr_scale):
    """One optimiser step over `rows`."""
    batch = experience.batch
    packing = self._packing(batch, rows)
    micros = list(
      self._micros(
        packing, batch, logp=experience.logp,
        reference_logp=experience.reference_logp, values=experience.values,
        advantages=experience.advantages, returns=experience.returns,
        scope=experience.scope,
      )
    )
    counts = {"policy": batch.policy_mask, "value": experience.scope}
    seen = {}
    # One model after the other: only one set of gradients exists at a time.
    for kind in self._kinds:
      if kind == "policy" and not train_policy:
        continue
      zero, accumulate, apply = self._programs[kind]
      params, opt = getattr(state, kind), getattr(state, f"{kind}_opt")
      grads, sums = zero(params)
      count = np.float32(counts[kind][rows].sum())
      for micro in micros:
        grads, sums = accumulate(
          params, experience.reference, grads, sums, micro, count,
          np.float32(len(micros)),
        )
      params, opt, norms = apply(params, opt, grads, np.float32(lr_scale))
      state = state.replace(**{kind: params, f"{kind}_opt": opt})
      seen |= {**sums, **norms}
    return state, seen
