"""Experiment trackers: a run's page at Weights & Biases or in Trackio.

Both have the same calls (`init`, `log`, `finish`, `Table`) but for two things:
which argument names the run that goes on, and how a table is given.
"""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax import buckets, files

NAMES = ("wandb", "trackio")


class Tracker:
  """A run's page; one that resumes goes on with the page that it has."""

  def __init__(
    self, name: str, project: str, workdir: epath.PathLike,
    config: Mapping[str, Any],
  ):
    """Opens the page.

    Args:
      name: one of NAMES, the package.
      project: the page's project.
      workdir: holds the page's id.
      config: hyperparameters, shown without secrets.
    """
    self._name = name
    self._package = importlib.import_module(name)  # Slow, and an extra.
    workdir = epath.Path(workdir)
    path = workdir / f"{name}_id"
    if not path.exists():
      files.write_text(path, uuid.uuid4().hex[:16])
    own = path.read_text().strip()
    if name == "wandb":
      place: dict[str, Any] = {
        "id": own, "dir": str(buckets.scratch(workdir / "wandb"))
      }
    else:  # Trackio finds a run by its name.
      place = {"name": f"{workdir.name}-{own}"}
    self._run = self._package.init(
      project=project, resume="allow", config=public(config), **place
    )

  def log(self, step: int, values: Mapping[str, float]) -> None:
    """Records metrics of a step."""
    self._run.log(dict(values), step=step)

  def table(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Records rows, all with the same fields, as the step's `trajectories`."""
    if not rows:
      return
    if self._name == "wandb":
      table = self._package.Table(
        columns=list(rows[0]), data=[list(row.values()) for row in rows]
      )
    else:  # Trackio ignores `columns`.
      table = self._package.Table(data=[dict(row) for row in rows])
    self._run.log({"trajectories": table}, step=step)

  def close(self) -> None:
    """Sends what is left."""
    self._run.finish()


def start(
  name: str, project: str, workdir: epath.PathLike, config: Mapping[str, Any]
) -> Tracker | None:
  """Returns the tracker of that name, None for ""; see `Tracker`."""
  return Tracker(name, project, workdir, config) if name else None


def public(value: Any) -> Any:
  """Returns settings without logins, keys and queries of URLs in them."""
  if isinstance(value, Mapping):
    return {name: public(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [public(inner) for inner in value]
  if isinstance(value, str) and "://" in value:
    from stepsearch_jax.retrieval import remote  # Slow to import.

    return remote.public_url(value)
  return value
