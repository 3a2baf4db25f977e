"""Packed attention: every way against a loop over segments."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.models import attention, cache, cudnn

SEGMENTS = np.array([
  [1] * 200 + [2] * 300 + [0] * 12,
  [1] * 512,
  [0] * 512,
  [1] * 1 + [2] * 255 + [0] * 256,
], np.int32)

# Rows that begin with what all of their segments see, beside rows without.
SHARED = np.array([
  [-1] * 100 + [1] * 150 + [2] * 200 + [0] * 62,
  [-1] * 128 + [1] * 384,
  [-1] * 3 + [0] * 1 + [1] * 1 + [2] * 300 + [0] * 207,
  [1] * 200 + [2] * 300 + [0] * 12,
], np.int32)


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(
    jnp.asarray(rng.standard_normal((4, 512, heads, 16)), dtype)
    for heads in (4, 2, 2)
  )


def by_hand(q, k, v, segments):
  """Softmax over earlier tokens of prefix and segment, one by one."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  out = np.zeros(q.shape)
  for row in range(len(q)):
    for segment in set(segments[row]) - {0}:
      own = np.isin(segments[row], (segment, attention.PREFIX))
      own = np.flatnonzero(own)
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


@pytest.mark.parametrize("segments", [SEGMENTS, SHARED])
def test_query_blocks_equal_the_loop(segments):
  ours = jax.jit(attention.packed_attention, static_argnums=4)(
    *inputs(), jnp.asarray(segments), "xla"
  )
  np.testing.assert_allclose(ours, by_hand(*inputs(), segments), atol=2e-6)


def fused_only(q, *unused):
  """In place of the other path, where it must not be taken."""
  return jnp.full(q.shape, jnp.nan)


def packed(*args, otherwise):
  """Compiles `cudnn.packed` as a whole, around the kernel of this test."""
  return jax.jit(lambda *x: cudnn.packed(*x, otherwise=otherwise))(*args)


@pytest.mark.parametrize("segments", [SEGMENTS, SHARED])
def test_segments_through_the_fused_kernel_equal_the_loop(fused, segments):
  ours = packed(*inputs(), jnp.asarray(segments), otherwise=fused_only)
  np.testing.assert_allclose(ours, by_hand(*inputs(), segments), atol=2e-6)


@pytest.mark.parametrize("segments", [SEGMENTS, SHARED])
def test_gradients_pass_the_fused_kernel_without_its_padding(fused, segments):
  segments = jnp.asarray(segments)
  aim = np.random.default_rng(3).normal(size=inputs()[0].shape)
  aim = aim.astype(np.float32)

  def gradients(way):
    return jax.jit(jax.grad(
      lambda qkv: (way(*qkv, segments) * aim).sum()
    ))(inputs())

  ours = gradients(
    lambda *x: cudnn.packed(*x, otherwise=fused_only)
  )
  for mine, theirs in zip(
    ours, gradients(attention._xla_packed), strict=True
  ):
    np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_rows_of_too_many_segments_take_the_other_path(fused):
  many = np.repeat(np.arange(1, 5, dtype=np.int32), 128)[None].repeat(4, 0)
  assert many.max() > cudnn.max_segments(512)
  ours = packed(
    *inputs(), jnp.asarray(many), otherwise=attention._xla_packed
  )
  np.testing.assert_allclose(ours, by_hand(*inputs(), many), atol=2e-6)


def test_rows_that_do_not_fit_when_spread_out_take_the_other_path(
  fused, monkeypatch
):
  # With a copy of the prefix each, three segments take 3 * 400 + 110 places.
  ids = [-1] * 400 + [1] * 50 + [2] * 30 + [3] * 30 + [0] * 2
  long = np.asarray([ids], np.int32).repeat(4, 0)
  monkeypatch.setattr(cudnn, "max_segments", lambda length: 3)
  assert not cudnn.Spread.of(jnp.asarray(long)).fits()
  assert cudnn.Spread.of(jnp.minimum(jnp.asarray(long), 2)).fits()
  ours = packed(
    *inputs(), jnp.asarray(long), otherwise=attention._xla_packed
  )
  np.testing.assert_allclose(ours, by_hand(*inputs(), long), atol=2e-6)


