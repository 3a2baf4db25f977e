"""Limits and statistics of a rollout."""

from __future__ import annotations

import dataclasses

from stepsearch_jax import types


@dataclasses.dataclass(frozen=True)
class EngineSpec:
  """Limits of a rollout, in tokens.

  Attributes:
    max_prompt: a longer prompt is an error; questions are never cut.
    max_turn: tokens that the policy may write in one turn.
    max_observation: an observation's documents are cut to fit this.
    answer_room: tokens kept free behind an observation; a trajectory whose
      context cannot offer them ends there.
    retrieval_delay: decode steps between asking and reading a search.
    extend_rows: bucket sizes for rows ingested together.
    extend_tokens: bucket sizes for the tokens of one ingested chunk.
  """

  max_prompt: int = 2048
  max_turn: int = 800
  max_observation: int = 800
  answer_room: int = 32
  retrieval_delay: int = 8
  extend_rows: tuple[int, ...] = (1, 4, 16)
  extend_tokens: tuple[int, ...] = (64, 256, 512)

  def __post_init__(self):
    if self.retrieval_delay < 1:
      raise types.UserError(
        "rollout.retrieval_delay must be at least 1 step, got "
        f"{self.retrieval_delay}"
      )
    for name in ("extend_rows", "extend_tokens"):
      sizes = getattr(self, name)
      if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise types.UserError(
          f"{name} must be increasing positive sizes: {sizes}"
        )
    if self.extend_tokens[-1] < 2:
      raise types.UserError(
        "extend_tokens must allow chunks of at least 2 tokens"
      )


@dataclasses.dataclass
class RolloutStats:
  """What one call of `Engine.run` did, for metrics and benchmarks.

  Attributes:
    policy_tokens, ingested_tokens: sampled, and written from prompts and
      observations.
    extend_padding: places of chunks that held no token.
    decode_steps: calls of the policy for one token in every slot.
    slot_steps: decode steps times slots; of these
    idle_slot_steps: those of slots that sampled nothing, and
    vacant_slot_steps: those of finished trajectories while questions wait.
    searches, failed_searches: asked, and not answered.
    seconds: of the whole call, of which
    retrieval_wait_seconds: nothing but searches was waited for,
    extend_seconds, decode_seconds: in the device programs.
  """

  policy_tokens: int = 0
  ingested_tokens: int = 0
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
