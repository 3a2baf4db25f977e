"""Packed attention, forward and backward, by every kernel within reach.

The product's own backends and the library kernels that might serve instead,
on the same rows of two segments. What a kernel refuses is a figure that
failed, with the kernel's reason.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from stepsearch_jax.bench import duel
from stepsearch_jax.models import attention

_CALLS = 10  # Per timing: one takes less than a millisecond.


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of one packed batch; Qwen2.5-3B's heads."""

  rows: int = 4
  length: int = 2048
  heads: int = 16
  kv_heads: int = 2
  head_dim: int = 128


def _inputs(shape: Shape, dtype):
  """(q, k, v) drawn from a seed."""
  rng = np.random.default_rng(0)
  size = shape.rows, shape.length
  return tuple(
    jnp.asarray(rng.standard_normal((*size, heads, shape.head_dim)), dtype)
    for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
  )


def _ends(shape: Shape) -> np.ndarray:
  """[B] where each row's first segment ends."""
  return shape.length // 4 + 64 * np.arange(shape.rows) % (shape.length // 2)


def _segments(shape: Shape) -> jax.Array:
  """[B, S] ids of two segments in every row, without padding."""
  first = np.arange(shape.length)[None] < _ends(shape)[:, None]
  return jnp.asarray(np.where(first, 1, 2), jnp.int32)


def _own(backend: str) -> Callable:
  """The product's backend."""
  return functools.partial(attention.packed_attention, backend=backend)


def _causal(q, k, v, segments):
  """cuDNN without segments: what no mask can be faster than."""
  del segments
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=True, implementation="cudnn"
  )


def _full(q, k, v, segments):
  """jax.nn's plain form, all scores at once."""
  mask = segments[:, None, :, None] == segments[:, None, None, :]
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, is_causal=True, implementation="xla"
  )


def _sequences(shape: Shape) -> Callable:
  """cuDNN's packed layout: segments as sequences, no mask."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  ends = _ends(shape)
  lengths = jnp.asarray(
    np.stack([ends, shape.length - ends], axis=1), jnp.int32
  )
  offsets = jnp.asarray(
    np.stack([0 * ends, ends, 0 * ends + shape.length], axis=1), jnp.int32
  )
  return lambda q, k, v, segments: cudnn.dot_product_attention(
    q, k, v, None, None, lengths, lengths, offsets, offsets,
    scale=shape.head_dim**-0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
  )


def _pallas(shape: Shape) -> Callable:
  """JAX's Triton kernel; every query head brings its own keys."""
  from jax.experimental.pallas.ops.gpu import attention as kernels

  groups = shape.heads // shape.kv_heads

  def call(q, k, v, segments):
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    return kernels.mha(q, k, v, segments, shape.head_dim**-0.5, True)

  return call


def _milliseconds(make: Callable[[], Callable], shape: Shape) -> Callable:
  """A function that times one forward and backward pass."""

  @functools.cache
  def prepared():
    inputs = *_inputs(shape, jnp.bfloat16), _segments(shape)
    kernel = make()
    return inputs, jax.jit(jax.grad(
      lambda *given: kernel(*given).astype(jnp.float32).sum(), (0, 1, 2)
    ))

  def read() -> float:
    inputs, both = prepared()
    began = time.perf_counter()
    for _ in range(_CALLS):
      out = both(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - began) / _CALLS * 1e3

  return read


def readings(
  path: str | None, shape: Shape | None = None
) -> Iterator[duel.Reading]:
  """Milliseconds of every kernel, forward and backward, bfloat16.

  Args:
    path: "tiny" rehearses with small rows; nothing else is read.
    shape: of the batch; None is 4 x 2048 with Qwen2.5-3B's heads.
  """
  small = Shape(2, 256, 4, 2, 64)
  shape = shape or (small if path == "tiny" else Shape())
  work = (f"{shape.rows} x {shape.length}, {shape.heads} heads, "
          f"{shape.kv_heads} of keys, {shape.head_dim} wide")
  for name, make in (
    ("own, cuDNN", lambda: _own("cudnn")),
    ("cuDNN, causal, segments ignored", lambda: _causal),
    ("cuDNN, segments as sequences", lambda: _sequences(shape)),
    ("XLA, full mask", lambda: _full),
    ("Pallas, Triton, segments", lambda: _pallas(shape)),
    ("own, XLA query blocks", lambda: _own("xla")),
  ):
    yield duel.Reading(
      f"attention, {name}", work, _milliseconds(make, shape), unit="ms",
      warm_up=True,
    )
