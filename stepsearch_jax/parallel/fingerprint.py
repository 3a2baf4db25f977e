"""Which parameters are these: a hash that does not depend on the mesh."""

from __future__ import annotations

import hashlib
import math

import jax
import jax.numpy as jnp

from stepsearch_jax import types

# The finalizer of MurmurHash3 (Appleby), a bijection of 32-bit words.
_MURMUR = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
_SALTS = (0x9E3779B9, 0x7F4A7C15)


def fingerprint(tree: types.Tree) -> str:
  """Returns a hash of the names, shapes, types and bits of all leaves.

  Leaves are reduced where they lie, by integer sums, which give the same
  number in whatever order and on however many devices. Every process of a run
  has to call this with its part of the same arrays.

  Args:
    tree: arrays of numbers, on hosts or devices.

  Returns:
    16 hexadecimal digits.
  """
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  # All are asked for before the first is waited for.
  found = jax.device_get([_sums(leaf) for _, leaf in leaves])
  for (path, leaf), sums in zip(leaves, found, strict=True):
    sums = [int(x) for x in sums]
    digest.update(repr((
      jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), sums,
    )).encode())
  return digest.hexdigest()[:16]


@jax.jit
def _sums(array: jax.Array) -> tuple[jax.Array, ...]:
  """Returns sums of every element's bits, mixed with its place."""
  size = array.dtype.itemsize
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
  place = jnp.zeros(bits.shape, jnp.uint32)
  for axis in range(bits.ndim):
    stride = math.prod(bits.shape[axis + 1 :]) % 2**32
    step = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    place += step * jnp.uint32(stride)
  return tuple(
    _mixed(bits ^ _mixed(place + jnp.uint32(salt))).sum(dtype=jnp.uint32)
    for salt in _SALTS
  )


def _mixed(words: jax.Array) -> jax.Array:
  for shift, factor in _MURMUR:
    words = (words ^ (words >> shift)) * jnp.uint32(factor)
  return words
