"""What a rollout is limited by and what it returns."""

from __future__ import annotations

import dataclasses

from stepsearch_jax import types


@dataclasses.dataclass(frozen=True)
class ProbeSpec:
  """How gold answers are probed; see `probing`.

  Attributes:
    aliases: gold answers of a question that are probed, the shortest first.
    tokens: bucket sizes for opened tag and answer; an answer that does not fit
      the largest is never probed.
    others: other questions whose documents are tried in place of a search's.
    seed: of the choice of those questions.
  """

  aliases: int
  tokens: tuple[int, ...]
  others: int
  seed: int

  def __post_init__(self):
    """Raises UserError, naming the field of the config."""
    types.expect(self.aliases >= 1, "probe.aliases", "1 or more", self.aliases)
    types.expect(
      self.tokens and list(self.tokens) == sorted(set(self.tokens))
      and self.tokens[0] >= 1,
      "probe.tokens", "increasing positive sizes", self.tokens,
    )


@dataclasses.dataclass(frozen=True)
class EngineSpec:
  """Limits of a rollout, in tokens.

  Attributes:
    max_prompt: a longer prompt is an error; questions are never cut.
    max_turn: tokens that the policy may write in one turn.
    max_observation: documents are cut so that an observation fits this.
    answer_room: tokens kept free behind an observation; a trajectory whose
      context cannot offer them ends there.
    retrieval_delay: decode steps between asking and reading a search.
    search_threads: host threads that search at the same time.
    extend_rows: bucket sizes for rows written together.
    extend_tokens: bucket sizes for the tokens of one written chunk.
    probe: how gold answers are probed; None where they never are.
  """

  max_prompt: int
  max_turn: int
  max_observation: int
  answer_room: int
  retrieval_delay: int
  search_threads: int
  extend_rows: tuple[int, ...]
  extend_tokens: tuple[int, ...]
  probe: ProbeSpec | None

  def __post_init__(self):
    """Raises UserError, naming the field of the config."""
    for name in ("max_prompt", "max_turn", "max_observation", "answer_room",
                 "retrieval_delay", "search_threads"):
      value = getattr(self, name)
      types.expect(value >= 1, f"rollout.{name}", "at least 1", value)
    for name in ("extend_rows", "extend_tokens"):
      sizes = getattr(self, name)
      types.expect(
        sizes and list(sizes) == sorted(set(sizes)) and sizes[0] >= 1,
        f"rollout.{name}", "increasing positive sizes", sizes,
      )
    types.expect(
      self.extend_tokens[-1] >= 2, "rollout.extend_tokens",
      "chunks of at least 2 tokens", self.extend_tokens,
    )


@dataclasses.dataclass
class RolloutStats:
  """What one call of `Engine.run` did, for metrics and benchmarks.

  Attributes:
    policy_tokens: tokens sampled.
    ingested_tokens: tokens written from prompts and observations.
    shared_tokens: tokens of prompts that another prompt had written already.
    extend_padding: places of written chunks that held no token.
    decode_steps: runs of the policy for one token in every slot.
    slot_steps: decode steps times slots.
    idle_slot_steps: of these, the ones of slots that sampled nothing.
    vacant_slot_steps: of these, the ones of finished trajectories while
      questions waited.
    searches: searches asked.
    failed_searches: searches that failed for good.
    seconds: of the whole call.
    retrieval_wait_seconds: of these, spent waiting for searches alone.
    extend_seconds: of these, spent writing into the cache.
    decode_seconds: of these, spent sampling.
    probe_seconds: spent on how likely gold answers are; what is read for that
      alone, behind the rollouts, included.
  """

  policy_tokens: int = 0
  ingested_tokens: int = 0
  shared_tokens: int = 0
  extend_padding: int = 0
  decode_steps: int = 0
  slot_steps: int = 0
  idle_slot_steps: int = 0
  vacant_slot_steps: int = 0
  searches: int = 0
  failed_searches: int = 0
  seconds: float = 0.0
  retrieval_wait_seconds: float = 0.0
  extend_seconds: float = 0.0
  decode_seconds: float = 0.0
  probe_seconds: float = 0.0

  @property
  def retrieval_wait_share(self) -> float:
    """Share of the call that was spent waiting for searches alone."""
    return self.retrieval_wait_seconds / max(self.seconds, 1e-9)


  def __add__(self, other: RolloutStats) -> RolloutStats:
    """Returns the statistics of two rollouts, one after the other."""
    return RolloutStats(*(
      getattr(self, field.name) + getattr(other, field.name)
      for field in dataclasses.fields(self)
    ))


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Finished trajectories in the order of their questions, and statistics."""

  trajectories: list[types.Trajectory]
  stats: RolloutStats
