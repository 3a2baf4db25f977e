"""What the learner hands to whom: KL, rates, masks, weights, warnings."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts, update_test

from stepsearch_jax.models import adapters
from stepsearch_jax.ppo import (
  advantages,
  batch_metrics,
  estimators,
  model_losses,
  optimizer,
  records,
  specs,
  weighting,
)

optax_promotes = update_test.optax_promotes


def fresh(ours):
  reference = jax.tree.map(lambda x: 0.9 * x, update_test.policy())
  return ours.init_state(update_test.policy(), None, reference)


def kl_of(experience):
  gap = experience.logp - experience.reference_logp
  return np.where(experience.batch.policy_mask > 0, gap, 0)


@pytest.mark.parametrize("in_reward", [True, False])
def test_the_kl_is_subtracted_from_rewards_only_where_it_belongs(in_reward):
  ours = update_test.make_learner(kl__in_reward=in_reward)
  batch = update_test.make_batch()
  found, metrics = ours.prepare(fresh(ours), batch)
  gap = kl_of(found)
  rewards = batch.token_rewards - 0.1 * in_reward * gap
  assert metrics["critic/rewards/mean"] == pytest.approx(
    rewards.sum(1).mean(), abs=1e-5
  )
  on = batch.policy_mask > 0
  returns = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  want = np.where(on, returns - returns[on].mean(), 0)
  np.testing.assert_allclose(found.advantages, want, atol=1e-4)
  assert np.abs(gap).max() > 0.01
  tokens = np.maximum(on.sum(1), 1)
  assert metrics["critic/kl"] == pytest.approx(
    (gap.sum(1) / tokens).mean(), abs=1e-5
  )


def test_each_model_has_the_rate_of_its_own_optimizer():
  ours = update_test.learner.Learner(
    update_test.MODEL, update_test.MODEL,
    parts.learner_spec(
      policy__learning_rate=0.3, policy__warmup=10, value__learning_rate=0.7,
      value__warmup=0,
    ), update_test.sharding.make_mesh(),
  )
  assert float(ours.policy.rate(0)) == pytest.approx(0.03)
  assert float(ours.policy.rate(10)) == pytest.approx(0.3)
  assert float(ours.value.rate(0)) == pytest.approx(0.7)


def test_the_released_warm_up_starts_at_nothing():
  ours = update_test.make_learner(
    adam__first_rate_zero=True, adam__warmup=4
  )
  assert [float(ours.policy.rate(i)) for i in (0, 1, 4)] == pytest.approx(
    [0, 0.0025, 0.01]
  )


def test_micro_batches_weigh_by_tokens_or_the_same():
  mask = jnp.array([[1.0, 1.0, 1.0, 0.0]])
  share = model_losses.Share(*map(jnp.float32, (10, 4, 2)))
  by_token = model_losses.scale("token", mask, share)
  by_micro = model_losses.scale("micro_mean", mask, share)
  assert float(by_token) == pytest.approx(1 / 10)
  assert float(by_micro) == pytest.approx(1 / (3 * 2))
  # Also of nothing: no division by zero.
  nothing = model_losses.Share(*map(jnp.float32, (0, 0, 1)))
  assert float(model_losses.scale("token", 0 * mask, nothing)) == 1
  assert float(model_losses.scale("micro_mean", 0 * mask, nothing)) == 1


def test_the_value_loss_is_a_mean_over_weighted_tokens_by_hand(monkeypatch):
  monkeypatch.setattr(
    model_losses.forward, "values",
    lambda params, micro, config: jnp.array([[1.0, 2.0, 3.0]]),
  )
  zeros = jnp.zeros((1, 3))
  fields = {f.name: zeros for f in dataclasses.fields(records.MicroBatch)}
  micro = records.MicroBatch(**fields | dict(
    value_weights=jnp.array([[2.0, 0.0, 0.5]]),
    values=jnp.array([[1.0, 0.0, 3.0]]), returns=jnp.array([[0.0, 9.0, 5.0]]),
  ))
  share = model_losses.Share(*map(jnp.float32, (4, 1, 1)))
  found = model_losses.value(
    None, micro, share, config=None, spec=parts.SPEC
  )
  # Half squares of 1 and 2, weighed 2 and .5, over 4 tokens.
  assert float(found.loss) == pytest.approx((2 * 0.5 + 0.5 * 2) / 4)
  assert float(found.metrics["critic/vpred_mean"]) == pytest.approx(4 / 4)


def test_explained_variance_of_perfect_constant_and_opposite_values():
  returns = jnp.array([[1.0, 3.0, 5.0, 99.0]])
  mask = jnp.array([[1.0, 1.0, 1.0, 0.0]])

  def share(values):
    return float(advantages.explained_variance(values, returns, mask))

  assert share(returns) == pytest.approx(1)
  assert share(0 * returns + 7) == pytest.approx(0)
  assert share(-returns) == pytest.approx(-3)
  assert share(0.5 * returns) == pytest.approx(0.75)


def test_returns_and_values_are_measured_where_values_are_fitted():
  """turn_gae fits values at the first token of a turn only."""
  shape = (4, 12)
  turn = np.broadcast_to(np.arange(12) // 4, shape).astype(np.int32)
  rewards = np.zeros(shape, np.float32)
  rewards[:, -1] = [0.0, 1.0, 2.0, 3.0]
  ones = np.ones(shape, np.float32)
  inputs = estimators.Inputs(
    rewards=rewards, values=ones * rewards[:, -1:],  # Perfect ones.
    logp=0 * ones, masks=records.Masks(ones, ones, ones),
    group=np.arange(4, dtype=np.int32), turn=turn,
    anchor=np.zeros((4, 8), np.int32), searches=np.zeros(4, np.int32),
  )
  for name in ("gae", "turn_gae"):
    spec = parts.learner_spec(estimator__name=name)
    found = advantages.compute(
      estimators.find(name), spec, inputs, inputs.logp, np.float32(0)
    ).metrics
    assert found["critic/vf_explained_var"] == pytest.approx(1), name
    assert found["critic/returns/mean"] == pytest.approx(1.5), name
    assert found["critic/values/mean"] == pytest.approx(1.5), name
    assert found["critic/returns/max"] == 3, name


def test_masks_differ_in_the_released_scope_only():
  batch = parts.rollout_batch(
    [[0, 1, 0, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0] * 6],
    lengths=np.array([5, 6, 6]),
  )
  same = records.Masks.of(batch, "policy")
  assert same.policy is same.advantage is same.value
  found = records.Masks.of(batch, "attended")
  np.testing.assert_array_equal(found.policy, batch.policy_mask)
  assert found.advantage.tolist() == [
    [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [0] * 6
  ]
  assert found.value.tolist() == [  # And the token behind the response.
    [0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6
  ]


def test_a_split_state_joins_to_itself_and_stores_no_reference():
  state = fresh(update_test.make_learner())
  saved = state.split()
  assert saved.rest.reference is None and saved.rest.policy.params is None
  assert saved.policy is state.policy.params
  again = saved.join(state.reference)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state),
                  strict=True):
    assert a is b


@pytest.mark.parametrize("aggregation", ["token", "constant"])
def test_recorded_log_probabilities_save_a_pass_and_report_the_mismatch(
  aggregation, monkeypatch
):
  ours = update_test.make_learner(
    loss__old_logp="rollout", loss__aggregation=aggregation
  )
  batch = update_test.make_batch()
  state = fresh(ours)
  on = batch.policy_mask > 0
  true = np.asarray(update_test.forward(update_test.policy(), batch)[0])
  batch.rollout_logp = np.where(on, true + 0.25, 0).astype(np.float32)
  passes = []
  program = ours._reference_forward
  monkeypatch.setattr(
    ours, "_reference_forward",
    lambda *args: passes.append(args[0]) or program(*args),
  )
  found, metrics = ours.prepare(state, batch)
  np.testing.assert_array_equal(found.logp, batch.rollout_logp)
  assert all(params is state.reference for params in passes)
  assert "actor/entropy" not in metrics
  _, updated = ours.update(state, found)
  assert updated["rollout_mismatch/mean"] == pytest.approx(0.25, abs=1e-4)
  assert updated["rollout_mismatch/k3"] == pytest.approx(
    np.exp(-0.25) - 1 + 0.25, abs=1e-4)
  assert updated["rollout_mismatch/outside"] == pytest.approx(1, abs=1e-5)
  entropy = update_test.forward(update_test.policy(), batch)[1]
  assert updated["actor/entropy"] == pytest.approx(
    float(np.asarray(entropy)[on].mean()), rel=1e-3
  )


def test_warm_up_of_the_value_model_leaves_the_policy_alone():
  ours = update_test.make_learner(critic_warmup=1)
  state, batch = fresh(ours), update_test.make_batch()
  after, metrics = ours.update(state, update_test.experience(batch))
  assert after.policy is state.policy and int(after.step) == 1
  assert not any(name.startswith("actor/") for name in metrics)


def test_mismatch_metrics_by_hand():
  batch = parts.rollout_batch([[1, 1, 1, 0]])
  batch.rollout_logp = np.float32([[-1, -2, -3, 0]])
  logp = np.float32([[-1, -2.5, -2.95, 9]])
  found = batch_metrics.rollout_mismatch(batch, logp)
  gaps = np.array([0, -0.5, 0.05])
  assert found == pytest.approx({
    "rollout_mismatch/mean": 0.55 / 3, "rollout_mismatch/max": 0.5,
    "rollout_mismatch/k3": np.mean(np.exp(gaps) - 1 - gaps),
    "rollout_mismatch/outside": 1 / 3,
  }, abs=1e-6)
  batch.policy_mask[:] = 0
  assert batch_metrics.rollout_mismatch(batch, logp) == {}


def test_old_logp_of_good_and_bad_rows_by_hand():
  batch = parts.rollout_batch([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0]])
  zeros = np.zeros((4, 3), np.float32)
  found = records.Experience(
    batch, records.Masks.of(batch, "policy"),
    np.float32([[-1, -3, 9], [-5, 9, 9], [9, 9, 9], [9, -7, 9]]), zeros,
    zeros, np.float32([[3, -1, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]]), zeros,
    zeros, 0.0,
  )
  assert batch_metrics.old_logp_by_advantage(found) == pytest.approx({
    "actor/old_logp/positive": -2, "actor/old_logp/negative": -5,
  })


def test_llds_in_a_batch_of_one_optimizer_step_is_said_to_do_nothing(caplog):
  assert parts.SPEC.batch.optimizer_steps(4) == 1
  assert parts.SPEC.batch.optimizer_steps(5) == 2
  spec = parts.learner_spec(loss__llds_coef=0.5)
  with caplog.at_level(logging.WARNING, logger="absl"):
    weighting.warn_of_llds(spec, 5)
    assert not caplog.text
    weighting.warn_of_llds(spec, 4)
  assert "ppo.llds_coef = 0.5 does nothing" in caplog.text


def test_an_update_says_what_it_pads():
  ours = update_test.make_learner()
  state, batch = fresh(ours), update_test.make_batch()
  _, metrics = ours.update(state, update_test.experience(batch))
  # 42 tokens, packed as 16, 12 + 5 and 9 into rows of 20.
  assert metrics["update/padding_share"] == pytest.approx(1 - 42 / 60)


def test_the_kl_that_has_no_gradient_is_no_loss():
  with pytest.raises(specs.types.UserError, match="ppo.kl_loss_estimator"):
    parts.learner_spec(kl__loss_estimator="kl")


def moved(after):
  return jax.tree.map(
    lambda new, old: np.asarray(new) - np.asarray(old), after.policy.params,
    update_test.policy(),
  )


def test_each_epoch_takes_its_optimizer_steps(monkeypatch):
  ours = update_test.make_learner()
  exp = update_test.experience(update_test.make_batch())
  once, _ = ours.update(fresh(ours), exp)
  assert int(optimizer.steps_taken(once.policy.opt)) == 1
  batch = dataclasses.replace(ours.spec.batch, epochs=3)
  monkeypatch.setattr(
    ours, "spec", dataclasses.replace(ours.spec, batch=batch)
  )
  packed, pack = [], ours._packer.packing
  monkeypatch.setattr(
    ours._packer, "packing", lambda *given, **also: (
      packed.append(given) or pack(*given, **also))
  )
  often, _ = ours.update(fresh(ours), exp)
  assert len(packed) == 1  # Each epoch sees the same mini-batch.
  assert int(optimizer.steps_taken(often.policy.opt)) == 3
  assert int(often.step) == int(once.step) == 1


def test_a_rollback_scales_the_whole_move():
  ours = update_test.make_learner()
  exp = update_test.experience(update_test.make_batch())
  whole, metrics = ours.update(fresh(ours), exp)
  part, fewer = ours.update(fresh(ours), exp, lr_scale=0.25)
  assert fewer["actor/lr"] == pytest.approx(0.25 * metrics["actor/lr"])
  for a, b in zip(jax.tree.leaves(moved(part)), jax.tree.leaves(moved(whole)),
                  strict=True):
    assert np.abs(b).max() > 1e-4
    np.testing.assert_allclose(a, 0.25 * b, atol=1e-6)


@pytest.mark.parametrize("adapter", [None, adapters.AdapterSpec(2, 2.0)])
def test_log_probabilities_are_those_of_the_sampling_temperature(adapter):
  ours = update_test.make_learner(temperature=0.5, policy__adapter=adapter)
  batch, policy = update_test.make_batch(), update_test.policy()
  state = ours.start(policy, policy, jax.random.key(0))  # B of adapters is 0.
  found, _ = ours.prepare(state, batch)
  on = batch.policy_mask > 0
  for temperature, agrees in ((0.5, True), (1.0, False)):
    want = np.asarray(
      update_test.forward(update_test.policy(), batch, temperature)[0]
    )
    assert np.allclose(found.logp[on], want[on], atol=1e-4) == agrees
