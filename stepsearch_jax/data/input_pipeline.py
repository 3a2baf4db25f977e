"""Which questions a step asks: a pure function of (seed, step).

No iterator state exists, so a resumed or re-sharded run asks the same
questions. Epochs are fresh permutations laid end to end: no question is
dropped at an epoch's end and none comes twice before all came once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types


class QuestionStream:
  """Batches of questions by step, the same in every process."""

  def __init__(
    self, questions: Sequence[types.Question], batch_size: int, seed: int
  ):
    """Sets up the stream.

    Args:
      questions: all questions.
      batch_size: questions per step.
      seed: of the permutations.

    Raises:
      UserError: there are no questions, or the batch is empty.
    """
    if not questions or batch_size < 1:
      raise types.UserError(
        f"need questions and a positive batch, got {len(questions)} and "
        f"batch.questions = {batch_size}"
      )
    self._questions = questions
    self._batch = batch_size
    self._seed = seed

  def _order(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(len(self._questions))

  def indices(self, step: int) -> list[int]:
    """Returns the row numbers of the questions at `step`."""
    count = len(self._questions)
    places = np.arange(step * self._batch, (step + 1) * self._batch)
    epochs = (places // count).tolist()
    orders = {epoch: self._order(epoch) for epoch in set(epochs)}
    return [
      int(orders[epoch][place % count])
      for epoch, place in zip(epochs, places, strict=True)
    ]

  def batch(self, step: int) -> list[types.Question]:
    """Returns the questions at `step`."""
    return [self._questions[i] for i in self.indices(step)]
