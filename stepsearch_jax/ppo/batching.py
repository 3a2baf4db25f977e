"""Trajectories to padded batches, and batches to packed rows (numpy).

Packing goes by a trajectory's length, never by its loss mask: a token that is
not trained is still attended to. What the trajectories of a row begin with is
there once, in front of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.models import attention

_TURNS = 8  # Turns are padded to a multiple, so that shapes rarely change.


def trajectories_to_batch(
  trajectories: Sequence[types.Trajectory],
  rewards: Sequence[np.ndarray],
  max_length: int,
  pad_id: int,
  rollouts: int = 1,
  dropped_ids: Sequence[int] = (),
) -> types.RolloutBatch:
  """Right-pads trajectories to [B, max_length].

  Args:
    trajectories: finished rollouts, those of one question side by side.
    rewards: [T] float32 per trajectory.
    max_length: T of the batch.
    pad_id: fills `tokens`.
    rollouts: trajectories per question. Groups go by place and not by the
      question's id, which another question may share.
    dropped_ids: sampled tokens to leave out of the policy mask (the released
      preset drops end-of-text).

  Raises:
    UserError: a trajectory is longer than `max_length`.
  """
  rows = len(trajectories)
  lengths = np.array([len(t.tokens) for t in trajectories], np.int32)
  if lengths.max(initial=0) > max_length:
    raise types.UserError(
      f"a trajectory has {lengths.max()} tokens, rollout.context is "
      f"{max_length}"
    )
  if rows % rollouts:
    raise ValueError(f"{rows} trajectories are no whole groups of {rollouts}")
  batch = _empty(trajectories, lengths, max_length, pad_id, rollouts)
  states: dict[tuple[int, bytes], int] = {}
  for row, (trajectory, reward) in enumerate(
    zip(trajectories, rewards, strict=True)
  ):
    size = lengths[row]
    sampled = trajectory.policy_mask
    if len(dropped_ids):
      sampled = sampled & ~np.isin(trajectory.tokens, dropped_ids)
    batch.tokens[row, :size] = trajectory.tokens
    batch.policy_mask[row, :size] = sampled
    batch.token_rewards[row, :size] = reward
    batch.rollout_logp[row, :size] = np.where(sampled, trajectory.logprobs, 0)
    batch.turn[row, :size] = np.where(sampled, trajectory.turn_index, -1)
    for turn in range(_turns(trajectory)):
      state = batch.group[row], _state(trajectory, turn)
      batch.anchor[row, turn] = states.setdefault(state, len(states))
  return batch


def _empty(
  trajectories: Sequence[types.Trajectory], lengths: np.ndarray,
  max_length: int, pad_id: int, rollouts: int,
) -> types.RolloutBatch:
  """A batch of padding with what is known per trajectory."""
  rows = len(trajectories)
  shape = (rows, max_length)
  turns = max((_turns(t) for t in trajectories), default=1)
  return types.RolloutBatch(
    tokens=np.full(shape, pad_id, np.int32),
    lengths=lengths,
    policy_mask=np.zeros(shape, np.float32),
    token_rewards=np.zeros(shape, np.float32),
    rollout_logp=np.zeros(shape, np.float32),
    group=np.arange(rows, dtype=np.int32) // rollouts,
    turn=np.full(shape, -1, np.int32),
    anchor=np.full((rows, -(-turns // _TURNS) * _TURNS), -1, np.int32),
    searches=np.array(
      [sum(turn.retrieved for turn in t.turns) for t in trajectories], np.int32
    ),
    answer_start=np.array(
      [_answer_start(t, max_length) for t in trajectories], np.int32
    ),
  )


def _turns(trajectory: types.Trajectory) -> int:
  """Turns that have tokens, one that was cut off included; at least 1."""
  return max(int(trajectory.turn_index.max(initial=0)) + 1, 1)


def _answer_start(trajectory: types.Trajectory, nowhere: int) -> int:
  """Place of the answer's first token, `nowhere` where there is none."""
  turns = trajectory.turns
  place = turns[-1].answer_position if turns else -1
  return nowhere if place < 0 else place


def _state(trajectory: types.Trajectory, turn: int) -> bytes:
  """What the policy saw last before a turn: an observation, or the prompt."""
  if turn == 0:
    return b""
  seen = trajectory.provenance == types.Provenance.OBSERVATION
  seen &= trajectory.turn_index == turn - 1
  return b"observation" + np.asarray(trajectory.tokens)[seen].tobytes()


