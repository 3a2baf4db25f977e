"""Stop or go: expected gradients of estimators against finite differences.

A policy that may stop decides which turns exist. A row stops at once, goes on
once, or goes on twice; all outcomes of all rows are enumerated, so that the
expectation is exact. With a baseline over only those rows that reached a turn
it would be wrong: the last test shows that this rig notices.
"""

import itertools

import jax
import numpy as np
import pytest
from ppo import parts

from stepsearch_jax.ppo import estimators, masked, records

ROWS = 3
LOGITS = np.array([0.3, -0.4])  # Of "go" at turns 0 and 1.
# Rewards per turn of: stop; go, stop; go, go.
OUTCOMES = {"s": (0.7,), "gs": (-0.3, 1.9), "gg": (-0.3, 0.4, 0.1)}


def probability(outcome, logits):
  go = 1 / (1 + np.exp(-logits))
  return {"s": 1 - go[0], "gs": go[0] * (1 - go[1]), "gg": go[0] * go[1]}[
    outcome
  ]


def score(outcome, logits):
  """d log pi / d logits of each decision, [turns, 2]; none at turn 2."""
  go = 1 / (1 + np.exp(-logits))
  out = np.zeros((3, 2))
  for turn, action in enumerate(outcome):
    out[turn, turn] = (action == "g") - go[turn]
  return out


def true_gradient():
  def value(logits):
    return sum(probability(o, logits) * sum(r) for o, r in OUTCOMES.items())

  eps = 1e-5
  return np.array([
    (value(LOGITS + eps * axis) - value(LOGITS - eps * axis)) / (2 * eps)
    for axis in np.eye(2)
  ])


def inputs_of(rows, values=None):
  """A batch whose every turn is one token."""
  mask = np.zeros((len(rows), 3), np.float32)
  rewards = np.zeros_like(mask)
  for b, outcome in enumerate(rows):
    mask[b, : len(OUTCOMES[outcome])] = 1
    rewards[b, : len(OUTCOMES[outcome])] = OUTCOMES[outcome]
  turn = np.where(mask > 0, np.arange(3), -1).astype(np.int32)
  states = np.where(mask > 0, np.arange(3), -1)
  anchor = np.pad(states, ((0, 0), (0, 5)), constant_values=-1)
  given = np.zeros_like(mask) if values is None else np.float32(values) * mask
  return estimators.Inputs(
    rewards=rewards, values=given, logp=np.zeros_like(mask),
    masks=records.Masks(mask, mask, mask),
    group=np.zeros(len(rows), np.int32), turn=turn,
    anchor=anchor.astype(np.int32),
    searches=(mask.sum(1) - 1).astype(np.int32),
  )


def expected_gradient(advantages_of):
  """E of the mean over rows of sum_n A_n d log pi, over all outcomes."""
  total = np.zeros(2)
  for rows in itertools.product(OUTCOMES, repeat=ROWS):
    chance = np.prod([probability(o, LOGITS) for o in rows])
    advantages = np.asarray(advantages_of(inputs_of(rows)), np.float64)
    for b, outcome in enumerate(rows):
      total += chance * advantages[b] @ score(outcome, LOGITS) / ROWS
  return total


def by_name(name, **settings):
  changes = {f"estimator__{k}": v for k, v in settings.items()}
  spec = parts.learner_spec(estimator__name=name, **changes).estimator
  compiled = jax.jit(lambda inputs: estimators.find(name)(inputs, spec))
  return lambda inputs: compiled(inputs).advantages


@pytest.mark.parametrize("name", ["turn_rloo", "rloo"])
def test_leave_one_out_baselines_are_unbiased(name):
  np.testing.assert_allclose(
    expected_gradient(by_name(name)), true_gradient(), atol=1e-5
  )


def valued(estimate):
  """The estimate, given the true value of each turn."""
  go = 1 / (1 + np.exp(-LOGITS[1]))
  last = OUTCOMES["gg"][2]
  middle = (1 - go) * OUTCOMES["gs"][1] + go * (OUTCOMES["gg"][1] + last)
  start = sum(probability(o, LOGITS) * sum(r) for o, r in OUTCOMES.items())
  values = np.float32([start, middle, last])
  return lambda x: estimate(x.replace(values=values * x.masks.policy))


