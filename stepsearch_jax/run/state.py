"""Everything about a run that changes from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepsearch_jax.ppo import records


@dataclasses.dataclass
class RunState:
  """What a checkpoint holds and a resumed run needs.

  Attributes:
    step: training steps done.
    learner: models, optimizers, controllers and the frozen reference.
    asked: questions asked so far, the place in the question stream.
    baseline: metrics of the evaluation before the first step; None before it.
    best: {"step", "em"} of the best evaluation; None before the first.
    latest: metrics of the newest evaluation; None before the first.
    seconds: spent on the run, over all its starts.
    monitor: memory of `monitor.Sentinel`.
  """

  step: int
  learner: records.LearnerState
  asked: int = 0
  baseline: dict[str, float] | None = None
  best: dict[str, float] | None = None
  latest: dict[str, float] | None = None
  seconds: float = 0.0
  monitor: dict[str, Any] | None = None

  def progress(self) -> dict[str, Any]:
    """The JSON-able part: all but the arrays and the step."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in ("step", "learner")
    }

  def note_evaluation(self, metrics: dict[str, float]) -> None:
    """Takes in the metrics of an evaluation at the current step."""
    if self.baseline is None:
      self.baseline = metrics
    self.latest = metrics
    if self.best is None or metrics["em"] > self.best["em"]:
      self.best = {"step": self.step, "em": metrics["em"]}
