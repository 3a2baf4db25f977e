"""What a search returns when retrieval is not what is measured.

Two controls of an evaluation: with passages drawn at random nothing can be
learned from searching (closed book), with the gold passages in their order
nothing depends on the queries (oracle retrieval).
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.rollout import recorder, text_side


class Documents(enum.StrEnum):
  """What the policy is shown when it searches."""

  FOUND = "found"  # What the retriever finds.
  RANDOM = "random"  # Any passages of the corpus.
  GOLD = "gold"  # The question's supporting passages, one search's worth each.


class RandomDocuments(text_side.TextSide):
  """Shows passages that have nothing to do with the query."""

  def __init__(
    self, env: search_env.SearchEnv, tokenizer: tokenizer_lib.Tokenizer,
    corpus: Sequence[types.Passage],
  ):
    """Draws from `corpus`."""
    super().__init__(env, tokenizer)
    self._corpus = corpus

  def documents(
    self, record: recorder.Recorder, found: Sequence[types.Passage] | None
  ) -> Sequence[types.Passage]:
    """Returns passages that depend on question and turn alone."""
    del found
    drawn = np.random.default_rng(
      (zlib.crc32(record.question.id.encode()), len(record.turns))
    ).integers(len(self._corpus), size=self.topk)
    return [self._corpus[int(place)] for place in drawn]


class GoldDocuments(text_side.TextSide):
  """Shows the supporting passages in order, whatever the query."""

  def prompt(self, question: types.Question) -> list[int]:
    """Returns the tokens of a question's prompt.

    Raises:
      UserError: the question has no supporting passages.
    """
    types.expect(
      bool(question.support), "rollout.documents=gold",
      "supporting passages for every question", f"none for {question.id}",
    )
    return super().prompt(question)

  def documents(
    self, record: recorder.Recorder, found: Sequence[types.Passage] | None
  ) -> Sequence[types.Passage]:
    """Returns the next supporting passages; the last ones stay the last."""
    del found
    support, size = record.question.support, self.topk
    last = (len(support) - 1) // size
    searched = sum(turn.action == types.Action.SEARCH for turn in record.turns)
    first = min(searched, last) * size
    return support[first : first + size]
