"""Scaled dot-product attention, and the one place that picks a backend.

Softmax runs in float32 everywhere. A query that may see nothing (padding)
yields zeros, never NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import cache as cache_lib
from stepsearch_jax.models import cudnn, decode_kernel
from stepsearch_jax.parallel import sharding

PREFIX = -1  # Segment id of tokens that all segments of a packed row see.

_QUERY_BLOCK = 128  # Largest query block whose scores stay in cache on CPU.
_MASKED = -1e30  # Finite, so that a fully masked row stays free of NaN.


def _attend(q, k, v, mask, keys="ntd"):
  """Grouped-query attention of one block of queries.

  Batch axes lead and the groups of a kv head are rows of one matrix: XLA then
  sees plain batched matrix products, forward and backward.

  Args:
    q: [B, KV, G, S, D], already scaled.
    k: [B, KV, T, D], or another order of the last two as `keys` says.
    v: [B, KV, T, D].
    mask: [B, S, T] bool, True where visible.
    keys: axes of `k` behind the batch.

  Returns:
    [B, KV, G, S, D] in q's dtype.
  """
  batch, kv, groups, length, dim = q.shape
  rows = q.reshape(batch, kv, groups * length, dim)
  scores = jnp.einsum(
    f"bnrd,b{keys}->bnrt", rows, k, preferred_element_type=jnp.float32
  ).reshape(batch, kv, groups, length, -1)
  mask = mask[:, None, None]
  scores = scores + jnp.where(mask, 0.0, _MASKED)
  weights = jax.nn.softmax(scores, axis=-1)
  # A query that sees nothing would average over everything.
  weights = jnp.where(mask.any(-1, keepdims=True), weights, 0.0)
  weights = weights.astype(v.dtype).reshape(batch, kv, groups * length, -1)
  out = jnp.einsum("bnrt,bntd->bnrd", weights, v)
  return out.reshape(q.shape)


def _grouped(q, kv):
  """[B, S, H, D] to [B, KV, G, S, D], scaled."""
  batch, length, heads, dim = q.shape
  q = q * jnp.asarray(dim**-0.5, q.dtype)
  return q.reshape(batch, length, kv, heads // kv, dim).transpose(0, 2, 3, 1, 4)


def _heads_first(q, k, v):
  """[B, S, H, D] and [B, T, KV, D] to the layouts of `_attend`, q scaled."""
  return _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _merge(blocks, shape):
  """Query blocks [B, KV, G, S, D] back to [B, S, H, D]."""
  out = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)
  return out.transpose(0, 3, 1, 2, 4).reshape(shape)


def cached_attention(
  q: jax.Array, entries: cache_lib.Entries, positions: jax.Array,
  cache: cache_lib.Cache, kv_length: int | None = None,
  backend: str | None = None,
) -> jax.Array:
  """Attention of new tokens over a slot cache.

  Args:
    q: [B, S, H, D] queries.
    entries: a layer's keys and values of all slots; entry t at position t.
    positions: [B, S] int32; a query sees entries 0..position. Outside the
      cache it is padding, whose result is for nobody to see.
    cache: tells the slots of the rows and how keys lie.
    kv_length: static bound on the positions; None = all of the cache.
    backend: see `packed_attention`. One query per slot goes through the
      kernel that `held_kernel` finds, else through XLA.

  Returns:
    [B, S, H, D].
  """
  backend = backend or backend_of(jax.default_backend())
  if kernel := held_kernel(q, entries, cache, backend):
    return _held_only(kernel, q, entries, positions, cache)
  k, v = cache_lib.read(entries, kv_length, cache)
  even = q.shape[1] % 2 == v.shape[2] % 2 == 0
  if backend == "cudnn" and even and q.dtype in cudnn.TYPES:
    return _cudnn_cached(q, k, v, positions)
  grouped = _grouped(q, k.shape[1])
  k, v = k.astype(q.dtype), v.astype(q.dtype)
  places = jnp.arange(v.shape[2], dtype=jnp.int32)[None, None]
  blocks = []
  for start in range(0, q.shape[1], _QUERY_BLOCK):
    part = slice(start, start + _QUERY_BLOCK)
    visible = places <= positions[:, part, None]
    blocks.append(
      _attend(grouped[:, :, :, part], k, v, visible, keys=f"n{cache.order}")
    )
  return _merge(blocks, q.shape)


def held_kernel(
  q: types.Leaf, entries: cache_lib.Entries, cache: cache_lib.Cache,
  backend: str | None = None,
) -> Callable[..., jax.Array] | None:
  """The kernel that reads only what slots hold, for one query per slot.

  Args:
    q, entries, cache, backend: see `cached_attention`; shapes will do.

  Returns:
    A function of (queries [P, KV, G, D], keys, values, entries held [P]); None
    where there is none, and `kv_length` bounds what is read.
  """
  backend = backend or backend_of(jax.default_backend())
  kv = entries[0].shape[1]
  if cache.slots is not None or not _splits_alike(q.shape[2], kv):
    return None
  if backend == "cudnn" and cudnn.decodes(q, *entries):
    return cudnn.decode
  if backend != "splash":
    return None
  rows = decode_kernel.block_rows(
    q, *entries, sharding.shards("kv_heads", kv)
  )
  if rows is None:
    return None
  return functools.partial(
    decode_kernel.attend, rows=rows, cores=sharding.cores()
  )


def _splits_alike(heads, kv):
  """Whether every device has the kv heads of its own query heads."""
  return sharding.shards("heads", heads) == sharding.shards("kv_heads", kv)


def _held_only(kernel, q, entries, positions, cache):
  """The same for one query per slot, of what it holds.

  The whole cache goes in, since a slice of it would be copied for the kernel:
  lengths bound what is read, so `kv_length` does not matter.
  """
  held = positions[:, 0] + 1
  held = jnp.where(held <= entries[1].shape[2], held, 0)
  query = ("slots", "kv_heads", None, "head_dim")
  names = (query, *cache.axes, ("slots",))
  grouped = _grouped(q, entries[0].shape[1])[:, :, :, 0]
  out = sharding.per_device(kernel, names, query, grouped, *entries, held)
  return out.reshape(q.shape)


def _cudnn_cached(q, k, v, positions):
  """The same for several queries a row, keys [B, KV, T, D]."""
  k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in (k, v))
  return _on_own_heads(_cudnn_masked, q, k, v, positions)


def _cudnn_masked(q, k, v, positions):
  entries = jnp.arange(k.shape[1], dtype=jnp.int32)
  visible = entries <= positions[:, None, :, None]
  return jax.nn.dot_product_attention(
    q, k, v, mask=visible, implementation="cudnn"
  )


def _meets(own, others):
  """Whether queries of a segment may see keys of another, by their ids."""
  return ((own == others) | (others == PREFIX)) & (own != 0)


def _xla_packed(q, k, v, segment_ids):
  """Causal attention inside segments, in query blocks.

  A block of queries only meets the keys up to its own end, which halves the
  work of a causal mask.
  """
  grouped, keys, values = _heads_first(q, k, v)
  length = q.shape[1]
  blocks = []
  for start in range(0, length, _QUERY_BLOCK):
    stop = min(start + _QUERY_BLOCK, length)
    rows = jnp.arange(start, stop, dtype=jnp.int32)
    columns = jnp.arange(stop, dtype=jnp.int32)
    mask = (rows[:, None] >= columns[None])[None]
    mask = mask & _meets(
      segment_ids[:, start:stop, None], segment_ids[:, None, :stop]
    )
    blocks.append(
      _attend(
        grouped[:, :, :, start:stop], keys[:, :, :stop], values[:, :, :stop],
        mask,
      )
    )
  return _merge(blocks, q.shape)


def _cudnn_packed(q, k, v, segment_ids):
  """The same through cuDNN's fused kernel (bfloat16 or float16 on GPU)."""
  if cudnn.kernel() is None:
    return _masked_packed(q, k, v, segment_ids)
  segments = functools.partial(cudnn.packed, otherwise=_xla_packed)
  return _on_own_heads(segments, q, k, v, segment_ids)


