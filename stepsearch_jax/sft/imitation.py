"""Warm start: imitates scripted trajectories before reinforcement learning."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from stepsearch_jax import types
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching, forward, losses, records


def _step(params, opt, micro, *, config, tx):
  """One optimiser step on the masked tokens of packed rows."""

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


def imitate(
  params: types.Tree, batch: types.RolloutBatch, config: decoder.DecoderConfig,
  mesh: sharding.DeviceMesh, *, steps: int, rows: int, row_length: int,
  learning_rate: float, seed: int,
) -> tuple[types.Tree, list[float]]:
  """Trains a policy on the policy tokens of `batch`.

  Args:
    params: policy parameters.
    batch: scripted trajectories; rewards are ignored.
    config: decoder configuration.
    mesh: device mesh.
    steps: optimiser steps, each over `rows` packed rows.
    rows: packed rows per step.
    row_length: tokens of a packed row.
    learning_rate: peak of a one-cycle cosine schedule.
    seed: order of the trajectories.

  Returns:
    (parameters, list of losses).
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, max(steps // 20, 1), steps, 0.05 * learning_rate
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
  bar = tqdm.tqdm(total=steps, desc="warm start", unit="step")
  with sharding.scope(mesh):
    params = sharding.put(
      params,
      sharding.tree_shardings(mesh, heads.logical_axes(config), params),
    )
    opt = jax.jit(tx.init)(params)
    for i, micro in enumerate(_micros(batch, steps, rows, row_length, seed)):
      params, opt, value = step(params, opt, sharding.put(micro, where))
      history.append(value)
      # One step stays in flight; without this the bar would run ahead.
      jax.block_until_ready(history[max(i - 1, 0)])
      bar.update(1)
      if i % 20 == 19:
        bar.set_postfix(loss=f"{float(value):.3f}")
  bar.close()
  return params, [float(v) for v in history]
