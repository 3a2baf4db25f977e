"""The rollout's compiled programs: their shapes, layouts and number.

`device.py` says what they compute. A program is compiled once for each shape
of a chunk and each `kv_length`, the bound on the positions that it attends to;
both come from few buckets, so their number is bounded and all can be compiled
ahead.

Like `device.py`, this module must not know tags, strings or retrievers.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from stepsearch_jax import types
from stepsearch_jax.models import attention, decoder, heads
from stepsearch_jax.parallel import first_run, sharding
from stepsearch_jax.rollout import device, layout
from stepsearch_jax.rollout.device import ProgramSpec


def _state_shardings(mesh, state: device.SlotState) -> device.SlotState:
  """Where the slots' cache and counters live."""
  rows = jax.tree.map(
    lambda leaf: sharding.named(mesh, ("slots",), leaf.shape),
    dataclasses.replace(state, cache=None),
  )
  return dataclasses.replace(
    rows, cache=layout.cache_shardings(mesh, state.cache)
  )


def _kv_buckets(context: int) -> tuple[int, ...]:
  """Returns the values of `kv_length`, a third to a half apart."""
  buckets, length = {context}, context
  while length > 256:
    half = -(-length // 2)
    buckets |= {half + half // 2, half}
    length = half
  return tuple(sorted(buckets))


_Compiled = dict[tuple[int, ...], jax.stages.Compiled]  # By shapes.


class RolloutPrograms:
  """The compiled programs for one model and one set of shapes.

  A `kv_length` asked for is rounded up to a few buckets, so the number of
  compiled variants is bounded by `len(kv_buckets)` times the chunk shapes in
  use.
  """

  def __init__(
    self, config: decoder.DecoderConfig, spec: ProgramSpec, table: np.ndarray,
    first_stop: int, mesh: sharding.DeviceMesh,
  ):
    """Prepares the programs; nothing is compiled yet."""
    # A cached forward is never differentiated: remat would only cost time.
    config = dataclasses.replace(config, remat=decoder.Remat.NONE)
    self.config = config
    self.spec = spec
    self._mesh = mesh
    everywhere = sharding.replicated(mesh)
    self._automaton = np.asarray(table, np.min_scalar_type(len(table) - 1))
    init = functools.partial(device.init_state, config, spec)
    state = jax.eval_shape(init)
    placed = _state_shardings(mesh, state)
    self._state = sharding.abstract(state, placed)
    self._init = jax.jit(init, out_shardings=placed)
    self._extend = jax.jit(
      functools.partial(device.extend, config=config, spec=spec),
      static_argnames="kv_length",
      donate_argnums=1,
      out_shardings=placed,
    )
    self._copy = jax.jit(
      functools.partial(device.copy_prefix, spec=spec),
      static_argnames="kv_length",
      donate_argnums=0,
      out_shardings=placed,
    )
    self._decode = jax.jit(
      functools.partial(
        device.decode_block,
        compiled=device.Compiled(config, spec, first_stop),
      ),
      static_argnames="kv_length",
      donate_argnums=1,
      out_shardings=(placed, everywhere),
    )
    self._probe = jax.jit(
      functools.partial(device.probe, config=config),
      static_argnames="kv_length", out_shardings=everywhere,
    )
    policy = jax.eval_shape(
      functools.partial(heads.init_policy, config), jax.random.key(0)
    )
    cast = functools.partial(
      layout.reshard_cast, config=config,
      training=sharding.tree_shardings(
        mesh, heads.logical_axes(config), policy
      ),
    )
    weights = jax.eval_shape(cast, policy)
    placed = sharding.decode_shardings(
      mesh, layout.decode_axes(config), weights
    )
    self._weights = sharding.abstract(weights, placed)
    self._cast = jax.jit(cast, out_shardings=placed)
    self._compiled, self._probes = _Compiled(), _Compiled()
    self._run = first_run.FirstAlone()  # Searches go on in other threads.
    self.kv_buckets = _kv_buckets(spec.context)

  @functools.cached_property
  def _table(self) -> jax.Array:
    """The stop automaton on the devices."""
    return sharding.put(self._automaton, sharding.replicated(self._mesh))

  @functools.cached_property
  def _decodes_held(self) -> bool:
    """Whether lengths on the device bound what a decode block reads."""
    config, cache = self.config, self._state.cache
    query = jax.ShapeDtypeStruct(
      (self.spec.slots, 1, config.num_heads, config.head_dim), config.dtype
    )
    with sharding.scope(self._mesh):
      return attention.held_kernel(
        query, (cache.k[0], cache.v[0]), cache, config.attention
      ) is not None

  def lowered(
    self, rows: int, tokens: int, params: types.Tree
  ) -> dict[str, jax.stages.Lowered]:
    """The programs at their largest shapes, lowered but not compiled.

    Args:
      rows, tokens: shape of a chunk.
      params: policy in training layout, as shapes with shardings.
    """
    with sharding.scope(self._mesh):
      cast = self._cast.lower(params)
    kv_length = self.spec.context
    return {
      "reshard_cast": cast,
      "extend": self._lower_extend(kv_length, rows, tokens),
      "decode_block": self._lower_decode(kv_length),
    }

  def _chunk(self, rows: int, tokens: int) -> device.Chunk:
    """Returns the shape of a chunk, replicated."""
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    chunk = device.Chunk(
      slot=row, start=row, length=row, budget=row, episode=row,
      tokens=jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
      begins_turn=jax.ShapeDtypeStruct((rows,), jnp.bool_),
      temperature=jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    return sharding.abstract(chunk, sharding.replicated(self._mesh))

  def _lower_extend(self, kv_length: int, rows: int, tokens: int):
    with sharding.scope(self._mesh):
      return self._extend.lower(
        self._weights, self._state, self._chunk(rows, tokens),
        kv_length=kv_length,
      )

  def _lower_copy(self, kv_length: int, rows: int):
    chunk = self._chunk(rows, 1)
    with sharding.scope(self._mesh):
      return self._copy.lower(
        self._state, chunk.slot, chunk, kv_length=kv_length
      )

  def _lower_decode(self, kv_length: int):
    one = jax.ShapeDtypeStruct((), jnp.int32)
    table, key, one = sharding.abstract(
      (self._automaton, jax.eval_shape(jax.random.key, 0), one),
      sharding.replicated(self._mesh),
    )
    with sharding.scope(self._mesh):
      return self._decode.lower(
        self._weights, self._state, device.Draw(table, key, one, one),
        kv_length=kv_length,
      )

  def _lower_probe(self, kv_length: int, rows: int, tokens: int):
    row = jax.ShapeDtypeStruct((rows,), jnp.int32)
    whole = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    chunk = sharding.abstract(
      device.ProbeChunk(row, whole, row, row, whole),
      sharding.replicated(self._mesh),
    )
    with sharding.scope(self._mesh):
      return self._probe.lower(
        self._weights, self._state, chunk, kv_length=kv_length
      )

  def _probe_program(self, *shape: int) -> jax.stages.Compiled:
    """Returns the probe of (kv_length, rows, tokens)."""
    if shape not in self._probes:
      self._probes[shape] = self._lower_probe(*shape).compile()
    return self._probes[shape]

  def _program(self, *shape: int) -> jax.stages.Compiled:
    """Returns the program of a shape, compiled when it is first needed.

    (kv_length) is `decode_block`, (kv_length, rows) `copy_prefix` and
    (kv_length, rows, tokens) `extend`.
    """
    if shape not in self._compiled:
      lower = (self._lower_decode, self._lower_copy,
               self._lower_extend)[len(shape) - 1]
      self._compiled[shape] = lower(*shape).compile()
    return self._compiled[shape]

  def compile_ahead(
    self, rows: Sequence[int], tokens: Sequence[int], prompt: int,
    probed: Sequence[int] = (),
  ) -> None:
    """Compiles whatever a rollout can need, with a progress bar.

    Args:
      rows, tokens: bucket sizes of chunks, increasing.
      prompt: tokens of the longest prompt.
      probed: bucket sizes for the tokens of probes; none = no probes.
    """
    shapes: list[tuple[int, ...]] = [
      (size,) for size in sorted(set(map(self._reach, self.kv_buckets)))
    ]
    shapes += [
      (kv_length, count) for kv_length in self.kv_buckets
      if kv_length <= self.bucket(prompt) for count in rows
      if count <= self.spec.slots or count == rows[0]
    ]
    for below, size in zip((0, *tokens), tokens, strict=False):
      # A chunk has this size because a row of it is longer than the last.
      lengths = [length for length in self.kv_buckets if length > below]
      shapes += [
        (kv_length, count, size) for kv_length in lengths for count in rows
        if count <= self.spec.slots or count == rows[0]
      ]
    jobs = [functools.partial(self._program, *shape) for shape in shapes]
    jobs += [
      functools.partial(self._probe_program, kv_length, count, size)
      for kv_length in self._probe_buckets for count in rows for size in probed
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for _ in tqdm.tqdm(
        pool.map(lambda job: job(), jobs),
        desc="compile", total=len(jobs), unit="program",
      ):
        pass

  def init_state(self) -> device.SlotState:
    """Returns an empty slot cache; see `device.init_state`."""
    return self._init()

  def decode_params(self, params: types.Tree) -> types.Tree:
    """Policy parameters in the type and layout of the decode programs.

    Layers come apart, and weights that are sharded over `fsdp` for training
    are gathered, here once and not in every decode step.
    """
    return self._cast(jax.tree.map(jnp.asarray, params))

  def bucket(self, kv_length: int) -> int:
    """Returns the smallest compiled `kv_length` that is not below this one."""
    kv_length = min(kv_length, self.spec.context)
    return next(b for b in self.kv_buckets if b >= kv_length)

  def _reach(self, kv_length: int) -> int:
    """Returns the compiled `kv_length` of a decode block."""
    return self.spec.context if self._decodes_held else self.bucket(kv_length)

  def extend(
    self, params: types.Tree, state: device.SlotState, chunk: device.Chunk,
    kv_length: int,
  ) -> device.SlotState:
    """Runs `device.extend`; `kv_length` bounds the tokens' positions."""
    program = self._program(self.bucket(kv_length), *chunk.tokens.shape)
    return self._run(program, params, state, chunk)

  @property
  def _probe_buckets(self) -> tuple[int, ...]:
    """Values of `kv_length` of probes: every second, which is enough."""
    return self.kv_buckets[::-2][::-1]

  def probe(
    self, params: types.Tree, state: device.SlotState, chunk: device.ProbeChunk
  ) -> jax.Array:
    """Runs `device.probe`; the chunk tells how far it reaches."""
    reach = min(int((chunk.start + chunk.length).max()), self.spec.context)
    kv_length = next(b for b in self._probe_buckets if b >= reach)
    program = self._probe_program(kv_length, *chunk.tokens.shape)
    return self._run(program, params, state, chunk)

  def copy_prefix(
    self, state: device.SlotState, source: np.ndarray, chunk: device.Chunk,
    kv_length: int,
  ) -> device.SlotState:
    """Runs `device.copy_prefix`; `kv_length` bounds the prefixes."""
    program = self._program(self.bucket(kv_length), len(source))
    return self._run(program, state, source, chunk)

  def decode_block(
    self, params: types.Tree, state: device.SlotState, key: jax.Array,
    kv_length: int, limit: int, leave: int,
  ) -> tuple[device.SlotState, device.BlockOutput]:
    """Runs `device.decode_block`; `kv_length` bounds what it may reach."""
    return self._run(
      self._program(self._reach(kv_length)), params, state,
      device.Draw(self._table, key, np.int32(limit), np.int32(leave)),
    )
