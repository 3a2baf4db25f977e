"""Searches under way on host threads, on a clock that counts decode steps."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from stepsearch_jax import types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rollout import records


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What became of one search.

  Attributes:
    asker: whatever `SearchQueue.ask` was given beside the query.
    documents: passages, best first; None where the search failed for good.
  """

  asker: Any
  documents: Sequence[types.Passage] | None


@dataclasses.dataclass(frozen=True)
class _Request:
  due: int
  future: concurrent.futures.Future
  askers: Sequence[Any]


class SearchQueue:
  """Starts searches at once and reads them a fixed number of steps later.

  When a result is read depends on the clock alone, never on the speed of the
  retriever: a late one is waited for, an early one has to wait.
  """

  def __init__(
    self,
    retriever: types.Retriever,
    pool: concurrent.futures.Executor,
    topk: int,
    delay: int,
    stats: records.RolloutStats,
  ):
    """Starts without searches.

    Args:
      retriever: is asked on the threads of
      pool: shared by all rollouts of an engine.
      topk: passages per search.
      delay: decode steps between asking and reading.
      stats: its `decode_steps` is the clock.
    """
    self._retriever = retriever
    self._pool = pool
    self._topk = topk
    self._delay = delay
    self._stats = stats
    self._requests: collections.deque[_Request] = collections.deque()

  def __len__(self) -> int:
    """Returns how many requests are under way."""
    return len(self._requests)

  def ask(self, queries: Sequence[str], askers: Sequence[Any]) -> None:
    """Starts one request for all queries that came up at the same step."""
    due = self._stats.decode_steps + self._delay
    future = self._pool.submit(self._retriever.search, queries, self._topk)
    self._requests.append(_Request(due, future, askers))
    self._stats.searches += len(queries)

  def steps_until_due(self) -> int | None:
    """Returns the decode steps until a request is to be read, if any is."""
    if not self._requests:
      return None
    return max(self._requests[0].due - self._stats.decode_steps, 0)

  def read(self) -> list[SearchResult]:
    """Returns the oldest request's results, waiting for them if need be."""
    request = self._requests.popleft()
    began = time.perf_counter()
    # In the order of asking and on this thread, so that processes exchange
    # the same searches at the same time.
    results = distributed.search_together(
      request.future.result, len(request.askers), self._topk
    )
    self._stats.retrieval_wait_seconds += time.perf_counter() - began
    self._stats.failed_searches += results.count(None)
    return [
      SearchResult(asker, documents)
      for asker, documents in zip(request.askers, results, strict=True)
    ]
