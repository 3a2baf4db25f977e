"""Queries to passages: encode, search, remember."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.retrieval.index import encoder as encoder_lib
from stepsearch_jax.retrieval.index import index as index_lib


class LocalRetriever:
  """Searches an index on this host; safe to call from several threads."""

  def __init__(
    self,
    index: index_lib.Index,
    encoder: encoder_lib.Encoder,
    cache_size: int = 65536,
  ):
    """Wraps an opened index.

    Args:
      index: what to search.
      encoder: how its passages were embedded.
      cache_size: remembered (k, query) pairs, least recent dropped first.
    """
    self.index = index
    self._encoder = encoder
    self._cache: collections.OrderedDict = collections.OrderedDict()
    self._cache_size = cache_size
    self._lock = threading.Lock()

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """Returns up to k passages of each query, best first, with scores.

    Passages that share nothing with the query count as not found.
    """
    with self._lock:
      known = {
        query: self._cache[k, query]
        for query in set(queries)
        if (k, query) in self._cache
      }
    missing = [q for q in dict.fromkeys(queries) if q not in known]
    if missing:
      vectors = self._encoder.encode(missing, "query")
      rows, scores = self.index.search(vectors, k)
      for query, row, score in zip(missing, rows, scores, strict=True):
        known[query] = [
          dataclasses.replace(self.index.passages[int(i)], score=float(s))
          for i, s in zip(row, score, strict=True)
          if self._is_hit(s)
        ]
    with self._lock:
      for query in dict.fromkeys(queries):
        self._cache[k, query] = known[query]
        self._cache.move_to_end((k, query))
      while len(self._cache) > self._cache_size:
        self._cache.popitem(last=False)
    return [list(known[query]) for query in queries]

  def _is_hit(self, score: float) -> bool:
    if np.isnan(score):  # The search found fewer than it was asked for.
      return False
    return score > 0 if self._encoder.counts_words else score != 0

  def describe(self) -> dict[str, str | int]:
    """What evaluation cards say about the retrieval."""
    manifest = self.index.manifest
    return {
      "index": self.index.hash,
      "encoder": manifest["encoder"]["name"],
      "passages": manifest["count"],
      "corpus_hash": manifest["corpus"],
    }


class EmptyRetriever:
  """Finds nothing: stands in where another process asks for all."""

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """No passages for each query."""
    del k
    return [[] for _ in queries]

  def describe(self) -> dict:
    """Nothing to say."""
    return {}


def open_retriever(
  folder: epath.PathLike,
  encoder: encoder_lib.Encoder,
  corpus_hash: str | None = None,
  cache_size: int = 65536,
) -> LocalRetriever:
  """Opens an index folder for searching; see `index.open_index`."""
  index = index_lib.open_index(folder, encoder, corpus_hash)
  return LocalRetriever(index, encoder, cache_size)
