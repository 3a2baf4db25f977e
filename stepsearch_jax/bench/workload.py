"""Turn lengths of rollouts to be replayed, recorded or made up."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from etils import epath

from stepsearch_jax import types


@dataclasses.dataclass(frozen=True)
class Replay:
  """Lengths in tokens of one trajectory.

  Attributes:
    prompt: of the prompt.
    turns: (generated, observed) of each turn; the last observes nothing.
    common: tokens of the prompt with which every prompt begins.
    question: trajectories of one number have the same prompt; None = its own.
  """

  prompt: int
  turns: tuple[tuple[int, int], ...]
  common: int = 0
  question: int | None = None

  @property
  def total(self) -> int:
    """Tokens of the whole trajectory."""
    return self.prompt + sum(map(sum, self.turns))

  @property
  def generated(self) -> int:
    """Tokens that the policy writes."""
    return sum(turn[0] for turn in self.turns)


def made_up(count: int, searches: tuple[int, int] = (1, 3), seed: int = 0,
            scale: float = 1.0) -> list[Replay]:
  """Trajectories with the lengths usual in Search-R1's rollouts.

  Args:
    count: how many.
    searches: least and most searches of one.
    seed: of the lengths.
    scale: multiplies observations.
  """
  rng = np.random.default_rng(seed)
  out = []
  for _ in range(count):
    turns = [
      (int(rng.integers(50, 110)), int(scale * rng.integers(410, 550)))
      for _ in range(rng.integers(searches[0], searches[1] + 1))
    ]
    turns.append((int(rng.integers(8, 17)), 0))
    out.append(Replay(int(rng.integers(145, 160)), tuple(turns)))
  return out


def load(path: str | None, count: int) -> list[Replay]:
  """The recorded workload of `count` trajectories; made up without a path.

  Raises:
    UserError: the file has no such workload.
  """
  if path is None:
    return made_up(count)
  recorded = json.loads(epath.Path(path).read_text())["workloads"]
  if str(count) not in recorded:
    raise types.UserError(
      f"{path} has workloads {sorted(recorded)}, not {count}"
    )
  return [
    Replay(row["prompt_len"], tuple(tuple(turn) for turn in row["turns"]))
    for row in recorded[str(count)]["trajectories"]
  ]


def describe(replays: list[Replay]) -> str:
  """Size of a workload in words."""
  return (
    f"{len(replays)} trajectories, {sum(r.total for r in replays)} tokens, "
    f"{sum(r.generated for r in replays)} of them sampled"
  )
