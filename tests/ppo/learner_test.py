"""The assembled update: packing changes nothing, nothing recompiles."""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts
from reference import ppo as naive

from stepsearch_jax.models import decoder, heads
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import learner
from stepsearch_jax.sft import imitation

pytestmark = pytest.mark.slow  # Each learner compiles for some ten seconds.

MODEL = decoder.DecoderConfig(
  "qwen2", 60, 16, 24, 2, 2, 1, 8, qkv_bias=True, remat="none"
)
LENGTHS = [10, 31, 24, 48, 9, 17, 40, 12]


@pytest.fixture(autouse=True)
def optax_promotes():
  """Optax raises floats to integer powers, which strict promotion forbids."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@functools.cache
def make_learner(**changes):
  spec = parts.learner_spec(**changes)
  return learner.Learner(MODEL, MODEL, spec, sharding.make_mesh())


@functools.cache
def models():
  """(policy, value, reference) parameters."""
  policy, other, reference = (fakes.make_policy(MODEL, i) for i in range(3))
  value = heads.value_from_policy(other, jax.random.key(0))
  return policy, value, reference


def make_batch(seed, lengths=LENGTHS, width=48):
  rng = np.random.default_rng(seed)
  lengths = np.asarray(lengths, np.int32)
  inside = np.arange(width)[None] < lengths[:, None]
  mask = (rng.random(inside.shape) < 0.4) & inside
  mask[:, :3] = False
  mask[:, 3] = True
  rewards = np.where(mask, rng.normal(size=mask.shape), 0)
  tokens = np.where(inside, rng.integers(0, 60, mask.shape), 0)
  return parts.rollout_batch(
    mask, rewards, tokens.astype(np.int32), lengths
  )


def step(ours, state, batch):
  experience, seen = ours.prepare(state, batch)
  state, updated = ours.update(state, experience)
  return state, experience, {**seen, **updated}


def fresh(ours):
  return ours.init_state(*models())


@functools.cache
def baseline():
  return step(make_learner(), fresh(make_learner()), make_batch(0))


def states(params, tokens):
  """Hidden states [B, T, M] in which each token was chosen, one plain pass."""
  positions = jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32), tokens.shape)
  hidden, _ = decoder.Decoder(MODEL).apply(
    {"params": params["trunk"]}, tokens, positions
  )
  return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]


@jax.jit
def _logps(params, tokens):
  table = jax.nn.log_softmax(heads.logits(params, states(params, tokens)))
  picked = jnp.take_along_axis(table, tokens[..., None], -1)[..., 0]
  return picked, -(jnp.exp(table) * table).sum(-1)


def logps(params, batch):
  """(log-probabilities, entropies) [B, T] from all logits at once."""
  return _logps(params, batch.tokens)


@jax.jit
def _values(params, tokens):
  return heads.values(params, states(params, tokens))


def values_of(params, batch):
  """State values [B, T] of a value model."""
  return _values(params, batch.tokens)


def test_scores_equal_a_plain_forward_pass_of_unpacked_rows():
  _, experience, metrics = baseline()
  batch, (policy, value, reference) = make_batch(0), models()
  on = batch.policy_mask > 0
  want, entropy = logps(policy, batch)
  np.testing.assert_allclose(experience.logp[on], want[on], atol=1e-4)
  gap = jnp.where(on, want - logps(reference, batch)[0], 0.0).sum(1) / on.sum(1)
  assert metrics["critic/kl"] == pytest.approx(float(gap.mean()), abs=1e-4)
  assert metrics["actor/entropy"] == pytest.approx(
    float(entropy[on].mean()), rel=1e-4
  )
  values = values_of(value, batch)
  np.testing.assert_allclose(experience.values[on], values[on], atol=1e-4)


def test_one_update_equals_unpacked_whole_batch_autodiff():
  """Losses written out over padded rows, one jax.grad, textbook Adam."""
  ours = make_learner(batch__mini_batch=8)
  batch, (policy, value, reference) = make_batch(0), models()
  state, experience, metrics = step(ours, fresh(ours), batch)
  mask = jnp.asarray(batch.policy_mask)
  old, _ = logps(policy, batch)
  values = values_of(value, batch)
  shaped = batch.token_rewards - 0.1 * (old - logps(reference, batch)[0]) * mask
  raw, returns = naive.gae(*map(np.asarray, (shaped, values, mask)), 1.0, 1.0)
  picked = raw[batch.policy_mask > 0]
  advantages = (raw - picked.mean()) / picked.std(ddof=1)
  count = mask.sum()

  def loss(policy, value):
    logp, entropy = logps(policy, batch)
    ratio = jnp.exp(logp - old)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    pg = -jnp.minimum(ratio * advantages, clipped * advantages)
    error = 0.5 * (values_of(value, batch) - returns) ** 2
    return ((pg - 0.001 * entropy + error) * mask).sum() / count

  grads = jax.jit(jax.grad(loss, (0, 1)))(policy, value)
  for kind, params, grad in zip(
    ("policy", "value"), (policy, value), grads, strict=True
  ):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grad)))
    role = {"policy": "actor", "value": "critic"}[kind]
    assert metrics[f"{role}/grad_norm"] == pytest.approx(norm, rel=1e-3)
    scale = min(1.0, 1.0 / norm)
    # The first Adam step is lr * sign-like g / (|g| + eps), plus decay.
    want = jax.tree.map(
      lambda p, g, scale=scale: p
      - 1e-2 * (g * scale / (abs(g * scale) + 1e-8) + 0.01 * p),
      params, grad,
    )
    for (path, g), a, b in zip(
      jax.tree_util.tree_leaves_with_path(grad),
      jax.tree.leaves(getattr(state, kind).params), jax.tree.leaves(want),
      strict=True,
    ):
      sure = np.abs(g) * scale > 1e-4  # Below it Adam amplifies rounding.
      np.testing.assert_allclose(
        np.asarray(a)[sure], np.asarray(b)[sure], atol=1e-4, err_msg=str(path)
      )
  assert metrics["actor/lr"] == metrics["critic/lr"] == np.float32(1e-2)


@pytest.mark.parametrize(
  "changes", [dict(batch__micro_rows=4), dict(batch__row_length=96)], ids=str
)
def test_packing_and_micro_batches_do_not_change_the_update(changes):
  one, ours, metrics = baseline()
  learner_b = make_learner(**changes)
  other, theirs, again = step(learner_b, fresh(learner_b), make_batch(0))
  np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-5)
  np.testing.assert_allclose(ours.advantages, theirs.advantages, atol=1e-4)
  for a, b in zip(jax.tree.leaves(one.policy.params),
                  jax.tree.leaves(other.policy.params),
                  strict=True):
    # Adam divides by the gradient's size: noise in tiny entries is amplified.
    np.testing.assert_allclose(a, b, atol=2e-3)
  for name in ("actor/grad_norm", "critic/vf_loss", "actor/entropy_loss"):
    assert metrics[name] == pytest.approx(again[name], rel=1e-3), name


def test_other_lengths_and_later_updates_compile_nothing(compilations):
  ours = make_learner(batch__micro_rows=4)
  # One full row per trajectory: four and four, none of the smaller size.
  state, _, _ = step(ours, fresh(ours), make_batch(0, [48] * 8))
  compilations.clear()
  for seed, lengths in enumerate((
    [40] * 5 + [5] * 3, np.random.default_rng(1).integers(5, 48, 8)
  )):
    batch = make_batch(seed, lengths)
    packing = ours._packer.packing(batch, range(8))
    sizes = {len(x.tokens) for x in ours._packer.micros(packing, batch)}
    assert seed or sizes == {4, 1}
    state, _, _ = step(ours, state, batch)
  assert not compilations


def test_the_empty_micro_batch_of_the_first_step_changes_no_bit():
  states = []
  for met in ((), ("scores", "policy", "value")):
    ours = learner.Learner(
      MODEL, MODEL, parts.learner_spec(batch__micro_rows=4),
      sharding.make_mesh(),
    )
    ours._packer._met.update(met)
    states.append(step(ours, fresh(ours), make_batch(0)))
  (one, seen, first), (other, theirs, then) = states
  jax.tree.map(np.testing.assert_array_equal, one, other)
  np.testing.assert_array_equal(seen.logp, theirs.logp)
  timed = {name for name in first if name.startswith("timing_s")}
  assert {n: first[n] for n in first.keys() - timed} == {
    n: then[n] for n in then.keys() - timed
  }


def test_critic_warmup_trains_the_value_model_only():
  ours = make_learner(critic_warmup=1)
  policy, value, _ = models()
  state, _, _ = step(ours, fresh(ours), make_batch(0))
  jax.tree.map(np.testing.assert_array_equal, policy, state.policy.params)
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), value,
                       state.value.params)
  assert moved["trunk"]["embedding"] > 0
  state, _, _ = step(ours, state, make_batch(0))
  assert float(abs(state.policy.params["trunk"]["embedding"]
                   - policy["trunk"]["embedding"]).max()) > 0


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
def test_estimators_without_value_model_raise_rewarded_tokens(estimator):
  ours = make_learner(
    estimator__name=estimator, kl__in_reward=False, loss__entropy_coef=0.0,
    batch__mini_batch=8,
  )
  policy, _, reference = models()
  state = ours.init_state(policy, None, reference)
  batch = make_batch(0)
  state, experience, metrics = step(ours, state, batch)
  assert state.value is None and "critic/vf_loss" not in metrics
  assert experience.values is None
  assert all(np.isfinite(v) for v in metrics.values())
  after, _ = ours.prepare(state, batch)
  gain = (after.logp - experience.logp) * experience.advantages
  assert gain.sum() > 0


def test_released_scope_bootstraps_from_the_token_behind_the_response():
  """C1, C2, C10 against a loop over the padded rows."""
  ours = make_learner(estimator__scope="attended")
  batch = make_batch(0, [10, 31, 24, 48, 9, 17, 40, 12])
  experience, _ = ours.prepare(fresh(ours), batch)
  values = np.asarray(values_of(models()[1], batch))
  first = batch.policy_mask.argmax(1)
  raw, inside = np.zeros_like(values), np.zeros_like(values)
  kl = experience.logp - experience.reference_logp
  rewards = batch.token_rewards - 0.1 * kl * batch.policy_mask
  for b, n in enumerate(batch.lengths):
    inside[b, first[b] : n] = 1
    stop = min(n + 1, 48)
    np.testing.assert_array_equal(
      np.nonzero(experience.value_weights[b])[0], np.arange(first[b], stop)
    )
    value = np.zeros(49)
    value[first[b] : stop] = values[b, first[b] : stop]
    carried = 0.0
    for t in reversed(range(48)):
      carried += rewards[b, t] + value[t + 1] - value[t]
      raw[b, t] = carried
  picked = raw[inside > 0]
  want = (raw - picked.mean()) / np.sqrt(picked.var(ddof=1) + 1e-8)
  np.testing.assert_allclose(
    experience.advantages[inside > 0], want[inside > 0], atol=1e-4
  )


def test_adaptive_controller_follows_the_measured_kl():
  ours = make_learner(
    kl__controller="adaptive", kl__target=1e-3, kl__horizon=100
  )
  state, _, metrics = step(ours, fresh(ours), make_batch(0))
  error = np.clip(metrics["critic/kl"] / 1e-3 - 1, -0.2, 0.2)
  assert float(state.kl_coef) == pytest.approx(0.1 * (1 + error * 8 / 100))


def test_imitation_lowers_the_loss_and_keeps_its_input():
  policy = models()[0]
  _, losses = imitation.imitate(
    policy, make_batch(0), MODEL, sharding.make_mesh(),
    imitation.ImitationSpec(30, 2, 48, 1e-2, 0),
  )
  assert losses[-1] < 0.6 * losses[0]
  assert np.isfinite(np.asarray(policy["trunk"]["embedding"])).all()
