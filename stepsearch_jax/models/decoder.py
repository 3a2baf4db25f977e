"""Decoder trunk of Qwen2/2.5, Qwen3 and Llama: tokens to hidden states.

Used purely: `Decoder(config).apply({"params": trunk}, ...)`, with low-rank
adapters in a second collection (`adapters.collection`). For training,
layers are stacked and scanned: one layer is compiled and remembered. With a
cache they are apart (`unstack`), weights and cache entries of each layer in
arrays of their own: a scan would copy its slice of every weight in every step.
Weights and activations name logical axes only.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import attention, families, layers, rope
from stepsearch_jax.models import cache as cache_lib

_WRITTEN_OUT = 4  # Layers at most; see Decoder._stacked.


class Remat(enum.StrEnum):
  """What training keeps of a layer for the backward pass."""

  FULL = "full"  # Its input: the layer is computed again.
  DOTS = "dots"  # The results of its weight matrices too.
  NONE = "none"  # Everything.


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape of a decoder; hashable, so that it can be static under jit.

  Attributes:
    family: key of `families.FAMILIES`.
    vocab_size, hidden_size, intermediate_size, num_layers: V, M, F and L.
    num_heads, num_kv_heads, head_dim: query heads share the kv heads evenly.
    rope_theta, rope_scaling: see `rope.frequencies`.
    rms_norm_eps: added to the mean square in every norm.
    tie_embeddings: the embedding is also the output matrix.
    qkv_bias, qk_norm: None = as the family has them.
    o_bias, mlp_bias: the attention's output, the MLP's matrices have a bias.
    max_positions: the context that the model was made for.
    dtype, param_dtype: types of the computation and of the parameters.
    remat: what training keeps for the backward pass.
    attention: backend, see `attention.packed_attention`.
  """

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: rope.RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = True
  qkv_bias: bool | None = None
  qk_norm: bool | None = None
  o_bias: bool = False
  mlp_bias: bool = False
  max_positions: int = 32768
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: Remat = Remat.FULL
  attention: str | None = None

  def __post_init__(self):
    family = families.find(self.family, "model family")
    for name in ("qkv_bias", "qk_norm"):
      if getattr(self, name) is None:
        object.__setattr__(self, name, getattr(family, name))
    object.__setattr__(self, "remat", Remat(self.remat))
    if self.num_heads % self.num_kv_heads:
      raise types.UserError(
        f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads"
      )


def init_cache(
  config: DecoderConfig, slots: int, length: int, dtype: jax.typing.DTypeLike
) -> cache_lib.Cache:
  """An empty cache of `slots` rows with `length` positions."""
  return cache_lib.init_cache(
    slots, config.num_kv_heads, config.head_dim, length, config.num_layers,
    dtype, cache_lib.key_order(config.attention),
  )


def unstack(
  trunk: types.Tree, count: int, pick: Callable = lambda leaf, i: leaf[i],
  is_leaf: Callable[[Any], bool] | None = None,
) -> types.Tree:
  """A trunk with a subtree for every layer, as the cached forward takes it.

  Args:
    trunk: parameters with stacked layers, or a tree like them.
    count: layers.
    pick: (stacked leaf, layer) to the layer's own leaf.
    is_leaf: see `jax.tree.map`.
  """
  apart = {
    f"layer_{i}": jax.tree.map(
      lambda leaf, i=i: pick(leaf, i), trunk["layers"], is_leaf=is_leaf
    )
    for i in range(count)
  }
  rest = {name: leaf for name, leaf in trunk.items() if name != "layers"}
  return rest | apart


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x, angles, positions, segment_ids, entries, cache, kv_length
  ):
    """Returns (output [B, S, M], the layer's part of the cache)."""
    c = self.config
    width = c.hidden_size

    def project(name, heads, axis):
      kernel = layers.weight(
        self, f"{name}_kernel", (width, heads, c.head_dim),
        ("embed", axis, "head_dim"), c, width,
      )
      out = layers.multiply(
        self, f"{name}_kernel", x, kernel, "bsm,mhd->bshd", c.dtype
      )
      if c.qkv_bias:
        shape, axes = (heads, c.head_dim), (axis, "head_dim")
        out = out + layers.bias(self, f"{name}_bias", shape, axes, c)
      return out

    q = project("q", c.num_heads, "heads")
    k = project("k", c.num_kv_heads, "kv_heads")
    v = project("v", c.num_kv_heads, "kv_heads")
    if c.qk_norm:
      norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "head_dim")
      q = layers.RMSNorm(*norm, name="q_norm")(q)
      k = layers.RMSNorm(*norm, name="k_norm")(k)
    q, k = rope.rotate(q, *angles), rope.rotate(k, *angles)
    if cache is None:
      mixed = attention.packed_attention(
        q, k, v, segment_ids, c.attention
      )
    else:
      entries = cache_lib.write(entries, k, v, positions, cache)
      mixed = attention.cached_attention(
        q, entries, positions, cache, kv_length, c.attention
      )
    kernel = layers.weight(
      self, "o_kernel", (c.num_heads, c.head_dim, width),
      ("heads", "head_dim", "embed"), c, 2 * c.num_layers * width,
    )
    out = layers.multiply(
      self, "o_kernel", mixed, kernel, "bshd,hdm->bsm", c.dtype
    )
    if c.o_bias:
      out = out + layers.bias(self, "o_bias", (width,), ("norm",), c)
    return out, entries