def count_turns(turn: np.ndarray) -> int:
  """Turns that have policy tokens.

  Args:
    turn: [B, T] int32, see `RolloutBatch`.
  """
  numbers = range(int(turn.max(initial=-1)) + 1)
  return sum(int((turn == number).any(axis=1).sum()) for number in numbers)


@dataclasses.dataclass(frozen=True)
class Packing:
  """Where each token of a batch lies in packed rows.

  Attributes:
    source: [R, S] int64, flat index b * T + t of the token, -1 for padding. A
      shared prefix is its first trajectory's.
    segment_ids: [R, S] int32, 1.. within a row, 0 for padding,
      `attention.PREFIX` for a prefix that all trajectories of the row share.
    positions: [R, S] int32, position inside the trajectory.
    places: [B, T] int64, flat index r * S + s of every token, -1 where none
      was packed.
  """

  source: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  places: np.ndarray

  @property
  def padding_share(self) -> float:
    """Share of packed places that hold no token."""
    return float((self.source < 0).mean())

  def padded(self, rows: int) -> Packing:
    """Returns the packing with empty rows behind it, `rows` in all."""
    more = ((0, rows - len(self.source)), (0, 0))
    return dataclasses.replace(
      self, source=np.pad(self.source, more, constant_values=-1),
      segment_ids=np.pad(self.segment_ids, more),
      positions=np.pad(self.positions, more),
    )

  def pack(self, array: np.ndarray, fill: float = 0) -> np.ndarray:
    """[B, T] array to packed [R, S]."""
    return np.where(self.source >= 0, array.reshape(-1)[self.source], fill)

  def unpack(self, packed: np.ndarray) -> np.ndarray:
    """Packed [R, S] array back to [B, T], zeros where nothing was packed.

    What was found for a shared prefix comes back in every trajectory.
    """
    found = packed.reshape(-1)[self.places]
    return np.where(self.places >= 0, found, np.zeros((), packed.dtype))


