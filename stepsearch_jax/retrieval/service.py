"""A retriever over HTTP: the /retrieve that every Search-R1 descendant speaks.

    POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
      -> {"result": [[{"document": {..}, "score": 0.8}, ..], ..]}

Without scores the inner lists hold bare documents; no queries, which a client
sends when no trajectory searches, give no results. Fields are read as leniently
as typed servers read them ("topk": "3", "return_scores": null), gzipped bodies
too. Requests wait in a bounded
queue; a worker joins what is waiting into one search, because encoding many
queries at once costs little more than encoding one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence

import prometheus_client
from starlette import applications, requests, responses

from stepsearch_jax import files, types
from stepsearch_jax.serving import http


@dataclasses.dataclass(frozen=True)
class ServiceLimits:
  """What one request, and all together, may ask for.

  Attributes:
    body_bytes: larger bodies get 413.
    queries: per request; the clients of the family send a whole rollout batch.
    query_chars: per query; a policy may put its whole turn between the tags.
    topk: passages per query.
    default_topk: when a request names none.
    waiting: queries that may wait; further requests get 429.
    batch: queries searched together.
    timeout_seconds: a request that waited longer gets 503, one that is still
      being sent 408.
  """

  body_bytes: int = 16 << 20
  queries: int = 4096
  query_chars: int = 16384
  topk: int = 100
  default_topk: int = 3
  waiting: int = 8192
  batch: int = 256
  timeout_seconds: float = 60.0

  def __post_init__(self):
    if self.default_topk > self.topk:
      raise types.UserError(
        f"default_topk = {self.default_topk} exceeds topk = "
        f"{self.topk}"
      )


@dataclasses.dataclass
class _Waiting:
  queries: list[str]
  topk: int
  future: asyncio.Future


class Batcher:
  """Joins concurrent requests into few searches; bounded."""

  def __init__(self, retriever: types.Retriever, limits: ServiceLimits):
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
      http.QueueFullError: too much work waits.
      TimeoutError: the result took too long.
    """
    if self.waiting + len(queries) > self._limits.waiting:
      raise http.QueueFullError(
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


_TRUE = ("true", "1", "t", "y", "yes", "on")
_FALSE = ("false", "0", "f", "n", "no", "off")


def _boolean(value) -> bool | None:
  """What a typed server reads as a boolean, None for anything else."""
  text = str(value).strip().lower()
  if isinstance(value, float):
    text = text.removesuffix(".0")
  if value is None or text in _FALSE:
    return False
  return True if text in _TRUE else None


def _integer(value) -> int | None:
  """What a typed server reads as an integer, None for anything else."""
  if isinstance(value, str) and len(value) < 20:
    with contextlib.suppress(ValueError):
      value = float(value)
  if isinstance(value, float):
    return int(value) if value.is_integer() else None
  return int(value) if isinstance(value, int) else None


def parse_request(
  body: bytes, limits: ServiceLimits
) -> tuple[list[str], int, bool]:
  """(queries, topk, return_scores) of a request body.

  Raises:
    http.BadRequestError: naming the field and what was expected.
  """
  row = http.parse_object(body)
  queries = row.get("queries")
  if not isinstance(queries, list) or not all(
    isinstance(query, str) for query in queries
  ):
    raise http.BadRequestError("queries must be a list of strings")
  most = min(limits.queries, limits.waiting)
  if len(queries) > most:
    raise http.BadRequestError(
      f"queries must hold up to {most} strings, got {len(queries)}"
    )
  longest = max(map(len, queries), default=0)
  if longest > limits.query_chars:
    raise http.BadRequestError(
      f"a query has {longest} characters, the limit is {limits.query_chars}"
    )
  given = row.get("topk")
  topk = limits.default_topk if given is None else _integer(given)
  if topk is None or not 0 < topk <= limits.topk:
    raise http.BadRequestError(
      f"topk must be an integer from 1 to {limits.topk}, got {given!r:.40}"
    )
  scores = _boolean(row.get("return_scores"))
  if scores is None:
    raise http.BadRequestError(
      f"return_scores must be a boolean, got {row['return_scores']!r:.40}"
    )
  return files.encodable(queries), topk, scores


def to_document(passage: types.Passage) -> dict[str, str]:
  """A passage in both corpus schemas of the family."""
  return {
    "id": passage.id,
    "title": passage.title,
    "text": passage.text,
    "contents": f"{passage.title}\n{passage.text}",
  }


def make_app(
  retriever: types.Retriever, limits: ServiceLimits | None = None
) -> applications.Starlette:
  """The ASGI application around a retriever."""
  limits = limits or ServiceLimits()
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
    queries, topk, scores = parse_request(body, limits)
    found = await batcher.search(queries, topk) if queries else []
    # A score that is no number has no JSON and raises here.
    answer = responses.JSONResponse({"result": [
      [
        {"document": to_document(p), "score": p.score} if scores
        else to_document(p)
        for p in passages
      ]
      for passages in found
    ]})
    asked.inc(len(queries))
    return answer

  return service.make_app([service.route("/retrieve", retrieve)])
