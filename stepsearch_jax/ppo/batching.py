"""Trajectories to padded batches, and batches to packed rows (numpy).

Packing goes by a trajectory's length, never by its loss mask: a token that is
not trained is still attended to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types


def trajectories_to_batch(
  trajectories: Sequence[types.Trajectory],
  rewards: Sequence[np.ndarray],
  max_length: int,
  pad_id: int,
  dropped_ids: Sequence[int] = (),
) -> types.RolloutBatch:
  """Right-pads trajectories to [B, max_length].

  Args:
    trajectories: finished rollouts.
    rewards: [T] float32 per trajectory.
    max_length: T of the batch.
    pad_id: fills `tokens`.
    dropped_ids: sampled tokens to leave out of the policy mask (the released
      preset drops end-of-text).

  Raises:
    UserError: a trajectory is longer than `max_length`.
  """
  rows = len(trajectories)
  tokens = np.full((rows, max_length), pad_id, np.int32)
  mask = np.zeros((rows, max_length), np.float32)
  spread = np.zeros((rows, max_length), np.float32)
  lengths = np.array([len(t.tokens) for t in trajectories], np.int32)
  if lengths.max(initial=0) > max_length:
    raise types.UserError(
      f"a trajectory has {lengths.max()} tokens, rollout.context is "
      f"{max_length}"
    )
  groups: dict[str, int] = {}
  for row, (trajectory, reward) in enumerate(
    zip(trajectories, rewards, strict=True)
  ):
    size = lengths[row]
    tokens[row, :size] = trajectory.tokens
    sampled = trajectory.policy_mask
    if len(dropped_ids):
      sampled = sampled & ~np.isin(trajectory.tokens, dropped_ids)
    mask[row, :size] = sampled
    spread[row, :size] = reward
    groups.setdefault(trajectory.question.id, len(groups))
  group = np.array([groups[t.question.id] for t in trajectories], np.int32)
  return types.RolloutBatch(tokens, lengths, mask, spread, group)


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

  def pack(self, array: np.ndarray, fill=0) -> np.ndarray:
    """[B, T] array to packed [R, S]."""
    return np.where(self.source >= 0, array.reshape(-1)[self.source], fill)

  def unpack(self, packed: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Packed [R, S] array back to [B, T], zeros where nothing was packed."""
    out = np.zeros(shape[0] * shape[1], packed.dtype)
    valid = self.source >= 0
    out[self.source[valid]] = packed[valid]
    return out.reshape(shape)


def pack(
  rows: Sequence[int],
  lengths: np.ndarray,
  width: int,
  row_length: int,
  multiple: int,
) -> Packing:
  """First-fit-decreasing packing of trajectories into rows.

  Args:
    rows: batch rows to pack.
    lengths: [B] tokens of every batch row.
    width: T of the batch.
    row_length: S of the packed rows, at least the longest trajectory.
    multiple: the number of packed rows is rounded up to this.

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
  count = max(-(-len(free) // multiple), 1) * multiple
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
