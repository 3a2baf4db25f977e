"""Batches of a step: what is asked, what is kept, what goes on from where."""

import types as python_types

import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.data import input_pipeline
from stepsearch_jax.rollout import records
from stepsearch_jax.run import filling, specs

QUESTIONS = [types.Question(str(i), "q", ("a",)) for i in range(40)]
STREAM = input_pipeline.QuestionStream(QUESTIONS, seed=3)


def spec(**changes):
  return specs.BatchSpec(**(
    dict(questions=6, rollouts=2, dynamic=True, dynamic_limit=3) | changes
  ))


class Player:
  """Plays by table: rollout i of a question earns gap * i, spread on tokens."""

  def __init__(self, gaps):
    self.gaps, self.rounds, self.episodes = gaps, [], []

  def play(self, questions, episodes):
    self.rounds.append(len(questions))
    self.episodes += zip([q.id for q in questions], episodes, strict=True)
    played = [
      python_types.SimpleNamespace(question=q, episode=e)
      for q, e in zip(questions, episodes, strict=True)
    ]
    return records.Rollout(played, records.RolloutStats(
      policy_tokens=len(questions), seconds=1.5))

  def score(self, trajectories):
    return [
      python_types.SimpleNamespace(tokens=np.array(
        [0.25, self.gaps[t.question.id] * (t.episode % 2)], np.float32))
      for t in trajectories
    ]


def fill(batch, first=0, gaps=None, share=0.5):
  rng = np.random.default_rng(0)
  table = gaps or {
    q.id: float(rng.random() < share) for q in QUESTIONS
  }
  player = Player(table)
  found = filling.fill(batch, STREAM, first, player.play, player.score)
  return found, player, table


def ids(rollouts):
  return [t.question.id for t in rollouts.trajectories]


@pytest.mark.parametrize("first", [0, 7, 35])
def test_a_batch_that_is_not_chosen_is_the_next_questions(first):
  found, player, _ = fill(spec(dynamic=False), first)
  want = [q.id for q in STREAM.take(first, 6) for _ in range(2)]
  assert ids(found.batch) == ids(found.played) == want
  assert player.rounds == [12] and found.asked == 6
  assert player.episodes == list(
    zip(want, range(2 * first, 2 * first + 12), strict=True))


@pytest.mark.parametrize("first", [0, 5, 18])
def test_a_chosen_batch_is_the_first_questions_that_differ(first):
  found, _, gaps = fill(spec(), first)
  want, place = [], first  # One question at a time.
  while len(want) < 6:
    (question,) = STREAM.take(place, 1)
    want += [question.id] if gaps[question.id] else []
    place += 1
  assert ids(found.batch)[::2] == ids(found.batch)[1::2] == want
  assert place - first <= found.asked <= 18
  assert found.differing >= 6


def test_rewards_and_trajectories_of_the_batch_belong_together():
  found, player, _ = fill(spec())
  for kept in (found.batch, found.played):
    again = player.score(kept.trajectories)
    for ours, theirs in zip(kept.rewards, again, strict=True):
      np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_rounds_ask_for_what_is_lacking_at_the_share_that_was_kept():
  differ = [1, 1, 0, 0, 0, 0] + [1, 1, 0, 0, 0, 0] + [1, 0, 0] + [1] * 25
  order = STREAM.indices(0, 40)
  gaps = {str(i): float(d) for i, d in zip(order, differ, strict=True)}
  # 6 asked, 2 kept: 4 * 6 / 2 = 12, at most a batch of 6. 12 asked, 4 kept:
  # 2 * 12 / 4 = 6 = what is left of 18.
  found, player, _ = fill(spec(), gaps=gaps)
  assert player.rounds == [12, 12, 12]
  assert (found.asked, found.differing) == (18, 8)
  found, player, _ = fill(spec(dynamic_limit=9), gaps={
    str(i): float(place % 6 < 5) for place, i in enumerate(order)
  })
  assert player.rounds == [12, 4]  # 1 * 6 / 5, rounded up, is 2.
  assert found.asked == 8
  assert found.stats.policy_tokens == 16 and found.stats.seconds == 3.0


def test_a_batch_that_does_not_fill_takes_the_earliest_of_the_others():
  order = STREAM.indices(0, 40)
  gaps = dict.fromkeys(map(str, range(40)), 0.0)
  gaps |= {str(order[9]): 1.0, str(order[16]): 1.0}
  found, _, _ = fill(spec(), gaps=gaps)
  assert found.asked == 18 and found.differing == 2
  want = [str(order[place]) for place in (0, 1, 2, 3, 9, 16)]
  assert ids(found.batch)[::2] == want
  assert found.metrics() == {
    "batch/questions_asked": 18, "batch/differing_share": 2 / 18
  }


def test_the_next_step_begins_behind_all_that_was_asked():
  first, _, gaps = fill(spec())
  second, player, _ = fill(spec(), first.asked, gaps)
  again, replay, _ = fill(spec(), first.asked, gaps)
  assert ids(second.batch) == ids(again.batch)
  assert player.episodes == replay.episodes
  assert player.episodes[0][1] == 2 * first.asked
  assert not set(ids(first.played)) & set(ids(second.played))


def test_a_difference_that_is_rounding_is_none():
  gaps = dict.fromkeys(map(str, range(40)), 3e-7)
  found, _, _ = fill(spec(), gaps=gaps)
  assert found.differing == 0
  found, _, _ = fill(spec(), gaps=dict.fromkeys(gaps, 3e-6))
  assert found.differing == found.asked == 6


def test_single_rollouts_have_no_share():
  found, _, _ = fill(spec(rollouts=1, dynamic=False))
  assert found.metrics() == {}
