"""Log-probabilities and entropies without a [B, T, V] array.

Only the masked tokens (in a search rollout some 15 % of a row) are projected
onto the vocabulary, a chunk at a time, in float32; the backward pass computes
the logits of a chunk again instead of keeping them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_CHUNK_ENTRIES = 1 << 24  # Logits held at a time: 64 MB in float32.


def chunk_size(vocab: int) -> int:
  """Tokens per chunk: as many as fit the logits budget, in steps of 128."""
  return min(max(_CHUNK_ENTRIES // vocab // 128, 1), 16) * 128


def token_logprobs(
  hidden: jax.Array, weight: jax.Array, targets: jax.Array, mask: jax.Array,
  temperature: float = 1.0,
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

  Returns:
    (logp [N] float32, entropy [N] float32), 0 where mask is 0; differentiable
    in hidden and weight.
  """
  assert hidden.ndim == 2 and weight.ndim == 2, (hidden.shape, weight.shape)
  assert targets.shape == mask.shape == hidden.shape[:1]
  chunk = chunk_size(weight.shape[0])
  return _logprobs(
    hidden, weight, targets, mask.astype(bool), float(temperature), chunk
  )


def _compact(mask, chunk):
  """(wanted rows first, padded to whole chunks; number of chunks to do)."""
  order = jnp.argsort(~mask, stable=True).astype(jnp.int32)
  pad = -order.shape[0] % chunk
  order = jnp.pad(order, (0, pad), constant_values=mask.shape[0])
  wanted = mask.sum(dtype=jnp.int32)
  return order, wanted, (wanted + chunk - 1) // chunk


def _rows(order, wanted, i, chunk):
  """Row numbers of chunk i; rows past the wanted ones are out of range."""
  rows = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
  places = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
  return jnp.where(places < wanted, rows, jnp.int32(1 << 30))


def _logits(hidden, weight, rows, temperature):
  states = hidden.at[rows].get(mode="fill", fill_value=0)
  out = jnp.einsum(
    "nd,vd->nv", states, weight.astype(hidden.dtype),
    preferred_element_type=jnp.float32,
  )
  return states, out / jnp.float32(temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _logprobs(hidden, weight, targets, mask, temperature, chunk):
  return _forward(hidden, weight, targets, mask, temperature, chunk)[0]


def _forward(hidden, weight, targets, mask, temperature, chunk):
  order, wanted, count = _compact(mask, chunk)

  def step(i, carry):
    logps, entropies, norms = carry
    rows = _rows(order, wanted, i, chunk)
    _, logits = _logits(hidden, weight, rows, temperature)
    norm = jax.nn.logsumexp(logits, axis=-1)
    target = targets.at[rows].get(mode="fill", fill_value=0)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    # Summed over log-probabilities: norm minus a mean of logits would cancel.
    logp = logits - norm[:, None]
    entropy = -(jnp.exp(logp) * logp).sum(-1)
    return (
      logps.at[rows].set(chosen - norm, mode="drop"),
      entropies.at[rows].set(entropy, mode="drop"),
      norms.at[rows].set(norm, mode="drop"),
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

  def step(i, carry):
    d_hidden, d_weight = carry
    rows = _rows(order, wanted, i, chunk)
    take = functools.partial(jnp.take, indices=rows, mode="fill", fill_value=0)
    states, logits = _logits(hidden, weight, rows, temperature)
    norm, entropy = take(norms)[:, None], take(entropies)[:, None]
    p = jnp.exp(logits - norm)
    g_logp, g_entropy = take(d_logp)[:, None], take(d_entropy)[:, None]
    # dH/dlogits = -p (logits - sum p logits), and sum p logits = norm - H.
    d = -p * (g_logp + g_entropy * (logits - norm + entropy))
    d = d.at[jnp.arange(chunk), take(targets)].add(g_logp[:, 0])
    d = (d / jnp.float32(temperature)).astype(hidden.dtype)
    d_states = d @ weight.astype(hidden.dtype)
    d_weight = d_weight + jnp.einsum(
      "nv,nd->vd", d, states, preferred_element_type=jnp.float32
    )
    return d_hidden.at[rows].set(d_states, mode="drop"), d_weight

  d_hidden, d_weight = jax.lax.fori_loop(
    0, count, step,
    (jnp.zeros_like(hidden), jnp.zeros(weight.shape, jnp.float32)),
  )
  return d_hidden, d_weight.astype(weight.dtype), None, None


_logprobs.defvjp(_forward, _backward)
