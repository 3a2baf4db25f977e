"""Attention through cuDNN's fused kernel, by segments and by lengths.

Of packed rows, the kernel reads where each segment begins and how long it is;
no mask of [R, 1, S, S] exists. When slots decode, it reads how many entries
each one holds. JAX has these forms behind its public function only, so what
they need is looked up once and the caller falls back where it is not there.

The kernel's causal mask knows whole sequences only. Where segments share a
prefix, attention (and nothing else of the model) runs on rows that are spread
out: every segment with a copy of the prefix in front.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging

from stepsearch_jax import types

TYPES = (jnp.bfloat16, jnp.float16)  # That the kernel takes.

# A row with more segments than one per so many tokens takes the caller's other
# path: the kernel's workspace grows with the bound on their number.
_TOKENS_PER_SEGMENT = 256
# A spread-out row has so many times the places of the row.
_SPREAD = 2


@functools.cache
def kernel() -> ModuleType | None:
  """Returns JAX's cuDNN module, None where it cannot take segments.

  It needs a Hopper GPU or later, and a JAX whose function takes offsets.
  """
  try:
    from jax._src.cudnn import fused_attention_stablehlo as module
  except ImportError as error:
    module, lacking = None, str(error)
  else:
    lacking = _lacking(module)
  if lacking is None:
    return module
  logging.warning(
    "attention of packed rows goes through a mask: cuDNN cannot take their "
    "segments here (%s)", lacking,
  )
  return None


def _lacking(module: ModuleType) -> str | None:
  """Returns why a cuDNN module cannot take segments; None where it can."""
  for name in ("dot_product_attention", "check_compute_capability"):
    if not hasattr(module, name):
      return f"JAX has no {name}"
  parameters = inspect.signature(module.dot_product_attention).parameters
  missing = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"} - set(
    parameters
  )
  if missing:
    return f"its function takes no {sorted(missing)}"
  if not module.check_compute_capability("9.0"):
    return "it needs a GPU of compute capability 9.0"
  return None


def max_segments(length: int) -> int:
  """Returns the bound on the segments of a row that the kernel is given."""
  return max(length // _TOKENS_PER_SEGMENT, 2)


def segment_places(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns where segments begin [R, M + 1] and their lengths [R, M].

  Entries behind the last segment are -1.

  Args:
    segment_ids: [R, S] int32; 1, 2, ... in this order, 0 for padding.
  """
  numbers = jnp.arange(1, max_segments(segment_ids.shape[1]) + 1)
  own = segment_ids[:, :, None] == numbers.astype(jnp.int32)
  lengths = own.sum(axis=1, dtype=jnp.int32)
  starts = jnp.argmax(own, axis=1).astype(jnp.int32)
  there = lengths > 0
  starts = jnp.pad(
    jnp.where(there, starts, -1), ((0, 0), (0, 1)), constant_values=-1
  )
  return starts, jnp.where(there, lengths, -1)


@flax.struct.dataclass
class Spread:
  """Where the tokens of packed rows lie in rows that are spread out.

  A spread-out row is [prefix | segment 1 | prefix | segment 2 | ...].

  Attributes:
    source: [R, E] int32, place in the packed row; -1 behind the last segment.
    live: [R, E] bool, the one copy whose result counts.
    home: [R, S] int32, place of that copy; -1 for padding.
    firsts: [R, M] int32, where the copies of the prefix begin; -1 for none.
    sizes: [R, M] int32, lengths of prefix and segment; -1 for none.
    prefix: [R, 1] int32, length of the prefix.
  """

  source: jax.Array
  live: jax.Array
  home: jax.Array
  firsts: jax.Array
  sizes: jax.Array
  prefix: jax.Array

  @classmethod
  def of(cls, segment_ids: jax.Array) -> Spread:
    """Spreads out rows with ids [R, S] as `packed` takes them."""
    length = segment_ids.shape[1]
    prefix = (segment_ids < 0).sum(axis=1, dtype=jnp.int32, keepdims=True)
    starts, lengths = segment_places(segment_ids)
    starts, there = starts[:, :-1], lengths > 0
    sizes = jnp.where(there, lengths + prefix, 0)
    firsts = jnp.cumsum(sizes, axis=1, dtype=jnp.int32) - sizes
    places = jnp.arange(_SPREAD * length, dtype=jnp.int32)[None]
    begun = there[:, :, None] & (firsts[:, :, None] <= places[:, None])
    segment = jnp.maximum(begun.sum(axis=1, dtype=jnp.int32) - 1, 0)
    inside = places - _take(firsts, segment)
    own = inside >= prefix
    source = jnp.where(
      own, _take(starts, segment) + inside - prefix, inside
    )
    valid = places < sizes.sum(axis=1, dtype=jnp.int32, keepdims=True)
    steps = jnp.arange(length, dtype=jnp.int32)[None]
    mine = jnp.clip(segment_ids - 1, 0, firsts.shape[1] - 1)
    home = steps + jnp.where(
      segment_ids > 0, _take(firsts - starts, mine) + prefix, 0
    )
    return cls(
      source=jnp.where(valid, source, -1), live=valid & (own | (segment == 0)),
      home=jnp.where(segment_ids != 0, home, -1),
      firsts=jnp.where(there, firsts, -1), sizes=jnp.where(there, sizes, -1),
      prefix=prefix,
    )

  def fits(self) -> jax.Array:
    """Whether every row that is spread out fits its places."""
    total = jnp.maximum(self.sizes, 0).sum(axis=1)
    return (total <= self.source.shape[1]).all()


