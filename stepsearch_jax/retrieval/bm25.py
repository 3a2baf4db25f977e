"""BM25 (Robertson et al., 1995) through bm25s, over a corpus in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.retrieval.index import corpus as corpus_lib
from stepsearch_jax.retrieval.index import encoder as encoder_lib

MISSING = "retrieval.engine = bm25 needs the extra: pip install -e \".[bm25]\""


class Bm25Retriever:
  """Ranks passages by BM25 of title and text."""

  def __init__(self, passages: Sequence[types.Passage]):
    """Indexes passages.

    Args:
      passages: at least one.

    Raises:
      UserError: bm25s is not installed.
    """
    try:
      import bm25s
    except ImportError as error:
      raise types.UserError(MISSING) from error
    self._tokenize = lambda texts: bm25s.tokenize(
      texts, stopwords="en", show_progress=False
    )
    self._passages = list(passages)
    self._bm25 = None
    tokens = self._tokenize(
      [encoder_lib.passage_text(p) for p in self._passages]
    )
    if any(len(row) for row in tokens.ids):  # Else nothing can be found.
      self._bm25 = bm25s.BM25()
      self._bm25.index(tokens, show_progress=False)

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """Returns up to k passages of each query, best first, with scores.

    A passage that shares no word with the query is not found.
    """
    if not queries or self._bm25 is None:
      return [[] for _ in queries]
    rows, scores = self._bm25.retrieve(
      self._tokenize(list(queries)), k=min(k, len(self._passages)),
      show_progress=False,
    )
    return [
      [
        dataclasses.replace(self._passages[i], score=float(s))
        for i, s in zip(row, score, strict=True) if s > 0
      ]
      for row, score in zip(rows, scores, strict=True)
    ]

  def describe(self) -> dict[str, str | int]:
    """What evaluation cards say about the retrieval."""
    digest = corpus_lib.corpus_hash(self._passages)
    return {"index": f"bm25:{digest}", "encoder": "bm25",
            "passages": len(self._passages), "corpus_hash": digest}
