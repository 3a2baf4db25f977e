"""A retriever over HTTP: the /retrieve that every Search-R1 descendant speaks.

    POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
      -> {"result": [[{"document": {..}, "score": 0.8}, ..], ..]}

Without scores the inner lists hold bare documents; no queries, which a client
sends when no trajectory searches, give no results. Fields are read as leniently
as typed servers read them ("topk": "3", "return_scores": null), gzipped bodies
too. Requests wait in a bounded queue; a worker joins what is waiting into one
search, because encoding many queries at once costs little more than encoding
one.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import prometheus_client
from starlette import applications, requests, responses

from stepsearch_jax import types
from stepsearch_jax.retrieval import search_request
from stepsearch_jax.serving import errors, http


@dataclasses.dataclass
class _Waiting:
  queries: list[str]
  topk: int
  future: asyncio.Future


class Batcher:
  """Joins concurrent requests into few searches; bounded."""

  def __init__(
    self, retriever: types.Retriever, limits: search_request.ServiceLimits
  ):
    """Starts nothing yet; see `work`."""
    self._retriever = retriever
    self._limits = limits
    self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
    self.waiting = 0

  async def search(
    self, queries: list[str], topk: int
  ) -> list[list[types.Passage]]:
    """Passages of each query.

    Raises:
      errors.QueueFullError: too much work waits.
      TimeoutError: the result took too long.
    """
    if self.waiting + len(queries) > self._limits.waiting:
      raise errors.QueueFullError(
        f"{self.waiting} queries wait, the limit is {self._limits.waiting}"
      )
    item = _Waiting(queries, topk, asyncio.get_running_loop().create_future())
    self.waiting += len(queries)
    self._queue.put_nowait(item)
    return await asyncio.wait_for(item.future, self._limits.timeout_seconds)

  async def work(self) -> None:
    """Serves the queue until canceled."""
    while True:
      batch = [await self._queue.get()]
      size = len(batch[0].queries)
      while not self._queue.empty() and size < self._limits.batch:
        batch.append(self._queue.get_nowait())
        size += len(batch[-1].queries)
      self.waiting -= size
      # Requests that gave up meanwhile need no search.
      live = [item for item in batch if not item.future.done()]
      for topk in sorted({item.topk for item in live}):
        await self._serve([item for item in live if item.topk == topk], topk)

  async def _serve(self, items: Sequence[_Waiting], topk: int) -> None:
    queries = [query for item in items for query in item.queries]
    try:
      found = await asyncio.to_thread(self._retriever.search, queries, topk)
    except Exception as error:  # The requests get it; the worker lives on.
      if len(items) > 1:  # One request must not fail those beside it.
        for item in items:
          await self._serve([item], topk)
      elif not items[0].future.done():
        items[0].future.set_exception(error)
      return
    results = iter(found)
    for item in items:
      mine = [next(results) for _ in item.queries]
      if item.future.done():
        continue
      if None in mine:
        item.future.set_exception(types.SearchError("a query failed"))
      else:
        item.future.set_result(mine)


def make_app(
  retriever: types.Retriever, limits: search_request.ServiceLimits | None = None
) -> applications.Starlette:
  """The ASGI application around a retriever."""
  limits = limits or search_request.ServiceLimits()
  batcher = Batcher(retriever, limits)
  service = http.HttpService(
    "retrieve", "the search", batcher, limits.timeout_seconds
  )
  asked = prometheus_client.Counter(
    "retrieve_queries", "Queries answered.", registry=service.registry
  )

  async def retrieve(request: requests.Request) -> responses.Response:
    body = await http.read_body(
      request, limits.body_bytes, limits.timeout_seconds
    )
    asks = search_request.read(http.parse_object(body), limits)
    found = []
    if asks.queries:
      found = await batcher.search(asks.queries, asks.topk)
    # A score that is no number has no JSON and raises here.
    answer = responses.JSONResponse({"result": [
      [
        {"document": search_request.to_document(p), "score": p.score}
        if asks.scores else search_request.to_document(p)
        for p in passages
      ]
      for passages in found
    ]})
    asked.inc(len(asks.queries))
    return answer

  return service.make_app([service.route("/retrieve", retrieve)])
