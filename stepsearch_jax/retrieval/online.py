"""A web search engine with a Serper-type API behind the Retriever protocol.

The key comes from the environment, goes into one request header and nowhere
else: no log line, error, record or evaluation card holds it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Sequence

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

  def __init__(self, spec: remote.RemoteSpec, url: str = _URL, **testing):
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
  ) -> list[list[types.Passage]]:
    """The k first results of each query, title and snippet.

    Raises:
      SearchError: the engine failed for good.
    """
    ask = functools.partial(self._ask, k=k)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      return list(pool.map(ask, queries))

  def _ask(self, query: str, k: int) -> list[types.Passage]:
    return self._client.post(
      {"q": query, "num": k}, functools.partial(_parse, k=k)
    )

  def describe(self) -> dict[str, str]:
    """What evaluation cards say about the retrieval."""
    return {"index": self._client.url, "encoder": "web search",
            "passages": "unknown", "corpus_hash": "unknown"}


def _parse(body: dict, k: int) -> list[types.Passage]:
  passages = []
  for rank, item in enumerate(body["organic"][:k]):
    title, text = str(item["title"]), str(item.get("snippet", ""))
    link = item.get("link") or f"{title}\n{text}"
    digest = hashlib.sha256(link.encode()).hexdigest()[:16]
    # Engines rank without scores; falling ones keep the order when merged.
    passages.append(types.Passage(digest, title, text, 1.0 / (rank + 1)))
  return passages
