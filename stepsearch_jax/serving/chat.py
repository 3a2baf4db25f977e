"""A search agent behind the chat API that OpenAI's clients speak.

    POST /v1/chat/completions {"model": .., "messages": [..], "stream": false}
    GET /v1/models

The last user message is the question; what else was said is not read, because
the agent was trained on single questions. The answer is the message's content;
the field `trace` beside `choices` says how it was found. Streamed, each turn
and what it found is a chunk of its own while it happens. Requests wait in a
bounded queue for the one agent; one whose client has gone is dropped.

It must not know how questions are played (see `Agent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette import applications, requests, responses, routing

from stepsearch_jax import types
from stepsearch_jax.serving import chat_request, errors, http

# What a client gets that is no longer there; nginx has the number.
_CLIENT_GONE = 499


class Event(Protocol):
  """Something that happened, or the reply that ends a question."""

  def as_row(self) -> dict[str, Any]:
    """Returns a JSON-able form."""
    ...


class Agent(Protocol):
  """Plays one question at a time; `run.asking.Agent` is one."""

  def ask(
    self, text: str, temperature: float, tell: Callable[[Any], None],
    max_tokens: int | None,
  ) -> Event:
    """Plays a question; what `tell` raises ends it.

    Raises:
      UserError: the question does not fit.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ChatLimits:
  """What one request, and all together, may ask for.

  Attributes:
    body_bytes: larger bodies get 413.
    question_chars: longer questions get 400.
    waiting: requests that may wait; further ones get 429.
    timeout_seconds: a request without a reply by then gets 503, one that is
      still being sent 408.
  """

  body_bytes: int = 1 << 20
  question_chars: int = 16384
  waiting: int = 64
  timeout_seconds: float = 300.0


class _GoneError(Exception):
  """Ends a rollout that nobody waits for."""


@dataclasses.dataclass(frozen=True)
class _Told:
  """Something that happened on the way."""

  row: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Reply:
  """The end of a question."""

  row: dict[str, Any]


