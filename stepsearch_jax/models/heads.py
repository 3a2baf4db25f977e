"""Policy and value heads, and the parameter trees around the trunk.

A policy is `{"trunk": ..., "head": {"kernel": [V, M]}}`, without "head" when
the embedding is tied. A value model is `{"trunk": ..., "value_head":
{"kernel": [M, 1], "bias": [1]}}` (verl's token-classification critic). All
trees are plain nested dicts of arrays; layers are stacked on axis 0. A model
with low-rank adapters carries them beside its trunk as "adapters" (see
`adapters.collection`).
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import decoder


def _boxed_trunk(config: decoder.DecoderConfig, key):
  tokens = jnp.zeros((1, 1), jnp.int32)
  # The kernels of other backends refuse a single token.
  config = dataclasses.replace(config, attention="xla")
  return decoder.Decoder(config).init(key, tokens, tokens)["params"]


def init_trunk(config: decoder.DecoderConfig, key: jax.Array) -> types.Tree:
  """Random trunk parameters."""
  return nn.unbox(_boxed_trunk(config, key))


def init_policy(config: decoder.DecoderConfig, key: jax.Array) -> types.Tree:
  """Random policy parameters."""
  trunk_key, head_key = jax.random.split(key)
  params = {"trunk": init_trunk(config, trunk_key)}
  if not config.tie_embeddings:
    shape = (config.vocab_size, config.hidden_size)
    params["head"] = {
      "kernel": 0.02 * jax.random.normal(head_key, shape, config.param_dtype)
    }
  return params


def value_from_policy(policy: types.Tree, key: jax.Array) -> types.Tree:
  """A value model on the policy's own trunk, with a small new head."""
  return {"trunk": policy["trunk"], "value_head": value_head(policy, key)}


def value_head(policy: types.Tree, key: jax.Array) -> types.Tree:
  """A small random value head for a policy's trunk."""
  width = policy["trunk"]["embedding"].shape[1]
  kernel = 0.02 * jax.random.normal(key, (width, 1), jnp.float32)
  return {"kernel": kernel, "bias": jnp.zeros((1,), jnp.float32)}


def variables(params: types.Tree) -> types.Tree:
  """Returns the decoder's variables: the trunk and, if any, its adapters."""
  found = {"params": params["trunk"]}
  if "adapters" in params:
    found["adapters"] = params["adapters"]
  return found


def unembedding(params: types.Tree) -> jax.Array:
  """Output matrix [V, M] of a policy, tied or not."""
  if "head" in params:
    return params["head"]["kernel"]
  return params["trunk"]["embedding"]


def logits(params: types.Tree, hidden: jax.Array) -> jax.Array:
  """Next-token logits [..., V] float32; for tests and short inputs."""
  with jax.named_scope("unembedding"):
    weight = unembedding(params).astype(hidden.dtype)
    return jnp.einsum(
      "...m,vm->...v", hidden, weight, preferred_element_type=jnp.float32
    )


def values(params: types.Tree, hidden: jax.Array) -> jax.Array:
  """State values [...] float32 of hidden states [..., M]."""
  head = params["value_head"]
  wide = hidden.astype(jnp.float32)
  out = wide @ head["kernel"].astype(jnp.float32)
  return out[..., 0] + head["bias"].astype(jnp.float32)[0]


@functools.cache  # A plan asks a hundred times; tracing takes half a second.
def _trunk_axes(config: decoder.DecoderConfig) -> types.Tree:
  boxed = jax.eval_shape(lambda k: _boxed_trunk(config, k), jax.random.key(0))
  return jax.tree.map(
    lambda leaf: tuple(leaf.names),
    boxed,
    is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned),
  )


def logical_axes(
  config: decoder.DecoderConfig, kind: str = "policy"
) -> types.Tree:
  """Tree of logical axis names like the parameters of `kind`.

  Args:
    config: decoder configuration.
    kind: "policy" or "value".

  Returns:
    Nested dict whose leaves are tuples of axis names.
  """
  axes = {"trunk": _trunk_axes(config)}
  if kind == "value":
    axes["value_head"] = {"kernel": ("embed", None), "bias": (None,)}
  elif not config.tie_embeddings:
    axes["head"] = {"kernel": ("vocab", "embed")}
  return axes
