"""Rollout programs and full slots, for whatever times them bare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from stepsearch_jax.models import decoder
from stepsearch_jax.parallel import sharding
from stepsearch_jax.rollout import device
from stepsearch_jax.rollout import programs as rollout_programs

BLOCK = 32


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
