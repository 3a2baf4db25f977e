"""The learner: packing and micro-batches change nothing, nothing recompiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepsearch_jax import sharding, types
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.ppo import imitation
from stepsearch_jax.ppo.learner import Learner
from stepsearch_jax.ppo.records import LearnerSpec

MODEL = decoder.DecoderConfig(
  "qwen2", 60, 16, 24, 2, 2, 1, 8, qkv_bias=True, remat=False
)
SPEC = LearnerSpec(
  mini_batch=4, micro_rows=2, row_length=48, policy_lr=1e-2, value_lr=1e-2,
  kl_coef=0.1,
)


def make_batch(seed, lengths, width=48):
  rng = np.random.default_rng(seed)
  count = len(lengths)
  inside = np.arange(width)[None] < np.asarray(lengths)[:, None]
  mask = (rng.random((count, width)) < 0.4) & inside
  mask[:, :3] = False
  mask[:, 3] = True
  rewards = np.where(mask, rng.normal(size=mask.shape), 0)
  return types.RolloutBatch(
    tokens=np.where(inside, rng.integers(0, 60, mask.shape), 0).astype(
      np.int32
    ),
    lengths=np.asarray(lengths, np.int32),
    policy_mask=mask.astype(np.float32),
    token_rewards=rewards.astype(np.float32),
    group=np.arange(count, dtype=np.int32) // 2,
  )


def run(spec, batch, steps=1):
  mesh = sharding.make_mesh(data=1) if jax.device_count() == 1 else None
  learner = Learner(MODEL, MODEL, spec, mesh or sharding.make_mesh())
  policy = heads.init_policy(MODEL, jax.random.key(0))
  value = None
  if spec.estimator == "gae":
    value = heads.init_value(MODEL, jax.random.key(1))
  reference = heads.init_policy(MODEL, jax.random.key(2))
  state = learner.init_state(policy, value)
  for _ in range(steps):
    experience, seen = learner.prepare(state, reference, batch)
    state, updated = learner.update(state, experience)
  return learner, state, experience, {**seen, **updated}


@pytest.fixture(autouse=True)
def optax_promotes():
  """Optax raises floats to integer powers, which strict promotion forbids."""
  with jax.numpy_dtype_promotion("standard"):
    yield


LENGTHS = [10, 31, 24, 48, 9, 17, 40, 12]


@pytest.mark.parametrize(
  "changes",
  [dict(micro_rows=1), dict(micro_rows=4), dict(row_length=96)],
  ids=str,
)
def test_packing_and_micro_batches_do_not_change_the_update(changes):
  batch = make_batch(0, LENGTHS)
  _, one, ours, metrics = run(SPEC, batch)
  _, other, theirs, again = run(dataclasses.replace(SPEC, **changes), batch)
  np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-5)
  np.testing.assert_allclose(ours.advantages, theirs.advantages, atol=1e-4)
  for a, b in zip(jax.tree.leaves(one.policy), jax.tree.leaves(other.policy),
                  strict=True):
    # Adam divides by the gradient's size: noise in tiny entries is amplified.
    np.testing.assert_allclose(a, b, atol=2e-3)
  assert metrics["actor/grad_norm"] == pytest.approx(
    again["actor/grad_norm"], rel=1e-3
  )


def test_scores_equal_a_plain_forward_pass_per_row():
  batch = make_batch(1, LENGTHS)
  learner, state, experience, _ = run(SPEC, batch)
  policy = heads.init_policy(MODEL, jax.random.key(0))
  value = heads.init_value(MODEL, jax.random.key(1))
  apply = decoder.Decoder(MODEL).apply
  for b, n in enumerate(LENGTHS):
    tokens = jnp.asarray(batch.tokens[b : b + 1, :n])
    steps = jnp.arange(n, dtype=jnp.int32)[None]
    hidden, _ = apply({"params": policy["trunk"]}, tokens, steps)
    logp = jax.nn.log_softmax(heads.logits(policy, hidden))[0, :-1]
    logp = np.asarray(logp)[np.arange(n - 1), batch.tokens[b, 1:n]]
    on = batch.policy_mask[b, 1:n] > 0
    np.testing.assert_allclose(experience.logp[b, 1:n][on], logp[on],
                               atol=1e-4)
    hidden, _ = apply({"params": value["trunk"]}, tokens, steps)
    values = np.asarray(heads.values(value, hidden))[0, :-1]
    np.testing.assert_allclose(experience.values[b, 1:n], values, atol=1e-4)


def test_other_lengths_compile_nothing_new():
  learner, state, _, _ = run(SPEC, make_batch(0, LENGTHS), steps=2)
  reference = heads.init_policy(MODEL, jax.random.key(2))
  before = learner.compilations()
  for seed in (1, 2):
    lengths = np.random.default_rng(seed).integers(5, 48, 8)
    batch = make_batch(seed, lengths)
    experience, _ = learner.prepare(state, reference, batch)
    state, _ = learner.update(state, experience)
  assert learner.compilations() == before


def test_critic_warmup_leaves_the_policy_alone():
  spec = dataclasses.replace(SPEC, critic_warmup=1)
  policy = heads.init_policy(MODEL, jax.random.key(0))
  _, state, _, _ = run(spec, make_batch(0, LENGTHS))
  for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(state.policy),
                  strict=True):
    np.testing.assert_array_equal(a, b)
  _, state, _, _ = run(spec, make_batch(0, LENGTHS), steps=2)
  assert float(abs(state.policy["trunk"]["embedding"]
                   - policy["trunk"]["embedding"]).max()) > 0


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
def test_estimators_without_a_value_model_run(estimator):
  spec = dataclasses.replace(
    SPEC, estimator=estimator, kl_in_reward=False, kl_loss_coef=0.01
  )
  _, state, experience, metrics = run(spec, make_batch(0, LENGTHS))
  assert state.value is None and "critic/vf_loss" not in metrics
  assert np.isfinite(experience.advantages).all()
  assert all(np.isfinite(v) for v in metrics.values())


def test_update_raises_the_probability_of_rewarded_tokens():
  batch = make_batch(0, LENGTHS)
  spec = dataclasses.replace(SPEC, estimator="reinforce", kl_coef=0.0,
                             entropy_coef=0.0, mini_batch=8)
  learner, state, experience, _ = run(spec, batch)
  reference = heads.init_policy(MODEL, jax.random.key(2))
  after, _ = learner.prepare(state, reference, batch)
  gain = (after.logp - experience.logp) * experience.advantages
  assert gain.sum() > 0


def test_imitation_lowers_the_loss_and_keeps_the_input():
  policy = heads.init_policy(MODEL, jax.random.key(0))
  params, losses = imitation.imitate(
    policy, make_batch(0, LENGTHS), MODEL, sharding.make_mesh(), steps=30,
    rows=2, row_length=48, learning_rate=1e-2, seed=0,
  )
  assert losses[-1] < 0.6 * losses[0]
  assert np.isfinite(np.asarray(policy["trunk"]["embedding"])).all()
