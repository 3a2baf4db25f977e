"""The queue of searches: read by the clock, in the order of asking."""

import concurrent.futures
import threading

import fakes
import pytest

from stepsearch_jax import types
from stepsearch_jax.rollout import records, searches


def make_queue(retriever, delay=3, threads=2):
  stats = records.RolloutStats()
  pool = concurrent.futures.ThreadPoolExecutor(threads)
  return searches.SearchQueue(retriever, pool, 2, delay, stats), stats


def test_a_search_is_due_a_fixed_number_of_decode_steps_after_asking():
  queue, stats = make_queue(fakes.FakeRetriever())
  assert queue.steps_until_due() is None and not queue
  stats.decode_steps = 10
  queue.ask(["a"], ["first"])
  stats.decode_steps = 12
  queue.ask(["b", "c"], ["second", "third"])
  assert queue.steps_until_due() == 1 and len(queue) == 2
  stats.decode_steps = 14
  assert queue.steps_until_due() == 0  # Late is due.
  (result,) = queue.read()
  assert result.asker == "first"
  assert [p.id for p in result.documents] == ["a/0", "a/1"]
  assert queue.steps_until_due() == 1
  assert [r.asker for r in queue.read()] == ["second", "third"]
  assert stats.searches == 3 and stats.failed_searches == 0


def test_as_many_requests_run_at_once_as_there_are_threads():
  together = threading.Barrier(4, timeout=10)

  class Meeting:
    def search(self, queries, k):
      together.wait()  # Passes only when four searches run at the same time.
      return [[] for _ in queries]

  queue, stats = make_queue(Meeting(), threads=4)
  for name in "abcd":
    queue.ask([name], [name])
  assert [queue.read()[0].documents for _ in "abcd"] == [[]] * 4
  assert stats.failed_searches == 0


def test_a_failed_request_gives_none_and_a_wrong_setting_ends_the_run():
  class Failing:
    def __init__(self, error):
      self.error = error

    def search(self, queries, k):
      raise self.error

  for error in (types.SearchError("down"), RuntimeError("a bug")):
    queue, stats = make_queue(Failing(error))
    queue.ask(["a", "b"], [1, 2])
    assert [(r.asker, r.documents) for r in queue.read()] == [
      (1, None), (2, None)
    ]
    assert stats.failed_searches == 2
  queue, _ = make_queue(Failing(types.UserError("not on record")))
  queue.ask(["a"], [1])
  with pytest.raises(types.UserError, match="not on record"):
    queue.read()
