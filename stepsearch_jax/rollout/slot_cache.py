"""The host's side of the slots: what is written into them, when they sample.

A slot's record knows how many of its tokens the cache holds, so "what is still
to be written" is a slice of its tokens and never a second list. This module
knows tokens and programs; it must not know text, turns or searches.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Sequence

import jax
import numpy as np

from stepsearch_jax import types
from stepsearch_jax.rollout import (
  device,
  probing,
  programs,
  recorder,
  records,
)

# Shorter prefixes are not worth a program that copies them.
_LEAST_SHARED = 32


class Phase(enum.StrEnum):
  """What a slot waits for."""

  WRITING = "writing"  # Its newest tokens are to be written into the cache.
  SPEAKING = "speaking"  # The policy is in the middle of a turn.
  SEARCHING = "searching"  # A search is under way.


@dataclasses.dataclass(eq=False)
class Slot:
  """One place of the cache and the trajectory that lives there.

  Attributes:
    place: row of the cache.
    record: the trajectory so far.
    prompt: its prompt, tokens [N] int32.
    budget: tokens that the policy may write in its next turn.
    phase: what the slot waits for.
    cached: tokens that the cache holds. While the policy speaks all but the
      newest, which every program run feeds first.
    idled: decode steps that the last block ran on after this slot stopped.
  """

  place: int
  record: recorder.Recorder
  prompt: np.ndarray
  budget: int = 0
  phase: Phase = Phase.WRITING
  cached: int = 0
  idled: int = 0

  @property
  def is_new(self) -> bool:
    """Whether nothing of the trajectory has been written yet."""
    return self.cached == 0

  @property
  def missing(self) -> int:
    """Tokens that the next writing feeds."""
    return len(self.record.tokens) - self.cached

  def shares(self, other: Slot, held: int) -> int:
    """Returns how much of its prompt the row of another slot can give.

    The last token of a prompt never counts, since it is fed and not stored.

    Args:
      other: a slot.
      held: tokens of it that its row holds.
    """
    count = min(len(self.prompt) - 1, len(other.prompt), held)
    differ = self.prompt[:count] != other.prompt[:count]
    same = int(differ.argmax()) if differ.any() else count
    return same if same >= _LEAST_SHARED else 0


@dataclasses.dataclass(frozen=True)
class _Copy:
  """The first `length` tokens in row `source`, for a slot."""

  slot: Slot
  source: int
  length: int


class SlotCache:
  """The device state of one rollout: two ways to advance it, one to ask."""

  def __init__(
    self, compiled: programs.RolloutPrograms, params: types.Tree,
    key: jax.Array, temperature: float, spec: records.EngineSpec,
    stats: records.RolloutStats,
  ):
    """Starts with empty slots.

    Args:
      compiled: the device programs.
      params: policy in training layout.
      key: of the sampling.
      temperature: 0 for greedy.
      spec: bucket sizes.
      stats: counts what is done.
    """
    self._programs = compiled
    self._params = compiled.decode_params(params)
    self._state = compiled.init_state()
    self._key = key
    self._temperature = temperature
    self._spec = spec
    self._stats = stats
    # What each row of the cache was last written with.
    self._rows: dict[int, Slot] = {}
    # Stopped slots that end a block: a few per cent may idle, and a large
    # batch does not return to the host for every one of them.
    self._leave = max(compiled.spec.slots // 16, 1)

  def write(self, slots: Sequence[Slot]) -> None:
    """Writes the missing tokens of slots, which then speak."""
    if not slots:
      return
    began = time.perf_counter()
    waiting = list(slots)
    while waiting:
      # 1. Prompts that others can take more over from go first ...
      ready = self._take_over(waiting)
      # 2. ... then what is still missing is written, the longest together.
      self._write_missing([s for s in ready if s.phase is Phase.WRITING])
      self._rows.update((slot.place, slot) for slot in ready)
      waiting = [slot for slot in waiting if slot not in ready]
    # Tells writing from decoding; an accelerator would wait for nothing.
    if jax.default_backend() == "cpu":
      jax.block_until_ready(self._state.position)
    self._stats.extend_seconds += time.perf_counter() - began

  def _take_over(self, waiting: Sequence[Slot]) -> list[Slot]:
    """Copies what rows hold of new prompts; returns slots to write now."""
    anew = {slot.place for slot in waiting if slot.is_new}
    ready, copies, new = [], [], []
    for slot in waiting:
      if slot.is_new:
        row, shared = self._holder(slot, anew)
        ahead = max(
          (slot.shares(other, len(other.prompt) - 1) for other in new),
          default=0,
        )
        whole = ahead == len(slot.prompt) - 1
        if ahead > shared and (whole or ahead >= shared + _LEAST_SHARED):
          continue  # Until that one is written.
        new.append(slot)
        if row and (row.place != slot.place or shared == slot.missing - 1):
          copies.append(_Copy(slot, row.place, shared))
        elif row:
          slot.cached = shared
        self._stats.shared_tokens += shared
      ready.append(slot)
    while copies:
      rows = self._bucket_that_fills(len(copies))
      self._copy(copies[:rows])
      copies = copies[rows:]
    return ready

  def _holder(self, slot: Slot, anew: set[int]) -> tuple[Slot | None, int]:
    """Returns whose row holds most of a prompt, and how much; its own first.

    Rows that are about to be written anew are none to copy from.
    """
    best, shared = None, 0
    own = self._rows.get(slot.place)
    others = (row for p, row in sorted(self._rows.items()) if p not in anew)
    for row in (own, *others):
      held = slot.shares(row, row.cached) if row else 0
      if held > shared:
        best, shared = row, held
    return best, shared

  def _copy(self, copies: Sequence[_Copy]) -> None:
    """Copies prefixes; a slot that lacks only its last token speaks."""
    group = [copy.slot for copy in copies]
    for copy in copies:
      copy.slot.cached = copy.length
    chunk = self._chunk(group, 1)
    source = np.zeros(len(chunk.slot), np.int32)
    source[: len(copies)] = [copy.source for copy in copies]
    self._state = self._programs.copy_prefix(
      self._state, source, chunk, int(chunk.start.max())
    )
    self._advance(group, chunk)

  def _bucket_that_fills(self, count: int) -> int:
    """Returns the largest number of rows without padding, or `count`."""
    return max((r for r in self._spec.extend_rows if r <= count),
               default=count)

  def _write_missing(self, slots: Sequence[Slot]) -> None:
    """Writes missing tokens in chunks, the longest rows together."""
    waiting = sorted(slots, key=lambda slot: (-slot.missing, slot.place))
    while waiting:
      rows = self._bucket_that_fills(len(waiting))
      group, waiting = waiting[:rows], waiting[rows:]
      self._write_chunk(group)
      longer = [slot for slot in group if slot.phase is Phase.WRITING]
      waiting = longer + waiting

  def _write_chunk(self, group: Sequence[Slot]) -> None:
    """Writes up to one chunk of tokens of each slot."""
    longest = max(slot.missing for slot in group)
    size = next((s for s in self._spec.extend_tokens if s >= longest),
                self._spec.extend_tokens[-1])
    chunk = self._chunk(group, size)
    kv_length = int((chunk.start + chunk.length).max())
    self._state = self._programs.extend(
      self._params, self._state, chunk, kv_length
    )
    self._advance(group, chunk)
    written = int(chunk.length.sum())
    self._stats.ingested_tokens += written
    self._stats.extend_padding += chunk.tokens.size - written

  def _advance(self, group: Sequence[Slot], chunk: device.Chunk) -> None:
    """Notes what the cache holds after a chunk."""
    for row, slot in enumerate(group):
      # The last token of a chunk is fed but not stored, so the next chunk of
      # a longer row begins with it.
      slot.cached += int(chunk.length[row]) - 1
      if chunk.begins_turn[row]:
        slot.phase = Phase.SPEAKING

  def _chunk(self, group: Sequence[Slot], size: int) -> device.Chunk:
    """Returns the next `size` tokens of a group, padded to bucket sizes."""
    rows = next(r for r in self._spec.extend_rows if r >= len(group))
    ints = {
      name: np.zeros(rows, np.int32)
      for name in ("slot", "start", "length", "budget", "episode")
    }
    tokens = np.zeros((rows, size), np.int32)
    begins = np.zeros(rows, bool)
    for row, slot in enumerate(group):
      count = min(slot.missing, size)
      tokens[row, :count] = slot.record.tokens[slot.cached :][:count]
      begins[row] = count == slot.missing
      ints["slot"][row] = slot.place
      ints["start"][row] = slot.cached
      ints["length"][row] = count
      ints["budget"][row] = slot.budget
      ints["episode"][row] = slot.record.episode
    return device.Chunk(
      tokens=tokens,
      begins_turn=begins,
      temperature=np.full(rows, self._temperature, np.float32),
      **ints,
    )

  def decode(self, slots: Sequence[Slot], limit: int | None) -> list[Slot]:
    """Samples a block in slots that speak; returns those whose turn ended.

    Args:
      slots: all slots that speak.
      limit: decode steps at most; None for a whole block.
    """
    began = time.perf_counter()
    spec = self._programs.spec
    limit = spec.block if limit is None else min(limit, spec.block)
    furthest = max(len(slot.record.tokens) for slot in slots)
    self._state, output = self._programs.decode_block(
      self._params, self._state, self._key, furthest + limit, limit,
      self._leave,
    )
    output = jax.device_get(output)
    steps, ended = int(output.steps), []
    for slot in slots:
      count = int((output.tokens[slot.place] >= 0).sum())
      slot.record.append(
        output.tokens[slot.place, :count].tolist(),
        types.Provenance.POLICY,
        output.logprobs[slot.place, :count].tolist(),
      )
      slot.cached += count
      slot.idled = steps - count
      self._stats.policy_tokens += count
      if not output.active[slot.place]:
        ended.append(slot)
    self._stats.decode_steps += steps
    self._stats.slot_steps += steps * spec.slots
    self._stats.idle_slot_steps += int((output.tokens[:, :steps] < 0).sum())
    self._stats.decode_seconds += time.perf_counter() - began
    return ended

  def probe(
    self, rows: Sequence[probing.Row], spec: records.ProbeSpec
  ) -> list[float]:
    """Returns the log-probability of each row's answer; changes nothing.

    Args:
      rows: behind what their slots hold, or have held before they went on.
      spec: bucket sizes.
    """
    began = time.perf_counter()
    found = np.zeros(len(rows), np.float32)
    waiting = [
      (piece, self._programs.probe(self._params, self._state, piece.chunk))
      for piece in probing.pieces(rows, self._spec.extend_rows, spec.tokens)
    ]
    for piece, values in waiting:
      found[piece.rows] = jax.device_get(values)[: len(piece.rows)]
    self._stats.probe_seconds += time.perf_counter() - began
    return found.tolist()
