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
from stepsearch_jax.rollout import device, programs, recorder, records


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
    budget: tokens that the policy may write in its next turn.
    phase: what the slot waits for.
    cached: tokens that the cache holds. While the policy speaks all but the
      newest, which every program run feeds first.
    idled: decode steps that the last block ran on after this slot stopped.
  """

  place: int
  record: recorder.Recorder
  budget: int = 0
  phase: Phase = Phase.WRITING
  cached: int = 0
  idled: int = 0

  @property
  def missing(self) -> int:
    """Tokens that the next writing feeds."""
    return len(self.record.tokens) - self.cached


class SlotCache:
  """The device state of one rollout and the two ways to advance it."""

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
    # Stopped slots that end a block: a few per cent may idle, and a large
    # batch does not return to the host for every one of them.
    self._leave = max(compiled.spec.slots // 16, 1)

  def write(self, slots: Sequence[Slot]) -> None:
    """Writes the missing tokens of slots, the longest together; they speak."""
    if not slots:
      return
    began = time.perf_counter()
    waiting = sorted(slots, key=lambda slot: (-slot.missing, slot.place))
    while waiting:
      # No padding rows: the largest bucket that the waiting slots fill.
      rows = max((r for r in self._spec.extend_rows if r <= len(waiting)),
                 default=len(waiting))
      group, waiting = waiting[:rows], waiting[rows:]
      self._write_chunk(group)
      longer = [slot for slot in group if slot.phase is Phase.WRITING]
      waiting = longer + waiting
    jax.block_until_ready(self._state.position)  # For honest timings.
    self._stats.extend_seconds += time.perf_counter() - began

  def _write_chunk(self, group: Sequence[Slot]) -> None:
    """Writes up to one chunk of tokens of each slot."""
    chunk = self._chunk(group)
    kv_length = int((chunk.start + chunk.length).max())
    self._state = self._programs.extend(
      self._params, self._state, chunk, kv_length
    )
    for row, slot in enumerate(group):
      # The last token of a chunk is fed but not stored, so the next chunk of
      # a longer row begins with it.
      slot.cached += int(chunk.length[row]) - 1
      if chunk.begins_turn[row]:
        slot.phase = Phase.SPEAKING

  def _chunk(self, group: Sequence[Slot]) -> device.Chunk:
    """Returns the next tokens of a group, padded to bucket sizes."""
    longest = max(slot.missing for slot in group)
    size = next((s for s in self._spec.extend_tokens if s >= longest),
                self._spec.extend_tokens[-1])
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
      self._stats.ingested_tokens += count
    self._stats.extend_padding += rows * size - int(ints["length"].sum())
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
