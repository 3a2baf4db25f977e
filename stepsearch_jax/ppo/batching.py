"""Trajectories to padded batches, and batches to packed rows (numpy).

Packing goes by a trajectory's length, never by its loss mask: a token that is
not trained is still attended to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types

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
  shape = (rows, max_length)
  turns = max((_turns(t) for t in trajectories), default=1)
  batch = types.RolloutBatch(
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
    answer_turn=np.array([_answer_turn(t) for t in trajectories], np.int32),
  )
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


def _turns(trajectory: types.Trajectory) -> int:
  """Turns that have tokens, one that was cut off included; at least 1."""
  return max(int(trajectory.turn_index.max(initial=0)) + 1, 1)


def _answer_turn(trajectory: types.Trajectory) -> int:
  """Number of the turn that answers, -1 where none does."""
  turns = trajectory.turns
  return len(turns) - 1 if turns and turns[-1].action == "answer" else -1


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
    source: [R, S] int64, flat index b * T + t of the token, -1 for padding.
    segment_ids: [R, S] int32, 1.. within a row, 0 for padding.
    positions: [R, S] int32, position inside the trajectory.
  """

  source: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray

  @property
  def padding_share(self) -> float:
    """Share of packed places that hold no token."""
    return float((self.source < 0).mean())

  def padded(self, rows: int) -> Packing:
    """Returns the packing with empty rows behind it, `rows` in all."""
    more = ((0, rows - len(self.source)), (0, 0))
    return Packing(
      np.pad(self.source, more, constant_values=-1),
      np.pad(self.segment_ids, more), np.pad(self.positions, more),
    )

  def pack(self, array: np.ndarray, fill: float = 0) -> np.ndarray:
    """[B, T] array to packed [R, S]."""
    return np.where(self.source >= 0, array.reshape(-1)[self.source], fill)

  def unpack(self, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Packed [R, S] array back to [B, T], zeros where nothing was packed."""
    out = np.zeros(shape[0] * shape[1], packed.dtype)
    valid = self.source >= 0
    out[self.source[valid]] = packed[valid]
    return out.reshape(shape)


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


def pack(
  rows: Sequence[int],
  lengths: np.ndarray,
  width: int,
  row_length: int,
) -> Packing:
  """First-fit-decreasing packing of trajectories into rows.

  Args:
    rows: batch rows to pack.
    lengths: [B] tokens of every batch row.
    width: T of the batch.
    row_length: S of the packed rows, at least the longest trajectory.

  Raises:
    UserError: a trajectory does not fit a row.
  """
  free: list[int] = []
  places: list[list[int]] = []
  for b in sorted(rows, key=lambda b: (-int(lengths[b]), b)):
    size = int(lengths[b])
    if size > row_length:
      raise types.UserError(
        f"a trajectory of {size} tokens does not fit a packed "
        f"row of {row_length}"
      )
    r = next((i for i, room in enumerate(free) if room >= size), len(free))
    if r == len(free):
      free.append(row_length)
      places.append([])
    free[r] -= size
    places[r].append(b)
  count = max(len(free), 1)
  source = np.full((count, row_length), -1, np.int64)
  segments = np.zeros((count, row_length), np.int32)
  positions = np.zeros((count, row_length), np.int32)
  for r, inside in enumerate(places):
    start = 0
    for segment, b in enumerate(inside, 1):
      stop = start + int(lengths[b])
      steps = np.arange(stop - start)
      source[r, start:stop] = b * width + steps
      segments[r, start:stop] = segment
      positions[r, start:stop] = steps
      start = stop
  return Packing(source, segments, positions)
