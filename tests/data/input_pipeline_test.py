"""The question stream: resumable and complete."""

import collections

import pytest

from stepsearch_jax import types
from stepsearch_jax.data.input_pipeline import QuestionStream

QUESTIONS = [types.Question(str(i), "q", ("a",)) for i in range(10)]


def test_every_epoch_asks_every_question_once_and_order_changes():
  stream = QuestionStream(QUESTIONS, 4, seed=1)
  ids = [q.id for step in range(5) for q in stream.batch(step)]
  assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(q.id for q in QUESTIONS)
  assert ids[:10] != ids[10:]


def test_a_batch_depends_on_seed_and_step_alone():
  one = QuestionStream(QUESTIONS, 4, seed=1)
  other = QuestionStream(QUESTIONS, 4, seed=1)
  other.batch(7)
  assert one.indices(2) == other.indices(2)
  assert one.indices(2) != QuestionStream(QUESTIONS, 4, seed=2).indices(2)


def test_batches_do_not_depend_on_their_size():
  small = QuestionStream(QUESTIONS, 3, seed=1)
  large = QuestionStream(QUESTIONS, 6, seed=1)
  for step in range(4):
    assert large.indices(step) == (
      small.indices(2 * step) + small.indices(2 * step + 1))


def test_a_batch_may_be_larger_than_the_data_and_not_empty():
  counts = collections.Counter(QuestionStream(QUESTIONS, 25, 0).indices(0))
  assert set(counts.values()) == {2, 3}
  for questions, size in (([], 4), (QUESTIONS, 0)):
    with pytest.raises(types.UserError, match="positive batch"):
      QuestionStream(questions, size, 0)
