"""Estimators, losses and log-probabilities against naive references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts
from reference import ppo as reference

from stepsearch_jax.ppo import kl, logprobs, losses, masked, optimizer
from stepsearch_jax.ppo.estimators import gae


def arrays(seed, count, shape=(4, 17), density=0.5):
  rng = np.random.default_rng(seed)
  mask = (rng.random(shape) < density).astype(np.float32)
  mask[0] = 0.0  # A row without any policy token.
  return mask, *rng.normal(size=(count, *shape)).astype(np.float32)


def compact(mask, *xs):
  """Each row's masked-in entries pushed to the left, rest zero."""
  out = [np.zeros_like(mask)] + [np.zeros_like(x) for x in xs]
  for b in range(mask.shape[0]):
    where = np.nonzero(mask[b])[0]
    out[0][b, : len(where)] = 1.0
    for target, x in zip(out[1:], xs, strict=True):
      target[b, : len(where)] = x[b, where]
  return out


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_equals_the_naive_loop_over_policy_tokens(gamma, lam):
  mask, rewards, values = arrays(0, 2)
  ours = jax.jit(gae.gae, static_argnums=(3, 4))(
    rewards, values, mask, gamma, lam
  )
  want, _ = reference.gae(rewards, values, mask, gamma, lam)
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_gae_worked_by_hand_across_an_observation():
  rewards = jnp.array([[1.0, 9.0, 2.0]])
  values = jnp.array([[0.5, 7.0, 0.25]])
  mask = jnp.array([[1.0, 0.0, 1.0]])
  advantages = gae.gae(rewards, values, mask, 0.5, 0.5)
  # delta_2 = 2 - .25 = 1.75; delta_0 = 1 + .5*.25 - .5 = .625; + .25*1.75
  np.testing.assert_allclose(advantages, [[1.0625, 0.0, 1.75]])


def policy_loss(logp, old, advantages, mask):
  log_ratio = jnp.where(mask > 0, logp - old, 0.0)
  return losses.masked_sum(
    losses.policy_loss(log_ratio, advantages, 0.8, 1.2).loss, mask
  )


MASKED_OPS = {
  "gae": lambda m, x, y, z: gae.gae(x, y, m, 0.9, 0.8),
  "whiten": lambda m, x, y, z: masked.whiten(x, m),
  "mean": lambda m, x, y, z: masked.mean(x, m),
  "policy_loss": lambda m, x, y, z: policy_loss(x, y, z, m),
  "value_loss": lambda m, x, y, z: losses.masked_sum(
    losses.value_loss(x, y, z, 0.5).loss, m
  ),
  "imitation": lambda m, x, y, z: losses.imitation_loss(x, m),
}


@pytest.mark.parametrize("name", MASKED_OPS)
def test_masked_equals_compacted(name):
  op = MASKED_OPS[name]
  mask, x, y, z = arrays(3, 3)
  dense, cx, cy, cz = compact(mask, x, y, z)
  poison = np.where(mask > 0, 0.0, np.nan).astype(np.float32)
  ours = np.asarray(op(*map(jnp.asarray, (mask, x + poison, y + poison,
                                          z + poison))))
  want = np.asarray(op(*map(jnp.asarray, (dense, cx, cy, cz))))
  if ours.ndim == 2:
    ours = compact(mask, ours)[1]
    want = want * dense
  np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
  assert np.isfinite(ours).all()


def test_losses_give_no_nan_gradient_through_masked_positions():
  mask, x, y, z = arrays(4, 3)
  huge = jnp.where(mask > 0, x, 1e4)

  def loss(x):
    value = losses.value_loss(x, y, z, 0.5).loss
    return policy_loss(x, y, z, mask) + losses.masked_sum(value, mask)

  grads = jax.grad(loss)(huge)
  assert jnp.isfinite(grads).all()
  assert (grads[mask == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_equal_full_logits(temperature):
  rng = np.random.default_rng(1)
  n, d, v = 300, 16, 1000
  hidden = rng.normal(size=(n, d)).astype(np.float32)
  weight = rng.normal(size=(v, d)).astype(np.float32)
  targets = rng.integers(0, v, n).astype(np.int32)
  mask = rng.random(n) < 0.6
  logp, entropy = jax.jit(logprobs.token_logprobs, static_argnums=4)(
    hidden, weight, targets, mask, temperature
  )
  want = reference.logprobs(
    hidden.astype(np.float64), weight.astype(np.float64), targets, temperature
  )
  np.testing.assert_allclose(logp[mask], want[0][mask], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(entropy[mask], want[1][mask], atol=1e-4)
  assert (np.asarray(logp)[~mask] == 0).all()
  a, b = rng.normal(size=(2, n)).astype(np.float32)

  def chunked(hidden, weight):
    logp, entropy = logprobs.token_logprobs(
      hidden, weight, jnp.asarray(targets), jnp.asarray(mask), temperature
    )
    return (logp * a + entropy * b).sum()

  def full(hidden, weight):
    logits = jax.nn.log_softmax(hidden @ weight.T / temperature)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    entropy = -(jnp.exp(logits) * logits).sum(-1)
    return jnp.where(jnp.asarray(mask), chosen * a + entropy * b, 0.0).sum()

  inputs = jnp.asarray(hidden), jnp.asarray(weight)
  ours = jax.jit(jax.grad(chunked, (0, 1)))(*inputs)
  want = jax.jit(jax.grad(full, (0, 1)))(*inputs)
  for x, y in zip(ours, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)


def test_logprobs_never_hold_all_logits():
  n, d, v = 4096, 8, 151_936
  lowered = jax.jit(
    jax.grad(
      lambda h, w: logprobs.token_logprobs(
        h, w, jnp.zeros(n, jnp.int32), jnp.ones(n)
      )[0].sum(),
      (0, 1),
    )
  ).lower(
    jax.ShapeDtypeStruct((n, d), jnp.float32),
    jax.ShapeDtypeStruct((v, d), jnp.float32),
  )
  text = lowered.as_text()
  assert f"{logprobs.chunk_size(v)}x{v}" in text
  assert f"{n}x{v}" not in text


@pytest.mark.parametrize("vocab, tokens", [
  (1_400, 512),  # Small: no more than what arithmetic asks for.
  (49_152, 512), (151_936, 384), (262_144, 256), (10**7, 128),
])
def test_a_chunk_is_bounded_by_memory_and_by_empty_rows(vocab, tokens):
  assert logprobs.chunk_size(vocab) == tokens


def test_warmup_starts_at_a_full_first_step_unless_released():
  assert float(optimizer.warmup_factor(0, 4)) == 0.25
  assert float(optimizer.warmup_factor(0, 0)) == 1.0
  assert float(optimizer.warmup_factor(0, 0, first_zero=True)) == 0.0
  assert float(optimizer.warmup_factor(7, 319, True)) == pytest.approx(
    0.0219435736677116
  )


def test_adaptive_kl_controller_clips_the_error():
  spec = parts.learner_spec(
    kl__controller="adaptive", kl__target=6.0, kl__horizon=1000.0
  ).kl
  assert kl.next_coefficient(spec, 0.2, 100.0, 1000) == pytest.approx(0.24)
  assert kl.next_coefficient(spec, 0.2, 6.0, 1000) == pytest.approx(0.2)
  assert kl.next_coefficient(parts.SPEC.kl, 0.2, 100.0, 10) == 0.2