@dataclasses.dataclass
class _Job:
  """A request in the queue, and what the agent has said of it so far."""

  request: chat_request.ChatRequest
  deadline: float
  events: asyncio.Queue = dataclasses.field(default_factory=asyncio.Queue)
  gone: threading.Event = dataclasses.field(default_factory=threading.Event)

  async def next(self) -> _Told | _Reply:
    """Returns the next event.

    Raises:
      TimeoutError: none came in time.
      Exception: what ended the rollout.
    """
    async with asyncio.timeout_at(self.deadline):
      event = await self.events.get()
    if isinstance(event, Exception):
      raise event
    return event

  async def drop_when_gone(self, request: requests.Request) -> None:
    """Ends the job when its client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
      pass
    self.gone.set()
    self.events.put_nowait(
      errors.BadRequestError("the client has gone", _CLIENT_GONE)
    )


class AskQueue:
  """Requests that wait for the one agent; bounded."""

  def __init__(self, agent: Agent, limits: ChatLimits):
    """Starts nothing yet; see `work`."""
    self._agent = agent
    self._limits = limits
    self._queue: asyncio.Queue[_Job] = asyncio.Queue()
    self.waiting = 0

  def submit(self, request: chat_request.ChatRequest) -> _Job:
    """Queues a request.

    Raises:
      errors.QueueFullError: too much work waits.
    """
    if self.waiting >= self._limits.waiting:
      raise errors.QueueFullError(
        f"{self.waiting} requests wait, the limit is {self._limits.waiting}"
      )
    seconds = self._limits.timeout_seconds
    job = _Job(request, asyncio.get_running_loop().time() + seconds)
    self.waiting += 1
    self._queue.put_nowait(job)
    return job

  async def work(self) -> None:
    """Plays one question after the other until canceled."""
    while True:
      job = await self._queue.get()
      self.waiting -= 1
      if job.gone.is_set():
        continue
      loop = asyncio.get_running_loop()
      try:
        await asyncio.to_thread(self._play, job, loop)
      finally:
        job.gone.set()  # Canceled: the thread need not go on.

  def _play(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
    """Plays on a thread, and says on the loop what happens."""

    def say(event: _Told | _Reply | Exception) -> None:
      loop.call_soon_threadsafe(job.events.put_nowait, event)

    def tell(happening: Event) -> None:
      if job.gone.is_set():
        raise _GoneError
      row = happening.as_row()
      if row["kind"] != "text":  # A turn is streamed whole, when it ends.
        say(_Told(row))

    request = job.request
    try:
      reply = self._agent.ask(
        request.question, request.temperature, tell, request.max_tokens
      )
      say(_Reply(reply.as_row()))
    except _GoneError:
      pass
    except types.UserError as error:
      say(errors.BadRequestError(
        str(error), param="messages", code="context_length_exceeded"
      ))
    except Exception as error:  # The request gets it; the queue goes on.
      say(error)


def _trace(row: dict[str, Any]) -> dict[str, Any]:
  """How a reply was found: turns with thought, query, titles and seconds."""
  return {
    "stop_reason": row["stop_reason"],
    "seconds": row["seconds"],
    "turns": [
      {
        **{name: turn[name] for name in ("thought", "action", "content",
                                         "failed", "seconds")},
        "titles": [document["title"] for document in turn["documents"]],
      }
      for turn in row["turns"]
    ],
  }


def _usage(row: dict[str, Any]) -> dict[str, int]:
  """Tokens that the policy read (prompt and documents) and wrote."""
  read, written = row["read_tokens"], row["tokens"]
  return {"prompt_tokens": read, "completion_tokens": written,
          "total_tokens": read + written}


def _finish_reason(row: dict[str, Any]) -> str:
  no_room = row["cut"] or row["stop_reason"] == types.StopReason.CONTEXT
  return "length" if no_room else "stop"


def _head(model: str, kind: str) -> dict[str, Any]:
  return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind,
          "created": int(time.time()), "model": model}


def _completion(model: str, row: dict[str, Any]) -> dict[str, Any]:
  """The whole answer of a request that is not streamed."""
  message = {"role": "assistant", "content": row["answer"] or "",
             "refusal": None}
  return {
    **_head(model, "chat.completion"),
    "choices": [{"index": 0, "message": message, "logprobs": None,
                 "finish_reason": _finish_reason(row)}],
    "usage": _usage(row),
    "trace": _trace(row),
  }


async def _chunks(
  model: str, job: _Job, event: _Told | _Reply
) -> AsyncIterator[dict[str, Any]]:
  """Yields the chunks of a streamed answer, from its first event on."""
  head = _head(model, "chat.completion.chunk")

  def chunk(delta: dict, reason: str | None = None, **more: Any) -> dict:
    choice = {"index": 0, "delta": delta, "logprobs": None,
              "finish_reason": reason}
    return {**head, "choices": [choice], **more}

  yield chunk({"role": "assistant", "content": ""})
  while isinstance(event, _Told):
    yield chunk({}, event=event.row)
    event = await job.next()
  row = event.row
  yield chunk({"content": row["answer"] or ""})
  yield chunk({}, _finish_reason(row), trace=_trace(row))
  if job.request.usage:
    yield {**head, "choices": [], "usage": _usage(row)}


def error_row(error: errors.BadRequestError) -> dict[str, Any]:
  """Returns an error as OpenAI's clients read it."""
  kind = "invalid_request_error"
  if error.status == 429:
    kind = "rate_limit_error"
  elif error.status >= 500:
    kind = "server_error"
  return {"error": {"message": str(error), "type": kind,
                    "param": error.param, "code": error.code}}


def make_app(
  agent: Agent, model: str, limits: ChatLimits | None = None
) -> applications.Starlette:
  """The ASGI application around an agent that clients know as `model`."""
  limits = limits or ChatLimits()
  queue = AskQueue(agent, limits)
  service = http.HttpService(
    "chat", "the rollout", queue, limits.timeout_seconds, error_row
  )
  card = {"id": model, "object": "model", "created": int(time.time()),
          "owned_by": "stepsearch"}

  async def stream(job: _Job, first: _Told | _Reply) -> AsyncIterator[str]:
    try:
      async for chunk in _chunks(model, job, first):
        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except Exception as error:  # The status is sent; the rest says it.
      refusal = bytes(service.refusal(error).body).decode()
      yield f"data: {refusal}\n\n"
    finally:
      job.gone.set()
    yield "data: [DONE]\n\n"

  async def complete(request: requests.Request) -> responses.Response:
    body = await http.read_body(
      request, limits.body_bytes, limits.timeout_seconds
    )
    asked = chat_request.parse(
      http.parse_object(body), model, limits.question_chars
    )
    job = queue.submit(asked)
    watching = asyncio.create_task(job.drop_when_gone(request))
    try:
      event = await job.next()
      while not asked.stream and isinstance(event, _Told):
        event = await job.next()
    except BaseException:
      job.gone.set()
      raise
    finally:
      watching.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await watching
    if asked.stream:
      return responses.StreamingResponse(
        stream(job, event), media_type="text/event-stream",
        headers={"cache-control": "no-cache"},
      )
    return responses.JSONResponse(_completion(model, event.row))

  async def models(request: requests.Request) -> responses.Response:
    del request
    return responses.JSONResponse({"object": "list", "data": [card]})

  return service.make_app([
    service.route("/v1/chat/completions", complete),
    routing.Route("/v1/models", models),
  ])
