"""What of a model is trained: all, or adapters on the frozen reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from stepsearch_jax import types
from stepsearch_jax.models import adapters, decoder, heads
from stepsearch_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Trainable:
  """Policy or value model, whole or as adapters.

  Attributes:
    role: "policy" or "value".
    config: decoder configuration.
    adapter: size of the adapters; None trains everything.
  """

  role: str
  config: decoder.DecoderConfig
  adapter: adapters.AdapterSpec | None = None

  def init(self, policy: types.Tree, key: jax.Array) -> Any:
    """Parameters to train, in a run that starts from `policy`."""
    if self.adapter is None:
      if self.role == "policy":
        return policy
      return heads.value_from_policy(policy, key)
    low_rank = adapters.init(self.config, self.adapter, key)
    if self.role == "policy":
      return {"adapters": low_rank}
    head = heads.value_head(policy, key)
    return {"adapters": low_rank, "value_head": head}

  def shapes(self) -> Any:
    """Shapes of `init`'s result."""
    return _shapes(self)

  def axes(self) -> Any:
    """Logical axes of `init`'s result."""
    whole = heads.logical_axes(self.config, self.role)
    if self.adapter is None:
      return whole
    found = {"adapters": adapters.logical_axes(whole["trunk"])}
    if self.role == "value":
      found["value_head"] = whole["value_head"]
    return found

  def shardings(self, mesh: sharding.DeviceMesh) -> Any:
    """Places of `init`'s result."""
    return sharding.tree_shardings(mesh, self.axes(), self.shapes())

  def apart(self, params: types.Tree, reference: types.Tree) -> Any:
    """The model as it is trained: adapters apart from the frozen reference."""
    if self.adapter is None:
      return params
    rest = reference if self.role == "policy" else params
    return rest | {
      "trunk": reference["trunk"],
      "adapters": adapters.collection(params["adapters"], self.adapter),
    }

  def merged(
    self, params: types.Tree, reference: types.Tree,
    dtype: jax.typing.DTypeLike,
  ) -> Any:
    """The whole model with its adapters merged in float32, as `dtype`."""
    if self.adapter is None:
      return params
    trunk = adapters.merge(
      reference["trunk"], params["adapters"], self.adapter, dtype
    )
    rest = reference if self.role == "policy" else params
    return {k: v for k, v in rest.items() if k != "adapters"} | {"trunk": trunk}


@functools.cache  # As for `heads._trunk_axes`.
def _shapes(part: Trainable) -> Any:
  def make(key):
    return part.init(heads.init_policy(part.config, key), key)

  return jax.eval_shape(make, jax.random.key(0))


def abstract_reference(
  config: decoder.DecoderConfig, mesh: sharding.DeviceMesh
) -> Any:
  """Shape and place of the frozen policy, in the compute type."""
  policy = Trainable("policy", config)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, config.dtype), policy.shapes()
  )
  return sharding.abstract(
    shapes, sharding.tree_shardings(mesh, policy.axes(), shapes)
  )


@functools.partial(jax.jit, static_argnums=(0, 3))
def whole_model(
  trainable: Trainable, params: types.Tree, reference: types.Tree,
  dtype: jax.typing.DTypeLike,
) -> types.Tree:
  """`Trainable.merged` as a program of its own, for rollouts and export."""
  return trainable.merged(params, reference, dtype)
