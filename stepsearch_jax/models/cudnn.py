"""Packed attention through cuDNN's fused kernel, by the places of segments.

The kernel reads where each segment begins and how long it is; no mask of
[R, 1, S, S] exists. JAX has this form behind its public function only, so what
it needs is looked up once and the caller falls back where it is not there.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging

# A row with more segments than one per so many tokens takes the caller's other
# path: the kernel's workspace grows with the bound on their number.
_TOKENS_PER_SEGMENT = 256


@functools.cache
def kernel() -> types.ModuleType | None:
  """Returns JAX's cuDNN module, None where it cannot take segments.

  It needs a Hopper GPU or later, and a JAX whose function takes offsets.
  """
  try:
    from jax._src.cudnn import fused_attention_stablehlo as module

    parameters = inspect.signature(module.dot_product_attention).parameters
    missing = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"} - set(
      parameters
    )
    if missing:
      raise NotImplementedError(f"its function takes no {sorted(missing)}")
    if not module.check_compute_capability("9.0"):
      raise NotImplementedError("it needs a GPU of compute capability 9.0")
  except (ImportError, AttributeError, NotImplementedError) as error:
    logging.warning(
      "attention of packed rows goes through a mask: cuDNN cannot take their "
      "segments here (%s)", error,
    )
    return None
  return module


def max_segments(length: int) -> int:
  """Returns the bound on the segments of a row that the kernel is given."""
  return max(length // _TOKENS_PER_SEGMENT, 2)


def segment_places(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns where segments begin [R, M + 1] and their lengths [R, M].

  Entries behind the last segment are -1.

  Args:
    segment_ids: [R, S] int32; 1, 2, ... in this order, 0 for padding.
  """
  numbers = jnp.arange(1, max_segments(segment_ids.shape[1]) + 1)
  own = segment_ids[:, :, None] == numbers.astype(jnp.int32)
  lengths = own.sum(axis=1, dtype=jnp.int32)
  starts = jnp.argmax(own, axis=1).astype(jnp.int32)
  there = lengths > 0
  starts = jnp.pad(
    jnp.where(there, starts, -1), ((0, 0), (0, 1)), constant_values=-1
  )
  return starts, jnp.where(there, lengths, -1)


def packed(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array,
  otherwise: Callable[..., jax.Array],
) -> jax.Array:
  """Causal attention inside segments.

  Args:
    q: [R, S, H, D] bfloat16 or float16.
    k, v: [R, S, KV, D].
    segment_ids: [R, S] int32, see `segment_places`.
    otherwise: computes the same for rows of too many segments.

  Returns:
    [R, S, H, D], zero at padding.
  """
  module = kernel()
  # Padding belongs to no segment: the kernel writes nothing there, neither
  # results nor gradients.
  valid = (segment_ids > 0)[..., None, None]

  def fused(q, k, v, segment_ids):
    q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
    starts, lengths = segment_places(segment_ids)
    out = module.dot_product_attention(
      q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts,
      kv_offsets=starts, scale=q.shape[-1] ** -0.5,
      mask_type=module.MaskType.PADDING_CAUSAL,
    )
    return jnp.where(valid, out, 0)

  return jax.lax.cond(
    segment_ids.max() <= max_segments(q.shape[1]), fused, otherwise,
    q, k, v, segment_ids,
  )
