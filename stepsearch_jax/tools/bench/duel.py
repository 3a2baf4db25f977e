"""Two ways to do the same work, measured in turns."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable


@dataclasses.dataclass
class Duel:
  """One comparison.

  Attributes:
    what: what is done.
    work: size of the workload in words.
    peer: name of the other way.
    ours, theirs: do the whole work and return its result.
    same: raises when the two results are not the same work.
  """

  what: str
  work: str
  peer: str
  ours: Callable
  theirs: Callable
  same: Callable


def measure(duel: Duel, repeats: int) -> dict:
  """Medians of alternating repeats after one checked warm-up of each."""
  duel.same(duel.ours(), duel.theirs())
  seconds = {"ours": [], "theirs": []}
  for _ in range(repeats):
    for side in seconds:
      began = time.perf_counter()
      getattr(duel, side)()
      seconds[side].append(time.perf_counter() - began)
  ours, theirs = map(statistics.median, seconds.values())
  return {
    "what": duel.what, "work": duel.work, "peer": duel.peer,
    "ours_seconds": ours, "peer_seconds": theirs, "ratio": theirs / ours,
    "repeats": seconds,
  }
