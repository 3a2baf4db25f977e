"""A user's own reward: what it is given, where it is paid, what goes wrong."""

import dataclasses
import sys
import types as python_types

import numpy as np
import pytest
from rewards.step_rewards_test import two_searches

from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards, token_rewards

SPEC = dataclasses.replace(
  step_rewards.RewardSpec.paper(), function="mine:reward", outcome_only=True
)


@pytest.fixture
def pay(monkeypatch):
  """Scores a trajectory with a function that is importable as mine:reward."""

  def score(function, trajectory=None, spec=SPEC):
    module = python_types.ModuleType("mine")
    module.reward = function
    monkeypatch.setitem(sys.modules, "mine", module)
    (reward,) = token_rewards.score_trajectories(
      spec, [trajectory or two_searches()], None
    )
    return reward

  return score


def test_the_function_sees_question_turns_and_answer(pay):
  seen = []

  def function(question, turns, answer):
    seen.append((
      question.id, [t.content for t in turns],
      [[d.text for d in t.documents] for t in turns], answer,
    ))
    return 0.0, [0.0] * len(turns)

  pay(function)
  assert seen == [(
    "1", ["ada", "bo", "cy", "x"], [["alpha beta"], [], ["alpha beta"], []],
    "x",
  )]


def test_turns_are_paid_where_they_act_and_the_outcome_at_the_end(pay):
  """Turns close at tokens 4, 7, 10, 13; the last sampled token is 13."""
  reward = pay(lambda question, turns, answer: (8.0, [1, 2.0, -4, 0.5]))
  want = np.zeros(14)
  want[[4, 7, 10, 13]] = 1, 2, -4, 8.5
  np.testing.assert_array_equal(reward.tokens, want)
  assert reward.tokens.dtype == np.float32
  assert [turn.paid for turn in reward.turns] == [1, 2, -4, 8.5]
  assert [turn.step for turn in reward.turns] == [1, 2, -4, 0.5]
  assert reward.parts.score == 8.0
  assert reward.parts.step_scores == [1, 2, -4, 0.5]


def test_nothing_of_the_preset_is_paid_but_its_parts_are_there(pay):
  spec = dataclasses.replace(SPEC, outcome_only=False)
  reward = pay(lambda q, turns, a: (0, np.zeros(len(turns))), spec=spec)
  assert not reward.tokens.any()
  assert reward.parts.answer_correct == 1.0
  assert [t.gain for t in reward.turns] == pytest.approx([1, 0, 0, 0])
  assert [t.redundancy for t in reward.turns] == [0, 0, 1, 0]


def test_a_rollout_without_a_turn_has_an_outcome_all_the_same(pay):
  cut = dataclasses.replace(two_searches(), turns=[], answer=None)
  reward = pay(lambda q, turns, answer: (float(answer is None), []), cut)
  assert reward.tokens[13] == 1.0 and reward.tokens.sum() == 1.0


def raises(question, turns, answer):
  raise KeyError("no such thing")


@pytest.mark.parametrize("function, value", [
  (lambda q, t, a: 1.0, "1.0"),
  (lambda q, t, a: None, "None"),
  (lambda q, t, a: (1.0, [0.5]), r"\(1.0, \[0.5\]\)"),
  (lambda q, t, a: (1.0, 0.5), r"\(1.0, 0.5\)"),
  (lambda q, t, a: ("good", [0] * 4), r"\('good', \[0, 0, 0, 0\]\)"),
  (lambda q, t, a: (float("nan"), [0] * 4), r"\(nan, \[0, 0, 0, 0\]\)"),
  (lambda q, t, a: (0, [0, 0, 0, float("inf")]), r"\(0, \[0, 0, 0, inf\]\)"),
  (lambda q, t, a: (0, np.zeros((4, 2))), r"\(0, array\(.*"),
])
def test_a_wrong_value_names_function_trajectory_and_value(
  pay, function, value
):
  with pytest.raises(types.UserError, match=(
    r"^reward.function 'mine:reward': expected \(outcome, rewards of 4 turns\) "
    rf"as finite numbers for question '1', episode 0, got {value}$"
  )) as error:
    pay(function)
  assert "\n" not in str(error.value)


def test_a_function_that_raises_names_itself_and_the_trajectory(pay):
  with pytest.raises(types.UserError, match=(
    r"^reward.function 'mine:reward' raised KeyError: 'no such thing' "
    r"\(question '1', episode 0\)$"
  )):
    pay(raises)
