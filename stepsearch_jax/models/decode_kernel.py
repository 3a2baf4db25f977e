"""Attention of one query per slot that reads only what the slot holds (TPU).

XLA reads every slot up to the bound that the program was compiled for, and the
furthest slot decides which program runs. This kernel copies of each slot the
blocks of keys and values that hold entries, and no others: its grid walks a
list of those blocks, as many steps as there are blocks now. A running maximum
and sum in float32 carry the softmax from block to block (flash decoding, after
arXiv 2205.14135).

Compiled by the TPU's compiler, not run on a TPU: neither the time nor the best
block size was measured.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_MASKED = -1e30  # Finite, so that no difference of two of them is NaN.
# Positions per block: the most whose keys fit these bytes. Smaller blocks read
# less behind a slot's last entry, but every step of the grid has a fixed cost:
# keys and values of this size take a v5e 0.6 us to copy (819 GB/s).
_ROWS = (512, 256, 128)
_KEY_BYTES = 2**18


class Visits(NamedTuple):
  """Which block of which slot each step reads, a list for each core.

  Attributes:
    slot, block: [C * W] int32; behind a core's last step they repeat it, so
      that nothing more is copied.
    steps: [C] int32, steps of each core.
  """

  slot: jax.Array
  block: jax.Array
  steps: jax.Array


def block_rows(
  q: jax.Array, k: jax.Array, v: jax.Array, shards: int = 1
) -> int | None:
  """Positions per block, None where the kernel cannot do the work.

  It wants a query per slot, one type, keys that lie as values do, a head
  dimension of whole lanes (a multiple of 128) and positions in blocks of 128.

  Args:
    q: [B, S, H, D] queries.
    k, v: [P, KV, T, D] entries of all slots; keys may lie in another order.
    shards: devices that share the KV heads.
  """
  whole = k.shape == v.shape and v.shape[3] % 128 == 0
  if q.shape[:2] != (v.shape[0], 1) or not whole:
    return None
  if not q.dtype == k.dtype == v.dtype:
    return None
  fitting = [rows for rows in _ROWS if v.shape[2] % rows == 0]
  position = v.shape[1] // shards * v.shape[3] * v.dtype.itemsize
  small = [rows for rows in fitting if rows * position <= _KEY_BYTES]
  return max(small, default=min(fitting, default=None))


def visits(
  lengths: jax.Array, rows: int, blocks: int, cores: int
) -> Visits:
  """Lists the blocks that hold entries, slot after slot.

  Args:
    lengths: [B] int32, entries of each slot, at most `rows * blocks`.
    rows: positions per block.
    blocks: per slot; the list of a core has room for W = B / C * blocks.
    cores: C, which divides B; the slots of one lie side by side.
  """
  own = len(lengths) // cores
  counts = -(-lengths.reshape(cores, own) // rows)
  ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)
  steps = ends[:, -1]
  step = jnp.arange(own * blocks, dtype=jnp.int32)[None]
  step = jnp.minimum(step, jnp.maximum(steps - 1, 0)[:, None])
  slot = (ends[:, None] <= step[:, :, None]).sum(-1, dtype=jnp.int32)
  slot = jnp.minimum(slot, own - 1)  # Where a core has nothing to do.
  begins = jnp.take_along_axis(ends - counts, slot, axis=1)
  first = jnp.arange(cores, dtype=jnp.int32)[:, None] * own
  return Visits((slot + first).ravel(), (step - begins).ravel(), steps)


def _kernel(visited, lengths, *refs, rows, bound):
  """One block of one slot, of all kv heads."""
  q, k, v, out, top, total, mixed = refs
  core, step = pl.program_id(0), pl.program_id(1)
  place = core * bound + step
  block, length = visited.block[place], lengths[visited.slot[place]]

  @pl.when(step < visited.steps[core])
  def _():
    @pl.when(block == 0)
    def _():
      top[...] = jnp.full_like(top, _MASKED)
      total[...] = jnp.zeros_like(total)
      mixed[...] = jnp.zeros_like(mixed)

    heads, groups, _ = q.shape
    held = length - block * rows  # At least one: the block is in the list.
    scores = jax.lax.dot_general(
      q[...], k[...], (((2,), (2,)), ((0,), (0,))),
      preferred_element_type=jnp.float32,
    )
    columns = jax.lax.broadcasted_iota(jnp.int32, (heads, groups, rows), 2)
    scores = jnp.where(columns < held, scores, _MASKED)
    # What lies behind a slot's entries may be anything, and 0 * NaN is NaN.
    lines = jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)
    values = jnp.where(lines < held, v[...], jnp.zeros_like(v))
    highest = jnp.maximum(top[...], scores.max(axis=2, keepdims=True))
    shrink = jnp.exp(top[...] - highest)
    weights = jnp.exp(scores - highest)
    total[...] = shrink * total[...] + weights.sum(axis=2, keepdims=True)
    mixed[...] = shrink * mixed[...] + jax.lax.dot_general(
      weights.astype(v.dtype), values, (((2,), (1,)), ((0,), (0,))),
      preferred_element_type=jnp.float32,
    )
    top[...] = highest

    @pl.when((block + 1) * rows >= length)
    def _():
      out[...] = (mixed[...] / total[...]).astype(out.dtype)


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *,
  rows: int, cores: int = 1, interpret: bool = False,
) -> jax.Array:
  """Attention of one query per slot over the slot's first entries.

  Args:
    q: [B, KV, G, D], already scaled; G query heads share a kv head.
    k, v: [B, KV, T, D], the whole cache.
    lengths: [B] int32 up to T, entries that the slot's query sees.
    rows: positions per block, see `block_rows`.
    cores: of a device, which share its slots.
    interpret: runs on any device, slowly.

  Returns:
    [B, KV, G, D], zeros where a slot has no entries.
  """
  slots, kv, groups, dim = q.shape
  cores = cores if slots % cores == 0 else 1
  blocks = k.shape[2] // rows
  bound = slots // cores * blocks
  listed = visits(lengths, rows, blocks, cores)

  def of_slot(core, step, visited, lengths):
    return visited.slot[core * bound + step], 0, 0, 0

  def of_block(core, step, visited, lengths):
    place = core * bound + step
    return visited.slot[place], 0, visited.block[place], 0

  query = pl.BlockSpec((None, kv, groups, dim), of_slot)
  entries = pl.BlockSpec((None, kv, rows, dim), of_block)
  carried = (kv, groups, 1)
  # Without a cost estimate: with one, the TPU's compiler copied whole caches
  # into faster memory for the kernel, far more than the kernel reads.
  out = pl.pallas_call(
    functools.partial(_kernel, rows=rows, bound=bound),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      # A core without steps would leave what was never written.
      grid=(cores, jnp.maximum(listed.steps.max(), 1)),
      in_specs=[query, entries, entries],
      out_specs=query,
      scratch_shapes=[
        pltpu.VMEM(carried, jnp.float32), pltpu.VMEM(carried, jnp.float32),
        pltpu.VMEM((kv, groups, dim), jnp.float32),
      ],
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    name="decode_attention",
    interpret=interpret,
  )(listed, lengths, q, k, v)
  # Slots without entries are in no list.
  return jnp.where((lengths > 0)[:, None, None, None], out, 0)
