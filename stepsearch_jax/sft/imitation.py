"""Warm start: imitates scripted trajectories before reinforcement learning."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepsearch_jax import types
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching, forward, losses, records


@dataclasses.dataclass
class Progress:
  """What an imitation has learned so far.

  Attributes:
    step: optimizer steps done.
    params, opt: parameters, and state of the optimizer.
    loss: the latest that is known; None before the first step.
  """

  step: int
  params: types.Tree
  opt: types.Tree
  loss: float | None = None


class Keeper(Protocol):
  """Keeps the progress of an imitation, so that a later start goes on."""

  def restore(self, fresh: Progress) -> Progress:
    """Returns what an earlier start kept, else `fresh`."""

  def after_step(self, progress: Progress) -> None:
    """Takes note of a step; may show and keep it, or raise to stop here."""


def _step(params, opt, micro, *, config, tx):
  """One optimizer step on the masked tokens of packed rows."""

  def loss(params):
    logp = forward.policy(params, micro, config, 1.0).logp
    mask = micro.policy_mask
    count = (mask > 0).sum(dtype=jnp.float32)
    return losses.imitation_loss(logp, mask) / jnp.maximum(count, 1.0)

  value, grads = jax.value_and_grad(loss)(params)
  updates, opt = tx.update(grads, opt, params)
  return optax.apply_updates(params, updates), opt, value


def _micros(batch, steps, rows, row_length, seed):
  """Yields `steps` micro-batches of packed rows, epoch after epoch."""
  rng = np.random.default_rng(seed)
  packing = batching.pack(
    range(len(batch.tokens)), batch.lengths, batch.tokens.shape[1],
    row_length,
  )
  packed = {
    "tokens": packing.pack(batch.tokens),
    "policy_mask": packing.pack(batch.policy_mask),
    "segment_ids": packing.segment_ids,
    "positions": packing.positions,
  }
  total = len(packing.source)
  places = np.concatenate([
    rng.permutation(total) for _ in range(-(-steps * rows // total))
  ])
  zeros = np.zeros((rows, row_length), np.float32)
  for chosen in places[: steps * rows].reshape(steps, rows):
    yield records.MicroBatch(
      turn=np.zeros_like(zeros, np.int32), weights=zeros, llds_weights=zeros,
      value_weights=zeros, logp=zeros, reference_logp=zeros, values=zeros,
      advantages=zeros, returns=zeros,
      **{name: array[chosen] for name, array in packed.items()},
    )


@dataclasses.dataclass(frozen=True)
class ImitationSpec:
  """How long and how fast a policy imitates.

  Attributes:
    steps: optimizer steps, each over `rows` packed rows.
    rows: packed rows per step.
    row_length: tokens of a packed row.
    lr: peak of a one-cycle cosine schedule.
    seed: order of the trajectories.
  """

  steps: int
  rows: int
  row_length: int
  lr: float
  seed: int


def imitate(
  params: types.Tree, batch: types.RolloutBatch, config: decoder.DecoderConfig,
  mesh: sharding.DeviceMesh, spec: ImitationSpec, keeper: Keeper | None = None,
) -> tuple[types.Tree, list[float]]:
  """Trains a policy on the policy tokens of `batch`.

  Args:
    params: policy parameters.
    batch: scripted trajectories; rewards are ignored.
    config: decoder configuration.
    mesh: device mesh.
    spec: how long and how fast.
    keeper: of the progress; None keeps nothing.

  Returns:
    (parameters, losses of the steps that this call made).
  """
  warmup = min(max(spec.steps // 20, 1), spec.steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, spec.lr, warmup, spec.steps, 0.05 * spec.lr
  )
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=0.01),
  )
  step = jax.jit(
    functools.partial(_step, config=config, tx=tx), donate_argnums=(0, 1)
  )
  where = sharding.batch(mesh)
  history = []
  with sharding.scope(mesh):
    params = sharding.put(
      params,
      sharding.tree_shardings(mesh, heads.logical_axes(config), params),
    )
    now = Progress(0, params, jax.jit(tx.init)(params))
    if keeper is not None:
      now = keeper.restore(now)
    micros = _micros(
      batch, spec.steps, spec.rows, spec.row_length, spec.seed
    )
    for micro in itertools.islice(micros, now.step, None):
      params, opt, value = step(now.params, now.opt, sharding.put(micro, where))
      history.append(value)
      # One step stays in flight; without this what is shown would run ahead.
      known = float(history[max(len(history) - 2, 0)])
      now = Progress(now.step + 1, params, opt, known)
      if keeper is not None:
        keeper.after_step(now)
  return now.params, [float(v) for v in history]
