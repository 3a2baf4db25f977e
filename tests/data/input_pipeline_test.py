"""The question stream: resumable and complete."""

import collections

import pytest

from stepsearch_jax import types
from stepsearch_jax.data.input_pipeline import QuestionStream

QUESTIONS = [types.Question(str(i), "q", ("a",)) for i in range(10)]


def test_every_epoch_asks_every_question_once_and_order_changes():
  stream = QuestionStream(QUESTIONS, seed=1)
  ids = [q.id for first in range(0, 20, 4) for q in stream.take(first, 4)]
  assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(q.id for q in QUESTIONS)
  assert ids[:10] != ids[10:]


def test_questions_depend_on_seed_and_place_alone():
  one = QuestionStream(QUESTIONS, seed=1)
  other = QuestionStream(QUESTIONS, seed=1)
  other.take(28, 4)
  assert one.indices(8, 4) == other.indices(8, 4)
  assert one.indices(8, 4) != QuestionStream(QUESTIONS, seed=2).indices(8, 4)


def test_questions_do_not_depend_on_how_many_are_taken_at_once():
  stream = QuestionStream(QUESTIONS, seed=1)
  for first in range(0, 24, 6):
    assert stream.indices(first, 6) == (
      stream.indices(first, 3) + stream.indices(first + 3, 3))


def test_more_may_be_taken_than_there_are_and_none_is_refused():
  counts = collections.Counter(QuestionStream(QUESTIONS, 0).indices(0, 25))
  assert set(counts.values()) == {2, 3}
  with pytest.raises(types.UserError, match="at least one question"):
    QuestionStream([], 0)
