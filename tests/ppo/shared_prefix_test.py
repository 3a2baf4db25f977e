"""A prefix that trajectories share is computed once: the same in float64.

Losses and gradients of packed rows with shared prefixes against those without,
for every attention backend that runs on a CPU.
"""

import dataclasses
import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import attention_test
from ppo import parts

from stepsearch_jax.models import attention, cudnn, decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import (
  batching,
  forward,
  learner,
  model_losses,
  packer,
  records,
)

TEMPLATE, PROMPT = 11, 14
LENGTHS = np.array([30, 22, 27, 19, 40, 15, 33, 15], np.int32)
ROW = 64


def config():
  return decoder.DecoderConfig(
    "qwen3", 50, 16, 24, 2, 2, 1, 8, remat="none", dtype=jnp.float64,
    param_dtype=jnp.float64,
  )


@pytest.fixture
def double(monkeypatch):
  """Everything that is computed in float32 is computed in float64."""
  monkeypatch.setattr(jnp, "float32", jnp.float64)
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    yield


def make_batch():
  """Pairs of rollouts behind a template; one has no tokens of the policy."""
  rng = np.random.default_rng(0)
  width = int(LENGTHS.max())
  inside = np.arange(width)[None] < LENGTHS[:, None]
  tokens = np.where(inside, rng.integers(0, 50, inside.shape), 0)
  tokens[:, :TEMPLATE] = tokens[0, :TEMPLATE]
  tokens[1::2, :PROMPT] = tokens[::2, :PROMPT]
  mask = (rng.random(inside.shape) < 0.5) & inside
  mask[:, :PROMPT] = False
  mask[:, PROMPT] = True
  mask[5] = False
  return parts.rollout_batch(
    mask, np.where(mask, rng.normal(size=mask.shape), 0),
    tokens.astype(np.int32), LENGTHS,
  )


def micros_of(share, spec):
  """Micro-batches of the whole batch, with made-up scores in them."""
  batch, rng = make_batch(), np.random.default_rng(1)
  ours = learner.Learner(config(), config(), spec, sharding.make_mesh())
  on = batch.policy_mask > 0
  drawn = {
    name: np.where(on, 0.3 * rng.normal(size=on.shape), 0)
    for name in ("reference_logp", "values", "advantages", "returns")
  }
  packing = ours._packer.packing(batch, range(len(LENGTHS)), share)
  return packing, ours._packer.micros(
    packing, batch, logp=np.where(on, -4 + rng.normal(size=on.shape), 0),
    weights=np.ones(on.shape), llds_weights=np.where(on, 0.1, 0),
    value_weights=batch.policy_mask, **drawn,
  )


@functools.cache
def program(spec, backend):
  """Loss of policy and value model with gradients and log-probabilities."""
  del backend  # The attention that is traced into it.
  size = model_losses.Share(*(jnp.asarray(x, jnp.float64) for x in (40, 9, 3)))

  def loss(params, micro):
    given = dict(config=config(), spec=spec)
    policy = model_losses.policy(params[0], micro, size, **given)
    value = model_losses.value(params[1], micro, size, **given)
    logp = forward.policy(params[0], micro, config(), spec.temperature).logp
    return policy.loss + value.loss, logp

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def losses_of(share, spec, backend):
  """(loss, gradients, log-probabilities [B, T]) of policy and value model."""
  packing, micros = micros_of(share, spec)
  policy = fakes.make_policy(config())
  value = heads.value_from_policy(policy, jax.random.key(0))
  found = [program(spec, backend)((policy, value), micro) for micro in micros]
  total = sum(one[0][0] for one in found)
  grads = functools.reduce(
    functools.partial(jax.tree.map, jnp.add), [one[1] for one in found]
  )
  logp = np.concatenate([one[0][1] for one in found])
  return total, grads, packing.unpack(logp)


SPEC = parts.learner_spec(
  loss__ratio="turn", loss__llds_coef=0.5, kl__in_reward=False,
  batch__row_length=ROW, batch__micro_rows=1, batch__mini_batch=8,
)


def assert_same(spec, backend="xla"):
  plain, plain_grads, plain_logp = losses_of(False, spec, backend)
  shared, shared_grads, shared_logp = losses_of(True, spec, backend)
  assert plain.dtype == jnp.float64
  np.testing.assert_allclose(shared_logp, plain_logp, rtol=0, atol=1e-12)
  np.testing.assert_allclose(shared, plain, rtol=1e-12)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(shared_grads),
    jax.tree.leaves(plain_grads), strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-12, err_msg=str(path))


def test_a_shared_prefix_changes_no_loss_and_no_gradient(double):
  assert_same(SPEC)


@pytest.mark.slow  # As above with a path of the loss more.
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_shared_prefix_changes_no_ratio(double, ratio):
  assert_same(
    dataclasses.replace(SPEC, loss=dataclasses.replace(SPEC.loss, ratio=ratio))
  )


