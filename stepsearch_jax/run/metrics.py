"""Where numbers go: JSONL, TensorBoard, wandb if asked, a progress bar.

Metric names are verl's (`actor/pg_loss`, `critic/kl`, ...), so that curves of
both projects overlay. One JSON object per line and step; a resumed run cuts
the file back to the step it resumes from, so no step appears twice.
"""

from __future__ import annotations

import contextlib
import logging as std_logging
import math
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.monitoring
import tqdm
from absl import logging
from etils import epath

from stepsearch_jax import buckets, files

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
    wandb_project: str = "",
    run_config: Mapping | None = None,
    active: bool = True,
  ):
    """Opens the files, dropping records of `first_step` and later.

    Args:
      workdir: local folder or bucket path.
      first_step: the next step that will be written.
      wandb_project: also log there when not empty.
      run_config: hyperparameters, logged once to wandb.
      active: False on processes that must not write.
    """
    self._active = active
    self._wandb: Any = None
    if not active:
      return
    workdir = epath.Path(workdir)
    self._log = files.RowLog(workdir / "metrics.jsonl")
    self._board_folder = workdir / "tensorboard"
    self._board_local = buckets.new_scratch(self._board_folder)
    self._board: Any = None
    self._uploaded = time.monotonic()
    self.rewind(first_step)
    if wandb_project:
      self._wandb = _open_wandb(wandb_project, workdir, run_config or {})

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
    if self._wandb is not None:
      self._wandb.log(values, step=step)

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
      if self._wandb is not None:
        self._wandb.finish()


def _open_wandb(
  project: str, workdir: epath.Path, run_config: Mapping[str, Any]
) -> Any:
  """Opens the run's page, the one that it has already where it resumes.

  Its id lies in the work directory.
  """
  import wandb  # Only this path needs the extra.

  path = workdir / "wandb_id"
  if not path.exists():
    files.write_text(path, uuid.uuid4().hex[:16])
  return wandb.init(
    project=project, id=path.read_text().strip(), resume="allow",
    dir=str(buckets.scratch(workdir / "wandb")), config=public(run_config),
  )


def public(value: Any) -> Any:
  """Returns settings without logins, keys and queries of URLs in them."""
  from stepsearch_jax.retrieval import remote  # Slow to import.

  if isinstance(value, Mapping):
    return {name: public(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [public(inner) for inner in value]
  if isinstance(value, str) and "://" in value:
    return remote.public_url(value)
  return value


class Progress:
  """A bar over training steps with the numbers that one watches."""

  def __init__(self, total: int, done: int = 0, active: bool = True,
               label: str = "train"):
    """Starts a bar at `done` of `total` steps."""
    self._bar = tqdm.tqdm(
      total=total, initial=done, desc=label, dynamic_ncols=True, unit="step",
      disable=not active, mininterval=0.5,
    )

  def update(self, **shown: float) -> None:
    """Advances one step and shows `shown`, three digits each."""
    self._bar.set_postfix(
      {name: f"{value:.3g}" for name, value in shown.items()}, refresh=False
    )
    self._bar.update(1)

  def rewind(self, step: int) -> None:
    """Goes back to `step`."""
    self._bar.n = step
    self._bar.refresh()

  def close(self) -> None:
    """Leaves the finished bar on the screen."""
    self._bar.close()


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
    me = weakref.ref(self)

    def listen(name: str, seconds: float, **unused) -> None:
      del seconds
      if name == _COMPILE_EVENT and me() is not None:
        me()._count += 1

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
    self._seconds: dict[str, float] = {}

  def time(self, phase: str) -> _Phase:
    """Context manager that adds its duration to `phase`."""
    return _Phase(self._seconds, phase)

  @property
  def total(self) -> float:
    """Seconds of all phases."""
    return sum(self._seconds.values())

  def metrics(self) -> dict[str, float]:
    """Seconds so far, as metrics."""
    return {f"timing_s/{k}": v for k, v in self._seconds.items()}


class _Phase:
  def __init__(self, seconds, phase):
    self._seconds, self._phase = seconds, phase

  def __enter__(self):
    self._began = time.perf_counter()

  def __exit__(self, *unused):
    spent = time.perf_counter() - self._began
    self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent
