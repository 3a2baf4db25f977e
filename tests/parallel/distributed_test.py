"""Searches that several processes end together, without the processes."""

import json

import jax
import numpy as np
import pytest

from stepsearch_jax import types
from stepsearch_jax.parallel import distributed


@pytest.fixture
def other(monkeypatch):
  """A second process: what it found is put into the returned list."""
  found = []

  def allgather(x):
    theirs = json.dumps([
      row if row is None else [vars(p) for p in row] for row in found
    ]).encode()
    if x.ndim == 0:
      return np.array([x, len(theirs)], np.int32)
    width = max(len(x), len(theirs))
    rows = np.zeros((2, width), np.uint8)
    rows[0, : len(x)] = x
    rows[1, : len(theirs)] = np.frombuffer(theirs, np.uint8)
    return rows

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(
    distributed.multihost_utils, "process_allgather", allgather
  )
  return found


A = types.Passage("a", "A", "x", 0.9)
B = types.Passage("b", "B", "y", 0.2)
C = types.Passage("c", "C", "z", 0.5)


def test_merged_results_are_the_best_of_all_shards(other):
  other[:] = [[C, A]]
  assert distributed.search_together(lambda: [[A, B]], 1, 2) == [[A, C]]


def test_a_query_that_failed_in_any_process_failed_and_no_other(other):
  other[:] = [[C], None, [], [A]]
  here = [[A], [B], [], None]
  merged = distributed.search_together(lambda: here, 4, 2)
  assert merged == [[A, C], None, [], None]


@pytest.mark.parametrize("error", [
  types.SearchError("down"), Exception("Truncation error"), KeyError("id"),
])
def test_any_error_of_a_retriever_fails_its_searches(error, other):
  other[:] = [[A], [B]]

  def search():
    raise error

  # The other process learns it and does not wait for ever.
  assert distributed.search_together(search, 2, 1) == [None, None]


def test_results_of_another_number_are_failed_searches():
  assert distributed.search_together(lambda: [[A]], 2, 1) == [None, None]


def test_a_setting_that_forbids_the_search_ends_the_run():
  def search():
    raise types.UserError("not on record")

  with pytest.raises(types.UserError, match="not on record"):
    distributed.search_together(search, 1, 1)
