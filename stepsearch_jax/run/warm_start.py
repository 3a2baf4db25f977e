"""Progress of a warm start: shown, and on disk, so that it can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import checkpoints, live
from stepsearch_jax.run.interrupts import Interrupts, PreemptedError
from stepsearch_jax.sft import imitation

_KEEP_SECONDS = 180.0  # Between two times that it is kept.
_SHOWN_EVERY = 20  # Steps between two lines about it.


class Keeper:
  """Shows the progress of a warm start, keeps it in `workdir/warm_start`.

  It is written when the run is asked to stop and every few minutes; `forget`
  drops it once a checkpoint holds the result.
  """

  def __init__(
    self, workdir: epath.PathLike, about: Mapping[str, Any],
    interrupts: Interrupts,
  ):
    """Opens the folder.

    Args:
      workdir: local folder or bucket path.
      about: JSON-able settings of the warm start, its `steps` among them; the
        progress of one with others does not count.
      interrupts: requests to stop.
    """
    self._about = json.loads(json.dumps(about))
    self._interrupts = interrupts
    self._view = live.View(
      "warm start", about["steps"], distributed.is_primary(), _SHOWN_EVERY
    )
    self._kept = time.monotonic()
    self._folder = _folder(workdir)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=1, cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
      ),
      item_names=("learned", "about"),
    )

  def restore(self, fresh: imitation.Progress) -> imitation.Progress:
    """See `imitation.Keeper`; progress that cannot be read does not count."""
    step = self._manager.latest_step()
    if step is None:
      return fresh
    like = checkpoints.abstract({"params": fresh.params, "opt": fresh.opt})
    try:
      found = self._manager.restore(step, args=ocp.args.Composite(
        about=ocp.args.JsonRestore(), learned=ocp.args.StandardRestore(like),
      ))
      if found["about"] != self._about:
        raise ValueError("it has other settings")
    except Exception as error:  # Whatever a damaged file makes orbax raise.
      logging.warning("warm start from its beginning: what was kept of it does "
                      "not count (%s)", types.first_line(error)[:200])
      for step in self._manager.all_steps():
        self._manager.delete(step)
      return fresh
    logging.info("warm start goes on behind step %d", step)
    return imitation.Progress(
      step, found["learned"]["params"], found["learned"]["opt"]
    )

  def after_step(self, progress: imitation.Progress) -> None:
    """See `imitation.Keeper`.

    Raises:
      PreemptedError: the run was asked to stop; the progress is kept.
    """
    # From the first step on (which compiles) there is something to lose.
    self._interrupts.defer()
    if progress.loss is not None:
      self._view.update(
        progress.step, [live.Measure("loss", live.short(progress.loss))]
      )
    stopping = distributed.any_process(self._interrupts.requested)
    due = time.monotonic() - self._kept > _KEEP_SECONDS
    if not stopping and not distributed.any_process(due):
      return
    self._kept = time.monotonic()
    learned = {"params": progress.params, "opt": progress.opt}
    with checkpoints.writing(self._folder):
      self._manager.save(progress.step, args=ocp.args.Composite(
        about=ocp.args.JsonSave(self._about),
        learned=ocp.args.StandardSave(learned),
      ))
    if stopping:
      self._view.close()
      raise PreemptedError(
        f"stopped after step {progress.step} of the warm start and saved; the "
        "same command goes on"
      )

  def close(self) -> None:
    """Releases the writer, and lets signals stop the run at once again.

    Raises:
      PreemptedError: one came meanwhile.
    """
    self._view.close()
    self._manager.close()
    self._interrupts.allow()


def _folder(workdir: epath.PathLike) -> epath.Path:
  return checkpoints.absolute(workdir) / "warm_start"


def forget(workdir: epath.PathLike) -> None:
  """Drops what a `Keeper` kept."""
  folder = _folder(workdir)
  if distributed.is_primary() and folder.exists():
    folder.rmtree()
