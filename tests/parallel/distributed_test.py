"""Searches that several processes end together, without the processes."""

import dataclasses
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


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shares_in_order_are_the_whole(count, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: count)
  whole = []
  for index in range(count):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    part = distributed.share("abcdef")
    assert abs(len(part) - 6 / count) < 1
    whole += part
  assert "".join(whole) == "abcdef"


def test_a_tie_goes_to_the_earlier_share_as_in_one_index(other):
  # One index names the lower row first, and the first share holds it.
  tied = dataclasses.replace(B, score=A.score)
  other[:] = [[A]]
  assert distributed.search_together(lambda: [[tied]], 1, 1) == [[tied]]


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


SLURM = {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}
MPI = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize("environment, installed, expected", [
  # One task per node takes all of them, not the GPU of its number.
  ({"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": EIGHT}, 8,
   list(range(8))),
  ({"SLURM_LOCALID": "0"}, 4, [0, 1, 2, 3]),
  (MPI, 8, list(range(8))),
  # Two tasks that see the same ones share them.
  (SLURM | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": EIGHT}, 8,
   [4, 5, 6, 7]),
  # What SLURM has bound to the task is numbered anew from 0.
  (SLURM | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 8,
   [0, 1, 2, 3]),
  (SLURM, 0, None), (SLURM | {"CUDA_VISIBLE_DEVICES": ""}, 8, None),
  ({}, 8, None),
])
def test_a_task_takes_all_of_its_gpus(environment, installed, expected):
  assert distributed.gpus_of_task(environment, installed) == expected


@pytest.mark.parametrize("environment, installed, message", [
  (SLURM, 3, "2 tasks cannot share the 3 GPUs"),
  ({"SLURM_LOCALID": "0", "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0"}, 8, "shows 1 GPUs, the job has 8 .* 1 tasks"),
])
def test_fewer_gpus_than_asked_for_are_an_error(
  environment, installed, message
):
  with pytest.raises(types.UserError, match=message):
    distributed.gpus_of_task(environment, installed)


def test_the_gpus_of_a_task_reach_jax(monkeypatch):
  given = {}
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *unused, **named: given.update(named)
  )
  monkeypatch.setattr(
    distributed, "gpus_of_task", lambda environment, installed: [0, 1]
  )
  distributed.initialize()
  assert given["local_device_ids"] == [0, 1]
  distributed.initialize("host:1", 2, 0)  # Then JAX takes what is visible.
  assert given["local_device_ids"] is None
