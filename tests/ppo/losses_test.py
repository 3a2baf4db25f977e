"""Loss switches against loops in numpy, edges included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts
from reference import ppo as naive

from stepsearch_jax import types
from stepsearch_jax.ppo import losses, weighting


def close(ours, want):
  np.testing.assert_allclose(ours, want, rtol=2e-5, atol=2e-6)


def packed(seed=0):
  """Two packed rows of trajectories with turns, observations and padding.

  Returns:
    (segment_ids, turn, mask, logp, old, advantages), [2, 14] each.
  """
  rng = np.random.default_rng(seed)
  segments = np.array([[1] * 8 + [2] * 4 + [0] * 2, [1] * 3 + [2] * 11])
  turn = np.array([
    [-1, 0, 0, -1, 1, 1, 1, -1, -1, 0, 0, 0, -1, -1],
    [-1, -1, -1, -1, 0, -1, 0, 1, -1, -1, 2, 2, -1, 3],
  ])  # The first trajectory of row 1 has no policy token; its turn 0 a hole.
  logp, old, advantages = rng.normal(size=(3, 2, 14)).astype(np.float32)
  mask = (turn >= 0).astype(np.float32)
  return (segments.astype(np.int32), turn.astype(np.int32), mask, logp, old,
          advantages)


@pytest.mark.parametrize("low, high, dual", [
  (0.2, 0.2, 0), (0.2, 0.28, 0), (0.2, 0.28, 3.0), (0.1, 0.5, 1.5),
])
def test_clipped_surrogate_equals_the_formula(low, high, dual):
  _, _, mask, logp, old, advantages = packed()
  gap = (logp - old) * mask
  found = losses.policy_loss(gap, advantages, 1 - low, 1 + high, dual)
  want = [
    naive.policy_loss(g, a, low, high, dual)
    for g, a in zip(gap.ravel(), advantages.ravel(), strict=True)
  ]
  close(np.ravel(found.loss), want)


def test_dual_clip_bounds_bad_tokens_only():
  gap = jnp.log(jnp.array([[10.0, 10.0, 0.5]]))
  advantages = jnp.array([[-1.0, 1.0, -1.0]])
  free = losses.policy_loss(gap, advantages, 0.8, 1.2).loss
  bounded = losses.policy_loss(gap, advantages, 0.8, 1.2, 3.0).loss
  close(free, [[10.0, -1.2, 0.8]])
  close(bounded, [[3.0, -1.2, 0.8]])
  grad = jax.grad(
    lambda g: losses.policy_loss(g, advantages, 0.8, 1.2, 3.0).loss.sum()
  )(gap)
  close(grad, [[0.0, 0.0, 0.0]])


@pytest.mark.parametrize("kind", ["token", "sequence", "turn"])
def test_ratios_equal_means_over_what_they_are_of(kind):
  segments, turn, mask, logp, old, _ = packed()
  numbers = {
    "token": None, "sequence": segments,
    "turn": losses.turn_numbers(segments, turn),
  }[kind]
  found = losses.log_ratio(logp, old, mask, numbers)
  want = naive.log_ratio(logp, old, segments, turn, kind)
  close(found, want)
  assert np.abs(want).max() > 0.3 and (np.asarray(found)[mask == 0] == 0).all()
  # Every token keeps its own gradient: d ratio / d logp = ratio.
  grad = jax.grad(
    lambda x: jnp.exp(losses.log_ratio(x, old, mask, numbers)).sum()
  )(logp)
  close(grad, np.exp(want) * mask)


def test_the_log_of_a_sequence_ratio_is_at_most_ten():
  ones = np.ones((1, 3), np.int32)
  high = np.full((1, 3), 50, np.float32)
  found = losses.log_ratio(high, 0 * high, np.ones((1, 3)), ones)
  close(found, [[10, 10, 10]])


def test_what_is_masked_reaches_neither_ratios_nor_gradients():
  segments, turn, mask, logp, old, advantages = packed()
  hole = np.where(mask > 0, 0, np.nan).astype(np.float32)
  turns = losses.turn_numbers(segments, turn)

  def loss(logp, old):
    total = 0.0
    for numbers in (None, segments, turns):
      ratio = losses.truncate(losses.log_ratio(logp, old, mask, numbers), 2.0)
      token = losses.policy_loss(ratio, advantages, 0.8, 1.2, 3.0)
      total += losses.masked_sum(token.loss, mask)
    drop = losses.likelihood_drop(logp, old, mask, turns)
    return total + losses.masked_sum(drop.loss, mask) + drop.turns

  value, grad = jax.value_and_grad(loss)(logp, old)
  again, poisoned = jax.value_and_grad(loss)(logp + hole, old + hole)
  assert np.isfinite(value) and value == again
  np.testing.assert_array_equal(grad, poisoned)
  assert (np.asarray(grad)[mask == 0] == 0).all()


def test_importance_weights_are_cut_and_keep_their_gradient():
  ratios = np.array([0.5, 1.9, 2.0, 8.0], np.float32)
  value, grad = jax.vmap(jax.value_and_grad(
    lambda x: jnp.exp(losses.truncate(x, 2.0))
  ))(jnp.log(ratios))
  close(value, [0.5, 1.9, 2.0, 2.0])
  close(grad, [0.5, 1.9, 2.0, 2.0])


def test_likelihood_drop_equals_the_double_sum():
  segments, turn, mask, logp, old, _ = packed()
  turns = losses.turn_numbers(segments, turn)
  found = losses.likelihood_drop(logp, old, mask, turns)
  want, fell = naive.likelihood_drop(logp, old, segments, turn)
  close(found.loss, want)
  assert float(found.turns) == fell
  assert 0 < fell < len(naive.packed_turns(segments, turn))


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_weights_turn_a_token_mean_into_each_aggregation(kind):
  rng = np.random.default_rng(1)
  mask = (rng.random((5, 9)) < 0.5).astype(np.float32)
  mask[2] = 0
  x = rng.normal(size=mask.shape)
  on = mask > 0
  weights = weighting.aggregation(mask, kind, 20)
  found = (weights * x)[on].sum() / mask.sum()
  rows = [row[own].mean() for row, own in zip(x, on, strict=True) if own.any()]
  want = {"token": x[on].mean(), "sequence": np.mean(rows),
          "constant": x[on].sum() / (5 * 20)}[kind]
  assert found == pytest.approx(want, rel=1e-5)


def test_llds_weighs_good_rows_and_answers_as_said():
  mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
  advantages = np.array([[2, 0, 0, -1], [-1, 0, 0, 0], [0] * 4, [0] * 4])
  answer = np.zeros((4, 4), bool)
  answer[0, 3] = True
  found = weighting.llds(advantages, mask, answer, 0.2)
  close(found, [
    [1 / 6, 1 / 6, 0, 0.2 / 6], [0] * 4, [1 / 8] * 4, [0] * 4,
  ])  # Rows 0 and 2 of 3 and 4 tokens; row 1 is bad, row 3 empty.


@pytest.mark.parametrize("field, value, expected", [
  ("clip_ratio_high", 0.1, "ppo.clip_ratio_high: expected 0 or at least"),
  ("clip_ratio", 0.0, "ppo.clip_ratio: expected more than 0, at most 1"),
  ("dual_clip", 0.5, "ppo.dual_clip: expected 0 .none. or more than 1"),
  ("ratio", "word", "ppo.ratio: expected one of token, sequence, turn"),
  ("aggregation", "sum", "ppo.aggregation: expected one of token, sequence"),
  ("llds_coef", -1.0, "ppo.llds_coef: expected 0 or more"),
  ("old_logp", "cache", "ppo.old_logp: expected one of recompute, rollout"),
  ("importance_cap", 0.5, "ppo.importance_cap: expected 1 or more"),
  ("value_clip", float("nan"), "ppo.value_clip: expected more than 0"),
])
def test_a_wrong_setting_is_one_line(field, value, expected):
  with pytest.raises(types.UserError, match=expected):
    parts.learner_spec(**{f"loss__{field}": value})


def test_clip_ratio_high_of_zero_is_clip_ratio():
  assert parts.SPEC.loss.highest_ratio == 1.2
  higher = parts.learner_spec(loss__clip_ratio_high=0.28).loss
  assert higher.highest_ratio == pytest.approx(1.28)
