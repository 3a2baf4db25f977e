"""How many packed rows a step computes, and how many its tokens fill.

Lengths are known by their mean only. Packing is taken as perfect, so that the
rows are the fewest that can hold the tokens; what is counted is the padding of
the micro-batches, whose rows do not change with a batch.
"""

from __future__ import annotations

import dataclasses
import math

from stepsearch_jax.ppo import batching, specs


@dataclasses.dataclass(frozen=True)
class Rows:
  """Packed rows of one pass over a batch.

  Attributes:
    filled: rows' worth of tokens; not a whole number.
    computed: rows of all micro-batches.
    length: tokens of a row.
  """

  filled: float
  computed: int
  length: int

  @property
  def tokens(self) -> int:
    """Tokens that are computed, padding among them."""
    return self.computed * self.length

  @property
  def padding_share(self) -> float:
    """Share of the computed tokens that are padding."""
    return 1 - self.filled / self.computed


def of_batch(
  spec: specs.LearnerSpec, trajectories: int, tokens: float, shards: int
) -> dict[str, Rows]:
  """Returns the rows of scoring and of an epoch of updates.

  Scoring packs the whole batch, an update every mini-batch on its own.

  Args:
    spec: settings of the learner.
    trajectories: of a step.
    tokens: mean tokens of a trajectory.
    shards: parts into which the mesh splits rows.
  """
  size = spec.batch.mini_batch
  minis = [
    min(size, trajectories - start) for start in range(0, trajectories, size)
  ]
  return {
    "scores": _packed(spec, [trajectories], tokens, shards),
    "updates": _packed(spec, minis, tokens, shards),
  }


def _packed(spec, counts, tokens, shards) -> Rows:
  """Rows of passes over so many trajectories each."""
  batch, filled, computed = spec.batch, 0.0, 0
  for count in counts:
    own = count * tokens / batch.row_length
    filled += own
    computed += sum(
      batching.micro_sizes(math.ceil(own), *spec.pass_rows(shards))
    )
  return Rows(filled, computed, batch.row_length)
