"""Which rematerialization fits a machine, and which is the fastest of those."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import ml_collections

from stepsearch_jax.models.decoder import Remat
from stepsearch_jax.plan import arithmetic
from stepsearch_jax.plan.machines import Machine

Programs = Mapping[str, Mapping[str, int]]  # See tpu_compiler.

FASTEST_FIRST = (Remat.NONE, Remat.DOTS, Remat.FULL)


@dataclasses.dataclass(frozen=True)
class Choice:
  """A run with one value of `model.remat`.

  Attributes:
    update: bytes per chip while a model is updated, the most of all models.
    peak: bytes per chip, the most of all programs.
    fits: whether the machine has them.
    compiled: the compiler says so, not the estimate.
  """

  update: float
  peak: float
  fits: bool
  compiled: bool


def with_remat(
  config: ml_collections.ConfigDict, remat: Remat
) -> ml_collections.ConfigDict:
  """Returns a copy of run settings with another `model.remat`."""
  other = copy.deepcopy(config)
  with other.unlocked():
    other.model.remat = str(remat)
  return other


def choose(
  config: ml_collections.ConfigDict, machine: Machine, remat: Remat,
  programs: Programs, updates: Programs | None = None,
) -> Choice:
  """Returns what a run needs with another `model.remat`.

  Args:
    config: run settings as they are.
    machine: where it runs.
    remat: the value.
    programs: compiled for `config`, or none.
    updates: the updates compiled with `remat`; None = what the run as it is
      needs, changed by as much as the estimate changes.
  """
  other = with_remat(config, remat)
  same = remat == config.model.remat
  compiled = bool(programs) and (same or updates is not None)
  if compiled or same:
    peaks = arithmetic.program_peaks(
      other, machine, {**programs, **(updates or {})}
    )
  else:
    peaks = arithmetic.program_peaks(config, machine, programs)
    before = arithmetic.program_peaks(config, machine, {})
    after = arithmetic.program_peaks(other, machine, {})
    for name in filter(is_update, peaks):
      peaks[name] += after[name] - before[name]
  peak = max(peaks.values())
  return Choice(
    max(peaks[name] for name in filter(is_update, peaks)), peak,
    peak <= machine.usable, compiled,
  )


def is_update(program: str) -> bool:
  """Whether a program is the forward and backward pass of an update."""
  return program.endswith("_update")
