"""Trajectories to micro-batches on the devices: how many rows, of which sizes.

Micro-batches have two sizes, whole ones and smaller ones that end a mini-batch,
so that what is compiled never depends on the lengths of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.parallel import sharding
from stepsearch_jax.ppo import batching, specs
from stepsearch_jax.ppo.records import MicroBatch


class Packer:
  """Packs batches as a learner's settings and mesh want it."""

  def __init__(self, spec: specs.LearnerSpec, mesh: sharding.DeviceMesh):
    """Nothing was packed yet."""
    self._spec, self._mesh = spec, mesh
    self._sizes = spec.pass_rows(sharding.batch_shards(mesh))
    self._met: set[str] = set()  # See `both_sizes`.

  def packing(
    self, batch: types.RolloutBatch, rows: Iterable[int], share: bool = True
  ) -> batching.Packing:
    """Packs trajectories, with empty rows up to whole micro-batches.

    Args:
      batch: rollouts.
      rows: which of them.
      share: what trajectories begin with is in a packed row once.
    """
    lengths = batch.lengths
    if self._spec.estimator.scope == specs.MaskScope.ATTENDED:
      # The released value model also sees the token behind the last.
      lengths = np.minimum(lengths + 1, batch.tokens.shape[1])
    packing = batching.pack(
      rows, lengths, batch.tokens.shape[1], self._spec.batch.row_length,
      batching.shareable(batch) if share else None,
    )
    sizes = batching.micro_sizes(len(packing.source), *self._sizes)
    return packing.padded(sum(sizes))

  def both_sizes(
    self, what: str, micros: Sequence[MicroBatch]
  ) -> Sequence[MicroBatch]:
    """Adds an empty micro-batch of a size that is not among the first ones.

    So both sizes are compiled when something runs for the first time, and none
    in the middle of a run, where it would take minutes at a bad moment.

    Args:
      what: the programs that run over them.
      micros: micro-batches; returned as they are from the second time on.
    """
    if what in self._met:
      return micros
    self._met.add(what)
    have = {len(micro.tokens) for micro in micros}
    empty = [
      sharding.put(
        MicroBatch.empty((size, self._spec.batch.row_length)),
        sharding.batch(self._mesh),
      ) for size in sorted(set(self._sizes) - have)
    ]
    return [*micros, *empty]

  def micros(
    self, packing: batching.Packing, batch: types.RolloutBatch,
    **arrays: np.ndarray | None,
  ) -> list[MicroBatch]:
    """Returns the micro-batches of a packing, on the devices.

    Args:
      packing: where the tokens go.
      batch: rollouts.
      **arrays: [B, T] fields of `MicroBatch`; absent ones or None are zeros.
    """
    zeros = np.zeros(batch.tokens.shape, np.float32)
    names = ("weights", "llds_weights", "value_weights", "logp",
             "reference_logp", "values", "advantages", "returns")
    given = {name: x for name, x in arrays.items() if x is not None}
    packed = {name: packing.pack(given.get(name, zeros)) for name in names}
    packed |= {
      "tokens": packing.pack(batch.tokens),
      "turn": packing.pack(batch.turn, fill=-1),
      "policy_mask": packing.pack(batch.policy_mask),
      "segment_ids": packing.segment_ids,
      "positions": packing.positions,
    }
    where, start, found = sharding.batch(self._mesh), 0, []
    for size in batching.micro_sizes(len(packing.source), *self._sizes):
      part = {name: x[start : start + size] for name, x in packed.items()}
      found.append(sharding.put(MicroBatch(**part), where))
      start += size
    return found
