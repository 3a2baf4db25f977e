"""A web search engine with a Serper-type API behind the Retriever protocol.

The key comes from the environment, goes into one request header and nowhere
else: no log line, error, record or evaluation card holds it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Callable, Sequence

from absl import logging

from stepsearch_jax import types
from stepsearch_jax.retrieval import remote

KEY_VARIABLE = "SERPER_API_KEY"
_URL = "https://google.serper.dev/search"
_AT_ONCE = 8


def api_key() -> str:
  """Returns the key of the environment.

  Raises:
    UserError: there is none.
  """
  key = os.environ.get(KEY_VARIABLE, "")
  if not key:
    raise types.UserError(
      "retrieval.engine = online needs the API key in the environment "
      f"variable {KEY_VARIABLE}"
    )
  return key


class OnlineRetriever:
  """Asks `POST {"q": query, "num": k}`, reads `organic` results."""

  def __init__(
    self, spec: remote.RemoteSpec, url: str = _URL, **testing: Callable
  ):
    """Prepares a client.

    Args:
      spec: patience.
      url: of the API.
      **testing: sleep and clock of `remote.PatientClient`.

    Raises:
      UserError: the environment holds no key.
    """
    self._client = remote.PatientClient(
      url, spec, {"X-API-KEY": api_key()}, **testing
    )

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage] | None]:
    """Returns the first k results of each query, title and snippet.

    None where the engine refused the query or failed.

    Raises:
      SearchError: it did so for every query.
    """
    ask = functools.partial(self._ask, k=k)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      found = list(pool.map(ask, queries))
    errors = [row for row in found if isinstance(row, types.SearchError)]
    if errors and len(errors) == len(found):
      raise errors[0]
    for error in errors:
      logging.warning("one of %d searches failed: %s", len(found), error)
    return [None if isinstance(row, types.SearchError) else row
            for row in found]

  def _ask(self, query: str, k: int) -> list[types.Passage] | types.SearchError:
    if not query.strip():
      return []  # Engines refuse it.
    try:
      return self._client.post(
        {"q": query, "num": k}, functools.partial(_parse, k=k)
      )
    except types.SearchError as error:
      return error

  def describe(self) -> dict[str, str]:
    """What evaluation cards say about the retrieval."""
    return {"index": self._client.url, "encoder": "web search",
            "passages": "unknown", "corpus_hash": "unknown"}

  def close(self) -> None:
    """Closes the connections."""
    self._client.close()


def _parse(body: dict, k: int) -> list[types.Passage]:
  passages = []
  # Without a hit there is no such field.
  for rank, item in enumerate((body.get("organic") or [])[:k]):
    title = str(item.get("title") or "")
    text = str(item.get("snippet") or "")
    link = item.get("link") or types.Passage.of(title, text).id
    digest = hashlib.sha256(link.encode()).hexdigest()[:16]
    # Engines rank without scores; falling ones keep the order when merged.
    passages.append(types.Passage(digest, title, text, 1.0 / (rank + 1)))
  return passages
