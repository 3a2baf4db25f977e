"""Decoder trunk of Qwen2/2.5, Qwen3 and Llama: tokens to hidden states.

Used purely: `Decoder(config).apply({"params": trunk}, ...)`. For training,
layers are stacked and scanned: one layer is compiled and remembered. With a
cache they are apart (`unstack`), weights and cache entries of each layer in
arrays of their own: a scan would copy its slice of every weight in every step.
Weights and activations name logical axes only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import attention

FAMILIES = ("qwen2", "qwen3", "llama")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Context extension of the rotary embedding.

  Attributes:
    kind: "llama3" (Llama 3.1 model card) or "yarn" (arXiv 2309.00071).
    factor: how much longer the context became.
    original: context length before extension.
    low, high: llama3: wavelength band limits; yarn: beta_slow, beta_fast.
    attention_factor: yarn's scale of the rotary table; 0 = from `factor`.
  """

  kind: str
  factor: float
  original: int
  low: float = 1.0
  high: float = 4.0
  attention_factor: float = 0.0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Shape of a decoder; hashable, so that it can be static under jit."""

  family: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = True
  qkv_bias: bool = False
  qk_norm: bool = False
  max_positions: int = 32768
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: bool = True
  attention: str | None = None  # See `attention.packed_attention`.

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise types.UserError(
        f"model family must be one of {FAMILIES}, got {self.family!r}"
      )
    if self.num_heads % self.num_kv_heads:
      raise types.UserError(
        f"{self.num_heads} heads cannot share {self.num_kv_heads} kv heads"
      )


@flax.struct.dataclass
class Cache:
  """Keys and values of P slots, one array a layer.

  A decode step multiplies a few queries with all keys, and the weights with
  all values; in these layouts both are matrix products without a transpose.

  Attributes:
    k: L arrays [P, KV, D, T].
    v: L arrays [P, KV, T, D].
    slots: [B] int32, the slot of each batch row; None = row b is slot b.
  """

  k: tuple[jax.Array, ...]
  v: tuple[jax.Array, ...]
  slots: jax.Array | None = None


# Logical axes of a layer's keys and values.
CACHE_AXES = (
  ("slots", "kv_heads", "head_dim", "length"),
  ("slots", "kv_heads", "length", "head_dim"),
)


def init_cache(
  config: DecoderConfig, slots: int, length: int, dtype: jax.typing.DTypeLike
) -> Cache:
  """An empty cache of `slots` rows with `length` positions."""
  keys = (slots, config.num_kv_heads, config.head_dim, length)
  values = (slots, config.num_kv_heads, length, config.head_dim)
  layers = range(config.num_layers)
  return Cache(
    tuple(jnp.zeros(keys, dtype) for _ in layers),
    tuple(jnp.zeros(values, dtype) for _ in layers),
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
  layers = {
    f"layer_{i}": jax.tree.map(
      lambda leaf, i=i: pick(leaf, i), trunk["layers"], is_leaf=is_leaf
    )
    for i in range(count)
  }
  rest = {name: leaf for name, leaf in trunk.items() if name != "layers"}
  return rest | layers


def rope_frequencies(config: DecoderConfig) -> tuple[jax.Array, float]:
  """Rotary frequencies [D/2] float32 and the scale of the table."""
  dim = config.head_dim
  exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  base = 1.0 / config.rope_theta**exponents
  scaling = config.rope_scaling
  if scaling is None:
    return base, 1.0
  if scaling.kind == "llama3":
    wavelength = 2 * math.pi / base
    smooth = (scaling.original / wavelength - scaling.low) / (
      scaling.high - scaling.low
    )
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor + smooth * base, 1.0

  def correction(rotations):
    ratio = scaling.original / (rotations * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

  first = max(math.floor(correction(scaling.high)), 0)
  last = min(math.ceil(correction(scaling.low)), dim - 1)
  ramp = jnp.arange(dim // 2, dtype=jnp.float32) - first
  ramp = jnp.clip(ramp / max(last - first, 0.001), 0.0, 1.0)
  factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
  return ramp * base / scaling.factor + (1 - ramp) * base, factor


def _rotate(x, cos, sin):
  """Applies the rotary embedding (half-split layout) in float32."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  out = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return out.astype(x.dtype)


