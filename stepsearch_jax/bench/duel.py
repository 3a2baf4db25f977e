"""Two ways to do the same work, measured in turns; and single readings."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import tqdm

MIN_REPEATS = 3  # Of which a median is worth showing.

# Threads of the other side's OpenMP spin for a while after their last work.
_SETTLE = 0.3


@dataclasses.dataclass
class Measured:
  """A result whose cost is not the wall time of the whole call."""

  result: Any
  amount: float


@dataclasses.dataclass
class Duel:
  """One comparison.

  Attributes:
    what: what is done.
    work: size of the workload in words.
    peer: name of the other way.
    ours, theirs: do the whole work and return its result, or a `Measured`.
    same: raises when the two results are not the same work.
    goal: what was asked of the ratio, in words.
    unit: of the amounts; seconds unless the sides measure something else.
    warm_up: a first call of ours does not count (compilation); likewise
    peer_warm_up: of the peer.
  """

  what: str
  work: str
  peer: str
  ours: Callable
  theirs: Callable
  same: Callable
  goal: str = ""
  unit: str = "s"
  warm_up: bool = True
  peer_warm_up: bool = False

  def measure(self, repeats: int, before: dict | None = None) -> Iterator[dict]:
    """Yields medians of the alternating repeats so far, after each of them.

    Args:
      repeats: how many are wanted, those of `before` among them.
      before: what an earlier call yielded, to go on from.

    Raises:
      whatever `same` does, for the first results of every call.
    """
    earlier = before["repeats"] if before else {"ours": [], "peer": []}
    amounts = {side: list(x) for side, x in earlier.items()}
    turns = range(len(amounts["ours"]), repeats)
    if not turns:
      return
    # Models change from call to call: the first calls are what can be compared.
    first = [
      _timed(side) if warm_up else None
      for side, warm_up in (
        (self.ours, self.warm_up), (self.theirs, self.peer_warm_up)
      )
    ]
    for turn in tqdm.tqdm(
      turns, desc=f"{self.what} | {self.peer}", leave=False,
      initial=turns.start, total=repeats,
    ):
      ours, theirs = _timed(self.ours), _timed(self.theirs)
      if turn == turns.start:
        self.same((first[0] or ours).result, (first[1] or theirs).result)
      amounts["ours"].append(ours.amount)
      amounts["peer"].append(theirs.amount)
      medians = {side: statistics.median(x) for side, x in amounts.items()}
      yield {
        "what": self.what, "work": self.work, "peer_name": self.peer,
        "goal": self.goal, "unit": self.unit, **medians,
        "ratio": medians["peer"] / medians["ours"], "repeats": amounts,
      }


@dataclasses.dataclass
class Reading:
  """One figure of ours that has no peer.

  Attributes:
    what, work, goal, unit: see `Duel`.
    read: returns the figure.
    warm_up: a first call differs (compilation) and does not count.
    once: repeats would find the same.
  """

  what: str
  work: str
  read: Callable[[], float]
  goal: str = ""
  unit: str = ""
  warm_up: bool = False
  once: bool = False

  def measure(self, repeats: int, before: dict | None = None) -> Iterator[dict]:
    """Yields the median of the repeats, or nothing if `before` has them."""
    repeats = 1 if self.once else repeats
    if before and len(before["repeats"]) >= repeats:
      return
    turns = tqdm.trange(repeats + self.warm_up, desc=self.what, leave=False)
    values = [self.read() for _ in turns][self.warm_up :]
    yield {
      "what": self.what, "work": self.work, "goal": self.goal,
      "unit": self.unit, "value": statistics.median(values), "repeats": values,
    }


def _timed(call: Callable) -> Measured:
  time.sleep(_SETTLE)
  began = time.perf_counter()
  result = call()
  seconds = time.perf_counter() - began
  if isinstance(result, Measured):
    return result
  return Measured(result, seconds)
