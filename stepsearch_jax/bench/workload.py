"""Turn lengths of rollouts to be replayed, recorded or made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

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


@dataclasses.dataclass(frozen=True)
class Template:
  """Lengths in tokens of prompts that differ in their question alone.

  Attributes:
    prompt: of a whole prompt.
    common: of what stands in front of every question.
  """

  prompt: int
  common: int


STEPSEARCH = Template(prompt=271, common=244)  # As released; `env/prompts`.


def behind(
  replays: Sequence[Replay], template: Template, rollouts: int = 1
) -> list[Replay]:
  """Returns the turns of a workload behind other prompts.

  Args:
    replays: the workload; its turns stay as they are.
    template: of the prompts.
    rollouts: trajectories per question, side by side; they have one prompt.

  Raises:
    ValueError: the trajectories are no whole groups.
  """
  if len(replays) % rollouts:
    raise ValueError(
      f"{len(replays)} trajectories are no whole groups of {rollouts}"
    )
  return [
    Replay(template.prompt, replay.turns, template.common, place // rollouts)
    for place, replay in enumerate(replays)
  ]


def questions(replays: Sequence[Replay]) -> np.ndarray:
  """Numbers the questions of a workload in the order of their appearance.

  Returns:
    [B] int32, equal for trajectories of one question.
  """
  numbers: dict[tuple[bool, int], int] = {}
  found = []
  for row, replay in enumerate(replays):
    alone = replay.question is None
    key = alone, row if alone else replay.question
    found.append(numbers.setdefault(key, len(numbers)))
  return np.array(found, np.int32)


def prompts(replays: Sequence[Replay], vocab: int) -> list[np.ndarray]:
  """Draws the prompts of a workload, the same ones in every call.

  Args:
    replays: the workload.
    vocab: size of the vocabulary.

  Returns:
    Tokens [prompt] int32 of each trajectory, 1 to `vocab` - 1, common where
    the workload says so.
  """
  longest = max(replay.common for replay in replays)
  template = np.random.default_rng(1).integers(1, vocab, longest)
  found = []
  for replay, number in zip(replays, questions(replays), strict=True):
    own = np.random.default_rng((2, number)).integers(
      1, vocab, replay.prompt - replay.common
    )
    whole = np.concatenate([template[: replay.common], own])
    found.append(whole.astype(np.int32))
  return found


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
  """Returns the size of a workload in words."""
  words = (
    f"{len(replays)} trajectories, {sum(r.total for r in replays)} tokens, "
    f"{sum(r.generated for r in replays)} of them sampled"
  )
  common = min(replay.common for replay in replays)
  if common:
    words += f", prompts of {replays[0].prompt}, {common} of them common"
  asked = len(set(questions(replays).tolist()))
  if asked < len(replays):
    words += f", {asked} questions x {len(replays) // asked}"
  return words