def _weight(module, name, shape, axes, config, inputs):
  """A matrix drawn with standard deviation 1/sqrt(inputs).

  The usual fixed 0.02 suits wide models; in a model of width 128 it leaves
  attention almost uniform for a long time.
  """
  init = nn.with_logical_partitioning(
    nn.initializers.normal(inputs**-0.5, config.param_dtype), axes
  )
  return module.param(name, init, shape, config.param_dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm (arXiv 1910.07467) in float32."""

  eps: float
  dtype: Any
  param_dtype: Any
  axis: str

  @nn.compact
  def __call__(self, x):
    """Normalises the last axis of `x`."""
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(
      jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps
    )
    return wide.astype(self.dtype) * scale.astype(self.dtype)


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x, rope, positions, segment_ids, cache, slots, kv_length):
    """Returns (output [B, S, M], the layer's cache (keys, values))."""
    c = self.config
    width = c.hidden_size

    def project(name, heads, axis):
      kernel = _weight(
        self, f"{name}_kernel", (width, heads, c.head_dim),
        ("embed", axis, "head_dim"), c, width,
      )
      out = jnp.einsum("bsm,mhd->bshd", x, kernel.astype(c.dtype))
      if c.qkv_bias:
        init = nn.with_logical_partitioning(
          nn.initializers.zeros, (axis, "head_dim")
        )
        bias = self.param(
          f"{name}_bias", init, (heads, c.head_dim), c.param_dtype
        )
        out = out + bias.astype(c.dtype)
      return out

    q = project("q", c.num_heads, "heads")
    k = project("k", c.num_kv_heads, "kv_heads")
    v = project("v", c.num_kv_heads, "kv_heads")
    if c.qk_norm:
      norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "head_dim")
      q = RMSNorm(*norm, name="q_norm")(q)
      k = RMSNorm(*norm, name="k_norm")(k)
    q, k = _rotate(q, *rope), _rotate(k, *rope)
    if cache is None:
      mixed = attention.packed_attention(
        q, k, v, segment_ids, c.attention
      )
    else:
      cache = _write(cache, k, v, slots, positions)
      keys, values = _read(cache, slots, kv_length)
      mixed = attention.cached_attention(q, keys, values, positions)
    kernel = _weight(
      self, "o_kernel", (c.num_heads, c.head_dim, width),
      ("heads", "head_dim", "embed"), c, 2 * c.num_layers * width,
    )
    return jnp.einsum("bshd,hdm->bsm", mixed, kernel.astype(c.dtype)), cache


def _write(cache, k, v, slots, positions):
  """Stores new keys and values [B, S, KV, D]; others' places are padding."""
  keys, values = cache
  rows = jnp.arange(k.shape[0], dtype=jnp.int32) if slots is None else slots
  rows = rows[:, None]
  # Advanced indices around a slice come first: both take [B, S, KV, D].
  return (
    keys.at[rows, :, :, positions].set(k.astype(keys.dtype), mode="drop"),
    values.at[rows, :, positions].set(v.astype(values.dtype), mode="drop"),
  )


def _read(cache, slots, kv_length):
  """The batch rows' entries up to `kv_length`."""
  keys, values = cache
  keys, values = keys[..., :kv_length], values[:, :, :kv_length]
  if slots is None:
    return keys, values
  return tuple(x.at[slots].get(mode="clip") for x in (keys, values))


class Mlp(nn.Module):
  """SwiGLU feed-forward (arXiv 2002.05202)."""

  config: DecoderConfig

  @nn.compact
  def __call__(self, x):
    """Maps [B, S, M] to [B, S, M]."""
    c = self.config
    wide = (c.hidden_size, c.intermediate_size)
    axes = ("embed", "mlp")
    gate = _weight(self, "gate_kernel", wide, axes, c, wide[0])
    up = _weight(self, "up_kernel", wide, axes, c, wide[0])
    down = _weight(
      self, "down_kernel", wide[::-1], axes[::-1], c,
      2 * c.num_layers * wide[1],
    )
    hidden = nn.silu(x @ gate.astype(c.dtype)) * (x @ up.astype(c.dtype))
    hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
    return hidden @ down.astype(c.dtype)


class Block(nn.Module):
  """Pre-norm transformer layer."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self, x, rope, positions, segment_ids, cache=None, slots=None,
    kv_length=None,
  ):
    """Returns (hidden [B, S, M], the layer's cache), as a scan wants it."""
    c = self.config
    norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "norm")
    mixed, cache = Attention(c, name="attention")(
      RMSNorm(*norm, name="attention_norm")(x),
      rope, positions, segment_ids, cache, slots, kv_length,
    )
    x = x + mixed
    x = x + Mlp(c, name="mlp")(RMSNorm(*norm, name="mlp_norm")(x))
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    return x, cache


class Decoder(nn.Module):
  """Token embedding, layers and final norm."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    kv_length: int | None = None,
  ):
    """Runs the trunk.

    Args:
      tokens: [B, S] int32.
      positions: [B, S] int32, position inside the sequence. With a cache also
        where keys and values are stored; positions outside it are padding.
      segment_ids: [B, S] int32 of packed rows (0 = padding); only without a
        cache, None = every row is one sequence.
      cache: see `Cache`; a token attends to all entries up to its position.
        The parameters' layers are apart then, see `unstack`.
      kv_length: static bound on the entries read; None = all.

    Returns:
      (hidden [B, S, M] after the final norm, cache).
    """
    c = self.config
    table = _weight(
      self, "embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), c,
      c.hidden_size,
    )
    x = jnp.take(table.astype(c.dtype), tokens, axis=0)
    x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
    frequencies, scale = rope_frequencies(c)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    rope = (jnp.cos(angles) * scale, jnp.sin(angles) * scale)
    if segment_ids is None and cache is None:
      segment_ids = jnp.ones_like(tokens)
    if cache is None:
      x = self._stacked(x, rope, positions, segment_ids)
    else:
      x, cache = self._cached(x, rope, positions, cache, kv_length)
    norm = (c.rms_norm_eps, c.dtype, c.param_dtype, "norm")
    return RMSNorm(*norm, name="final_norm")(x), cache

  def _stacked(self, x, rope, positions, segment_ids):
    """A scan over stacked layers."""
    c = self.config
    block = Block
    if c.remat:
      block = nn.remat(Block, prevent_cse=False)
    layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, name="layers")
    return layers(x, rope, positions, segment_ids)[0]

  def _cached(self, x, rope, positions, cache, kv_length):
    """Layer after layer, each with its own weights and cache."""
    keys, values = [], []
    for i, entries in enumerate(zip(cache.k, cache.v, strict=True)):
      x, (k, v) = Block(self.config, name=f"layer_{i}")(
        x, rope, positions, None, entries, cache.slots, kv_length
      )
      keys.append(k)
      values.append(v)
    return x, cache.replace(k=tuple(keys), v=tuple(values))
