"""TF-IDF similarity of gold paragraphs and documents, many at once.

The reward refits TF-IDF on {document} + gold paragraphs for every retrieved
document. Those small problems share the gold part, so all of them are solved
by a few matrix products: with document j, idf_j differs from the gold-only
document frequencies only where j has the term.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Sequence

import numpy as np

from stepsearch_jax.rewards import text_match

_TOKEN = re.compile(r"\b\w\w+\b")


class EmptyVocabularyError(ValueError):
  """Neither the document nor the gold paragraphs hold a scorable word."""


@functools.lru_cache(maxsize=1 << 15)
def _counts(text: str) -> collections.Counter:
  """Term counts of a normalized text, scikit-learn's default tokens."""
  return collections.Counter(_TOKEN.findall(text))


@functools.lru_cache(maxsize=4096)
def _gold_matrix(golds: tuple[str, ...]) -> tuple[dict[str, int], np.ndarray]:
  """(term -> column, [n, V] counts) of the gold paragraphs."""
  columns: dict[str, int] = {}
  for gold in golds:
    for term in _counts(gold):
      columns.setdefault(term, len(columns))
  matrix = np.zeros((len(golds), len(columns)))
  for row, gold in enumerate(golds):
    for term, count in _counts(gold).items():
      matrix[row, columns[term]] = count
  return columns, matrix


def forget() -> None:
  """Empties the caches of texts seen before, for measurements."""
  _counts.cache_clear()
  _gold_matrix.cache_clear()


def similarities(
  golds: Sequence[str], documents: Sequence[str], strict: bool = False
) -> np.ndarray:
  """Cosine TF-IDF similarity of every gold paragraph and document.

  Equals scikit-learn's TfidfVectorizer defaults fitted per document on
  {document} + golds, after `normalize_answer` on every text.

  Args:
    golds: n gold paragraphs.
    documents: m retrieved documents.
    strict: raise where scikit-learn would; otherwise such a pair scores 0.

  Returns:
    [n, m] float64 in [0, 1].

  Raises:
    EmptyVocabularyError: `strict` and a document that is not empty shares
      with the golds not a single word of two characters.
  """
  golds = tuple(text_match.normalize_answer(gold) for gold in golds)
  documents = [text_match.normalize_answer(doc) for doc in documents]
  if not golds or not documents:
    return np.zeros((len(golds), len(documents)))
  columns, gold = _gold_matrix(golds)
  count = np.zeros((len(documents), len(columns)))
  outside = np.zeros(len(documents))
  for row, document in enumerate(documents):
    for term, times in _counts(document).items():
      column = columns.get(term)
      if column is None:
        outside[row] += times * times
      else:
        count[row, column] = times
    if strict and document and not columns and not outside[row]:
      raise EmptyVocabularyError(
        f"no word of two or more characters in document {document[:40]!r} "
        "and the gold paragraphs"
      )
  total = len(golds) + 2  # n gold paragraphs, one document, smoothing.
  frequency = (gold > 0).sum(0) + (count > 0)
  idf2 = (np.log(total / (1.0 + frequency)) + 1.0) ** 2
  lone = (np.log(total / 2.0) + 1.0) ** 2
  dot = gold @ (count * idf2).T
  gold_norm = np.sqrt((gold * gold) @ idf2.T)
  document_norm = np.sqrt((count * count * idf2).sum(1) + outside * lone)
  norm = gold_norm * document_norm
  return np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)
