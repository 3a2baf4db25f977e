"""A retriever behind somebody's /retrieve, with a limit to its patience.

Every request has a timeout and a few retries with growing pauses. After
several searches in a row have failed for good the circuit opens: for a while
searches fail at once instead of stalling every rollout on a dead server.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import httpx2

from stepsearch_jax import files, types

_BATCH = 256  # Queries per request.
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

  def post(self, payload: dict, parse: Callable[[dict], _T]) -> _T:
    """Parsed answer to `payload`.

    Raises:
      SearchError: the server failed for good, or the circuit is open.
    """
    with self._lock:
      if self._clock() < self._open_until:
        raise types.SearchError(
          f"{self.url} failed {self._failures} times in a row; asking again "
          f"in {self._open_until - self._clock():.0f} s"
        )
    spec, reason = self._spec, ""
    for attempt in range(spec.retries + 1):
      if attempt:
        pause = spec.backoff_seconds * 2 ** (attempt - 1)
        self._sleep(pause * (1 + random.random()))
      try:
        response = self._client.post(self._address, json=payload)
        if response.status_code == 200:
          parsed = parse(files.encodable(response.json()))
          self._note(failed=False)
          return parsed
        said = self._redacted(response.text)[:200]
        reason = f"status {response.status_code}: {said}"
        if 400 <= response.status_code < 500 and response.status_code != 429:
          break  # The same request will not do better.
      except (httpx2.HTTPError, *_UNREADABLE) as error:
        reason = f"{type(error).__name__}: {self._redacted(str(error))}"
    self._note(failed=True)
    raise types.SearchError(f"{self.url}: {reason}")

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

  def __init__(self, url: str, spec: RemoteSpec, **testing):
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
  ) -> list[list[types.Passage]]:
    """The k best passages of each query.

    Raises:
      SearchError: the server failed for good, or the circuit is open.
    """
    found = []
    for start in range(0, len(queries), _BATCH):
      part = list(queries[start : start + _BATCH])
      payload = {"queries": part, "topk": k, "return_scores": True}
      found += self._client.post(
        payload, functools.partial(_parse, count=len(part))
      )
    return found

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
    for item in found:
      document = item.get("document", item)
      if "contents" in document:
        title, _, text = document["contents"].partition("\n")
      else:
        title = document.get("title", "")
        text = document.get("content", document.get("text"))
      if not isinstance(text, str):
        raise types.UserError(f"a document without text: {sorted(document)}")
      # Servers differ in whether documents have ids; texts always identify.
      digest = hashlib.sha256(f"{title}\n{text}".encode()).hexdigest()[:16]
      passages.append(types.Passage(
        str(document.get("id", digest)), title, text,
        float(item.get("score", 0.0)),
      ))
    out.append(passages)
  return out
