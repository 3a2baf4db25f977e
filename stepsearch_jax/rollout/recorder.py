"""A trajectory as it grows, token by token with provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepsearch_jax import types


@dataclasses.dataclass
class Recorder:
  """Collects tokens and turns of one trajectory.

  Attributes:
    order: place among the questions of a run.
    question: what was asked.
    episode: number of the rollout.
    turn_start: index of the current turn's first policy token.
    turns: finished turns.
    answer: content of the final answer.
    truncated_documents: documents cut so far.
  """

  order: int
  question: types.Question
  episode: int
  turn_start: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  turns: list[types.Turn] = dataclasses.field(default_factory=list)
  answer: str | None = None
  truncated_documents: int = 0
  _provenance: list[int] = dataclasses.field(default_factory=list)
  _turn_index: list[int] = dataclasses.field(default_factory=list)
  _logprobs: list[float] = dataclasses.field(default_factory=list)

  def append(
    self,
    tokens: Sequence[int],
    provenance: types.Provenance,
    logprobs: Sequence[float] | None = None,
  ) -> None:
    """Adds tokens of the current turn (of the prompt before any turn)."""
    count = len(tokens)
    prompt = provenance == types.Provenance.PROMPT
    turn = -1 if prompt else len(self.turns)
    self.tokens.extend(tokens)
    self._provenance.extend([int(provenance)] * count)
    self._turn_index.extend([turn] * count)
    self._logprobs.extend([0.0] * count if logprobs is None else logprobs)

  def finish(self, reason: types.StopReason) -> types.Trajectory:
    """Returns the finished record; `reason` says why it ended."""
    return types.Trajectory(
      question=self.question,
      episode=self.episode,
      tokens=np.asarray(self.tokens, np.int32),
      provenance=np.asarray(self._provenance, np.int8),
      turn_index=np.asarray(self._turn_index, np.int16),
      logprobs=np.asarray(self._logprobs, np.float32),
      turns=self.turns,
      answer=self.answer,
      stop_reason=reason,
      truncated_documents=self.truncated_documents,
    )
