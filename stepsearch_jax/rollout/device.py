"""Device side of the rollout: a slot cache and four functions over it.

`extend` writes known tokens (prompts, observations) into slots of the cache;
`copy_prefix` lets a slot take over what another one holds already;
`decode_block` samples up to a block of tokens in all active slots, leaving
early when every slot has stopped; `probe` says how likely tokens would be
behind what a slot holds, and changes nothing. The newest token of a slot is
`pending`: it is known but not yet in the cache, and the next program run feeds
it.

This module knows tokens, automaton states and random keys. It must not know
tags, strings or retrievers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from stepsearch_jax import types
from stepsearch_jax.models import cache as cache_lib
from stepsearch_jax.models import decoder, heads
from stepsearch_jax.rollout import sampling

_PROBED_AT_ONCE = 128  # Tokens whose logits `probe` holds at the same time.


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
  """Static shape and filter settings of the compiled programs.

  Attributes:
    slots: P, trajectories that decode side by side.
    context: T, tokens that a slot can hold.
    block: decode steps between two looks of the host.
    top_k: keep this many most likely tokens, 0 for all.
    top_p: keep the smallest set with this much probability, 1 for all.
  """

  slots: int
  context: int
  block: int
  top_k: int
  top_p: float

  def __post_init__(self):
    """Raises UserError, naming the field of the config."""
    for name in ("slots", "context", "block"):
      value = getattr(self, name)
      types.expect(value >= 1, f"rollout.{name}", "at least 1", value)
    types.expect(self.top_k >= 0, "rollout.top_k", "at least 0 (0 keeps all)",
                 self.top_k)
    types.expect(0 < self.top_p <= 1, "rollout.top_p",
                 "more than 0 and at most 1", self.top_p)


@flax.struct.dataclass
class SlotState:
  """Everything the decode loop carries; one row per slot.

  Attributes:
    cache: keys and values of all slots.
    pending: [P] int32, newest token, not yet in the cache.
    position: [P] int32, position of `pending`.
    automaton: [P] int32, stop-automaton state before `pending` is followed.
    active: [P] bool, slot is in the middle of a policy turn.
    budget: [P] int32, tokens that the turn may still take.
    episode: [P] int32, rollout number; seeds the slot's randomness.
    temperature: [P] float32, 0 for greedy.
  """

  cache: cache_lib.Cache
  pending: types.Leaf
  position: types.Leaf
  automaton: types.Leaf
  active: types.Leaf
  budget: types.Leaf
  episode: types.Leaf
  temperature: types.Leaf


@flax.struct.dataclass
class BlockOutput:
  """What one block sampled, copied to the host in one go.

  Attributes:
    tokens: [P, block] int32, -1 where a slot was not active.
    logprobs: [P, block] float32, under the temperature-scaled policy.
    active: [P] bool, slot goes on in the next block.
    steps: [] int32, decode steps that ran.
  """

  tokens: jax.Array
  logprobs: jax.Array
  active: jax.Array
  steps: jax.Array


@flax.struct.dataclass
class Chunk:
  """Known tokens for some slots. Padding rows have length 0.

  Attributes:
    slot: [B] int32.
    tokens: [B, S] int32.
    start: [B] int32, position of the first token.
    length: [B] int32, valid tokens; the last one becomes `pending`.
    begins_turn: [B] bool, the policy speaks after this chunk.
    budget, episode, temperature: [B], see `SlotState`.
  """

  slot: types.Leaf
  tokens: types.Leaf
  start: types.Leaf
  length: types.Leaf
  begins_turn: types.Leaf
  budget: types.Leaf
  episode: types.Leaf
  temperature: types.Leaf


@flax.struct.dataclass
class ProbeChunk:
  """Tokens that might follow in some slots. Padding rows have length 0.

  Attributes:
    slot: [B] int32; a slot may come more than once.
    tokens: [B, S] int32.
    start: [B] int32, position of the first token.
    length: [B] int32, valid tokens.
    targets: [B, S] int32, the token behind each one where its probability is
      wanted; -1 elsewhere.
  """

  slot: types.Leaf
  tokens: types.Leaf
  start: types.Leaf
  length: types.Leaf
  targets: types.Leaf


def init_state(config: decoder.DecoderConfig, spec: ProgramSpec) -> SlotState:
  """An empty slot cache with every slot inactive."""
  rows = functools.partial(jnp.zeros, (spec.slots,))
  return SlotState(
    cache=decoder.init_cache(config, spec.slots, spec.context, config.dtype),
    pending=rows(jnp.int32),
    position=rows(jnp.int32),
    automaton=rows(jnp.int32),
    active=rows(jnp.bool_),
    budget=rows(jnp.int32),
    episode=rows(jnp.int32),
    temperature=rows(jnp.float32),
  )


def extend(
  params: types.Tree, state: SlotState, chunk: Chunk, *,
  config: decoder.DecoderConfig, spec: ProgramSpec, kv_length: int,
) -> SlotState:
  """Writes known tokens into the cache; see `Chunk`.

  The last token of a row stays out of the cache as its slot's `pending`.

  Returns:
    The new `SlotState`.
  """
  offsets = jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32)[None]
  stored = offsets < chunk.length[:, None] - 1
  positions = jnp.where(stored, chunk.start[:, None] + offsets, spec.context)
  applied: Any = decoder.Decoder(config).apply(
    {"params": params["trunk"]},
    chunk.tokens,
    positions,
    cache=dataclasses.replace(state.cache, slots=chunk.slot),
    kv_length=kv_length,
  )
  return _placed(state, applied[1], chunk, spec)


def copy_prefix(
  state: SlotState, source: jax.Array, chunk: Chunk, *, spec: ProgramSpec,
  kv_length: int,
) -> SlotState:
  """Takes over the first cached positions of other slots.

  Positions behind the prefix are copied along, up to `kv_length`; a slot
  never attends to what it has not written itself.

  Args:
    state: slots; donated.
    source: [B] int32, the slot that holds the prefix of each row.
    chunk: the token behind each prefix, [B, 1]; see `Chunk`.
    spec: shapes.
    kv_length: static bound on the prefixes' lengths.

  Returns:
    The new `SlotState`.
  """
  target = jnp.where(chunk.length > 0, chunk.slot, spec.slots)
  cache = cache_lib.copy_rows(state.cache, source, target, kv_length)
  return _placed(state, cache, chunk, spec)


def _placed(
  state: SlotState, cache: cache_lib.Cache, chunk: Chunk, spec: ProgramSpec
) -> SlotState:
  """Returns the state in which a chunk's last tokens are pending."""
  last = jnp.maximum(chunk.length - 1, 0)
  newest = jnp.take_along_axis(chunk.tokens, last[:, None], axis=1)[:, 0]
  # Rows without tokens point past the last slot and are dropped.
  slot = jnp.where(chunk.length > 0, chunk.slot, spec.slots)

  def put(field, value):
    return field.at[slot].set(value, mode="drop")

  return SlotState(
    cache=dataclasses.replace(cache, slots=None),
    pending=put(state.pending, newest),
    position=put(state.position, chunk.start + last),
    automaton=put(state.automaton, jnp.zeros_like(chunk.slot)),
    active=put(state.active, chunk.begins_turn),
    budget=put(state.budget, chunk.budget),
    episode=put(state.episode, chunk.episode),
    temperature=put(state.temperature, chunk.temperature),
  )


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What decode programs are compiled for.

  Attributes:
    config: decoder configuration.
    spec: shapes and filters.
    first_stop: automaton states from here on end a turn.
  """

  config: decoder.DecoderConfig
  spec: ProgramSpec
  first_stop: int


@flax.struct.dataclass
class Draw:
  """How a block samples, and when it ends.

  Attributes:
    table: [states, V] unsigned, the stop automaton; a byte per entry if that is
      enough (64 states of 151,936 tokens are 10 MB, in int32 39).
    key: the run's sampling key.
    limit: [] int32, decode steps at most, up to `ProgramSpec.block`.
    leave: [] int32, stop as soon as so many slots have stopped.
  """

  table: types.Leaf
  key: types.Leaf
  limit: types.Leaf
  leave: types.Leaf


def _decode_step(params, state, draw: Draw, compiled: Compiled, kv_length):
  """One token in every active slot; returns (state, tokens, logprobs)."""
  on, spec = state.active, compiled.spec
  where = jnp.where(on, state.position, spec.context)
  hidden, cache = decoder.Decoder(compiled.config).apply(
    {"params": params["trunk"]},
    state.pending[:, None],
    where[:, None],
    cache=state.cache,
    kv_length=kv_length,
  )
  logits = heads.logits(params, hidden[:, 0])
  token, logprob = sampling.select(
    logits, state.temperature,
    sampling.uniforms(draw.key, state.episode, state.position),
    spec.top_k, spec.top_p,
  )
  automaton = draw.table[state.automaton, token].astype(jnp.int32)
  budget = state.budget - 1
  state = state.replace(
    cache=cache,
    pending=jnp.where(on, token, state.pending),
    position=jnp.where(on, state.position + 1, state.position),
    automaton=jnp.where(on, automaton, state.automaton),
    active=on & (automaton < compiled.first_stop) & (budget > 0),
    budget=jnp.where(on, budget, state.budget),
  )
  return state, jnp.where(on, token, -1), jnp.where(on, logprob, 0.0)


def decode_block(
  params: types.Tree, state: SlotState, draw: Draw, *, compiled: Compiled,
  kv_length: int,
) -> tuple[SlotState, BlockOutput]:
  """Samples up to `spec.block` tokens in every active slot.

  Args:
    params: policy parameters.
    state: slots; donated.
    draw: how to sample, and when to end.
    compiled: what the program is compiled for.
    kv_length: static bound on the positions reached inside the block.

  Returns:
    (`SlotState`, `BlockOutput`).
  """

  def step(carry):
    i, state, tokens, logprobs = carry
    state, token, logprob = _decode_step(
      params, state, draw, compiled, kv_length
    )
    tokens = tokens.at[:, i].set(token)
    return i + 1, state, tokens, logprobs.at[:, i].set(logprob)

  began = state.active.sum(dtype=jnp.int32)

  def unfinished(carry):
    left = carry[1].active.sum(dtype=jnp.int32)
    short = (carry[0] < draw.limit) & (began - left < draw.leave)
    return short & (left > 0)

  shape = (compiled.spec.slots, compiled.spec.block)
  start = (
    jnp.int32(0),
    state,
    jnp.full(shape, -1, jnp.int32),
    jnp.zeros(shape, jnp.float32),
  )
  steps, state, tokens, logprobs = jax.lax.while_loop(unfinished, step, start)
  return state, BlockOutput(tokens, logprobs, state.active, steps)


def probe(
  params: types.Tree, state: SlotState, chunk: ProbeChunk, *,
  config: decoder.DecoderConfig, kv_length: int,
) -> jax.Array:
  """Log-probability of the targets of each row, their sum [B] float32.

  Rows attend to what their slot holds before `start`. They are fed to a copy of
  those positions, so that neither the slots nor other rows of a slot notice.
  The distribution is the policy's at temperature 1.
  """
  cache = cache_lib.rows_of(state.cache, chunk.slot, kv_length)
  offsets = jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32)[None]
  fed = offsets < chunk.length[:, None]
  positions = jnp.where(fed, chunk.start[:, None] + offsets, kv_length)
  hidden, _ = decoder.Decoder(config).apply(
    {"params": params["trunk"]}, chunk.tokens, positions, cache=cache,
    kv_length=kv_length,
  )

  def logprob(inputs):
    state, target = inputs
    logits = heads.logits(params, state)
    return logits[jnp.maximum(target, 0)] - jax.nn.logsumexp(logits)

  wanted = chunk.targets.reshape(-1)
  # As many logits at a time as a decode step of as many slots has.
  found = jax.lax.map(
    logprob, (hidden.reshape(len(wanted), -1), wanted),
    batch_size=_PROBED_AT_ONCE,
  )
  found = jnp.where(wanted >= 0, found, 0.0)
  return found.reshape(chunk.targets.shape).sum(-1)
