"""Checkpoints of a run, via orbax.

A checkpoint is complete or absent: orbax writes to a temporary folder and
renames it. Everything a step depends on is inside or follows from the step
number (the question stream and all random keys are functions of it), so a
resumed run repeats the uninterrupted one. Whose run it is, `identity` knows.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from absl import logging
from etils import epath

from stepsearch_jax import buckets, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.ppo import records
from stepsearch_jax.run.state import RunState

# In the words of tensorstore and of the system.
_NOT_WRITTEN = re.compile(
  "No space left on device|Disk quota exceeded|Permission denied|"
  "Read-only file system|Input/output error|PERMISSION_DENIED"
)


class CheckpointMismatchError(types.UserError):
  """The checkpoint belongs to another model."""


class Checkpointer:
  """Saves and restores the state of one run in `workdir/checkpoints`."""

  def __init__(self, workdir: epath.PathLike, keep: int):
    """Opens the folder.

    Args:
      workdir: local folder or bucket path.
      keep: how many checkpoints to retain; the one with the best EM is kept
        besides.
    """
    self._folder = absolute(workdir) / "checkpoints"
    best = policies.BestN(
      get_metric_fn=lambda scores: scores["em"], n=1,
      keep_checkpoints_without_metrics=False,
    )
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
          [policies.LatestN(keep), best]
        ),
        # Without this orbax keeps no scores for the policy to look at.
        best_fn=lambda scores: scores["em"],
        cleanup_tmp_directories=True,
      ),
      item_names=("policy", "rest", "progress"),
    )

  def save(self, state: RunState) -> None:
    """Writes a checkpoint in the background; a saved step is a no-op.

    The policy is an item of its own, so that evaluation reads only that. The
    reference is not written: `save_reference` does that once.

    Raises:
      UserError: an earlier one could not be written, for instance to a full
        disk; `wait` and `close` likewise.
    """
    if state.step in self._manager.all_steps():
      return
    is_best = state.best is not None and state.best["step"] == state.step
    saved = state.learner.split()
    with writing(self._folder):
      self._manager.save(
        state.step,
        args=ocp.args.Composite(
          policy=ocp.args.StandardSave(saved.policy),
          rest=ocp.args.StandardSave(saved.rest),
          progress=ocp.args.JsonSave(state.progress()),
        ),
        metrics={"em": state.best["em"]} if is_best else None,
      )

  def restore(self, like: RunState) -> RunState | None:
    """Reads the newest readable checkpoint.

    Unreadable ones are set aside under another name, so that their steps can
    be saved again.

    Args:
      like: shapes and places of the run's state; its reference is kept.

    Returns:
      The state, or None when there is no checkpoint.

    Raises:
      CheckpointMismatchError: the newest is of another model.
      UserError: checkpoints exist but none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        return self._read(step, like)
      except CheckpointMismatchError:
        raise
      except Exception as error:  # Whatever a damaged file makes orbax raise.
        logging.error(
          "checkpoint %s/%d cannot be read (%s: %s); trying the one before",
          self._folder, step, type(error).__name__,
          types.first_line(error)[:200],
        )
        self._set_aside(step)
    if steps:
      raise types.UserError(
        f"none of the checkpoints {steps} in {self._folder} can be read; "
        "remove the folder to start anew"
      )
    return None

  def _read(self, step: int, like: RunState) -> RunState:
    saved = like.learner.split()
    _check_shapes(self._folder / str(step) / "policy", saved.policy)
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        policy=ocp.args.StandardRestore(abstract(saved.policy)),
        rest=ocp.args.StandardRestore(abstract(saved.rest)),
        progress=ocp.args.JsonRestore(),
      ),
    )
    found = records.SavedState(items["policy"], items["rest"])
    return RunState(
      step, found.join(like.learner.reference), **items["progress"]
    )

  def _set_aside(self, step: int) -> None:
    """Renames an unreadable checkpoint, so that nothing takes it for one."""
    if jax.process_index() == 0:
      broken = self._folder / str(step)
      if broken.exists():
        broken.rename(self._folder.parent / f"unreadable_checkpoint_{step}")
    distributed.wait("unreadable checkpoint set aside")
    self._manager.reload()

  def rewind(self, like: RunState, before: int) -> RunState:
    """Drops the checkpoints from step `before` on; then see `restore`.

    Raises:
      UserError: there is no older one.
    """
    self.wait()
    for step in self._manager.all_steps():
      if step >= before:
        self._manager.delete(step)
    found = self.restore(like)
    if found is None:
      raise types.UserError(
        f"{self._folder} has no checkpoint before step {before} to roll back "
        "to: raise checkpoint.keep"
      )
    return found

  def wait(self) -> None:
    """Blocks until background writes are on disk."""
    with writing(self._folder):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the writer threads."""
    with writing(self._folder):
      self._manager.close()


def save_reference(
  workdir: epath.PathLike, params: types.Tree, dtype: jax.typing.DTypeLike
) -> None:
  """Writes the frozen reference policy of a fresh run, in the compute type.

  Nothing is lost: the forward pass casts every weight to it anyway.

  One that is there already is replaced: it can only stem from a start that
  never reached its first checkpoint, maybe with other settings.
  """
  folder = absolute(workdir) / "reference"
  with writing(folder), ocp.StandardCheckpointer() as writer:
    writer.save(
      folder, jax.tree.map(lambda x: x.astype(dtype), params), force=True
    )


def load_reference(workdir: epath.PathLike, like: types.Tree) -> types.Tree:
  """Reads what `save_reference` wrote.

  Raises:
    UserError: the run has no reference.
  """
  folder = absolute(workdir) / "reference"
  if not folder.exists():
    raise types.UserError(
      f"{folder} is missing: cannot resume without the "
      "reference policy; start in a fresh --workdir"
    )
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(folder, abstract(like))


def load_policy(
  workdir: epath.PathLike, like: types.Tree, step: int | None = None
) -> tuple[int, types.Tree]:
  """Policy of the newest (or a given) checkpoint of a run.

  Args:
    workdir: run folder.
    like: pytree of shapes, with shardings where one device is too small.
    step: which checkpoint; None for the newest.

  Returns:
    (step, parameters).

  Raises:
    UserError: no such checkpoint, its shapes differ from `like`, or it cannot
      be read.
  """
  folder = absolute(workdir) / "checkpoints"
  if not folder.exists():
    raise types.UserError(f"no checkpoints in {workdir}: expected {folder}")
  # Unfinished ones have a suffix behind the number; in a bucket, no last file.
  steps = sorted(
    int(p.name) for p in folder.iterdir()
    if p.name.isdigit() and ocp.utils.is_checkpoint_finalized(p)
  )
  if not steps or (step is not None and step not in steps):
    raise types.UserError(
      f"no checkpoint {step} in {folder}, there are {steps}"
    )
  step = steps[-1] if step is None else step
  path = folder / str(step) / "policy"
  try:
    _check_shapes(path, like)
    with ocp.StandardCheckpointer() as reader:
      return step, reader.restore(path, abstract(like))
  except CheckpointMismatchError:
    raise
  except Exception as error:  # Whatever a damaged file makes orbax raise.
    raise types.UserError(
      f"{path} cannot be read ({type(error).__name__}); there are checkpoints "
      f"{steps}, choose another with --step"
    ) from error


@contextlib.contextmanager
def writing(folder: epath.Path) -> Iterator[None]:
  """Makes one line of what orbax raises where there is no room or no right."""
  try:
    yield
  except (ValueError, OSError, RuntimeError) as error:
    reason = _NOT_WRITTEN.search(str(error))
    if reason is None:
      raise
    raise types.UserError(
      f"{folder}: cannot be written ({reason[0]}); what was saved before stands"
    ) from error


def absolute(workdir: epath.PathLike) -> epath.Path:
  """Returns the path as orbax wants it; a bucket's is absolute already."""
  path = epath.Path(workdir)
  return path if buckets.is_bucket(path) else path.resolve()


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_shapes(path: epath.Path, like) -> None:
  """Compares a saved policy with the one that this run would make."""
  with ocp.StandardCheckpointer() as reader:
    saved = _shapes(reader.metadata(path).item_metadata.tree)
  ours = _shapes(like)
  for name in sorted(set(saved) | set(ours)):
    if saved.get(name) != ours.get(name):
      raise CheckpointMismatchError(
        f"{path}: checkpoint of another model: {name} has shape "
        f"{saved.get(name)} there and {ours.get(name)} in this config"
      )


def abstract(tree: types.Tree) -> types.Tree:
  """Returns shapes, types and places of arrays, as orbax reads into them."""
  # Always with a place to go: the devices of the writer may not exist here.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
    ),
    tree,
  )
