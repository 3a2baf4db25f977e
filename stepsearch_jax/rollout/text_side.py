"""What the schedule asks of the world of strings.

The engine moves token ids between questions, slots and searches. Whatever
needs text (prompts, what a turn means, observations) is asked of a `TextSide`.
Another object with the same methods can stand in its place, for instance one
that replays recorded lengths.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.env import actions, search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.rollout import observations, probing, recorder


class TextSide:
  """A protocol and a tokenizer as one."""

  def __init__(
    self, env: search_env.SearchEnv, tokenizer: tokenizer_lib.Tokenizer
  ):
    """Keeps the texts and rules of the protocol and the policy's tokenizer."""
    self._env = env
    self._tokenizer = tokenizer

  @property
  def topk(self) -> int:
    """Passages per search."""
    return self._env.topk

  def prompt(self, question: types.Question) -> list[int]:
    """Returns the tokens of a question's prompt."""
    return self._tokenizer.encode_prompt(self._env.prompt(question))

  def turn_budget(self, record: recorder.Recorder, limit: int) -> int:
    """Returns how many tokens, at most `limit`, the next turn may have."""
    del record
    return limit

  def written(self, record: recorder.Recorder) -> None:
    """Hears that the policy's turn may have grown; nobody listens here."""
    del record

  def judge(self, record: recorder.Recorder) -> search_env.Step:
    """Returns what the turn that the policy has just ended asks for."""
    text = self.decode(record.tokens[record.turn_start :])
    return self._env.step(text, len(record.turns))

  def reaches(self, tokens: Sequence[int], characters: int) -> int:
    """Returns how many of a turn's tokens it takes to write some characters."""
    return bisect.bisect_left(
      range(len(tokens)), characters,
      key=lambda count: len(self.decode(tokens[:count])),
    )

  def documents(
    self, record: recorder.Recorder, found: Sequence[types.Passage] | None
  ) -> Sequence[types.Passage] | None:
    """Returns what is shown of what a search found; None if it failed."""
    del record
    return found

  def observation(
    self, documents: Sequence[types.Passage] | None, turn: int
  ) -> search_env.Observation:
    """Returns the reply to the search of a turn; None says that it failed."""
    if documents is None:
      return self._env.failure(turn)
    return self._env.observation(documents, turn)

  def encode(
    self, observation: search_env.Observation, limit: int
  ) -> observations.Encoded:
    """Returns an observation as tokens, its documents cut to fit `limit`."""
    return observations.encode(observation, self._tokenizer, limit)

  def answers(self, question: types.Question) -> probing.Answers:
    """Returns the gold answers of a question as the policy would write them.

    A turn begins where they are asked for, so that the tag may follow at once.
    """
    encode = self._tokenizer.encode
    aliases = {
      tuple(encode(f" {answer.strip()}")) for answer in question.answers
    }
    return probing.Answers(
      encode(actions.opening(types.Action.ANSWER)),
      [list(alias) for alias in sorted(aliases, key=lambda a: (len(a), a))],
    )

  def decode(self, tokens: Sequence[int]) -> str:
    """Returns the text of tokens."""
    return self._tokenizer.decode(tokens)
