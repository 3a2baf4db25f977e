"""What has come out of a study's runs: its folders and its record.

It knows where a run of a study lies and what is kept of it, not how runs are
started or compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.evaluation import study
from stepsearch_jax.run.study_plan import ArmPlan, Plan


def run_folder(workdir: epath.Path, arm: ArmPlan, seed: int) -> epath.Path:
  """Folder of one run."""
  return workdir / arm.name / f"seed_{seed}"


def rate_folder(workdir: epath.Path, arm: ArmPlan, rate: float) -> epath.Path:
  """Folder of a run that tries a learning rate."""
  return workdir / "rates" / arm.name / f"{rate:g}"


def is_finished(folder: epath.Path) -> bool:
  """Whether a run has ended."""
  return (folder / "summary.json").exists()


def _name(config: str) -> str:
  """A config's file name and arguments, wherever the file lies."""
  path, colon, arguments = config.partition(":")
  return path.rpartition("/")[2] + colon + arguments


_FIELDS = {"arm", "seed", "rate", "config", "commit", "jax", "machine",
           "questions", "count", "em", "em_after", "curve", "hops", "searches",
           "recall", "seconds", "step_seconds"}


class Book:
  """What has come out of a study's runs: in its folder, and in a record.

  Attributes:
    recorded: rows of the record by arm, seed and, where it was a trial, rate.
  """

  def __init__(self, workdir: epath.Path, record: epath.Path | None):
    """Reads the record, if there is one.

    Raises:
      UserError: it is malformed.
    """
    self._workdir, self._record = workdir, record
    self.recorded: dict[tuple, dict[str, Any]] = {}
    if record is None or not record.exists():
      return
    for where, row in files.read_rows(record):
      missing = _FIELDS - row.keys()
      types.expect(not missing, where, "a run of a study, as --record has it",
                   f"no {', '.join(sorted(missing))}")
      self.recorded[row["arm"], row["seed"], row["rate"]] = row

  def has(self, arm: ArmPlan, seed: int) -> bool:
    """Whether a run is finished."""
    known = (arm.name, seed, None) in self.recorded
    return known or is_finished(run_folder(self._workdir, arm, seed))

  def tried(self, arm: ArmPlan, seed: int) -> dict[float, float]:
    """Validation EM per learning rate that was tried to its end."""
    found = {}
    for rate in arm.rates:
      folder = rate_folder(self._workdir, arm, rate)
      if row := self.recorded.get((arm.name, seed, rate)):
        found[rate] = row["em_after"]
      elif is_finished(folder):
        found[rate] = json.loads(
          (folder / "summary.json").read_text())["em_after"]
    return found

  def chosen_rate(self, arm: ArmPlan, seed: int) -> float | None:
    """The rate with the best validation EM; None while one is missing.

    Also None where an arm has no choice.
    """
    scores = self.tried(arm, seed)
    if not scores or len(scores) < len(arm.rates):
      return None
    return max(scores, key=lambda rate: scores[rate])

  def rows(self, plan: Plan) -> list[dict[str, Any]]:
    """Returns all runs, as a record has them, those of the plan first.

    Raises:
      UserError: the folder, or one of its runs, is of another commit or
        version than the record or the study.
    """
    about, found = self._workdir / "study.json", dict(self.recorded)
    here = json.loads(about.read_text()) if about.exists() else {}
    here_or_there = here or next(iter(found.values()), {})
    self.check({**here_or_there, "config": plan.config}, ())
    for arm in plan.arms:
      folders: dict[tuple[int, float | None], epath.Path] = {
        (int(place.name.removeprefix("seed_")), None): place
        for place in (self._workdir / arm.name).glob("seed_*")
      }
      for rate in arm.rates:
        place = rate_folder(self._workdir, arm, rate)
        folders[plan.tuning_seed, rate] = place
      for (seed, rate), place in folders.items():
        if (arm.name, seed, rate) not in found and is_finished(place):
          row = {"arm": arm.name, "seed": seed, "rate": rate, **here,
                 **study.read_run(place)}
          # Every run is a process of its own, maybe days later or elsewhere.
          for field in ("commit", "jax"):
            types.expect(row[field] == here[field], f"{place}: {field}",
                         f"{here[field]!r}, with which the study began",
                         row[field])
          found[arm.name, seed, rate] = row
    order = [arm.name for arm in plan.arms]
    order += sorted({row["arm"] for row in found.values()} - set(order))
    return sorted(found.values(), key=lambda row: (
      order.index(row["arm"]), row["rate"] or 0.0, row["seed"]))

  def check(
    self, about: Mapping[str, str], arms: Sequence[ArmPlan]
  ) -> None:
    """Refuses a record beside whose runs those of `arms` cannot stand.

    Args:
      about: what the runs here have in common, as in study.json.
      arms: that are to be played.

    Raises:
      UserError: another study, commit or version, or a seed with something
        left to play was begun on another kind of machine.
    """
    left = {s for arm in arms for s in arm.seeds if not self.has(arm, s)}
    for (_, seed, rate), row in self.recorded.items():
      for field in ("config", "commit", "jax"):
        theirs, ours = row[field], about[field]
        if field == "config":  # The same one wherever the file lies.
          theirs, ours = map(_name, (theirs, ours))
        types.expect(theirs == ours, f"{self._record}: {field}",
                     f"{ours!r} as here", theirs)
      if rate is None and seed in left:
        types.expect(row["machine"] == about["machine"], "--seeds",
                     f"none that was begun on {row['machine']}", seed)