class Mlp(nn.Module):
  """SwiGLU feed-forward (arXiv 2002.05202)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    """Maps [B, S, M] to [B, S, M]."""
    c = self.config
    wide = (c.hidden_size, c.intermediate_size)
    axes = ("embed", "mlp")
    gate = layers.weight(self, "gate_kernel", wide, axes, c, wide[0])
    up = layers.weight(self, "up_kernel", wide, axes, c, wide[0])
    down = layers.weight(
      self, "down_kernel", wide[::-1], axes[::-1], c,
      2 * c.num_layers * wide[1],
    )

    def multiply(name, x, kernel, equation):
      out = layers.multiply(
        self, f"{name}_kernel", x, kernel, equation, c.dtype
      )
      if c.mlp_bias:
        shape, axis = out.shape[-1:], "norm" if name == "down" else "mlp"
        out = out + layers.bias(self, f"{name}_bias", shape, (axis,), c)
      return out

    hidden = nn.silu(multiply("gate", x, gate, "bsm,mf->bsf"))
    hidden = hidden * multiply("up", x, up, "bsm,mf->bsf")
    hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
    return multiply("down", hidden, down, "bsf,fm->bsm")


class Block(nn.Module):
  """Pre-norm transformer layer."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x, angles, positions, segment_ids, entries=None, cache=None,
    kv_length=None,
  ):
    """Returns (hidden [B, S, M], the layer's part of the cache)."""
    c = self.config
    norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "norm")
    mixed, entries = Attention(c, name="attention")(
      layers.RMSNorm(*norm, name="attention_norm")(x),
      angles, positions, segment_ids, entries, cache, kv_length,
    )
    x = x + mixed
    x = x + Mlp(c, name="mlp")(layers.RMSNorm(*norm, name="mlp_norm")(x))
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    return x, entries


class Decoder(nn.Module):
  """Token embedding, layers and final norm."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: cache_lib.Cache | None = None,
    kv_length: int | None = None,
  ):
    """Runs the trunk.

    Args:
      tokens: [B, S] int32.
      positions: [B, S] int32, position inside the sequence. With a cache also
        where keys and values are stored; positions outside it are padding.
      segment_ids: [B, S] int32 of packed rows (0 = padding); only without a
        cache, None = every row is one sequence.
      cache: see `cache.Cache`; a token attends to all entries up to its
        position. The parameters' layers are apart then, see `unstack`.
      kv_length: static bound on the entries read; None = all.

    Returns:
      (hidden [B, S, M] after the final norm, cache).
    """
    c = self.config
    table = layers.weight(
      self, "embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), c,
      c.hidden_size,
    )
    with jax.named_scope("embedding"):
      x = jnp.take(table.astype(c.dtype), tokens, axis=0)
      x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    with jax.named_scope("rope"):
      frequencies, scale = rope.frequencies(
        c.head_dim, c.rope_theta, c.rope_scaling
      )
      turns = positions.astype(jnp.float32)[..., None] * frequencies
      angles = (jnp.cos(turns) * scale, jnp.sin(turns) * scale)
    if segment_ids is None and cache is None:
      segment_ids = jnp.ones_like(tokens)
    if cache is None:
      x = self._stacked(x, angles, positions, segment_ids)
    else:
      x, cache = self._cached(x, angles, positions, cache, kv_length)
    norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "norm")
    return layers.RMSNorm(*norm, name="final_norm")(x), cache

  def _stacked(self, x, angles, positions, segment_ids):
    """A scan over stacked layers.

    A loop copies what a layer keeps for the backward pass into an array for all
    layers. Few layers that keep everything are written out instead (.84 of the
    time of an imitation step of the quickstart, 2 x Xeon 6/207); many would
    take too long to compile.
    """
    c = self.config
    written_out = c.remat == Remat.NONE and c.num_layers <= _WRITTEN_OUT
    block = Block
    if c.remat != Remat.NONE:
      policy = None
      if c.remat == Remat.DOTS:
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
      block = nn.remat(Block, prevent_cse=False, policy=policy)
    stack = nn.scan(
      block,
      variable_axes={"params": 0, "adapters": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      unroll=c.num_layers if written_out else 1,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, name="layers")
    return stack(x, angles, positions, segment_ids)[0]

  def _cached(self, x, angles, positions, cache, kv_length):
    """Layer after layer, each with its own weights and cache."""
    keys, values = [], []
    for i, entries in enumerate(zip(cache.k, cache.v, strict=True)):
      x, (k, v) = Block(self.config, name=f"layer_{i}")(
        x, angles, positions, None, entries, cache, kv_length
      )
      keys.append(k)
      values.append(v)
    cache = dataclasses.replace(cache, k=tuple(keys), v=tuple(values))
    return x, cache
