"""Rotary position embedding (arXiv 2104.09864) and its context extensions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Context extension of the rotary embedding.

  Attributes:
    kind: "linear" (positions divided by `factor`), "llama3" (Llama 3.1 model
      card), "yarn" (arXiv 2309.00071) or "factors" (each frequency divided by
      a number of its own).
    factor: how much longer the context became; 1 for "factors".
    original: context length before extension.
    low, high: llama3: wavelength band limits; yarn: beta_slow, beta_fast.
    attention_factor: scale of yarn's rotary table; 0 = from `factor`.
    truncate: yarn rounds the ends of its ramp to whole dimensions.
    factors: D/2 divisors of "factors", else empty.
  """

  kind: str
  factor: float
  original: int
  low: float = 1.0
  high: float = 4.0
  attention_factor: float = 0.0
  truncate: bool = True
  factors: tuple[float, ...] = ()


def frequencies(
  dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, float]:
  """Returns the rotary frequencies [D/2] float32 and the table's scale."""
  exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  base = 1.0 / theta**exponents
  if scaling is None:
    return base, 1.0
  if scaling.kind == "linear":
    return base / scaling.factor, 1.0
  if scaling.kind == "factors":
    return base / jnp.asarray(scaling.factors, jnp.float32), 1.0
  if scaling.kind == "llama3":
    wavelength = 2 * math.pi / base
    smooth = (scaling.original / wavelength - scaling.low) / (
      scaling.high - scaling.low
    )
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor + smooth * base, 1.0
  return _yarn(base, dim, theta, scaling)


def _yarn(base, dim, theta, scaling):
  """Interpolates slow dimensions and leaves fast ones, with a ramp between."""

  def dimension(rotations):
    ratio = scaling.original / (rotations * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(theta))

  first, last = dimension(scaling.high), dimension(scaling.low)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, dim - 1)
  ramp = jnp.arange(dim // 2, dtype=jnp.float32) - first
  ramp = jnp.clip(ramp / max(last - first, 0.001), 0.0, 1.0)
  scale = scaling.attention_factor or yarn_scale(scaling.factor)
  return ramp * base / scaling.factor + (1 - ramp) * base, scale


def yarn_scale(factor: float, weight: float = 1.0) -> float:
  """Returns yarn's scale of the rotary table (its equation 22)."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Returns `x` [B, S, H, D] rotated (half-split layout, in float32).

  Args:
    x: queries or keys.
    cos, sin: [B, S, D/2] float32.
  """
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  out = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return out.astype(x.dtype)
