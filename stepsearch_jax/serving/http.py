"""What all HTTP services here share: bodies, errors, counters, probes.

Owns how a request's body is read within its limits, how errors become
statuses, and /health and /metrics. It knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import prometheus_client
from absl import logging
from starlette import applications, exceptions, requests, responses, routing

from stepsearch_jax import files
from stepsearch_jax.serving import errors

Handler = Callable[[requests.Request], Awaitable[responses.Response]]


class Worker(Protocol):
  """The one consumer of a service's queue."""

  waiting: int

  async def work(self) -> None:
    """Serves the queue until canceled."""
    ...


async def read_body(
  request: requests.Request, limit: int, timeout_seconds: float
) -> bytes:
  """Returns the body of a request, unzipped where it is gzipped.

  Args:
    request: whose body has not been read.
    limit: bytes, of the body as sent and of the unzipped one.
    timeout_seconds: until the last byte.

  Raises:
    BadRequestError: too long (413), too slow (408), coded otherwise (415) or
      broken.
  """
  body = bytearray()
  try:
    async with asyncio.timeout(timeout_seconds):
      async for part in request.stream():
        body += part
        if len(body) > limit:
          raise errors.BadRequestError(
            f"the body has more than {limit} bytes", 413
          )
  except TimeoutError as error:
    raise errors.BadRequestError(
      f"the body took more than {timeout_seconds} s", 408
    ) from error
  coding = request.headers.get("content-encoding", "identity").lower()
  if coding == "identity":
    return bytes(body)
  if coding not in ("gzip", "x-gzip"):
    raise errors.BadRequestError(
      f"content-encoding {coding!r} is not gzip", 415
    )
  return unzipped(bytes(body), limit)


def unzipped(body: bytes, limit: int) -> bytes:
  """Returns a gzipped body, never unpacking more than `limit` bytes of it.

  Raises:
    BadRequestError: it is longer, ends early or is no gzip.
  """
  reader = zlib.decompressobj(wbits=31)
  try:
    plain = reader.decompress(body, limit + 1)
  except zlib.error as error:
    raise errors.BadRequestError(f"the body is no gzip: {error}") from error
  if len(plain) > limit:
    raise errors.BadRequestError(f"the body has more than {limit} bytes", 413)
  if not reader.eof:
    raise errors.BadRequestError("the gzipped body ends early")
  return plain


def parse_object(body: bytes) -> dict:
  """Returns the JSON object that a body holds, fit to be answered with.

  Raises:
    BadRequestError: it is no JSON, or no object.
  """
  try:
    row = files.encodable(json.loads(body))
  except (ValueError, RecursionError) as error:
    raise errors.BadRequestError(f"the body is no JSON: {error}") from error
  if not isinstance(row, dict):
    raise errors.BadRequestError("the body must be a JSON object")
  return row


def plain_error(error: errors.BadRequestError) -> dict:
  """Returns {"error": reason}."""
  return {"error": str(error)}


class HttpService:
  """Turns handlers into an application with errors, counters and probes."""

  def __init__(
    self, name: str, work: str, worker: Worker, timeout_seconds: float,
    error_row: Callable[[errors.BadRequestError], dict] = plain_error,
  ):
    """Starts nothing yet.

    Args:
      name: begins the names of the metrics, a verb such as "retrieve".
      work: what fails where a request does, "the search" for instance.
      worker: works while the application runs.
      timeout_seconds: after which handlers raise TimeoutError.
      error_row: JSON of an error.
    """
    self._work = work
    self._worker = worker
    self._timeout = timeout_seconds
    self._error_row = error_row
    self.registry = prometheus_client.CollectorRegistry()
    self._answered = prometheus_client.Counter(
      f"{name}_requests", "Requests by HTTP status.", ["status"],
      registry=self.registry,
    )
    self._seconds = prometheus_client.Histogram(
      f"{name}_seconds", "Seconds until a request's answer or stream.",
      registry=self.registry,
    )
    prometheus_client.Gauge(
      f"{name}_waiting", "What waits in the queue.", registry=self.registry
    ).set_function(lambda: worker.waiting)

  def refusal(self, error: Exception) -> responses.Response:
    """Returns the answer to a request that failed."""
    if isinstance(error, errors.QueueFullError):
      error = errors.BadRequestError(str(error), 429, code="queue_full")
    elif isinstance(error, TimeoutError):
      error = errors.BadRequestError(f"no result in {self._timeout:g} s", 503,
                              code="timeout")
    elif not isinstance(error, errors.BadRequestError):
      # Only the type: the message may hold what clients must not see.
      logging.warning("a request failed", exc_info=error)
      error = errors.BadRequestError(
        f"{self._work} failed: {type(error).__name__}", 500
      )
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return responses.JSONResponse(
      self._error_row(error), error.status, headers
    )

  def route(self, path: str, handler: Handler) -> routing.Route:
    """Returns a POST route whose errors are answered and which is counted."""

    async def endpoint(request: requests.Request) -> responses.Response:
      began = time.perf_counter()
      try:
        response = await handler(request)
      except Exception as error:
        response = self.refusal(error)
      self._answered.labels(str(response.status_code)).inc()
      self._seconds.observe(time.perf_counter() - began)
      return response

    return routing.Route(path, endpoint, methods=["POST"])

  def make_app(
    self, routes: Sequence[routing.Route]
  ) -> applications.Starlette:
    """Returns the ASGI application: the routes, /health and /metrics."""
    worker = self._worker

    async def health(request: requests.Request) -> responses.Response:
      del request
      return responses.JSONResponse({"status": "ok", "waiting": worker.waiting})

    async def metrics(request: requests.Request) -> responses.Response:
      del request
      return responses.Response(
        prometheus_client.generate_latest(self.registry),
        media_type=prometheus_client.CONTENT_TYPE_LATEST,
      )

    async def refuse(
      request: requests.Request, error: Exception
    ) -> responses.Response:
      assert isinstance(error, exceptions.HTTPException)
      response = self.refusal(errors.BadRequestError(
        f"{request.method} {request.url.path}: {error.detail}",
        error.status_code,
      ))
      response.headers.update(error.headers or {})
      return response

    @contextlib.asynccontextmanager
    async def lifespan(app):
      del app
      working = asyncio.create_task(worker.work())
      yield
      working.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await working

    return applications.Starlette(
      routes=[
        *routes, routing.Route("/health", health),
        routing.Route("/metrics", metrics),
      ],
      exception_handlers={exceptions.HTTPException: refuse},
      lifespan=lifespan,
    )
