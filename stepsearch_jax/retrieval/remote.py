"""A retriever behind somebody's /retrieve, with a limit to its patience.

Every request has a timeout and a few retries with growing pauses. After
several searches in a row have failed for good the circuit opens: for a while
searches fail at once instead of stalling every rollout on a dead server.

A refused request (status 4xx) says nothing about the server's health. A request
of many queries that is refused is asked again in halves, so that a query which
the server does not take fails alone.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx2
from absl import logging

from stepsearch_jax import files, types
from stepsearch_jax.data import fields

_BATCH = 256  # Queries per request.
# Statuses that can be the fault of one query among many.
_OF_A_QUERY = (400, 413, 414, 422, 500)
_REFUSALS = 16  # Single queries refused before the rest is given up.
# What reading an answer of unexpected shape can raise.
_UNREADABLE = (
  ValueError, TypeError, AttributeError, LookupError, RecursionError
)
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class RemoteSpec:
  """Patience of the client.

  Attributes:
    timeout_seconds: of one request.
    retries: further attempts after the first.
    backoff_seconds: pause before the first retry; doubles each time, with up
      to as much again at random, so that clients do not return together.
    open_after: failed searches in a row that open the circuit.
    open_seconds: how long it stays open.
  """

  timeout_seconds: float
  retries: int
  backoff_seconds: float
  open_after: int
  open_seconds: float

  def __post_init__(self):
    if self.timeout_seconds <= 0:
      raise types.UserError(
        "retrieval.patience.timeout_seconds must be positive, got "
        f"{self.timeout_seconds}"
      )
    for field, least in (("retries", 0), ("backoff_seconds", 0),
                         ("open_after", 1), ("open_seconds", 0)):
      if getattr(self, field) < least:
        raise types.UserError(
          f"retrieval.patience.{field} must be at least {least}, got "
          f"{getattr(self, field)}"
        )


# Of commands that read no config.
PATIENCE = RemoteSpec(
  timeout_seconds=30.0, retries=3, backoff_seconds=0.5, open_after=3,
  open_seconds=30.0,
)


class RefusedError(types.SearchError):
  """The server answered, but not with a result.

  Attributes:
    status: HTTP status of the answer.
  """

  def __init__(self, message: str, status: int):
    """Keeps the status beside the reason."""
    super().__init__(message)
    self.status = status


def public_url(url: str) -> str:
  """A URL without the user, password and query that may hold a key."""
  parts = urllib.parse.urlsplit(_without_login(url)[0])
  return urllib.parse.urlunsplit(parts._replace(query="", fragment=""))


def _without_login(url: str) -> tuple[str, tuple[str, str] | None]:
  """(the URL without user and password, those two if it had them)."""
  parts = urllib.parse.urlsplit(url)
  login, at, host = parts.netloc.rpartition("@")
  if not at:
    return url, None
  user, _, password = map(urllib.parse.unquote, login.partition(":"))
  return urllib.parse.urlunsplit(parts._replace(netloc=host)), (user, password)


class PatientClient:
  """POSTs JSON with retries behind a circuit breaker; thread-safe."""

  def __init__(
    self,
    url: str,
    spec: RemoteSpec,
    headers: Mapping[str, str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Opens a connection pool; nothing is asked yet.

    Args:
      url: where to post.
      spec: patience.
      headers: of every request; never part of a message, not even where the
        server repeats them.
      sleep, clock: of the retries and the circuit; replaced in tests.
    """
    self.url = public_url(url)
    # As a header, because httpx logs the address of every request.
    self._address, login = _without_login(url)
    self._spec = spec
    self._client = httpx2.Client(
      timeout=spec.timeout_seconds, headers=dict(headers or {}),
      auth=login,
    )
    self._secrets = {
      part for value in (headers or {}).values() for part in value.split()
    }
    self._secrets |= set(login[1:]) if login else set()
    self._secrets -= {"Bearer", ""}
    self._sleep, self._clock = sleep, clock
    self._lock = threading.Lock()
    self._failures = 0
    self._open_until = float("-inf")

  def post(
    self, payload: dict, parse: Callable[[dict], _T], again: bool = False
  ) -> _T:
    """Returns the parsed answer to `payload`.

    Args:
      payload: what is posted, as JSON.
      parse: reads the answer.
      again: part of a request that failed: one attempt, and another failure
        tells nothing new about the server.

    Raises:
      RefusedError: the server answered with an error.
      SearchError: the server failed for good, or the circuit is open.
    """
    with self._lock:
      if self._clock() < self._open_until:
        raise types.SearchError(
          f"{self.url} failed {self._failures} times in a row; asking again "
          f"in {self._open_until - self._clock():.0f} s"
        )
    spec, reason, status = self._spec, "", 0
    for attempt in range(1 if again else spec.retries + 1):
      if attempt:
        pause = spec.backoff_seconds * 2 ** (attempt - 1)
        self._sleep(pause * (1 + random.random()))
      try:
        response = self._client.post(self._address, json=payload)
        if response.status_code == 200:
          parsed = parse(files.encodable(response.json()))
          self._note(failed=False)
          return parsed
        status = response.status_code
        said = self._redacted(response.text)[:200]
        reason = f"{self.url}: status {status}: {said}"
        if 400 <= status < 500 and status not in (408, 429):
          # The same request will not do better, and the server is well.
          self._note(failed=False)
          raise RefusedError(reason, status)
      except (httpx2.HTTPError, *_UNREADABLE) as error:
        status = 0
        reason = f"{self.url}: {type(error).__name__}: " + self._redacted(
          str(error)
        )
    if not again:
      self._note(failed=True)
    raise RefusedError(reason, status) if status else types.SearchError(reason)

  def _redacted(self, text: str) -> str:
    for secret in self._secrets:
      text = text.replace(secret, "[secret]")
    return text

  def _note(self, failed: bool) -> None:
    with self._lock:
      self._failures = self._failures + 1 if failed else 0
      if self._failures >= self._spec.open_after:
        self._open_until = self._clock() + self._spec.open_seconds

  def close(self) -> None:
    """Closes the connections."""
    self._client.close()


