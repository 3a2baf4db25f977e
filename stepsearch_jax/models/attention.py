"""Scaled dot-product attention, and the one place that picks a backend.

Softmax runs in float32 everywhere. A query that may see nothing (padding)
yields zeros, never NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_QUERY_BLOCK = 128  # Largest query block whose scores stay in cache on CPU.
_MASKED = -1e30  # Finite, so that a fully masked row stays free of NaN.


def _attend(q, k, v, mask):
  """Grouped-query attention of one block.

  Args:
    q: [B, S, KV, G, D], already scaled.
    k, v: [B, T, KV, D].
    mask: [B, S, T] bool, True where visible.

  Returns:
    [B, S, KV, G, D] in q's dtype.
  """
  scores = jnp.einsum(
    "bsngd,btnd->bngst", q, k, preferred_element_type=jnp.float32
  )
  mask = mask[:, None, None]
  scores = jnp.where(mask, scores, _MASKED)
  scores = scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.where(mask, jnp.exp(scores), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1.0)
  return jnp.einsum("bngst,btnd->bsngd", weights.astype(v.dtype), v)


def _group(q, k):
  batch, length, heads, dim = q.shape
  groups = heads // k.shape[2]
  scale = jnp.asarray(dim**-0.5, q.dtype)
  return (q * scale).reshape(batch, length, k.shape[2], groups, dim)


def cached_attention(q, k, v, positions):
  """Attention of new tokens over a slot cache.

  Args:
    q: [B, S, H, D] queries.
    k, v: [B, T, KV, D] cached keys and values, entry t at position t.
    positions: [B, S] int32; a query sees entries 0..position.

  Returns:
    [B, S, H, D].
  """
  grouped = _group(q, k)
  entries = jnp.arange(k.shape[1], dtype=jnp.int32)

  def block(start, size):
    where = positions[:, start : start + size, None]
    return _attend(
      grouped[:, start : start + size], k, v, entries[None, None] <= where
    )

  length = q.shape[1]
  blocks = [
    block(start, min(_QUERY_BLOCK, length - start))
    for start in range(0, length, _QUERY_BLOCK)
  ]
  out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
  return out.reshape(q.shape)


def _xla_packed(q, k, v, segment_ids):
  """Causal attention inside segments, in query blocks.

  A block of queries only meets the keys up to its own end, which halves the
  work of a causal mask.
  """
  grouped = _group(q, k)
  length = q.shape[1]
  blocks = []
  for start in range(0, length, _QUERY_BLOCK):
    stop = min(start + _QUERY_BLOCK, length)
    rows = jnp.arange(start, stop, dtype=jnp.int32)
    columns = jnp.arange(stop, dtype=jnp.int32)
    query_segment = segment_ids[:, start:stop, None]
    mask = (rows[:, None] >= columns[None])[None]
    mask = mask & (query_segment == segment_ids[:, None, :stop])
    mask = mask & (query_segment > 0)
    blocks.append(
      _attend(grouped[:, start:stop], k[:, :stop], v[:, :stop], mask)
    )
  out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
  return out.reshape(q.shape)


def _cudnn_packed(q, k, v, segment_ids):
  """The same through cuDNN's fused kernel (bfloat16 or float16 on GPU)."""
  same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
  valid = segment_ids[:, None, :, None] > 0
  return jax.nn.dot_product_attention(
    q, k, v, mask=same & valid, is_causal=True, implementation="cudnn"
  )


def _splash_packed(q, k, v, segment_ids):
  """The same through the splash kernel on TPU."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, heads, dim = q.shape[1:]
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  kernel = splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)
  repeats = heads // k.shape[2]

  def one(q, k, v, segments):
    ids = splash.SegmentIds(q=segments, kv=segments)
    return kernel(q, k, v, segment_ids=ids)

  def layout(x, times):
    return jnp.repeat(jnp.swapaxes(x, 1, 2), times, axis=1)

  scale = jnp.asarray(dim**-0.5, q.dtype)
  out = jax.vmap(one)(
    layout(q * scale, 1), layout(k, repeats), layout(v, repeats), segment_ids
  )
  return jnp.swapaxes(out, 1, 2)


def packed_attention(q, k, v, segment_ids):
  """Causal self-attention of packed rows.

  Args:
    q: [B, S, H, D].
    k, v: [B, S, KV, D].
    segment_ids: [B, S] int32; tokens see earlier tokens of their own segment,
      segment 0 is padding and sees nothing.

  Returns:
    [B, S, H, D].
  """
  backend = jax.default_backend()
  if backend == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16):
    return _cudnn_packed(q, k, v, segment_ids)
  if backend == "tpu" and q.shape[1] % 128 == 0 and q.shape[-1] % 64 == 0:
    return _splash_packed(q, k, v, segment_ids)
  return _xla_packed(q, k, v, segment_ids)
