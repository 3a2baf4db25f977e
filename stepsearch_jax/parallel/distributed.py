"""Several processes as one run: start-up, turns, and small host exchanges.

Every process plays the same schedule over the same questions, so all of them
launch the same device programs in the same order; devices, slots, batches and
the index are what is split. The schedule is a function of the data alone, which
is what makes this safe, and its host work (a few milliseconds a block) is too
small to be worth splitting.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from stepsearch_jax import types

_T = TypeVar("_T")
_HEARTBEAT_SECONDS = 30  # A process silent for this long ends the others.


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the other processes of the run; call before any other use of JAX.

  Args:
    coordinator: host:port of process 0. None asks the environment (TPU pod,
      SLURM, GKE, MPI).
    num_processes: how many there are; None likewise.
    process_id: which one this is; None likewise.

  Raises:
    UserError: some arguments are given and others not.
  """
  given = [x is not None for x in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise types.UserError(
      "give all of --coordinator, --num_processes and --process_id, or only "
      f"--multihost; got {coordinator}, {num_processes}, {process_id}"
    )
  # CPU collectives; accelerators bring their own.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  gpus = None
  if coordinator is None:
    gpus = gpus_of_task(os.environ, len(glob.glob("/dev/nvidia[0-9]*")))
  jax.distributed.initialize(
    coordinator, num_processes, process_id, local_device_ids=gpus,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
  )


def gpus_of_task(
  environment: Mapping[str, str], installed: int
) -> list[int] | None:
  """Returns which of the visible GPUs a SLURM or MPI task takes.

  JAX alone gives every task the one GPU of its number on the node.

  Args:
    environment: of the task.
    installed: GPUs of the node, where the environment does not say which are
      visible.

  Returns:
    Indices among the visible ones: all that the scheduler gave to the task
    alone, or its share of those that all tasks of the node see. None where
    JAX decides: no such task, or no GPU.

  Raises:
    UserError: fewer are visible than asked for, or the tasks cannot share
      them equally.
  """
  slurm = "SLURM_LOCALID" in environment
  if slurm:
    task = int(environment["SLURM_LOCALID"])
    # "2(x3),1": this node's number is the first, or that of all nodes.
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    said = next((environment[n] for n in names if n in environment), "1")
    tasks = int(re.match(r"\d+", said)[0])
  elif "OMPI_COMM_WORLD_LOCAL_RANK" in environment:
    task = int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])
    tasks = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
  else:
    return None
  shown = environment.get("CUDA_VISIBLE_DEVICES")
  visible = installed if shown is None else len(
    [name for name in shown.split(",") if name.strip()]
  )
  if not visible:
    return None
  asked = int(environment.get("SLURM_GPUS_ON_NODE", visible)) if slurm else (
    visible
  )
  if visible < asked and visible * tasks == asked:
    return list(range(visible))  # The scheduler has split them already.
  if visible < asked:
    raise types.UserError(
      f"CUDA_VISIBLE_DEVICES shows {visible} GPUs, the job has {asked} on this "
      f"node for {tasks} tasks: see --gpus-per-node, or unset it"
    )
  if visible % tasks:
    raise types.UserError(
      f"{tasks} tasks cannot share the {visible} GPUs of this node equally: "
      "start one task per node"
    )
  share = visible // tasks
  return list(range(task * share, (task + 1) * share))


def is_primary() -> bool:
  """True in the one process that writes metrics, predictions and plots."""
  return jax.process_index() == 0


def in_turn(work: Callable[[], _T]) -> _T:
  """Runs `work` in the primary process first, then in the others.

  For loading what the first one builds in the shared work directory.
  """
  if jax.process_count() == 1:
    return work()
  if is_primary():
    found = work()
    multihost_utils.sync_global_devices("primary first")
    return found
  multihost_utils.sync_global_devices("primary first")
  return work()


def wait(name: str) -> None:
  """Returns once every process has come to the same place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def any_process(flag: bool) -> bool:
  """True if `flag` is set in any process."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def share(total: Sequence[_T]) -> Sequence[_T]:
  """This process's part of a sequence; the parts in order are the whole.

  So a tie between two processes goes to the earlier item, as it would in one.
  """
  count, index = jax.process_count(), jax.process_index()
  return total[len(total) * index // count : len(total) * (index + 1) // count]


Found = list[list[types.Passage] | None]


def search_together(
  search: Callable[[], Found], count: int, k: int
) -> list[list[types.Passage] | None]:
  """Ends a search in every process and merges what they found.

  Every process calls this for the same searches in the same order.

  Args:
    search: waits for this process's part of the results.
    count: number of queries.
    k: passages to keep per query.

  Returns:
    The k best passages of each query, the same in every process; None where
    the search failed in some process.

  Raises:
    UserError: the retriever's settings do not allow the search.
  """
  try:
    found = search()
    if len(found) != count:
      raise types.SearchError(f"{len(found)} results for {count} queries")
  except types.UserError:
    raise
  except Exception as error:  # Costs its searches, not the run.
    unknown = not isinstance(error, types.SearchError)
    logging.warning(
      "%d searches failed: %s: %s", count, type(error).__name__, error,
      exc_info=unknown,
    )
    # The others wait for this process's part, if only to learn this.
    failed: Found = [None] * count
    found = failed
  return _merge_topk(found, k)


def _merge_topk(found: Found, k: int) -> list[list[types.Passage] | None]:
  """The k best passages over all processes, ties by process."""
  if jax.process_count() == 1:
    return list(found)
  packed = json.dumps([
    row if row is None else [dataclasses.asdict(p) for p in row]
    for row in found
  ]).encode()
  sizes = multihost_utils.process_allgather(np.int32(len(packed)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(packed)] = np.frombuffer(packed, np.uint8)
  everyone = np.asarray(multihost_utils.process_allgather(padded))
  shards = [
    json.loads(row[:size].tobytes())
    for row, size in zip(everyone, sizes, strict=True)
  ]
  merged: list[list[types.Passage] | None] = []
  for rows in zip(*shards, strict=True):
    if None in rows:
      merged.append(None)
      continue
    # By id, because processes may also hold replicas of one index.
    passages = {p["id"]: types.Passage(**p) for row in rows for p in row}
    merged.append(sorted(passages.values(), key=lambda p: -p.score)[:k])
  return merged
