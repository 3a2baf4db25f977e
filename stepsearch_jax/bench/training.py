"""Readings of a finished training run, from what it logged."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

from etils import epath

from stepsearch_jax import types
from stepsearch_jax.bench import duel
from stepsearch_jax.run import plots

_WARM_UP, _STEPS = 4, 20


def readings(path: str | None) -> Iterator[duel.Reading]:
  """Recompilations and speed of a run's steps.

  Args:
    path: folder of the run.

  Raises:
    UserError: the run is absent or too short.
  """
  if path is None:
    raise types.UserError(
      "--suite=training reads a run: --input=runs/quickstart"
    )
  records = plots.read_metrics(epath.Path(path) / "metrics.jsonl")
  steps = [
    record for record in records
    if _WARM_UP < record["step"] <= _WARM_UP + _STEPS
  ]
  if len(steps) < _STEPS:
    raise types.UserError(
      f"{path} has {len(steps)} steps after the first {_WARM_UP}, "
      f"{_STEPS} are needed"
    )
  work = f"{_STEPS} training steps of {epath.Path(path).name}"
  for what, name, unit, total, goal in (
    ("recompilations after warm-up", "perf/compilations", "", sum, "0"),
    ("rollout, sampled and ingested tokens a second",
     "perf/tokens_per_second", "", statistics.median, ""),
  ):
    values = [record[name] for record in steps]
    found: Any = functools.partial(total, values)
    yield duel.Reading(what, work, found, goal=goal, unit=unit)
