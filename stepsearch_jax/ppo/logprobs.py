"""Log-probabilities and entropies without a [B, T, V] array.

Only the masked tokens (in a search rollout some 15 % of a row) are projected
onto the vocabulary, a chunk at a time, in float32; the backward pass computes
the logits of a chunk again instead of keeping them.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

_CHUNK_ENTRIES = 1 << 26  # Logits held at a time: 256 MB in float32.


def chunk_size(vocab: int) -> int:
  """Tokens per chunk: as many as fit the logits budget, 128 to 512.

  Every chunk reads the [V, D] matrix and, on the way back, reads and writes its
  gradient: 12 V D bytes for 6 V D operations per token. An accelerator that
  does 240 to 300 operations while it moves a byte waits for memory below some
  500 tokens; above, the last chunk's empty rows cost more than that.
  """
  return min(max(_CHUNK_ENTRIES // vocab // 128, 1), 4) * 128


def token_logprobs(
  hidden: jax.Array, weight: jax.Array, targets: jax.Array, mask: jax.Array,
  temperature: float = 1.0, parts: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of targets and entropy of the distribution.

    logits = hidden weight^T / temperature
    logp   = logits[target] - logsumexp(logits)
    H      = -sum_v softmax(logits)_v log softmax(logits)_v

  Args:
    hidden: [N, D] states that predict the targets.
    weight: [V, D] output matrix.
    targets: [N] int32.
    mask: [N], non-zero where the result is wanted.
    temperature: static.
    parts: static; equal parts of N that are gathered into chunks apart from
      each other. One part per shard of N keeps every token on its device.

  Returns:
    (logp [N] float32, entropy [N] float32), 0 where mask is 0; differentiable
    in hidden and weight.
  """
  assert hidden.ndim == 2 and weight.ndim == 2, (hidden.shape, weight.shape)
  assert targets.shape == mask.shape == hidden.shape[:1]
  hidden, targets, mask = (
    x.reshape(parts, -1, *x.shape[1:])
    for x in (hidden, targets, mask.astype(bool))
  )
  chunk = min(chunk_size(weight.shape[0]), mask.shape[1])
  logp, entropy = _logprobs(
    hidden, weight, targets, mask, float(temperature), chunk
  )
  return logp.reshape(-1), entropy.reshape(-1)


def _compact(mask, chunk):
  """Wanted rows of each part first, padded to whole chunks.

  Returns:
    (row numbers [P, N'], wanted rows [P], number of chunks to do).
  """
  order = jnp.argsort(~mask, axis=1, stable=True).astype(jnp.int32)
  size = mask.shape[1]
  pad = -size % chunk
  order = jnp.pad(order, ((0, 0), (0, pad)), constant_values=size)
  wanted = mask.sum(axis=1, dtype=jnp.int32)
  return order, wanted, (wanted.max() + chunk - 1) // chunk


def _rows(order, wanted, i, chunk):
  """Row numbers [P, C] of chunk i; those past the wanted are out of range."""
  rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk, axis=1)
  places = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
  return jnp.where(places < wanted[:, None], rows, jnp.int32(1 << 30))


@jax.vmap
def _take(x, rows):
  return x.at[rows].get(mode="fill", fill_value=0)


@jax.vmap
def _put(x, rows, new):
  return x.at[rows].set(new, mode="drop")


def _gathered(weight, dtype):
  """The output matrix as chunks use it: gathered once, not for each of them.

  Without that the compiler gathers it, and a chunk's gradients of all logits,
  in every turn of the loop.
  """
  return nn.with_logical_constraint(
    weight.astype(dtype), ("vocab", "act_embed")
  )


def _logits(hidden, weight, rows, temperature):
  states = _take(hidden, rows)
  out = jnp.einsum(
    "pnd,vd->pnv", states, weight, preferred_element_type=jnp.float32,
  )
  return states, out / jnp.float32(temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _logprobs(hidden, weight, targets, mask, temperature, chunk):
  return _forward(hidden, weight, targets, mask, temperature, chunk)[0]


def _forward(hidden, weight, targets, mask, temperature, chunk):
  order, wanted, count = _compact(mask, chunk)
  used = _gathered(weight, hidden.dtype)

  def step(i, carry):
    logps, entropies, norms = carry
    rows = _rows(order, wanted, i, chunk)
    _, logits = _logits(hidden, used, rows, temperature)
    norm = jax.nn.logsumexp(logits, axis=-1)
    target = _take(targets, rows)[..., None]
    chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    # Summed over log-probabilities: norm minus a mean of logits would cancel.
    logp = logits - norm[..., None]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return (
      _put(logps, rows, chosen - norm), _put(entropies, rows, entropy),
      _put(norms, rows, norm),
    )

  zeros = jnp.zeros(mask.shape, jnp.float32)
  logps, entropies, norms = jax.lax.fori_loop(
    0, count, step, (zeros, zeros, zeros)
  )
  saved = (hidden, weight, targets, mask, norms, entropies)
  return (logps, entropies), saved


def _backward(temperature, chunk, saved, cotangents):
  hidden, weight, targets, mask, norms, entropies = saved
  d_logp, d_entropy = cotangents
  order, wanted, count = _compact(mask, chunk)
  vocab = jnp.arange(weight.shape[0], dtype=jnp.int32)
  used = _gathered(weight, hidden.dtype)

  def step(i, carry):
    d_hidden, d_weight = carry
    rows = _rows(order, wanted, i, chunk)
    states, logits = _logits(hidden, used, rows, temperature)
    norm, entropy, g_logp, g_entropy = (
      _take(x, rows)[..., None] for x in (norms, entropies, d_logp, d_entropy)
    )
    p = jnp.exp(logits - norm)
    # dH/dlogits = -p (logits - sum p logits), and sum p logits = norm - H.
    d = -p * (g_logp + g_entropy * (logits - norm + entropy))
    d += jnp.where(_take(targets, rows)[..., None] == vocab, g_logp, 0)
    d = (d / jnp.float32(temperature)).astype(hidden.dtype)
    d_states = d @ used
    d_weight = d_weight + jnp.einsum(
      "pnv,pnd->pvd", d, states, preferred_element_type=jnp.float32
    )
    return _put(d_hidden, rows, d_states), d_weight

  d_hidden, d_weight = jax.lax.fori_loop(
    0, count, step, (
      jnp.zeros_like(hidden),
      # Summed over the parts at the end: once over the devices, not per chunk.
      jnp.zeros((len(mask), *weight.shape), jnp.float32),
    ),
  )
  return d_hidden, d_weight.sum(0).astype(weight.dtype), None, None


_logprobs.defvjp(_forward, _backward)
