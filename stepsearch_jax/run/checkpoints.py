"""Checkpoints of a run: learner state, cursor and fingerprint, via orbax.

A checkpoint is complete or absent: orbax writes to a temporary folder and
renames it. Everything a step depends on is inside or follows from the step
number (the question stream and all random keys are functions of it), so a
resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from absl import logging
from etils import epath

from stepsearch_jax import types


class CheckpointMismatchError(types.UserError):
  """The checkpoint belongs to another model or other data."""


def fingerprint(**parts: Any) -> dict[str, str]:
  """Short hashes by which a checkpoint recognises its model and data."""
  return {
    name: hashlib.sha256(
      json.dumps(value, sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
    for name, value in parts.items()
  }


class Checkpointer:
  """Saves and restores the state of one run in `workdir/checkpoints`."""

  def __init__(
    self,
    workdir: epath.PathLike,
    identity: Mapping[str, str],
    keep: int = 2,
  ):
    """Opens the folder.

    Args:
      workdir: local folder or bucket path.
      identity: `fingerprint` of this run's model and data.
      keep: how many checkpoints to retain; the one with the best EM is kept
        besides.
    """
    self._folder = epath.Path(workdir).resolve() / "checkpoints"
    self._identity = dict(identity)
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
      item_names=("policy", "rest", "meta"),
    )

  def save(self, step: int, policy, rest, meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint in the background; a repeated step is a no-op.

    Args:
      step: optimiser steps done.
      policy: policy parameters, apart so that evaluation reads only them.
      rest: pytree with value model, optimisers and controllers.
      meta: JSON-able cursor and scores; `best` says whether this is it.
    """
    if step in self._manager.all_steps():
      return
    best = meta.get("best", {})
    self._manager.save(
      step,
      args=ocp.args.Composite(
        policy=ocp.args.StandardSave(policy),
        rest=ocp.args.StandardSave(rest),
        meta=ocp.args.JsonSave({**meta, "identity": self._identity}),
      ),
      metrics={"em": best["em"]} if best.get("step") == step else None,
    )

  def restore(self, policy, rest) -> tuple[int, Any, Any, dict] | None:
    """Reads the newest readable checkpoint.

    Args:
      policy: pytree like the saved one (arrays or shapes with shardings).
      rest: likewise.

    Returns:
      (step, policy, rest, meta), or None when there is no checkpoint.

    Raises:
      CheckpointMismatchError: the checkpoint is of another model or data.
      UserError: checkpoints exist but none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        meta = self._meta(step)
        self._check_identity(step, meta)
        items = self._manager.restore(
          step,
          args=ocp.args.Composite(
            policy=ocp.args.StandardRestore(_abstract(policy)),
            rest=ocp.args.StandardRestore(_abstract(rest)),
          ),
        )
      except CheckpointMismatchError:
        raise
      except Exception as error:  # Whatever a damaged file makes orbax raise.
        logging.error(
          "checkpoint %s/%d cannot be read (%s: %s); trying the one before",
          self._folder, step, type(error).__name__,
          str(error).split("\n")[0][:200],
        )
        continue
      return step, items["policy"], items["rest"], meta
    if steps:
      raise types.UserError(
        f"none of the checkpoints {steps} in {self._folder} can be read; "
        "remove the folder to start anew"
      )
    return None

  def rewind(self, policy, rest, before: int):
    """Drops the checkpoints from step `before` on; then see `restore`.

    Raises:
      UserError: there is no older one.
    """
    self.wait()
    for step in self._manager.all_steps():
      if step >= before:
        self._manager.delete(step)
    found = self.restore(policy, rest)
    if found is None:
      raise types.UserError(
        f"{self._folder} has no checkpoint before step {before} to roll back "
        "to: raise checkpoint.keep"
      )
    return found

  def _meta(self, step: int) -> dict:
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    return self._manager.restore(step, args=args)["meta"]

  def _check_identity(self, step: int, meta: Mapping[str, Any]) -> None:
    saved = meta["identity"]
    for name, ours in self._identity.items():
      if saved.get(name) != ours:
        raise CheckpointMismatchError(
          f"checkpoint {self._folder}/{step} was written for another {name} "
          f"(saved {saved.get(name)}, this run {ours}): use another --workdir "
          f"or restore the old {name} settings"
        )

  def wait(self) -> None:
    """Blocks until background writes are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the writer threads."""
    self._manager.close()


def save_reference(workdir: epath.PathLike, params, dtype) -> None:
  """Writes the frozen reference policy of a fresh run, in the compute type.

  Nothing is lost: the forward pass casts every weight to it anyway.

  One that is there already is replaced: it can only stem from a start that
  never reached its first checkpoint, maybe with other settings.
  """
  folder = epath.Path(workdir).resolve() / "reference"
  with ocp.StandardCheckpointer() as writer:
    writer.save(
      folder, jax.tree.map(lambda x: x.astype(dtype), params), force=True
    )


def load_reference(workdir: epath.PathLike, like):
  """Reads what `save_reference` wrote.

  Raises:
    UserError: the run has no reference.
  """
  folder = epath.Path(workdir).resolve() / "reference"
  if not folder.exists():
    raise types.UserError(
      f"{folder} is missing: cannot resume without the "
      "reference policy; start in a fresh --workdir"
    )
  with ocp.StandardCheckpointer() as reader:
    return reader.restore(folder, _abstract(like))


def load_policy(workdir: epath.PathLike, like, step: int | None = None):
  """Policy of the newest (or a given) checkpoint of a run.

  Args:
    workdir: run folder.
    like: pytree of shapes, with shardings where one device is too small.
    step: which checkpoint; None for the newest.

  Returns:
    (step, parameters).

  Raises:
    UserError: no such checkpoint, or its shapes differ from `like`.
  """
  folder = epath.Path(workdir).resolve() / "checkpoints"
  if not folder.exists():
    raise types.UserError(f"no checkpoints in {workdir}: expected {folder}")
  # Unfinished checkpoints carry a suffix behind the number.
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  if not steps or (step is not None and step not in steps):
    raise types.UserError(
      f"no checkpoint {step} in {folder}, there are {steps}"
    )
  step = steps[-1] if step is None else step
  path = folder / str(step) / "policy"
  with ocp.StandardCheckpointer() as reader:
    _check_shapes(path, reader.metadata(path).item_metadata.tree, like)
    return step, reader.restore(path, _abstract(like))


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {
    jax.tree_util.keystr(path): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_shapes(where, saved, like) -> None:
  saved, ours = _shapes(saved), _shapes(like)
  for name in sorted(set(saved) | set(ours)):
    if saved.get(name) != ours.get(name):
      raise CheckpointMismatchError(
        f"{where}: checkpoint of another model: {name} has shape "
        f"{saved.get(name)} there and {ours.get(name)} in this config"
      )


def _abstract(tree):
  # Always with a place to go: the devices of the writer may not exist here.
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here
    ),
    tree,
  )
