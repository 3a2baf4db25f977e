"""Which questions are asked: a pure function of the seed and a place.

No iterator state exists but how many were asked, so a resumed or re-sharded
run asks the same questions. Epochs are fresh permutations laid end to end: no
question is dropped at an epoch's end and none comes twice before all came once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types


class QuestionStream:
  """An endless row of questions, the same in every process."""

  def __init__(self, questions: Sequence[types.Question], seed: int):
    """Sets up the stream.

    Args:
      questions: all questions.
      seed: of the permutations.

    Raises:
      UserError: there are no questions.
    """
    types.expect(bool(questions), "data.train", "at least one question", 0)
    self._questions = questions
    self._seed = seed

  def _order(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(len(self._questions))

  def indices(self, first: int, count: int) -> list[int]:
    """Returns the numbers of the `count` questions from place `first` on."""
    total = len(self._questions)
    places = [divmod(place, total) for place in range(first, first + count)]
    orders = {epoch: self._order(epoch) for epoch in {e for e, _ in places}}
    return [int(orders[epoch][place]) for epoch, place in places]

  def take(self, first: int, count: int) -> list[types.Question]:
    """Returns the `count` questions from place `first` on."""
    return [self._questions[i] for i in self.indices(first, count)]