def _take(x, places):
  """Entries [R, N, ...] of rows [R, S, ...]; zeros where a place is -1."""
  more = (1,) * (x.ndim - 2)
  found = jnp.take_along_axis(
    x, jnp.maximum(places, 0).reshape(places.shape + more), axis=1
  )
  return jnp.where((places >= 0).reshape(places.shape + more), found, 0)


# Copies of the live tokens there and back: transposes of each other. Both ways
# are gathers; the scatter of a gather's own gradient has no fixed order of
# sums on GPU.
@jax.custom_vjp
def _place(x, spread):
  return _take(x, jnp.where(spread.live, spread.source, -1))


@jax.custom_vjp
def _collect(x, spread):
  return _take(x, spread.home)


@jax.custom_vjp
def _copy(x, spread):
  """All tokens, the prefix once per segment."""
  return _take(x, spread.source)


def _copy_back(spread, d):
  """Gradients of all copies of a token, summed."""
  total = _take(d, spread.home)
  steps = jnp.arange(spread.home.shape[1], dtype=jnp.int32)[None]
  for segment in range(1, spread.firsts.shape[1]):
    first = spread.firsts[:, segment, None]
    again = (steps < spread.prefix) & (first >= 0)
    total = total + _take(d, jnp.where(again, first + steps, -1))
  return total, None


_place.defvjp(
  lambda x, spread: (_place(x, spread), spread),
  lambda spread, d: (_collect(d, spread), None),
)
_collect.defvjp(
  lambda x, spread: (_collect(x, spread), spread),
  lambda spread, d: (_place(d, spread), None),
)
_copy.defvjp(lambda x, spread: (_copy(x, spread), spread), _copy_back)


def _sequences(q, k, v, starts, lengths):
  """The kernel on sequences [R, M + 1] and [R, M] of a row's places."""
  module = kernel()
  return module.dot_product_attention(
    q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts,
    kv_offsets=starts, scale=q.shape[-1] ** -0.5,
    mask_type=module.MaskType.PADDING_CAUSAL,
  )


def _apart(q, k, v, segment_ids):
  """Rows without a prefix."""
  # Padding belongs to no segment: the kernel writes nothing there, neither
  # results nor gradients.
  valid = (segment_ids > 0)[..., None, None]
  q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
  out = _sequences(q, k, v, *segment_places(segment_ids))
  return jnp.where(valid, out, 0)


def _shared(q, k, v, segment_ids):
  """Rows with a prefix, spread out."""
  spread = Spread.of(segment_ids)
  starts = jnp.pad(spread.firsts, ((0, 0), (0, 1)), constant_values=-1)
  out = _sequences(
    _place(q, spread), _copy(k, spread), _copy(v, spread), starts, spread.sizes
  )
  return _collect(out, spread)


def packed(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
  otherwise: Callable[..., jax.Array],
) -> jax.Array:
  """Causal attention inside segments.

  Args:
    q: [R, S, H, D] bfloat16 or float16.
    k, v: [R, S, KV, D].
    segment_ids: [R, S] int32, see `segment_places`; negative for a prefix
      that the segments of the row share.
    otherwise: computes the same for rows of too many segments.

  Returns:
    [R, S, H, D], zero at padding.
  """
  few = segment_ids.max() <= max_segments(q.shape[1])
  shares = (segment_ids < 0).any()
  fits = few & (~shares | Spread.of(segment_ids).fits())
  way = jnp.where(fits, shares.astype(jnp.int32), 2)
  return jax.lax.switch(
    way, (_apart, _shared, otherwise), q, k, v, segment_ids
  )


def decodes(q: types.Leaf, k: types.Leaf, v: types.Leaf) -> bool:
  """Whether `decode` takes one query per slot of such shapes and types.

  Args:
    q: [P, S, H, D] queries; shapes and types will do.
    k, v: [P, KV, T, D] entries of all slots; keys may lie in another order.
  """
  alike = k.shape == v.shape and q.dtype == k.dtype == v.dtype
  return (
    alike and q.shape[:2] == (v.shape[0], 1)
    and q.dtype in TYPES
    and v.shape[3] % 8 == 0 and kernel() is not None
  )


def decode(
  q: jax.Array, k: jax.Array, v: jax.Array, held: jax.Array
) -> jax.Array:
  """Attention of one query per slot over what the slot holds.

  The query heads that share keys are the kernel's queries, so that keys and
  values are read once for all of them.

  Args:
    q: [P, KV, G, D], already scaled.
    k, v: [P, KV, T, D].
    held: [P] int32, entries of each slot; 0 yields zeros.

  Returns:
    [P, KV, G, D].
  """
  module = kernel()
  out = module.dot_product_attention(
    q, k, v, q_seqlen=jnp.full_like(held, q.shape[2]),
    kv_seqlen=jnp.maximum(held, 1), scale=1.0,
    mask_type=module.MaskType.PADDING, qkv_layout="BNTH",
  )
  return jnp.where((held > 0)[:, None, None, None], out, 0)
