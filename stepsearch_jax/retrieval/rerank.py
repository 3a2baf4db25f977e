"""A cross-encoder that reorders what another retriever found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import bert
from stepsearch_jax.models.weights import hf as hf_weights
from stepsearch_jax.retrieval.index import encoder as encoder_lib

_LENGTHS = (64, 128, 256, 512)
_ROWS = 16


class RerankingRetriever:
  """Takes `candidates` passages of a retriever, keeps the best by the model."""

  def __init__(
    self, inner: types.Retriever, reference: str, candidates: int = 20
  ):
    """Loads a BERT cross-encoder (one output) such as ms-marco-MiniLM.

    Args:
      inner: the retriever of the candidates.
      reference: HF folder or id, or package:<name>.
      candidates: passages scored per query.

    Raises:
      UserError: the model has another number of outputs.
    """
    import transformers

    path = hf_weights.resolve(reference)
    config, params = bert.load_cross_encoder(path)
    self._inner = inner
    self._reference = reference
    self._candidates = candidates
    self._hf = transformers.AutoTokenizer.from_pretrained(path)
    self._limit = min(config.max_positions, _LENGTHS[-1])
    self._params = jax.device_put(params)
    self._score = jax.jit(functools.partial(bert.relevance, config=config))

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage] | None]:
    """The k passages that the cross-encoder likes best, with its scores."""
    found = self._inner.search(queries, max(k, self._candidates))
    pairs = [
      (query, encoder_lib.passage_text(passage))
      for query, passages in zip(queries, found, strict=True)
      for passage in passages or ()
    ]
    scores = iter(self._scores(pairs))
    best: list[list[types.Passage] | None] = []
    for passages in found:
      if passages is None:
        best.append(None)
        continue
      scored = [
        dataclasses.replace(p, score=float(next(scores))) for p in passages
      ]
      best.append(sorted(scored, key=lambda p: -p.score)[:k])
    return best

  def _scores(self, pairs) -> np.ndarray:
    out = np.empty(len(pairs), np.float32)
    if not pairs:
      return out
    encoded = self._hf(
      [query for query, _ in pairs], [text for _, text in pairs],
      # A query that fills the model by itself is cut too.
      truncation="longest_first", max_length=self._limit,
      return_token_type_ids=True,
    )
    ids, kinds = encoded["input_ids"], encoded["token_type_ids"]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), _ROWS):
      group = order[start : start + _ROWS]
      longest = len(ids[group[-1]])
      length = next(b for b in _LENGTHS if b >= longest)
      shape = (_ROWS, min(length, self._limit))
      tokens, kind = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
      mask = np.zeros(shape, bool)
      mask[:, 0] = True  # Padding rows need one visible token.
      for row, i in enumerate(group):
        tokens[row, : len(ids[i])] = ids[i]
        kind[row, : len(ids[i])] = kinds[i]
        mask[row, : len(ids[i])] = True
      scores = np.asarray(self._score(self._params, tokens, kind, mask))
      out[group] = scores[: len(group)]
    return out

  def close(self) -> None:
    """Closes the retriever of the candidates."""
    types.close_retriever(self._inner)

  def describe(self) -> dict:
    """What evaluation cards say about the retrieval."""
    return {**self._inner.describe(), "reranker": self._reference,
            "candidates": self._candidates}