def _masked_packed(q, k, v, segment_ids):
  """The same with a mask [R, 1, S, S], where cuDNN takes no segments."""
  mask = _meets(segment_ids[:, None, :, None], segment_ids[:, None, None, :])
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=True, implementation="cudnn"
  )


def _splash_packed(q, k, v, segment_ids):
  """The same through the splash kernel on TPU."""
  return _on_own_heads(_splash_local, q, k, v, segment_ids)


def _on_own_heads(kernel, q, k, v, segment_ids):
  """Calls a kernel on every device's own rows and heads."""
  heads, kv = q.shape[2], k.shape[2]
  if not _splits_alike(heads, kv):
    # Too few kv heads to split: every query head brings its own copy.
    k, v = (jnp.repeat(x, heads // kv, axis=2) for x in (k, v))
  query = ("batch", "length", "heads", "head_dim")
  key = ("batch", "length", "kv_heads", "head_dim")
  names = (query, key, key, ("batch", "length"))
  return sharding.per_device(kernel, names, query, q, k, v, segment_ids)


def prefix_step(length: int) -> int:
  """Returns a divisor of where segments may begin behind a PREFIX.

  Args:
    length: of the packed row.
  """
  fields = _fields(length)
  return 1 << max(fields.place - fields.prefix, 0)


class _Fields(NamedTuple):
  """Bits of the 32 that say what a query sees, see `_splash_codes`."""

  place: int  # Of its own place, and again of where its segment begins.
  prefix: int  # Of the end of the row's prefix, in steps.


def _fields(length):
  place = max((length - 1).bit_length(), 1)
  return _Fields(place, max(32 - 2 * place, 0))


def _splash_codes(segment_ids):
  """One number per query [B, S]: prefix's end, segment's begin, own place.

  The kernel's mask is a function of one number per query, and of the key.
  """
  length = segment_ids.shape[1]
  bits, step = _fields(length).place, prefix_step(length)
  places = jnp.arange(length, dtype=jnp.int32)[None]
  begins = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
  begins = jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
  size = (segment_ids == PREFIX).sum(axis=1, dtype=jnp.int32, keepdims=True)
  end = (size + (step - 1)) // step
  return (end << 2 * bits) | (begins << bits) | places


def _splash_local(q, k, v, segment_ids, interpret=False):
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  length, dim = q.shape[1], q.shape[3]
  groups = q.shape[2] // k.shape[2]
  fields, step = _fields(length), prefix_step(length)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * groups)
  # One kv head and the query heads that share it. Blocks of the mask that the
  # causal one leaves out are never computed; in the others ours holds.
  kernel = splash.make_splash_mqa_single_device(mask=mask, interpret=interpret)

  def visible(codes, keys):
    place = codes & ((1 << fields.place) - 1)
    begin = (codes >> fields.place) & ((1 << fields.place) - 1)
    end = (codes >> 2 * fields.place) & ((1 << fields.prefix) - 1)
    return (keys <= place) & ((keys >= begin) | (keys < end * step))

  def one(q, k, v, segments, codes):
    valid = (segments != 0).astype(jnp.int32)
    ids = splash.SegmentIds(q=valid, kv=valid)
    infos = (
      info._replace(q_sequence=codes) for info in
      (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    )
    shared = type(kernel)(*infos, **kernel.kwargs | {"mask_function": visible})
    return jax.vmap(lambda q, k, v: shared(q, k, v, segment_ids=ids))(q, k, v)

  grouped, keys, values = _heads_first(q, k, v)
  codes = _splash_codes(segment_ids)
  out = jax.vmap(one)(grouped, keys, values, segment_ids, codes)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape[:3] + (dim,))


def backend_of(platform: str) -> str:
  """The packed-attention backend for devices of a platform."""
  return {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")


def packed_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
  backend: str | None = None,
) -> jax.Array:
  """Causal self-attention of packed rows.

  Args:
    q: [B, S, H, D].
    k, v: [B, S, KV, D].
    segment_ids: [B, S] int32; tokens see earlier tokens of their own segment
      and of segment PREFIX, with which a row may begin. Segment 0 is padding
      and sees nothing.
    backend: "splash", "cudnn" or "xla"; None asks the default device. What a
      backend cannot do (odd shapes, float32 in cuDNN) goes through XLA.

  Returns:
    [B, S, H, D].
  """
  backend = backend or backend_of(jax.default_backend())
  if backend == "cudnn" and q.dtype in cudnn.TYPES:
    return _cudnn_packed(q, k, v, segment_ids)
  if backend == "splash" and q.shape[1] % 128 == 0 and q.shape[-1] % 64 == 0:
    return _splash_packed(q, k, v, segment_ids)
  return _xla_packed(q, k, v, segment_ids)
