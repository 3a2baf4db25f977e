"""Every estimator against loops, its edge cases, and what it must equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo import parts
from reference import ppo as naive

from stepsearch_jax.ppo import estimators, records
from stepsearch_jax.ppo.estimators import turns

GROUPED = ("grpo", "rloo", "grpo_no_std", "maxrl", "stratified", "turn_rloo",
           "gigpo")
TURNS = 8


@functools.cache
def program(name, **settings):
  changes = {f"estimator__{k}": v for k, v in settings.items()}
  spec = parts.learner_spec(estimator__name=name, **changes).estimator
  return jax.jit(lambda inputs: estimators.find(name)(inputs, spec))


def run(name, inputs, **settings):
  return jax.device_get(program(name, **settings)(inputs))


def make_inputs(batch, rewards=None, values=None):
  mask = batch.policy_mask
  return estimators.Inputs(
    rewards=batch.token_rewards if rewards is None else np.float32(rewards),
    values=np.zeros_like(mask) if values is None else values,
    logp=np.zeros_like(mask), masks=records.Masks(mask, mask, mask),
    group=batch.group, turn=batch.turn, anchor=batch.anchor,
    searches=batch.searches,
  )


def make_batch(seed=0):
  """Six rows of runs of policy tokens, groups of 3, 1 and 2, one row empty."""
  rng = np.random.default_rng(seed)
  mask = rng.random((6, 24)) < 0.6
  mask[4] = False
  rewards = np.where(mask & (rng.random(mask.shape) < 0.5),
                     rng.normal(0.3, 1, mask.shape), 0)
  batch = parts.rollout_batch(mask, rewards)
  batch.group = np.array([0, 0, 0, 1, 2, 2], np.int32)
  batch.searches = np.array([1, 1, 2, 0, 0, 0], np.int32)
  # Few states per question, so that they meet across rows and inside one.
  states = rng.integers(0, 3, batch.anchor.shape) + 10 * batch.group[:, None]
  batch.anchor = np.where(batch.anchor >= 0, states, -1).astype(np.int32)
  return batch, rng.normal(size=mask.shape).astype(np.float32)


def close(ours, want):
  np.testing.assert_allclose(ours, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  "name", ["grpo", "rloo", "grpo_no_std", "maxrl", "stratified"]
)
def test_row_estimators_equal_the_naive_loop(name):
  batch, _ = make_batch()
  found = run(name, make_inputs(batch))
  want = naive.row_estimator(
    name, batch.token_rewards.astype(float), batch.policy_mask, batch.group,
    batch.searches,
  )
  close(found.advantages, want)
  assert np.abs(want).max() > 0.1


def test_turn_rloo_equals_the_naive_double_sum():
  batch, _ = make_batch()
  want = naive.turn_rloo(
    batch.token_rewards.astype(float), batch.turn, batch.group,
    batch.anchor.shape[1],
  )
  close(run("turn_rloo", make_inputs(batch)).advantages, want)


def test_igpo_equals_the_naive_loop_over_all_turns_of_a_group():
  batch, _ = make_batch()
  want = naive.igpo(
    batch.token_rewards.astype(float), batch.turn, batch.group, batch.anchor
  )
  close(run("igpo", make_inputs(batch)).advantages, want)
  assert np.abs(want).max() > 0.1


def test_igpo_of_equal_turns_is_exactly_nothing_and_counts_turns_of_reward_0():
  mask = [[1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
  batch = parts.rollout_batch(mask, 0.7 * np.array(mask))
  assert (run("igpo", make_inputs(batch)).advantages == 0).all()
  batch.token_rewards[0, :] = [0, 0, 0, 0, 4, 0]
  batch.token_rewards[1, :] = 0
  # Of 0, 0, 4 and 0 the mean is 1 and the unbiased std is 2.
  close(run("igpo", make_inputs(batch)).advantages,
        [[0.5, 0, 1, 0, 1.5, 0], [-0.5, 0, 0, 0, 0, 0]])


def test_ig_search_equals_the_naive_loop():
  batch, _ = make_batch()
  want = naive.ig_search(
    batch.token_rewards.astype(float), batch.policy_mask, batch.turn,
    batch.group,
  )
  close(run("ig_search", make_inputs(batch)).advantages, want)
  assert np.abs(want).max() > 0.1


def test_ig_search_pays_a_turn_on_the_tokens_of_its_query_alone():
  mask = [[1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 1]]
  rewards = [[0, 0.1, 0.1, 0, 0, 1], [0, 0, -0.3, 0, 0, 0]]
  found = run("ig_search", make_inputs(parts.rollout_batch(mask, rewards)))
  half = np.sqrt(0.5)
  close(found.advantages, [
    [half, half + 0.2, half + 0.2, 0, half, half],
    [-half, -half, -half - 0.3, 0, -half, -half],
  ])


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.7])
def test_gigpo_equals_the_naive_loop_over_states(weight):
  batch, _ = make_batch()
  want = naive.gigpo(
    batch.token_rewards.astype(float), batch.policy_mask, batch.turn,
    batch.group, batch.anchor, 0.95, weight,
  )
  # Of a group of one, the row's z-score is 0.
  close(run("gigpo", make_inputs(batch), turn_weight=weight).advantages, want)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.9, 0.8)])
def test_turn_gae_equals_the_naive_loop_over_turns(gamma, lam):
  batch, values = make_batch()
  found = run("turn_gae", make_inputs(batch, values=values), gamma=gamma,
              lam=lam)
  first = np.zeros(batch.turn.shape, bool)
  for row, _, where in naive.firsts(batch.turn):
    first[row, where[0]] = True
  raw = naive.turn_gae(
    batch.token_rewards.astype(float), values, batch.turn, gamma, lam
  )
  close(found.returns, np.where(first, raw + values, 0))
  np.testing.assert_array_equal(found.value_weights, first)
  white = naive.white(raw, first)
  for row, _, where in naive.firsts(batch.turn):
    close(found.advantages[row, where], white[row, where[0]])
  assert (found.advantages[batch.turn < 0] == 0).all()


@pytest.mark.parametrize(
  "gamma, turn_gamma, lam", [(1, 0.95, 1), (0.9, 1, 0.8)]
)
def test_bilevel_gae_equals_the_naive_loops(gamma, turn_gamma, lam):
  batch, values = make_batch()
  found = run("bilevel_gae", make_inputs(batch, values=values), gamma=gamma,
              turn_gamma=turn_gamma, lam=lam)
  raw = naive.bilevel_gae(
    batch.token_rewards.astype(float), values, batch.turn, gamma, turn_gamma,
    lam,
  )
  on = batch.policy_mask > 0
  close(found.advantages, naive.white(raw, on))
  close(found.returns, np.where(on, raw + values, 0))


def test_gae_with_lambda_one_and_no_values_is_the_return_to_go():
  batch, _ = make_batch()
  found = run("gae", make_inputs(batch))
  want = np.where(
    batch.policy_mask > 0,
    np.cumsum(batch.token_rewards[:, ::-1], axis=1)[:, ::-1], 0,
  )
  close(found.returns, want)


def test_reinforce_is_the_return_to_go_minus_its_mean():
  batch, _ = make_batch()
  on = batch.policy_mask > 0
  returns = np.cumsum(batch.token_rewards[:, ::-1], axis=1)[:, ::-1]
  found = run("reinforce", make_inputs(batch)).advantages
  close(found, np.where(on, returns - returns[on].mean(), 0))
  assert abs(found[on].mean()) < 1e-5 and abs(returns[on].mean()) > 0.05


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_rewards_in_a_group_give_exactly_nothing(name, size):
  mask = np.zeros((2 * size, 12))
  mask[:, 2:5] = mask[:, 7:10] = 1
  rewards = np.zeros(mask.shape)
  parts_of_it = np.float32([0.1, 0.7, 0.013])
  for row in range(2 * size):  # Equal sums, added up in another order.
    rewards[row, 2:5] = np.roll(parts_of_it, row)
  batch = parts.rollout_batch(mask, rewards)
  batch.group = np.arange(2 * size, dtype=np.int32) // size
  batch.anchor = np.where(batch.anchor >= 0, batch.group[:, None], -1)
  found = run(name, make_inputs(batch))
  if name == "gigpo":  # One state: its turns have returns of two sizes.
    batch.anchor = np.where(
      batch.anchor >= 0, batch.group[:, None] * 8 + np.arange(TURNS), -1
    ).astype(np.int32)
    found = run(name, make_inputs(batch))
  assert (found.advantages == 0).all()


def test_gigpo_gives_a_state_that_nobody_shares_no_turn_advantage():
  batch, _ = make_batch()
  batch.anchor = np.where(
    batch.anchor >= 0, np.arange(batch.anchor.size).reshape(6, -1), -1
  ).astype(np.int32)
  alone = run("gigpo", make_inputs(batch)).advantages
  close(alone, run("gigpo", make_inputs(batch), turn_weight=0.0).advantages)


def test_gigpo_joins_a_state_that_a_row_meets_twice():
  mask = [[1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
  rewards = [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
  batch = parts.rollout_batch(mask, rewards)
  batch.anchor[:, :3] = [[0, 1, 1], [0, -1, -1]]
  found = run("gigpo", make_inputs(batch), turn_gamma=0.5).advantages
  # Turns 1 and 2 of row 0 return .5 and 1: z of -+ 1/sqrt(2) each; rows 1, 0.
  half = np.sqrt(0.5)
  close(found[0], [2 * half, 0, 0, 0, 2 * half, 0])
  close(found[1], [-2 * half, 0, 0, 0, 0, 0])


def test_maxrl_of_failures_is_nothing_and_rare_success_weighs_more():
  mask = np.ones((4, 2))
  batch = parts.rollout_batch(mask, [[0, 0], [0, 0], [0, 0], [0, 1]])
  batch.group[:] = 0
  close(run("maxrl", make_inputs(batch)).advantages[:, 0], [-1, -1, -1, 3])
  negative = make_inputs(batch, [[0, 0], [0, 0], [0, 0], [0, -1]])
  assert (run("maxrl", negative).advantages == 0).all()


@pytest.mark.parametrize("name", ["turn_gae", "bilevel_gae"])
def test_a_turn_without_reward_is_still_a_turn(name):
  """Its value is bootstrapped from, and it gets an advantage of its own."""
  mask = [[1, 1, 0, 1, 1, 0, 1, 1]] * 2
  batch = parts.rollout_batch(mask, np.zeros((2, 8)))
  batch.token_rewards[0, 7] = 1.0  # Only the last turn of row 0 earns.
  values = np.zeros((2, 8), np.float32)
  values[:, 3] = [5.0, -5.0]
  found = run(name, make_inputs(batch, values=values), lam=0.0, turn_gamma=1.0)
  # lambda 0: turn 0 sees nothing but the value of turn 1, turn 1 its own.
  returns = found.returns[:, [0, 3, 6]]
  want = {"turn_gae": [[5, 0, 1], [-5, 0, 0]],
          "bilevel_gae": [[0, 0, 0], [0, 0, 0]]}[name]
  if name == "bilevel_gae":  # With lambda 0 a return ends up at last tokens.
    returns, want = found.returns[:, [1, 4, 7]], [[5, 0, 1], [-5, 0, 0]]
  close(returns, want)


def test_stratified_compares_rows_of_as_many_searches():
  mask = np.ones((4, 1))
  batch = parts.rollout_batch(mask, [[0.0], [1.0], [3.0], [9.0]])
  batch.group[:] = 0
  batch.searches = np.array([0, 0, 1, 2], np.int32)
  found = run("stratified", make_inputs(batch), strata_blend=1.0).advantages
  half = np.sqrt(0.5)
  close(found[:, 0], [-half, half, 0, 0])  # Alone in a stratum: nothing.


@pytest.mark.parametrize("name", sorted(estimators.REGISTRY))
def test_what_lies_outside_the_mask_never_matters(name):
  batch, values = make_batch()
  hole = np.where(batch.policy_mask > 0, 0, np.nan).astype(np.float32)
  ours = run(name, make_inputs(batch, values=values + hole))
  want = run(name, make_inputs(batch, values=values))
  for field in ("advantages", "returns"):
    np.testing.assert_array_equal(getattr(ours, field), getattr(want, field))
    assert (getattr(ours, field)[batch.policy_mask == 0] == 0).all()


@pytest.mark.parametrize("name", sorted(estimators.REGISTRY))
def test_an_outcome_on_an_untrained_end_of_text_counts(name):
  """As if the policy's token before it had earned it (reward.eos=dropped)."""
  mask = np.array([[1, 1, 0, 1, 1, 0, 0, 0]] * 4)
  outcome = np.array([1.0, 0.0, 0.0, 3.0])
  step = np.zeros(mask.shape)
  step[:, 1] = [0.5, 0.25, 0.5, 0.0]
  before, behind = step.copy(), step.copy()
  before[:, 4], behind[:, 5] = outcome, outcome
  batch = parts.rollout_batch(mask, step)
  batch.group[:] = [0, 0, 1, 1]
  found, want, without = (
    run(name, make_inputs(batch, rewards)) for rewards in (behind, before, step)
  )
  for field in ("advantages", "returns"):
    close(getattr(found, field), getattr(want, field))
  assert np.abs(found.advantages - without.advantages).max() > 0.1


def test_an_outcome_without_its_token_by_hand():
  batch = parts.rollout_batch([[1, 0]] * 2, np.zeros((2, 2)))
  batch.group[:] = 0
  inputs = make_inputs(batch, [[0, 1], [0, 0]])
  half = np.sqrt(0.5)  # Of two scores 0 and 1: mean 1/2, deviation sqrt(1/2).
  for name, first in (("grpo", half), ("rloo", 1.0), ("reinforce", 0.5)):
    close(run(name, inputs).advantages, [[first, 0], [-first, 0]])


def test_first_and_last_tokens_of_turns():
  turn = np.array([[-1, 0, 0, -1, 1, -1, 1, 2], [-1] * 8], np.int32)
  assert turns.first_tokens(jnp.asarray(turn)).tolist() == [
    [0, 1, 0, 0, 1, 0, 0, 1], [0] * 8
  ]
  assert turns.last_tokens(jnp.asarray(turn)).tolist() == [
    [0, 0, 1, 0, 0, 0, 1, 1], [0] * 8
  ]
