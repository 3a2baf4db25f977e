"""Rollout programs and full slots, for whatever times them bare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import device
from stepsearch_jax.rollout import programs as rollout_programs

BLOCK = 32


class Optioned(rollout_programs.RolloutPrograms):
  """Programs that are compiled with options of the compiler's."""

  def __init__(self, options: dict[str, str | int | bool], *how: Any):
    """Options by their names; the rest as ever."""
    super().__init__(*how)
    self._options = options

  def _lower_decode(self, kv_length: int):
    return _Lowered(super()._lower_decode(kv_length), self._options)


@dataclasses.dataclass(frozen=True)
class _Lowered:
  """A lowered program and the options that it is compiled with."""

  program: jax.stages.Lowered
  options: dict[str, Any]

  def compile(self) -> jax.stages.Compiled:
    return self.program.compile(compiler_options=self.options)


def endless(
  config: decoder.DecoderConfig, rows: int, context: int,
  kind: Callable = rollout_programs.RolloutPrograms,
) -> rollout_programs.RolloutPrograms:
  """Returns programs of some kind whose automaton never stops."""
  return kind(
    config,
    rollout_programs.ProgramSpec(rows, context, BLOCK, top_k=0, top_p=1.0),
    np.zeros((1, config.vocab_size), np.int32), 1, sharding.make_mesh(),
  )


def prompts(
  tokens: np.ndarray, budget: int, temperature: float
) -> device.Chunk:
  """Prompts [P, S] of equal length for all slots."""
  count, length = tokens.shape
  same = lambda value: np.full(count, value, np.int32)  # noqa: E731
  places = np.arange(count, dtype=np.int32)
  return device.Chunk(
    slot=places, tokens=tokens, start=same(0), length=same(length),
    begins_turn=np.ones(count, bool), budget=same(budget), episode=places,
    temperature=np.full(count, temperature, np.float32),
  )


def speaking(
  programs: rollout_programs.RolloutPrograms, position: int
) -> device.SlotState:
  """Every slot in the middle of a long turn at a position."""
  count = programs.spec.slots
  return dataclasses.replace(
    programs.init_state(),
    position=np.full(count, position, np.int32),
    active=np.ones(count, bool),
    budget=np.full(count, 1 << 30, np.int32),
    temperature=np.ones(count, np.float32),
  )