def micro_sizes(rows: int, whole: int, tail: int) -> list[int]:
  """Splits packed rows into micro-batches of two sizes.

  Args:
    rows: packed rows that hold tokens.
    whole: rows of a micro-batch.
    tail: rows of the smaller ones that end a mini-batch where they compute
      less than one more whole one; `whole` for none.

  Returns:
    Sizes in order; their sum is at least `rows`, by less than `tail` where
    the smaller ones are used.
  """
  count, rest = divmod(rows, whole)
  small = -(-rest // tail)
  if small * tail >= whole:
    return [whole] * (count + 1)
  return [whole] * count + [tail] * small


def shareable(batch: types.RolloutBatch) -> np.ndarray:
  """Returns what trajectories may share: tokens before the policy's first.

  Returns:
    [B, P] int32; behind those tokens, numbers that no other row has. At least
    one token of every trajectory is left out.
  """
  on = batch.policy_mask > 0
  last = np.maximum(batch.lengths - 1, 0)
  sizes = np.where(on.any(axis=1), on.argmax(axis=1), last)
  sizes = np.minimum(sizes, last)[:, None]
  own = np.arange(sizes.max(initial=0)) < sizes
  names = -1 - np.arange(len(sizes), dtype=np.int32)[:, None]
  return np.where(own, batch.tokens[:, : own.shape[1]], names)


@dataclasses.dataclass(frozen=True)
class _Row:
  """A row that is being filled.

  Attributes:
    inside: its trajectories, numbers of the batch.
    common: tokens that all of them begin with.
    total: sum of their lengths.
    step: see `attention.prefix_step`.
  """

  inside: tuple[int, ...]
  common: int
  total: int
  step: int

  @property
  def start(self) -> int:
    """Where the first trajectory goes on behind the prefix; 0 without one."""
    start = -(-self.common // self.step) * self.step
    gains = len(self.inside) > 1 and start < len(self.inside) * self.common
    return start if gains else 0

  @property
  def prefix(self) -> int:
    """Tokens that the row holds once."""
    return self.common if self.start else 0

  @property
  def used(self) -> int:
    """Places taken."""
    return self.start + self.total - len(self.inside) * self.prefix


class _Rows:
  """First-fit-decreasing packing that is under way."""

  def __init__(self, lengths, heads, row_length, closest):
    """Prepares for trajectories of `lengths` that begin with `heads`."""
    self.rows: list[_Row] = []
    self._lengths, self._heads = lengths, heads
    self._row_length = row_length
    self._step = attention.prefix_step(row_length)
    self._closest = closest

  def add(self, b: int) -> None:
    """Puts a trajectory into a row where it fits, or into a new one."""
    size = int(self._lengths[b])
    best, saved = len(self.rows), -math.inf
    found = _Row((b,), self._heads.shape[1], size, self._step)
    for r, joined in enumerate(self._joined(b, size)):
      gain = self.rows[r].used + size - joined.used
      if joined.used <= self._row_length and gain > saved:
        best, saved, found = r, gain, joined
        if gain >= 0 and not self._closest:
          break
    self.rows[best : best + 1] = [found]

  def _joined(self, b, size):
    """Yields what each row would be with trajectory `b` in it."""
    same = self._heads[[row.inside[0] for row in self.rows]] == self._heads[b]
    same = np.pad(same, ((0, 0), (0, 1)))  # Behind them nothing is common.
    for row, common in zip(self.rows, same.argmin(axis=1), strict=True):
      yield _Row(
        (*row.inside, b), min(int(common), row.common), row.total + size,
        row.step,
      )

  @property
  def cost(self) -> tuple[int, int]:
    """Rows, and the places taken in them."""
    return len(self.rows), sum(row.used for row in self.rows)


def _first_fit(
  order: Sequence[int], lengths: np.ndarray, row_length: int
) -> list[_Row]:
  """Rows without prefixes: each trajectory into the first where it fits.

  Rows wait in heaps by the room they have left, so that tens of thousands of
  demonstrations are packed in a second.
  """
  inside: list[list[int]] = []
  by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
  for b in order:
    size = int(lengths[b])
    rooms = [room for room in range(size, row_length + 1) if by_room[room]]
    if rooms:
      room = min(rooms, key=lambda room: by_room[room][0])
      r = heapq.heappop(by_room[room])
    else:
      room, r = row_length, len(inside)
      inside.append([])
    inside[r].append(b)
    heapq.heappush(by_room[room - size], r)
  return [
    _Row(tuple(row), 0, int(lengths[list(row)].sum()), 1) for row in inside
  ]


def pack(
  rows: Iterable[int],
  lengths: np.ndarray,
  width: int,
  row_length: int,
  heads: np.ndarray | None = None,
) -> Packing:
  """First-fit-decreasing packing of trajectories into rows.

  A row is [prefix | rest of trajectory 1 | rest of trajectory 2 | ...], the
  prefix the longest that its trajectories have in common. A trajectory goes
  into the first row where it fits and lengthens nothing, or into that which
  saves most, failing both where it lengthens least; what takes fewer rows (or
  tokens) is kept.

  Args:
    rows: batch rows to pack.
    lengths: [B] tokens of every batch row.
    width: T of the batch.
    row_length: S of the packed rows, at least the longest trajectory.
    heads: what may be shared, see `shareable`; None = nothing.

  Raises:
    UserError: a trajectory does not fit a row.
  """
  order = sorted(rows, key=lambda b: (-int(lengths[b]), b))
  if order and lengths[order[0]] > row_length:
    raise types.UserError(
      f"a trajectory of {lengths[order[0]]} tokens does not fit a packed row "
      f"of {row_length}"
    )
  if heads is None:
    filled = _first_fit(order, lengths, row_length)
    return _lay_out(filled, lengths, width, row_length)
  ways = []
  for closest in (False, True):
    ways.append(_Rows(lengths, heads, row_length, closest))
    for b in order:
      ways[-1].add(b)
  return _lay_out(min(ways, key=lambda way: way.cost).rows, lengths, width,
                  row_length)


def _lay_out(rows, lengths, width, row_length) -> Packing:
  """The places of tokens in filled rows."""
  shape = (max(len(rows), 1), row_length)
  source = np.full(shape, -1, np.int64)
  segments, positions = np.zeros((2, *shape), np.int32)
  places = np.full((len(lengths), width), -1, np.int64)
  for r, row in enumerate(rows):
    steps = np.arange(row.prefix)
    source[r, : row.prefix] = row.inside[0] * width + steps
    segments[r, : row.prefix] = attention.PREFIX
    positions[r, : row.prefix] = steps
    start = row.start
    for segment, b in enumerate(row.inside, 1):
      places[b, : row.prefix] = r * row_length + steps
      own = np.arange(row.prefix, lengths[b])
      stop = start + len(own)
      source[r, start:stop] = b * width + own
      segments[r, start:stop] = segment
      positions[r, start:stop] = own
      places[b, own] = r * row_length + np.arange(start, stop)
      start = stop
  return Packing(source, segments, positions, places)
