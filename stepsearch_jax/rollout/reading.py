"""Probes finished trajectories with a model that has not played them.

The reference has no warm cache: it reads the contexts once, as prompts are
written, with the programs of the rollout. This costs about as much as one
scoring pass, and nothing is sampled.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rollout import (
  device,
  probing,
  recorder,
  records,
  slot_cache,
  text_side,
)


@dataclasses.dataclass(frozen=True)
class _Instead:
  """Documents in place of those of a turn; number `n` of its alternatives."""

  turn: int
  n: int
  documents: Sequence[types.Passage]


class Reader:
  """Reads trajectories into a slot cache and probes them there."""

  def __init__(
    self, cache: slot_cache.SlotCache, texts: text_side.TextSide,
    spec: records.EngineSpec, probe: records.ProbeSpec,
    shape: device.ProgramSpec,
  ):
    """Keeps the parts.

    Args:
      cache: empty slots of the model that reads.
      texts: protocol and tokenizer.
      spec: limits.
      probe: what is probed.
      shape: slots and their length.
    """
    self._cache = cache
    self._texts = texts
    self._spec = spec
    self._probe = probe
    self._shape = shape

  def read(self, trajectories: Sequence[types.Trajectory]) -> None:
    """Sets `probe` of all, as many at a time as there are slots."""
    found = _Documents.of(trajectories)
    for start in range(0, len(trajectories), self._shape.slots):
      part = trajectories[start : start + self._shape.slots]
      placed = [
        probing.Placed(
          place, trajectory,
          self._texts.answers(trajectory.question).chosen(self._probe),
        ) for place, trajectory in enumerate(part)
      ]
      slots = [_slot(one) for one in placed]
      self._cache.write(slots)
      probing.probe(
        placed, self._cache.probe, self._probe, self._shape.context
      )
      if self._probe.others:
        self._try_others(placed, slots, found)

  def _try_others(
    self, placed: Sequence[probing.Placed], slots: Sequence[slot_cache.Slot],
    found: _Documents,
  ) -> None:
    """Writes other documents over those that were found, and probes again.

    From the last turn to the first: what is overwritten is not needed again.
    """
    todo = [
      collections.deque(found.instead(one.trajectory, self._probe))
      for one in placed
    ]
    for one in placed:
      probe = one.trajectory.probe
      assert probe is not None
      shape = (len(probe.logp), self._probe.others, len(probe.sizes))
      one.trajectory.probe = dataclasses.replace(
        probe, others=np.full(shape, np.nan, np.float32)
      )
    while any(todo):
      now = [
        (one, slot, waiting.popleft())
        for one, slot, waiting in zip(placed, slots, todo, strict=True)
        if waiting
      ]
      for one, slot, instead in now:
        self._replace(one.trajectory, slot, instead)
      self._cache.write([slot for _, slot, _ in now])
      spots = [
        probing.Spot.behind(
          one.place, slot.record.tokens, one.answers, self._shape.context
        ) for one, slot, _ in now
      ]
      values = iter(self._cache.probe(
        [row for spot in spots for row in spot.rows], self._probe
      ))
      for (one, _, instead), spot in zip(now, spots, strict=True):
        assert one.trajectory.probe is not None
        others = one.trajectory.probe.others
        others[instead.turn + 1, instead.n] = spot.values(values)

  def _replace(
    self, trajectory: types.Trajectory, slot: slot_cache.Slot,
    instead: _Instead,
  ) -> None:
    """Makes a slot write the observation that other documents would give."""
    start = trajectory.turns[instead.turn].action_position + 1
    room = self._shape.context - start - self._spec.answer_room
    observation = self._texts.encode(
      self._texts.observation(instead.documents, instead.turn),
      min(self._spec.max_observation, room),
    )
    slot.record.tokens[start:] = observation.tokens
    slot.cached = start - 1
    slot.phase = slot_cache.Phase.WRITING


def _slot(one: probing.Placed) -> slot_cache.Slot:
  """Returns a slot that writes all contexts of a trajectory."""
  trajectory = one.trajectory
  places = [end for end in probing.ends(trajectory) if end]
  record = recorder.Recorder(
    one.place, trajectory.question, trajectory.episode
  )
  record.append(
    trajectory.tokens[: places[-1]].tolist(), types.Provenance.PROMPT
  )
  return slot_cache.Slot(
    one.place, record, np.asarray(trajectory.tokens[: places[0]], np.int32)
  )


@dataclasses.dataclass(frozen=True)
class _Documents:
  """What the searches of a batch found, and for which question."""

  found: Sequence[Sequence[types.Passage]]
  owner: np.ndarray
  numbers: dict[tuple[str, str], int]

  @classmethod
  def of(cls, trajectories: Sequence[types.Trajectory]) -> _Documents:
    """Collects them in the order of trajectories and turns."""
    numbers: dict[tuple[str, str], int] = {}
    found, owner = [], []
    for trajectory in trajectories:
      question = (trajectory.question.id, trajectory.question.text)
      number = numbers.setdefault(question, len(numbers))
      for turn in trajectory.turns:
        if turn.retrieved:
          found.append(turn.documents)
          owner.append(number)
    return cls(found, np.array(owner, np.int32), numbers)

  def instead(
    self, trajectory: types.Trajectory, spec: records.ProbeSpec
  ) -> list[_Instead]:
    """Returns what to try at each search, the last one's first.

    Fixed by (seed, episode, turn) and the batch; fewer than asked for where
    other questions have not found as many.
    """
    question = (trajectory.question.id, trajectory.question.text)
    others = np.nonzero(self.owner != self.numbers[question])[0]
    chosen = []
    for number, turn in reversed(list(enumerate(trajectory.turns))):
      if turn.retrieved:
        rng = np.random.default_rng((spec.seed, trajectory.episode, number))
        count = min(spec.others, len(others))
        chosen += [
          _Instead(number, n, self.found[pick])
          for n, pick in enumerate(rng.choice(others, count, replace=False))
        ]
    return chosen
