"""Where numbers go: JSONL, TensorBoard, and a tracker if asked.

Metric names are verl's (`actor/pg_loss`, `critic/kl`, ...), so that curves of
both projects overlay. One JSON object per line and step; a resumed run cuts
the file back to the step it resumes from, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import logging as std_logging
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.monitoring
from absl import logging
from etils import epath

from stepsearch_jax import buckets, files
from stepsearch_jax.run import trackers

# Of orbax: checkpoints without a score, a policy that is read alone, and the
# error of a background thread, which the main thread raises as well.
_IDLE_WARNINGS = (
  "Requested `tracked_metric`", "_CHECKPOINT_METADATA",
  "Metadata file does not exist", "_SignalingThread.run() raised",
  "Handler Commit operations", "Save Finalize thread",
)
_UPLOAD_SECONDS = 60.0  # Between two copies of TensorBoard's files.
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def quiet_libraries() -> None:
  """Shows this project's log lines and everybody's warnings, nothing else.

  Warnings that every run of ours earns and nobody can act on are left out.
  """
  project = str(epath.Path(__file__).parents[1])
  logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))
  logging.get_absl_handler().addFilter(
    lambda record: record.pathname.startswith(project)
    or (
      record.levelno >= std_logging.WARNING
      and not any(text in str(record.msg) for text in _IDLE_WARNINGS)
    )
  )


class NonFiniteError(RuntimeError):
  """A metric became NaN or infinite; the message names step and metric."""


def check_finite(
  step: int,
  metrics: Mapping[str, float],
  locate: Callable[[], str] = lambda: "",
) -> None:
  """Raises NonFiniteError for the first metric that is NaN or infinite.

  Args:
    step: named in the error.
    metrics: what to check.
    locate: asked for the tensor in which it began, if there is something.
  """
  for name, value in metrics.items():
    if not math.isfinite(value):
      tensor = locate()
      raise NonFiniteError(
        f"step {step}: metric {name} is {value}"
        + (f", first in tensor {tensor}" if tensor else "")
        + "; nothing of this step was saved, the last good checkpoint stands "
        "(try a lower ppo.policy_lr or ppo.value_lr)"
      )


class MetricsWriter:
  """Appends metrics of one run; only the first process writes."""

  def __init__(
    self,
    workdir: epath.PathLike,
    first_step: int,
    tracker: trackers.Tracker | None = None,
    active: bool = True,
  ):
    """Opens the files, dropping records of `first_step` and later.

    Args:
      workdir: local folder or bucket path.
      first_step: the next step that will be written.
      tracker: receives the metrics too.
      active: False on processes that must not write.
    """
    self._active = active
    self._tracker = tracker
    if not active:
      return
    workdir = epath.Path(workdir)
    self._log = files.RowLog(workdir / "metrics.jsonl")
    self._board_folder = workdir / "tensorboard"
    self._board_local = buckets.new_scratch(self._board_folder)
    self._board: Any = None
    self._uploaded = time.monotonic()
    self.rewind(first_step)

  def rewind(self, step: int) -> None:
    """Drops the records of `step` and later."""
    if not self._active:
      return
    self._log.keep(lambda record: record["step"] < step)
    if self._board is not None:
      self._board.close()
    # Here, so that a machine without it can still measure and evaluate.
    import tensorboardX

    self._board = tensorboardX.SummaryWriter(
      str(self._board_local), purge_step=step
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records `metrics` at `step`."""
    if not self._active:
      return
    values = {name: float(value) for name, value in metrics.items()}
    self._log.append({"step": step, **values})
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
      self._board.flush()
      self._upload()
    if self._tracker is not None:
      self._tracker.log(step, values)

  def flush(self) -> None:
    """Returns once all records are in the file, a bucket's included."""
    if self._active:
      self._log.flush()

  def write_rollouts(
    self, step: int, rows: Sequence[Mapping[str, Any]]
  ) -> None:
    """Gives rollouts of `step` to the tracker, a row each."""
    if self._active and self._tracker is not None:
      self._tracker.table(step, rows)

  def _upload(self) -> None:
    """Copies what TensorBoard reads to a bucket, which knows no appending."""
    self._uploaded = time.monotonic()
    if buckets.is_bucket(self._board_folder):
      buckets.publish(self._board_local, self._board_folder, last="")

  def close(self) -> None:
    """Flushes everything to disk."""
    if self._active:
      self._log.close()
      self._board.close()
      self._upload()
      if self._tracker is not None:
        self._tracker.close()


class Profiler:
  """Names every step for a profiler, and records some of them itself."""

  def __init__(self, folder: epath.PathLike, steps: Sequence[int]):
    """Prepares to profile.

    Args:
      folder: where the profile goes; TensorBoard's and xprof's layout.
      steps: (first, last) training step to record, or () for none.
    """
    self._folder = str(folder)
    self._first, self._last = steps or (0, 0)
    self._recording = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Context of training step `number`, counted from 1."""
    if number == self._first:
      jax.profiler.start_trace(self._folder)
      self._recording = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield
    if number == self._last:
      self.close()

  def close(self) -> None:
    """Writes a profile that is still being recorded."""
    if self._recording:
      self._recording = False
      jax.profiler.stop_trace()
      logging.info("profile written: %s", self._folder)


class Compilations:
  """Counts the programs that XLA compiles; any in a late step is a fault.

  A program that the persistent cache holds counts too.
  """

  def __init__(self):
    """Starts at none."""
    self._count = 0
    self.seconds = 0.0  # Of all so far; programs compile side by side.
    me = weakref.ref(self)

    def listen(name: str, seconds: float, **unused) -> None:
      counter = me()
      if name == _COMPILE_EVENT and counter is not None:
        counter._count += 1
        counter.seconds += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    weakref.finalize(
      self, jax.monitoring.unregister_event_duration_listener, listen
    )

  def take(self) -> int:
    """How many since the last call."""
    count, self._count = self._count, 0
    return count


class Stopwatch:
  """Seconds per named phase of a step, verl's `timing_s/<phase>`."""

  def __init__(self):
    """Starts with no phase."""
    self._began = time.perf_counter()
    self._seconds: dict[str, float] = {}

  def time(self, phase: str) -> _Phase:
    """Context manager that adds its duration to `phase`."""
    return _Phase(self._seconds, phase)

  def metrics(self) -> dict[str, float]:
    """Seconds so far, as metrics; `step` is all since the start."""
    whole = time.perf_counter() - self._began
    return {
      f"timing_s/{name}": seconds
      for name, seconds in {**self._seconds, "step": whole}.items()
    }


class _Phase:
  def __init__(self, seconds, phase):
    self._seconds, self._phase = seconds, phase

  def __enter__(self):
    self._began = time.perf_counter()

  def __exit__(self, *unused):
    spent = time.perf_counter() - self._began
    self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
