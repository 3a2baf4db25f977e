"""The slot cache: keys and values of all layers, how they lie, their access.

How keys lie is decided here alone (`key_order`) and travels with the cache.
"""

from __future__ import annotations

import dataclasses
import enum

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax import types

Entries = tuple[jax.Array, jax.Array]  # A layer's keys and values.


class KeyOrder(enum.StrEnum):
  """The last two axes of the keys: positions T, head dimension D.

  CPU multiplies a few queries with [D, T] without a transpose. Elsewhere a
  token's key must be one piece of memory: written as D strides of T, the keys
  of a prompt take as long as its matrix products.
  """

  DT = "dt"
  TD = "td"


def key_order(backend: str | None) -> KeyOrder:
  """How keys lie on the default device.

  Args:
    backend: of packed attention; one that no CPU has names another machine,
      for which programs may be compiled here.
  """
  on_cpu = backend in (None, "xla") and jax.default_backend() == "cpu"
  return KeyOrder.DT if on_cpu else KeyOrder.TD


@flax.struct.dataclass
class Cache:
  """Keys and values of P slots, one array a layer.

  Attributes:
    k: L arrays [P, KV, D, T] or [P, KV, T, D], see `order`.
    v: L arrays [P, KV, T, D].
    slots: [B] int32, the slot of each batch row; None = row b is slot b.
    order: how the keys lie.
  """

  k: tuple[types.Leaf, ...]
  v: tuple[types.Leaf, ...]
  slots: types.Leaf | None = None
  order: KeyOrder = flax.struct.field(pytree_node=False, default=KeyOrder.TD)

  @property
  def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of a layer's keys and of its values."""
    names = {"t": "length", "d": "head_dim"}
    first = ("slots", "kv_heads")
    keys, values = (
      first + tuple(names[axis] for axis in order)
      for order in (self.order, KeyOrder.TD)
    )
    return keys, values


def init_cache(
  slots: int, kv_heads: int, head_dim: int, length: int, layers: int,
  dtype: jax.typing.DTypeLike, order: KeyOrder,
) -> Cache:
  """An empty cache of `slots` rows with `length` positions."""
  keys = values = (slots, kv_heads, length, head_dim)
  if order == KeyOrder.DT:
    keys = (slots, kv_heads, head_dim, length)
  return Cache(
    tuple(jnp.zeros(keys, dtype) for _ in range(layers)),
    tuple(jnp.zeros(values, dtype) for _ in range(layers)), order=order,
  )


def write(
  entries: Entries, k: jax.Array, v: jax.Array, positions: jax.Array,
  cache: Cache,
) -> Entries:
  """Stores new keys and values of one layer.

  Args:
    entries: the layer's keys and values.
    k, v: [B, S, KV, D].
    positions: [B, S] int32; what lies outside the cache is padding.
    cache: tells the slots of the rows and how keys lie.
  """
  keys, values = entries
  rows = cache.slots
  if rows is None:
    rows = jnp.arange(k.shape[0], dtype=jnp.int32)
  rows = rows[:, None]
  k, v = k.astype(keys.dtype), v.astype(values.dtype)
  # Advanced indices around a slice come first: all take [B, S, KV, D].
  if cache.order == KeyOrder.DT:
    keys = keys.at[rows, :, :, positions].set(k, mode="drop")
  else:
    keys = keys.at[rows, :, positions].set(k, mode="drop")
  return keys, values.at[rows, :, positions].set(v, mode="drop")


def copy_rows(
  cache: Cache, source: jax.Array, target: jax.Array, kv_length: int
) -> Cache:
  """Copies the first `kv_length` positions of some slots to others.

  Args:
    cache: all slots.
    source: [B] int32.
    target: [B] int32, all different; what is no slot is dropped.
    kv_length: static.
  """
  first = slice(kv_length)

  def copy(x, where):
    return x.at[(target, *where)].set(x[(source, *where)], mode="drop")

  whole = slice(None)
  keys = (whole, whole, first)
  if cache.order == KeyOrder.TD:
    keys = (whole, first)
  return dataclasses.replace(
    cache,
    k=tuple(copy(x, keys) for x in cache.k),
    v=tuple(copy(x, (whole, first)) for x in cache.v),
  )


def rows_of(cache: Cache, rows: jax.Array, kv_length: int) -> Cache:
  """Returns a cache of its own that holds some slots' first positions.

  Args:
    cache: all slots.
    rows: [B] int32; a slot may come more than once.
    kv_length: static, positions of the new cache.
  """
  part = dataclasses.replace(cache, slots=rows)
  pairs = [
    read(entries, kv_length, part)
    for entries in zip(cache.k, cache.v, strict=True)
  ]
  keys, values = zip(*pairs, strict=True)
  return dataclasses.replace(cache, k=keys, v=values)


def read(entries: Entries, kv_length: int | None, cache: Cache) -> Entries:
  """The batch rows' keys and values of one layer, up to `kv_length`."""
  keys, values = entries
  if cache.order == KeyOrder.DT:
    keys = keys[..., :kv_length]
  else:
    keys = keys[:, :, :kv_length]
  values = values[:, :, :kv_length]
  if cache.slots is None:
    return keys, values
  own = cache.slots
  return keys.at[own].get(mode="clip"), values.at[own].get(mode="clip")
