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
  """Index-addressable batches of questions for one process."""

  def __init__(
    self,
    questions: Sequence[types.Question],
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Sets up the stream.

    Args:
      questions: all questions, the same on every process.
      batch_size: questions of a step over all processes.
      seed: of the permutations.
      shuffle: False asks in file order.
      process_index: which slice of each batch this process gets.
      process_count: number of slices.

    Raises:
      UserError: no questions, or a batch that does not split evenly.
    """
    if not questions or batch_size < 1:
      raise types.UserError(
        f"need questions and a positive batch, got {len(questions)} and "
        f"batch.questions = {batch_size}"
      )
    if batch_size % process_count:
      raise types.UserError(
        f"batch.questions = {batch_size} is not divisible by {process_count} "
        "processes"
      )
    self._questions = questions
    self._batch = batch_size
    self._seed = seed
    self._shuffle = shuffle
    share = batch_size // process_count
    self._slice = slice(process_index * share, (process_index + 1) * share)

  def _order(self, epoch: int) -> np.ndarray:
    if not self._shuffle:
      return np.arange(len(self._questions))
    rng = np.random.default_rng((self._seed, epoch))
    return rng.permutation(len(self._questions))

  def indices(self, step: int) -> list[int]:
    """Row numbers of this process's questions at `step`."""
    count = len(self._questions)
    places = np.arange(step * self._batch, (step + 1) * self._batch)
    orders = {epoch: self._order(epoch) for epoch in set(places // count)}
    rows = [int(orders[place // count][place % count]) for place in places]
    return rows[self._slice]

  def batch(self, step: int) -> list[types.Question]:
    """This process's questions at `step`."""
    return [self._questions[i] for i in self.indices(step)]
