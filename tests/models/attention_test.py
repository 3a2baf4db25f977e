"""Packed attention: every way against a loop over segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.models import attention, cudnn

SEGMENTS = np.array([
  [1] * 200 + [2] * 300 + [0] * 12,
  [1] * 512,
  [0] * 512,
  [1] * 1 + [2] * 255 + [0] * 256,
], np.int32)


def inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(
    jax.random.normal(key, (4, 512, heads, 16), dtype)
    for key, heads in zip(keys, (4, 2, 2), strict=True)
  )


def by_hand(q, k, v, segments):
  """Softmax over earlier tokens of the own segment, segment by segment."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  out = np.zeros(q.shape)
  for row in range(len(q)):
    for segment in set(segments[row]) - {0}:
      own = np.flatnonzero(segments[row] == segment)
      scores = np.einsum("shd,thd->hst", q[row, own], k[row, own]) / 4.0
      scores = np.where(np.tri(len(own)) > 0, scores, -np.inf)
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[row, own] = np.einsum("hst,thd->shd", weights, v[row, own])
  return out


class FakeKernel:
  """cuDNN's function as documented: places in, nothing written elsewhere."""

  class MaskType:
    PADDING_CAUSAL = "padding and causal"

  def __init__(self):
    self.calls = 0

  def dot_product_attention(
    self, q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale,
    mask_type,
  ):
    assert mask_type == "padding and causal"
    assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
    self.calls += 1
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    place = jnp.arange(q.shape[1])
    written = jnp.zeros(q.shape[:2], bool)
    out = jnp.full(q.shape, jnp.nan, jnp.float32)
    for m in range(q_seqlen.shape[1]):
      first, size = q_offsets[:, m, None], q_seqlen[:, m, None]
      inside = (size > 0) & (place >= first) & (place < first + size)
      mask = inside[:, :, None] & inside[:, None, :] & jnp.tri(
        q.shape[1], dtype=bool
      )
      scores = jnp.einsum("bshd,bthd->bhst", q, k) * scale
      weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), -1)
      own = jnp.einsum("bhst,bthd->bshd", weights, v).astype(jnp.float32)
      out = jnp.where(inside[..., None, None], own, out)
      written = written | inside
    return jnp.where(written[..., None, None], out, jnp.nan).astype(q.dtype)


@pytest.fixture
def fused(monkeypatch):
  fake = FakeKernel()
  monkeypatch.setattr(cudnn, "kernel", lambda: fake)
  return fake


def test_the_places_of_segments_are_what_the_kernel_expects():
  starts, lengths = cudnn.segment_places(jnp.asarray(SEGMENTS))
  assert starts.tolist() == [
    [0, 200, -1], [0, -1, -1], [-1, -1, -1], [0, 1, -1]
  ]
  assert lengths.tolist() == [[200, 300], [512, -1], [-1, -1], [1, 255]]


def test_query_blocks_equal_the_loop():
  ours = attention.packed_attention(*inputs(), jnp.asarray(SEGMENTS), "xla")
  np.testing.assert_allclose(ours, by_hand(*inputs(), SEGMENTS), atol=2e-6)


def test_segments_through_the_fused_kernel_equal_the_loop(fused):
  ours = cudnn.packed(
    *inputs(), jnp.asarray(SEGMENTS), otherwise=attention._xla_packed
  )
  assert fused.calls == 1
  np.testing.assert_allclose(ours, by_hand(*inputs(), SEGMENTS), atol=2e-6)


def test_gradients_pass_the_fused_kernel_without_its_padding(fused):
  segments = jnp.asarray(SEGMENTS)
  aim = jax.random.normal(jax.random.key(3), inputs()[0].shape)

  def gradients(way):
    return jax.grad(
      lambda qkv: (way(*qkv, segments) * aim).sum()
    )(inputs())

  ours = gradients(
    lambda *x: cudnn.packed(*x, otherwise=attention._xla_packed)
  )
  for mine, theirs in zip(
    ours, gradients(attention._xla_packed), strict=True
  ):
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_rows_of_too_many_segments_take_the_other_path(fused):
  many = np.repeat(np.arange(1, 5, dtype=np.int32), 128)[None].repeat(4, 0)
  assert many.max() > cudnn.max_segments(512)
  ours = cudnn.packed(
    *inputs(), jnp.asarray(many), otherwise=attention._xla_packed
  )
  np.testing.assert_allclose(ours, by_hand(*inputs(), many), atol=2e-6)


def test_the_gpus_way_takes_segments_where_it_can_and_says_where_not(
  fused, monkeypatch
):
  calls = []
  monkeypatch.setattr(
    attention, "_masked_packed", lambda *x: calls.append("masked") or x[0]
  )
  low = inputs(jnp.bfloat16)
  attention.packed_attention(*low, jnp.asarray(SEGMENTS), "cudnn")
  assert (fused.calls, calls) == (1, [])
  monkeypatch.setattr(cudnn, "kernel", lambda: None)
  attention.packed_attention(*low, jnp.asarray(SEGMENTS), "cudnn")
  assert calls == ["masked"]


def test_the_real_kernel_lowers_for_cuda_without_a_mask(monkeypatch):
  # cuDNN itself is not needed to lower, only asked for its version.
  module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(module, "check_cudnn_version", lambda: 91300)
  monkeypatch.setattr(module, "check_compute_capability", lambda _: True)
  cudnn.kernel.cache_clear()
  try:
    shapes = [
      jax.ShapeDtypeStruct((2, 2048, heads, 128), jnp.bfloat16)
      for heads in (8, 2, 2)
    ]
    segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def loss(q, k, v, segments):
      out = attention.packed_attention(q, k, v, segments, "cudnn")
      return out.astype(jnp.float32).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = program.trace(*shapes, segments).lower(
      lowering_platforms=("cuda",)
    ).as_text()
  finally:
    cudnn.kernel.cache_clear()
  assert "fmhaSoftmaxBackward" in text and "fmhaSoftmax" in text
  assert "2x1x2048x2048" not in text and "2048x2048xi1" not in text
