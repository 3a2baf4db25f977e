"""What a run shows while it trains.

On a terminal a table of the numbers that one watches, with the alarms that
stand; elsewhere (a cluster's log, several processes) plain lines. It only
shows: numbers and alarms are made by others.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from stepsearch_jax.run.state import RunState

_PACE_STEPS = 20  # Over which the time that a step takes is averaged.
_LONGEST_SILENCE = 30.0  # Seconds without a plain line, where steps are slow.


@dataclasses.dataclass(frozen=True)
class Measure:
  """A number to watch: name, value in text, and what the table adds to it."""

  name: str
  value: str
  remark: str = ""


def short(value: float) -> str:
  """Returns a number in few characters: 27500, 3.4, .61, .0021."""
  if abs(value) >= 10:
    return f"{value:.0f}"
  if abs(value) >= 1:
    return f"{value:.1f}"
  text = f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
  return text.replace("0.", ".", 1)


def duration(seconds: float) -> str:
  """Returns a time in its two largest units: 2h05m, 4m10s, 35s."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}h{minutes:02d}m"
  return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def training(values: Mapping[str, float], state: RunState) -> list[Measure]:
  """Returns what to watch of a training step.

  Args:
    values: metrics of the step.
    state: of the run, evaluated at least once.
  """
  assert state.latest and state.baseline and state.best
  em, best = state.latest["em"], state.best["em"]
  evaluated = (
    f"held out; {em - state.baseline['em']:+.3f} since the start, "
    f"{em - best:+.3f} since the best (step {state.best['step']})"
  )
  watched = [
    ("reward", values["critic/score/mean"], "mean"),
    ("EM", em, evaluated),
    ("searches", values["env/searches_per_question"], "per question"),
    ("length", values["response_length/mean"], "tokens that the policy wrote"),
    ("kl", values["critic/kl"], "to the start, nats per token"),
    ("tok/s", values["perf/tokens_per_second"], "of the rollout"),
  ]
  return [
    Measure(name, short(value), remark) for name, value, remark in watched
  ]


class Pace:
  """How fast steps follow each other, from the latest ones."""

  def __init__(self):
    """Starts without a step."""
    self._marks: collections.deque[tuple[int, float]] = collections.deque(
      maxlen=_PACE_STEPS + 1
    )

  def note(self, step: int, now: float) -> None:
    """Takes note that `step` ended at `now`, in seconds."""
    if self._marks and step <= self._marks[-1][0]:  # The run went back.
      self._marks.clear()
    self._marks.append((step, now))

  def left(self, total: int) -> float | None:
    """Seconds until step `total`; None until two steps are known."""
    if len(self._marks) < 2:
      return None
    (first, began), (last, ended) = self._marks[0], self._marks[-1]
    return (ended - began) / (last - first) * (total - last)


class View:
  """Shows the steps of one part of a run."""

  def __init__(
    self, label: str, total: int, active: bool = True, every: int = 1
  ):
    """Shows nothing yet.

    Args:
      label: what is counted, for instance "step".
      total: how many there will be.
      active: False on processes that show nothing.
      every: steps between two plain lines, where they are fast.
    """
    self._label, self._total, self._every = label, total, every
    self._active = active
    self._pace = Pace()
    self._spoke = time.monotonic()  # When the latest plain line was printed.
    self._live: Any = None

  @property
  def _on_terminal(self) -> bool:
    return (sys.stderr.isatty() and jax.process_count() == 1
            and os.environ.get("TERM") != "dumb")

  def update(
    self, step: int, measures: Sequence[Measure], alarms: Sequence[str] = ()
  ) -> None:
    """Shows a step that is done.

    Args:
      step: its number, from 1 on.
      measures: what to watch.
      alarms: sentences that hold now; the log has them too.
    """
    now = time.monotonic()
    self._pace.note(step, now)
    if not self._active:
      return
    if self._live is not None or self._on_terminal:
      self._draw(step, measures, alarms)
    elif (step % self._every == 0 or step == self._total
          or now - self._spoke > _LONGEST_SILENCE):
      self._spoke = now
      print(self._line(step, measures), file=sys.stderr, flush=True)

  def _left(self) -> str:
    left = self._pace.left(self._total)
    return "" if left is None else duration(left)

  def _line(self, step: int, measures: Sequence[Measure]) -> str:
    parts = [f"{self._label} {step}/{self._total}"]
    parts += [f"{measure.name} {measure.value}" for measure in measures]
    left = self._left()
    return " ".join([*parts, f"left {left}"] if left else parts)

  def _draw(
    self, step: int, measures: Sequence[Measure], alarms: Sequence[str]
  ) -> None:
    # Here, because only a terminal needs it.
    from rich import console, live, progress_bar, table, text

    grid = table.Table.grid(padding=(0, 2))
    left = self._left()
    grid.add_row(
      self._label, f"{step}/{self._total}", progress_bar.ProgressBar(
        self._total, step, width=40
      ),
    )
    for measure in measures:
      grid.add_row(measure.name, text.Text(measure.value, "bold"),
                   text.Text(measure.remark, "dim"))
    if left:
      grid.add_row("left", text.Text(left, "bold"))
    shown = console.Group(
      grid, *(text.Text(f"! {alarm}", "bold red") for alarm in alarms)
    )
    if self._live is None:
      self._live = live.Live(
        console=console.Console(stderr=True), auto_refresh=False
      )
      self._live.start()
      # A process that is ended leaves no terminal without a cursor.
      self._live.console.show_cursor(True)
      _log_to_stderr()  # Which prints above the table now.
    self._live.update(shown, refresh=True)

  def pause(self) -> None:
    """Leaves the table on the screen, for others that show their progress.

    The next update starts another one.
    """
    if self._live is not None:
      self._live.stop()
      self._live = None
      _log_to_stderr()

  def close(self) -> None:
    """Leaves what was shown last on the screen."""
    self.pause()


def _log_to_stderr() -> None:
  """Points the log at what sys.stderr is now."""
  logging.get_absl_handler().python_handler.setStream(sys.stderr)