@pytest.mark.parametrize("name", ["turn_gae", "bilevel_gae"])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_gae_over_turns_with_true_values_is_unbiased(name, lam, monkeypatch):
  """Before it is whitened; see the next test."""
  monkeypatch.setattr(masked, "whiten", lambda x, mask: x * mask)
  found = expected_gradient(
    valued(by_name(name, gamma=1.0, turn_gamma=1.0, lam=lam))
  )
  np.testing.assert_allclose(found, true_gradient(), atol=1e-5)


@pytest.mark.parametrize("name", ["turn_gae", "bilevel_gae"])
def test_gae_over_turns_as_it_ships_agrees_in_direction(name):
  found = expected_gradient(valued(by_name(name, lam=0.95)))
  assert (np.sign(found) == np.sign(true_gradient())).all()


def test_the_mean_of_the_group_shrinks_the_gradient_and_keeps_its_direction():
  found = expected_gradient(by_name("grpo_no_std"))
  np.testing.assert_allclose(
    found, true_gradient() * (ROWS - 1) / ROWS, atol=1e-5
  )


@pytest.mark.parametrize("name", ["gigpo", "stratified", "grpo", "maxrl"])
@pytest.mark.parametrize("turn_gamma", [0.95, 1.0])
def test_normalized_estimators_agree_in_the_first_choice(name, turn_gamma):
  found = expected_gradient(by_name(name, turn_gamma=turn_gamma))
  assert np.sign(found[0]) == np.sign(true_gradient()[0])


def test_gigpo_by_state_agrees_in_direction():
  """Without the row's own z-score: only the turns of one state."""
  whole = by_name("gigpo", turn_gamma=1.0, turn_weight=1.0)
  row = by_name("gigpo", turn_gamma=1.0, turn_weight=0.0)
  found = expected_gradient(lambda x: whole(x) - row(x))
  assert (np.sign(found) == np.sign(true_gradient())).all()


def with_rewards(monkeypatch, stop, go_stop, go_go):
  for outcome, rewards in (("s", stop), ("gs", go_stop), ("gg", go_go)):
    monkeypatch.setitem(OUTCOMES, outcome, rewards)


def test_igpo_agrees_in_direction_where_the_outcomes_decide(monkeypatch):
  with_rewards(monkeypatch, (0.2,), (0.1, 1.0), (0.1, 0.0, 0.4))
  found = expected_gradient(by_name("igpo"))
  assert (np.sign(found) == np.sign(true_gradient())).all()


def test_igpo_prefers_a_length_where_all_outcomes_are_equal(monkeypatch):
  """A turn that earns less than the mean turn costs, one that earns more pays.

  The method is made so; with gains in every search it searches too often.
  """
  with_rewards(monkeypatch, (0.7,), (0.0, 0.7), (0.0, 0.0, 0.7))
  np.testing.assert_allclose(true_gradient(), 0, atol=1e-9)
  assert (expected_gradient(by_name("igpo")) < -0.05).all()
  with_rewards(monkeypatch, (0.0,), (0.7, -0.7), (0.7, 0.7, -1.4))
  np.testing.assert_allclose(true_gradient(), 0, atol=1e-9)
  for name in ("turn_rloo", "grpo"):
    found = expected_gradient(by_name(name))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_a_baseline_over_those_that_reached_a_turn_is_biased():
  def biased(inputs):
    mask = inputs.masks.policy
    out = np.zeros(mask.shape)
    for b in range(ROWS):
      for n in range(3):
        for m in range(n, 3):
          if mask[b, m]:
            others = [inputs.rewards[j, m] for j in range(ROWS)
                      if j != b and mask[j, m]]
            base = np.mean(others) if others else 0.0
            out[b, n] += inputs.rewards[b, m] - base
    return out

  apart = np.abs(expected_gradient(biased) - true_gradient()).max()
  assert apart > 0.05