class RemoteRetriever:
  """Speaks /retrieve; safe to call from several threads."""

  def __init__(self, url: str, spec: RemoteSpec, **testing: Any):
    """Prepares a client.

    Args:
      url: of the server, with or without /retrieve.
      spec: patience.
      **testing: sleep and clock of `PatientClient`.
    """
    address = url.rstrip("/").removesuffix("/retrieve") + "/retrieve"
    self._client = PatientClient(address, spec, **testing)
    self.url = self._client.url

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage] | None]:
    """Returns the passages of each query, None where the server refused it.

    Raises:
      SearchError: every query failed, or the circuit is open.
    """
    found = []
    for start in range(0, len(queries), _BATCH):
      part = list(queries[start : start + _BATCH])
      try:
        found += self._ask(part, k)
      except RefusedError as error:
        if len(part) == 1 or error.status not in _OF_A_QUERY:
          raise
        found += self._one_by_one(part, k, error)
    return found

  def _ask(self, queries: list[str], k: int, again: bool = False):
    payload = {"queries": queries, "topk": k, "return_scores": True}
    parse = functools.partial(_parse, count=len(queries))
    return self._client.post(payload, parse, again)

  def _one_by_one(self, queries: list[str], k: int, first: RefusedError):
    """Asks the halves of a refused request, and their halves."""
    found: dict[int, list[types.Passage]] = {}
    spans, refused = [(0, len(queries))], []
    while spans:
      start, stop = spans.pop()
      if stop - start > 1:
        middle = (start + stop) // 2
        halves = [(start, middle), (middle, stop)]
      else:
        refused.append(queries[start])
        if not found and len(refused) == _REFUSALS:
          break  # Not the queries are at fault.
        continue
      for half in halves:
        try:
          answers = self._ask(queries[slice(*half)], k, again=True)
          found |= zip(range(*half), answers, strict=True)
        except RefusedError as error:
          if error.status not in _OF_A_QUERY:
            raise
          spans.append(half)
    if not found:
      raise first
    logging.warning("%d of %d queries refused, the first: %.80r",
                    len(refused), len(queries), refused[0])
    return [found.get(i) for i in range(len(queries))]

  def describe(self) -> dict[str, str]:
    """What evaluation cards say about the retrieval."""
    return {"index": self.url, "encoder": "unknown", "passages": "unknown",
            "corpus_hash": "unknown"}

  def close(self) -> None:
    """Closes the connections."""
    self._client.close()


def _parse(body: dict, count: int) -> list[list[types.Passage]]:
  """Passages of a response, in either document schema."""
  results = body["result"]
  if len(results) != count:
    raise types.UserError(f"{len(results)} results for {count} queries")
  out = []
  for found in results:
    passages = []
    for item in found or ():  # Some servers say null for no hits.
      document = item.get("document", item)
      title = document.get("title", "")
      if "contents" in document:
        title, text = fields.split_contents(
          document["contents"], str(title or "")
        )
      else:
        text = document.get("content", document.get("text"))
      if not isinstance(text, str):
        raise types.UserError(f"a document without text: {sorted(document)}")
      identity = document.get("id")
      if identity is None:  # Servers differ; texts always identify.
        identity = types.Passage.of(title, text).id
      passages.append(types.Passage(
        str(identity), title, text, float(item.get("score", 0.0))
      ))
    out.append(passages)
  return out
