"""The answer probe: how likely are the gold answers, and where.

A probe asks for log p(gold answer | context so far, opened answer tag). The
tag is the protocol's own; what is scored is the answer's tokens alone. The
closing tag is not: how sure a model is of the protocol's form says nothing
about what it knows, and would be most of the probability of a short answer.

Contexts of all turns of a trajectory lie in its slot until the slot is given
to another one, so a trajectory is probed once, when it has ended, in chunks as
full as can be. Nothing of a probe stays in the cache (`device.probe`). Like
`slot_cache`, this module knows tokens and places, not text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rollout import device, records


@dataclasses.dataclass(frozen=True)
class Answers:
  """Gold answers of a question as tokens.

  Attributes:
    opening: what opens an answer.
    aliases: what may follow, the shortest first.
  """

  opening: list[int]
  aliases: list[list[int]]

  def chosen(self, spec: records.ProbeSpec) -> Answers:
    """Returns those that are probed: the shortest that fit a probe."""
    room = spec.tokens[-1] - len(self.opening)
    fitting = [alias for alias in self.aliases if 0 < len(alias) <= room]
    return Answers(self.opening, fitting[: spec.aliases])

  @property
  def sizes(self) -> np.ndarray:
    """Tokens of each alias, [C] int32."""
    return np.array([len(alias) for alias in self.aliases], np.int32)


@dataclasses.dataclass(frozen=True)
class Row:
  """One answer behind one place of what a slot holds.

  Attributes:
    place: the slot's row of the cache.
    start: position of the first token.
    tokens: the last token of the context, and all that follows but the last.
    scored: the answer; its tokens follow the last `len(scored)` of `tokens`.
  """

  place: int
  start: int
  tokens: list[int]
  scored: list[int]


@dataclasses.dataclass(frozen=True)
class Spot:
  """All answers of a question behind one place of a slot; some have no room.

  Attributes:
    rows: those that have room.
    fits: [C] bool, which of the answers these are.
  """

  rows: list[Row]
  fits: np.ndarray

  @classmethod
  def behind(
    cls, place: int, tokens: Sequence[int], answers: Answers, context: int
  ) -> Spot:
    """Returns the answers behind `tokens` in a slot.

    Args:
      place: the slot's row of the cache.
      tokens: all that the answer would follow.
      answers: of the question.
      context: tokens that a slot can hold.
    """
    room = context - len(tokens) - len(answers.opening)
    fits = np.array([len(alias) <= room for alias in answers.aliases], bool)
    newest = [tokens[-1]]
    return cls(
      [
        Row(place, len(tokens) - 1, newest + answers.opening + alias[:-1],
            alias)
        for alias, fit in zip(answers.aliases, fits, strict=True) if fit
      ], fits,
    )

  def values(self, found: Iterator[float]) -> np.ndarray:
    """Returns [C] float32 from what was found for the rows; NaN elsewhere."""
    out = np.full(len(self.fits), np.nan, np.float32)
    out[self.fits] = [next(found) for _ in self.rows]
    return out


def ends(trajectory: types.Trajectory) -> list[int | None]:
  """Returns how many tokens there are behind the prompt and each turn.

  None for a turn that nothing was replied to: the trajectory ended with it.
  """
  index, count = trajectory.turn_index, len(trajectory.turns)
  seen = trajectory.provenance == types.Provenance.OBSERVATION
  found: list[int | None] = [int((index < 0).sum())]
  for turn in range(count):
    places = np.nonzero(seen & (index == turn))[0]
    found.append(int(places[-1]) + 1 if len(places) else None)
  return found


@dataclasses.dataclass(frozen=True)
class Placed:
  """A finished trajectory whose contexts lie in a slot."""

  place: int
  trajectory: types.Trajectory
  answers: Answers


Ask = Callable[[Sequence[Row], records.ProbeSpec], Sequence[float]]


def probe(
  placed: Sequence[Placed], ask: Ask, spec: records.ProbeSpec, context: int
) -> None:
  """Sets `probe` of trajectories, with no documents of other questions.

  Args:
    placed: trajectories with their answers.
    ask: log-probability of rows, `SlotCache.probe`.
    spec: what is probed.
    context: tokens that a slot can hold.
  """
  asked = []
  for one in placed:
    answers = one.answers.chosen(spec)
    asked.append((one, answers, [
      end and Spot.behind(
        one.place, one.trajectory.tokens[:end].tolist(), answers, context
      ) for end in ends(one.trajectory)
    ]))
  found = iter(ask(
    [row for *_, spots in asked for spot in spots if spot
     for row in spot.rows], spec,
  ))
  for one, answers, spots in asked:
    count = len(answers.aliases)
    logp = [
      spot.values(found) if spot else np.full(count, np.nan, np.float32)
      for spot in spots
    ]
    one.trajectory.probe = types.AnswerProbe(
      np.stack(logp), answers.sizes,
      np.zeros((len(spots), 0, count), np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Piece:
  """Rows that are probed together; `rows` are their numbers."""

  rows: list[int]
  chunk: device.ProbeChunk


def pieces(
  rows: Sequence[Row], counts: Sequence[int], sizes: Sequence[int]
) -> Iterator[Piece]:
  """Yields rows in chunks, those of one size that reach equally far together.

  Args:
    rows: what is to be probed.
    counts: bucket sizes for rows.
    sizes: bucket sizes for tokens.
  """
  fitting: dict[int, list[int]] = {size: [] for size in sizes}
  for number in sorted(range(len(rows)), key=lambda i: (-rows[i].start, i)):
    length = len(rows[number].tokens)
    fitting[next(size for size in sizes if size >= length)].append(number)
  for size, waiting in fitting.items():
    while waiting:
      full = [count for count in counts if count <= len(waiting)]
      count = full[-1] if full else counts[0]
      group, waiting = waiting[:count], waiting[count:]
      yield Piece(group, _chunk([rows[i] for i in group], count, size))


def _chunk(group: Sequence[Row], count: int, size: int) -> device.ProbeChunk:
  """Returns rows as arrays of `count` rows of `size` tokens."""
  slot, start, length = np.zeros((3, count), np.int32)
  tokens = np.zeros((count, size), np.int32)
  targets = np.full((count, size), -1, np.int32)
  for i, row in enumerate(group):
    slot[i], start[i], length[i] = row.place, row.start, len(row.tokens)
    tokens[i, : length[i]] = row.tokens
    targets[i, length[i] - len(row.scored) : length[i]] = row.scored
  return device.ProbeChunk(slot, tokens, start, length, targets)
