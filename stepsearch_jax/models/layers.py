"""Matrices, biases, adapters and norms that the decoder is made of.

Weights name logical axes only. Activations are [B, S, ...].
"""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from stepsearch_jax import types


def weight(
  module: nn.Module, name: str, shape: tuple[int, ...],
  axes: tuple[str, ...], config: Any, inputs: int,
) -> types.Leaf:
  """A matrix drawn with standard deviation 1/sqrt(inputs).

  The usual fixed 0.02 suits wide models; in a model of width 128 it leaves
  attention almost uniform for a long time.
  """
  init = nn.with_logical_partitioning(
    nn.initializers.normal(inputs**-0.5, config.param_dtype), axes
  )
  return module.param(name, init, shape, config.param_dtype)


def bias(
  module: nn.Module, name: str, shape: tuple[int, ...],
  axes: tuple[str, ...], config: Any,
) -> types.Leaf:
  """A bias in the compute type, zero at first."""
  init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
  bias: Any = module.param(name, init, shape, config.param_dtype)
  return bias.astype(config.dtype)


def multiply(
  module: nn.Module, name: str, x: jax.Array, kernel: jax.Array,
  equation: str, dtype: Any,
) -> jax.Array:
  """Returns `x` times a matrix and, where there is one, its adapter.

  The adapter's product is added before the sum is rounded to `dtype`: behind
  the rounding, updates below half a unit in the last place would be lost.

  Args:
    module: holds the adapter {"a", "b"} of `name` in collection "adapters".
    name: of the matrix.
    x: activations.
    kernel: the matrix.
    equation: einsum of the two.
    dtype: of the computation and of the result.
  """
  kernel = kernel.astype(dtype)
  if not module.has_variable("adapters", name):
    return jnp.einsum(equation, x, kernel)
  pair = module.get_variable("adapters", name)
  inputs, matrix, outputs = re.split(",|->", equation)
  down = "".join(axis for axis in matrix if axis in inputs)
  up = "".join(axis for axis in matrix if axis in outputs)
  multiply = functools.partial(
    jnp.einsum, preferred_element_type=jnp.float32
  )
  low = multiply(f"{inputs},{down}r->bsr", x, pair["a"].astype(dtype))
  low = low.astype(dtype)
  delta = multiply(f"bsr,r{up}->{outputs}", low, pair["b"].astype(dtype))
  return (multiply(equation, x, kernel) + delta).astype(dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm (arXiv 1910.07467) in float32."""

  eps: float
  dtype: Any
  param_dtype: Any
  axis: str

  @nn.compact
  def __call__(self, x):
    """Normalizes the last axis of `x`."""
    init = nn.with_logical_partitioning(nn.initializers.ones, (self.axis,))
    scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(
      jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps
    )
    return wide.astype(self.dtype) * scale.astype(self.dtype)
