"""The question stream: resumable, complete, split without overlap."""

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


def test_process_slices_make_up_the_global_batch():
  whole = QuestionStream(QUESTIONS, 6, seed=3)
  parts = [
    QuestionStream(QUESTIONS, 6, seed=3, process_index=i, process_count=3)
    for i in range(3)
  ]
  for step in range(4):
    assert sum((p.indices(step) for p in parts), []) == whole.indices(step)


def test_batch_larger_than_the_data_and_uneven_split():
  counts = collections.Counter(QuestionStream(QUESTIONS, 25, 0).indices(0))
  assert set(counts.values()) == {2, 3}
  with pytest.raises(ValueError, match="5 is not divisible by 2 processes"):
    QuestionStream(QUESTIONS, 5, 0, process_count=2)
