"""Where the wall-clock of a run goes, over all its starts.

Each start appends to `wall_clock.jsonl` in the work directory: every span of
time with what it went to. Nothing is ever taken back, so what a kill or a
rollback made the run do twice still counts, as repeated. Time between two
starts is nobody's; what a killed process did after its last row is not known.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from stepsearch_jax import files
from stepsearch_jax.run import metrics

COMPILE, REPEATED, STEP = "compile", "repeated", "step"


class WallClock:
  """Splits time into spans; the time of compiling is a span of its own."""

  def __init__(self, workdir: epath.PathLike, active: bool = True):
    """Starts the first span.

    Args:
      workdir: of the run.
      active: False on processes that must not write.
    """
    path = epath.Path(workdir) / "wall_clock.jsonl"
    self._log = files.RowLog(path) if active else None
    self._compilations = metrics.Compilations()
    self._compiled = 0.0
    self._began = time.monotonic()

  def lap(self, what: str, step: int | None = None) -> None:
    """Ends a span.

    Args:
      what: where its time went.
      step: number of the training step, where it was one.
    """
    now, compiled = time.monotonic(), self._compilations.seconds
    whole = now - self._began
    compiling = min(compiled - self._compiled, whole)
    self._began, self._compiled = now, compiled
    if self._log is None:
      return
    row = {"what": what, "seconds": whole - compiling}
    self._log.append(row if step is None else row | {"step": step})
    if compiling:
      self._log.append({"what": COMPILE, "seconds": compiling})

  def summary(self, steps: int) -> dict[str, float]:
    """See `summary`; empty where nothing is written.

    Args:
      steps: done at the end.
    """
    return {} if self._log is None else summary(self._log.rows(), steps)

  def close(self) -> None:
    """Ends the last span."""
    self.lap("end")
    if self._log is not None:
      self._log.close()


def spent(rows: Iterable[Mapping[str, Any]], steps: int) -> dict[str, float]:
  """Returns seconds by what they went to.

  A training step counts where the run kept it; where a later row has the same
  or an earlier number, the run had gone back behind it.

  Args:
    rows: of `wall_clock.jsonl`, in order.
    steps: done at the end.
  """
  seconds: dict[str, float] = collections.defaultdict(float)
  kept: list[tuple[int, float]] = []
  for row in rows:
    if row["what"] != STEP:
      seconds[row["what"]] += row["seconds"]
      continue
    while kept and kept[-1][0] >= row["step"]:
      seconds[REPEATED] += kept.pop()[1]
    kept.append((row["step"], row["seconds"]))
  for step, taken in kept:
    seconds[STEP if step <= steps else REPEATED] += taken
  return dict(seconds)


def summary(
  rows: Iterable[Mapping[str, Any]], steps: int
) -> dict[str, float]:
  """Returns all seconds, the share that trained, and where the rest went."""
  seconds = spent(rows, steps)
  whole = sum(seconds.values())
  if not whole:
    return {}
  return {
    "wall_seconds": whole,
    "goodput": seconds.pop(STEP, 0.0) / whole,
    **{f"share_{what}": x / whole for what, x in sorted(seconds.items())},
  }
