"""How weights and cache lie while decoding: layers apart, type of compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from stepsearch_jax import types
from stepsearch_jax.models import cache as cache_lib
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.parallel import sharding


def reshard_cast(
  params: types.Tree, config: decoder.DecoderConfig, training: types.Tree
) -> types.Tree:
  """Training weights in the type (and, under jit, layout) of decoding.

  Cast where they lie (`training`), so that what moves is the smaller type.
  """

  def cast(x, where):
    return jax.lax.with_sharding_constraint(x.astype(config.dtype), where)

  return apart(jax.tree.map(cast, params, training), config)


def apart(
  policy: types.Tree, config: decoder.DecoderConfig, **how: Callable
) -> types.Tree:
  """A policy (or a tree like it) with its layers apart."""
  trunk = decoder.unstack(policy["trunk"], config.num_layers, **how)
  return policy | {"trunk": trunk}


def decode_axes(config: decoder.DecoderConfig) -> types.Tree:
  """Logical axes of what `reshard_cast` returns."""
  return apart(
    heads.logical_axes(config), config, pick=lambda names, i: names[1:],
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def cache_shardings(
  mesh: sharding.DeviceMesh, cache: cache_lib.Cache
) -> cache_lib.Cache:
  """Slots are split like batches, heads of the cache like weights."""
  keys, values = (
    tuple(sharding.named(mesh, names, leaf.shape) for leaf in leaves)
    for leaves, names in zip((cache.k, cache.v), cache.axes, strict=True)
  )
  return dataclasses.replace(cache, k=keys, v=values)
