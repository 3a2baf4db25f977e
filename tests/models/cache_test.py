"""The slot cache: what is written is read back, in either order of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax.models import attention, cache

SLOTS, HEADS, DIM, LENGTH = 5, 2, 4, 6


def filled(order, slots, positions, k, v):
  """The single layer's keys and values after one write."""
  empty = cache.init_cache(SLOTS, HEADS, DIM, LENGTH, 1, jnp.float32, order)
  rows = empty.replace(slots=slots)
  return cache.write((empty.k[0], empty.v[0]), k, v, positions, rows), rows


@pytest.mark.parametrize("order", cache.KeyOrder)
@pytest.mark.parametrize("slots", [None, (3, 0, 4)])
def test_a_row_reads_what_it_wrote_and_padding_is_dropped(order, slots):
  rng = np.random.default_rng(0)
  k, v = rng.standard_normal((2, 3, 2, HEADS, DIM)).astype(np.float32)
  positions = np.array([[0, 1], [3, 2], [5, LENGTH]])
  where = None if slots is None else jnp.asarray(slots)
  entries, rows = filled(order, where, positions, k, v)
  for found, given, axes in zip(entries, (k, v), rows.axes, strict=True):
    want = np.zeros((SLOTS, HEADS, LENGTH, DIM), np.float32)
    for row, slot in enumerate(slots or range(3)):
      for step, position in enumerate(positions[row]):
        if position < LENGTH:
          want[slot, :, position] = given[row, step]
    if axes[-1] == "length":
      want = want.swapaxes(2, 3)
    np.testing.assert_array_equal(found, want)
    read = cache.read(entries, 4, rows)[0 if given is k else 1]
    cut = [slice(4) if axis == "length" else slice(None) for axis in axes]
    picked = want[list(slots)] if slots else want
    np.testing.assert_array_equal(read, picked[tuple(cut)])


@pytest.mark.parametrize("order", cache.KeyOrder)
def test_rows_are_copied_up_to_a_length(order):
  empty = cache.init_cache(SLOTS, HEADS, DIM, LENGTH, 1, jnp.float32, order)
  rng = np.random.default_rng(2)
  before = empty.replace(
    k=(rng.standard_normal(empty.k[0].shape).astype(np.float32),),
    v=(rng.standard_normal(empty.v[0].shape).astype(np.float32),),
  )
  before = jax.tree.map(jnp.asarray, before)
  after = cache.copy_rows(
    before, np.array([1, 1, 0]), np.array([4, 2, SLOTS]), 3
  )
  for old, new, axes in zip(
    before.k + before.v, after.k + after.v, before.axes, strict=True
  ):
    axis = axes.index("length")
    old, new = (np.moveaxis(np.asarray(x), axis, 1) for x in (old, new))
    want = old.copy()
    want[4, :3] = want[2, :3] = old[1, :3]
    np.testing.assert_array_equal(new, want)


def test_only_keys_of_a_cpu_lie_by_dimension(monkeypatch):
  assert cache.key_order(None) == cache.KeyOrder.DT
  assert cache.key_order("xla") == cache.KeyOrder.DT
  assert cache.key_order("splash") == cache.KeyOrder.TD
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert cache.key_order(None) == cache.KeyOrder.TD
  assert cache.key_order("xla") == cache.KeyOrder.TD


def by_hand(q, k, v, positions):
  """Attention of [B, S, H, D] over [B, KV, T, D], a query at a time."""
  out = np.zeros(q.shape)
  for b, s, h in np.ndindex(q.shape[:3]):
    kv = h // (q.shape[2] // k.shape[1])
    seen = slice(positions[b, s] + 1)
    scores = k[b, kv, seen] @ q[b, s, h] / np.sqrt(q.shape[3])
    weights = np.exp(scores - scores.max())
    out[b, s, h] = weights @ v[b, kv, seen] / weights.sum()
  return out


@pytest.mark.parametrize(("order", "backend", "dtype", "atol"), [
  ("dt", "xla", jnp.float32, 1e-5), ("td", "xla", jnp.float32, 1e-5),
  ("td", "cudnn", jnp.float32, 1e-5), ("td", "cudnn", jnp.bfloat16, 0.03),
])
@pytest.mark.parametrize("length", [1, 2, 150])
def test_a_query_sees_the_entries_up_to_its_position(
  order, backend, dtype, atol, length, monkeypatch
):
  fused = jax.nn.dot_product_attention
  monkeypatch.setattr(  # The fused kernel needs a GPU; its mask does not.
    jax.nn, "dot_product_attention",
    lambda *args, implementation, **how: fused(*args, **how),
  )
  rng = np.random.default_rng(1)
  q = rng.standard_normal((2, length, 4, 8))
  k, v = rng.standard_normal((2, 2, 2, 160, 8))
  positions = np.arange(length)[None] + np.array([[3], [9]])
  keys = k.swapaxes(2, 3) if order == "dt" else k
  given, *entries = (jnp.asarray(x, dtype) for x in (q, keys, v))
  with jax.numpy_dtype_promotion("standard"):  # As jax.nn wants it.
    found = attention.cached_attention(
      given, entries, jnp.asarray(positions, jnp.int32),
      cache.Cache((), (), order=cache.KeyOrder(order)), backend=backend,
    )
  np.testing.assert_allclose(
    np.asarray(found, np.float32), by_hand(q, k, v, positions), atol=atol
  )
