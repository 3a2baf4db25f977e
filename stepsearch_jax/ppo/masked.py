"""Statistics over masked-in entries; what lies elsewhere never matters."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mean(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean over masked-in entries; 0 when there are none."""
  on = mask > 0
  count = on.sum(dtype=jnp.float32)
  return jnp.where(on, x, 0.0).sum() / jnp.maximum(count, 1.0)


def variance(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Biased variance over masked-in entries; 0 when there are none."""
  return mean((x - mean(x, mask)) ** 2, mask)


def whiten(x: jax.Array, mask: jax.Array) -> jax.Array:
  """Shifts and scales masked-in entries to mean 0 and variance 1.

    (x - mean) / sqrt(unbiased variance + 1e-8)

  With fewer than two entries only the mean is removed. Masked-out entries
  become 0.
  """
  on = mask > 0
  count = on.sum(dtype=jnp.float32)
  centered = jnp.where(on, x - mean(x, mask), 0.0)
  spread = (centered**2).sum() / jnp.maximum(count - 1, 1.0)
  scale = jnp.where(count > 1, jax.lax.rsqrt(spread + 1e-8), 1.0)
  return centered * scale