def by_splash(*args):
  return attention._splash_local(*args, interpret=True)


def test_splash_attention_interpreted_equals_query_blocks():
  ids = np.array([
    [-1] * 100 + [1] * 60 + [2] * 80 + [0] * 16, [1] * 128 + [2] * 128,
    [-1] * 130 + [0] * 2 + [1] * 4 + [2] * 120,
  ], np.int32)
  given = tuple(jnp.tile(x[:3, :256], (1, 1, 1, 8)) for x in inputs())
  # What padding gets is for nobody to see.
  aim = np.random.default_rng(3).normal(size=given[0].shape)
  aim = np.where((ids != 0)[..., None, None], aim, 0).astype(np.float32)

  def both(way):
    def aimed(qkv):
      out = way(*qkv, jnp.asarray(ids)) * aim
      return out.sum(), out

    return jax.jit(jax.grad(aimed, has_aux=True))(given)

  jax.tree.map(
    lambda mine, other: np.testing.assert_allclose(mine, other, atol=1e-4),
    both(by_splash), both(attention._xla_packed),
  )


@pytest.mark.parametrize("length", [128, 1024, 2048, 4096, 8192, 16384])
def test_what_splash_queries_see_fits_one_number(length):
  step, fields = attention.prefix_step(length), attention._fields(length)
  assert 2 * fields.place + fields.prefix <= 32
  last = -(-(length - 2) // step) * step  # A prefix of all places but two.
  assert last // step <= 2**fields.prefix - 1 or last >= length
  assert length - 1 < 2**fields.place


def test_the_gpus_way_takes_segments_where_it_can_and_says_where_not(
  fused, monkeypatch
):
  calls = []
  monkeypatch.setattr(
    attention, "_masked_packed", lambda *x: calls.append("masked") or x[0]
  )
  low = inputs(jnp.bfloat16)

  def way(*qkv):  # Tracing takes it; nothing needs to run.
    jax.eval_shape(
      lambda *x: attention.packed_attention(*x, SEGMENTS, "cudnn"), *qkv
    )

  way(*low)
  assert fused.calls and not calls
  monkeypatch.setattr(cudnn, "kernel", lambda: None)
  way(*low)
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
    q, k, v = (
      jax.ShapeDtypeStruct((4, 2, length, 128), jnp.bfloat16)
      for length in (8, 1024, 1024)
    )
    held = jax.ShapeDtypeStruct((4,), jnp.int32)
    decoding = jax.jit(cudnn.decode).trace(q, k, v, held).lower(
      lowering_platforms=("cuda",)
    ).as_text()
  finally:
    cudnn.kernel.cache_clear()
  assert "fmhaSoftmaxBackward" in text and "fmhaSoftmax" in text
  assert "2x1x2048x2048" not in text and "2048x2048xi1" not in text
  # The cache goes in as it lies: nothing of its size is made.
  assert "fmhaSoftmax" in decoding and "tensor<4x1024x" not in decoding


class FakeDecode:
  """What cuDNN computes with padding: keys up to a row's own length."""

  MaskType = types.SimpleNamespace(PADDING="padding")

  def dot_product_attention(
    self, q, k, v, *, q_seqlen, kv_seqlen, scale, mask_type, qkv_layout
  ):
    assert (mask_type, qkv_layout) == ("padding", "BNTH")
    assert (q_seqlen == q.shape[2]).all()
    out = np.full(q.shape, np.nan, np.float32)
    for row, held in enumerate(np.asarray(kv_seqlen)):
      assert held > 0  # cuDNN would divide by nothing.
      keys, values = (np.asarray(x[row, :, :held], np.float32) for x in (k, v))
      scores = np.einsum("ngd,ntd->ngt", np.float32(q[row]), keys) * scale
      weights = np.exp(scores - scores.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      out[row] = np.einsum("ngt,ntd->ngd", weights, values)
    return jnp.asarray(out, q.dtype)


@pytest.mark.parametrize("heads, kv", [(8, 2), (9, 3)])
def test_slots_decode_over_what_they_hold(monkeypatch, heads, kv):
  monkeypatch.setattr(cudnn, "kernel", FakeDecode)
  rng = np.random.default_rng(4)
  q = jnp.asarray(rng.standard_normal((5, 1, heads, 16)), jnp.bfloat16)
  k, v = jnp.asarray(rng.standard_normal((2, 5, kv, 40, 16)), jnp.bfloat16)
  # The last slot is not active: its position is outside.
  positions = jnp.asarray([[0], [7], [20], [39], [40]], jnp.int32)
  slots = cache.Cache((), (), order=cache.KeyOrder.TD)
  # What lies behind a slot's last entry is nobody's: poison.
  behind = jnp.arange(40)[None, None, :, None] > positions[:, :, None, None]
  k, v = (jnp.where(behind, jnp.nan, x) for x in (k, v))
  ours = attention.cached_attention(
    q, (k, v), positions, slots, 24, "cudnn"
  )
  plain = attention.cached_attention(
    q.astype(jnp.float32), tuple(jnp.nan_to_num(x) for x in (k, v)),
    positions, slots, None, "xla",
  )
  np.testing.assert_allclose(
    np.float32(ours[:4]), plain[:4], rtol=0.02, atol=0.01
  )
  np.testing.assert_array_equal(np.float32(ours[4]), 0)


@pytest.mark.parametrize("change", [
  {"queries": 2}, {"dtype": jnp.float32}, {"dim": 12}, {"order": "dt"},
  {"rows": jnp.zeros(5, jnp.int32)}, {"backend": "xla"},
])
def test_other_queries_and_layouts_do_not_go_to_the_decode_kernel(
  monkeypatch, change
):
  monkeypatch.setattr(cudnn, "kernel", FakeDecode)

  def found(
    queries=1, dtype=jnp.bfloat16, dim=16, order="td", rows=None,
    backend="cudnn",
  ):
    q = jax.ShapeDtypeStruct((5, queries, 8, dim), dtype)
    v = jax.ShapeDtypeStruct((5, 2, 40, dim), dtype)
    turned = jax.ShapeDtypeStruct((5, 2, dim, 40), dtype)
    slots = cache.Cache((), (), rows, cache.KeyOrder(order))
    return attention.held_kernel(
      q, (v if order == "td" else turned, v), slots, backend
    )

  assert found() is cudnn.decode
  assert found(**change) is None
  monkeypatch.setattr(cudnn, "kernel", lambda: None)
  assert found() is None


def jax_with(capability="9.0", offsets=True):
  """JAX's cuDNN module, of another version or on another GPU."""

  def whole(query, q_seqlen, kv_seqlen, q_offsets, kv_offsets): ...

  def without(query, q_seqlen, kv_seqlen): ...

  return types.SimpleNamespace(
    dot_product_attention=whole if offsets else without,
    check_compute_capability=lambda least: capability >= least,
  )


@pytest.mark.parametrize("module, reason", [
  (jax_with(), None),
  (jax_with(capability="8.0"), "a GPU of compute capability 9.0"),
  (jax_with(offsets=False), r"takes no \['kv_offsets', 'q_offsets'\]"),
  (types.SimpleNamespace(), "JAX has no dot_product_attention"),
])
def test_segments_go_through_a_mask_where_cudnn_lacks_something(
  module, reason, monkeypatch, caplog
):
  import jax._src.cudnn as parent

  monkeypatch.setattr(
    parent, "fused_attention_stablehlo", module, raising=False
  )
  monkeypatch.setitem(
    sys.modules, "jax._src.cudnn.fused_attention_stablehlo", module
  )
  with caplog.at_level("WARNING"):
    found = cudnn.kernel.__wrapped__()
  assert (found is module) == (reason is None)
  assert re.search(reason or r"^\Z", caplog.text)