def test_the_fused_kernel_spreads_a_shared_prefix_out(double, monkeypatch):
  monkeypatch.setattr(cudnn, "kernel", attention_test.FakeKernel)
  monkeypatch.setattr(cudnn, "max_segments", lambda length: 6)
  monkeypatch.setattr(
    attention, "packed_attention",
    lambda q, k, v, segments, backend: cudnn.packed(
      q, k, v, segments, otherwise=lambda q, *unused: jnp.nan * q
    ),
  )
  monkeypatch.setattr(cudnn, "_SPREAD", 3)
  assert_same(SPEC, "fused")


def test_rows_hold_what_their_trajectories_begin_with_once():
  batch = make_batch()
  packing = batching.pack(
    range(len(LENGTHS)), LENGTHS, batch.tokens.shape[1], ROW,
    batching.shareable(batch),
  )
  plain = batching.pack(
    range(len(LENGTHS)), LENGTHS, batch.tokens.shape[1], ROW
  )
  assert len(packing.source) < len(plain.source)
  np.testing.assert_array_equal(
    packing.unpack(packing.pack(batch.tokens)),
    np.where(np.arange(40)[None] < LENGTHS[:, None], batch.tokens, 0),
  )
  for r, ids in enumerate(packing.segment_ids):
    prefix = int((ids == attention.PREFIX).sum())
    inside = set(ids) - {0, attention.PREFIX}
    assert (ids[:prefix] == attention.PREFIX).all()
    rows = {s: packing.source[r, ids == s] // 40 for s in inside}
    assert all(len(set(found)) == 1 for found in rows.values())
    rows = [int(found[0]) for found in rows.values()]
    own = batch.tokens[rows]
    common = int(np.append((own == own[0]).all(0), False).argmin())
    first = min(
      int(m.argmax()) if m.any() else LENGTHS[row] - 1
      for row, m in zip(rows, batch.policy_mask[rows] > 0, strict=True)
    )
    want = min(common, first) if len(rows) > 1 else 0
    assert prefix == want
    np.testing.assert_array_equal(
      packing.positions[r, :prefix], np.arange(prefix)
    )
    for s in inside:
      steps = packing.positions[r, ids == s]
      assert steps.tolist() == list(range(prefix, prefix + len(steps)))


def test_nothing_is_shared_where_nothing_is_common():
  heads_ = np.array([[1, -1], [2, -2]], np.int32)
  found = batching.pack(range(2), np.array([3, 3]), 4, 9, heads_)
  assert found.segment_ids.tolist() == [[1] * 3 + [2] * 3 + [0] * 3]


def test_a_trajectory_joins_the_row_that_saves_most():
  # Two questions of two rollouts; in order of length they would mix.
  heads_ = np.array([[7, 1, 2], [7, 3, 4], [7, 3, 4], [7, 1, 2]], np.int32)
  found = batching.pack(range(4), np.array([6, 6, 5, 5]), 6, 8, heads_)
  assert found.segment_ids.tolist() == [[-1] * 3 + [1] * 3 + [2] * 2] * 2
  assert (found.places >= 0).sum() == 22


def test_segments_behind_a_prefix_begin_where_attention_wants_them(
  monkeypatch
):
  monkeypatch.setattr(attention, "prefix_step", lambda length: 4)
  heads_ = np.array([[7, 1], [7, 1], [7, 1]], np.int32)
  found = batching.pack(range(3), np.array([5, 5, 5]), 5, 13, heads_)
  assert found.segment_ids.tolist() == [
    [-1] * 2 + [0] * 2 + [1] * 3 + [2] * 3 + [3] * 3
  ]
  # Of two, four places for the prefix would save nothing.
  found = batching.pack(range(2), np.array([5, 5]), 5, 13, heads_)
  assert found.segment_ids.tolist() == [[1] * 5 + [2] * 5 + [0] * 3]


def test_micro_batches_of_a_mean_over_them_hold_whom_they_held(monkeypatch):
  spec = dataclasses.replace(
    SPEC, loss=dataclasses.replace(SPEC.loss, micro_weighting="micro_mean")
  )
  shares = []
  monkeypatch.setattr(
    packer.Packer, "packing",
    lambda self, batch, rows, share=True: shares.append(share) or 1 / 0,
  )
  model = dataclasses.replace(config(), dtype="float32", param_dtype="float32")
  for given in (SPEC, spec):
    ours = learner.Learner(model, model, given, sharding.make_mesh())
    exp = records.Experience(
      make_batch(), None, *[np.zeros((8, 40), np.float32)] * 6, 0.0
    )
    with pytest.raises(ZeroDivisionError):
      ours._mini_batch(exp, np.arange(8))
  assert shares == [True, False]
