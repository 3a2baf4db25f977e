"""The search environment: policy text in, observation text out.

It knows the protocol. It must not know JAX, token
ids or slots; the engine calls the retriever, so that searches overlap with
decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.env import actions, prompts

FAILED = "The search engine did not answer."


@dataclasses.dataclass(frozen=True)
class Step:
  """What the environment makes of one policy turn.

  Attributes:
    action: "search", "answer" or "invalid".
    content: query or answer, stripped.
    done: the trajectory ends with this turn.
    query: what to retrieve, None if nothing.
    warning: text to feed back when not done and nothing is retrieved.
  """

  action: str
  content: str
  done: bool
  query: str | None
  warning: str


@dataclasses.dataclass(frozen=True)
class Observation:
  """An observation in parts, so that documents can be cut one by one."""

  head: str
  documents: Sequence[str]
  tail: str

  @property
  def text(self) -> str:
    """The uncut observation."""
    return self.head + "".join(self.documents) + self.tail


@dataclasses.dataclass(frozen=True)
class SearchEnv:
  """Rules of one protocol.

  Attributes:
    template: fixed texts.
    max_turns: turns that may search; one forced answer turn follows.
    topk: passages per search.
    hostile: treat questions and documents as untrusted (see
      `prompts.neutralise`).
  """

  template: prompts.Template
  max_turns: int = 5
  topk: int = 3
  hostile: bool = True

  def __post_init__(self):
    if self.max_turns < 0 or self.topk < 1:
      raise types.UserError(
        f"need max_turns >= 0 and topk >= 1, got {self.max_turns} and "
        f"{self.topk}"
      )

  def prompt(self, question: types.Question) -> str:
    """User message of a question."""
    # The chat template around it is encoded with its special tokens, so this
    # alone keeps a question from spelling them.
    text = prompts.neutralise(question.text) if self.hostile else question.text
    return self.template.render(text)

  def is_last(self, turn: int) -> bool:
    """Whether turn `turn` (from 0) is the forced one that cannot search."""
    return turn >= self.max_turns

  def step(self, text: str, turn: int) -> Step:
    """Judges one policy turn."""
    action = actions.parse(text)
    if action.kind == "answer" or self.is_last(turn):
      return Step(action.kind, action.content, True, None, "")
    if action.kind == "search":
      return Step("search", action.content, False, action.content, "")
    warning = self.template.invalid + self._notice(turn)
    return Step("invalid", "", False, None, warning)

  def observation(
    self, documents: Sequence[types.Passage], turn: int
  ) -> Observation:
    """The reply to the search of turn `turn`."""
    return Observation(
      self.template.head,
      self.template.format_documents(documents, self.hostile),
      self.template.tail + self._notice(turn),
    )

  def failure(self, turn: int) -> Observation:
    """The reply to a search of turn `turn` that failed."""
    return Observation(
      self.template.head + FAILED, (), self.template.tail + self._notice(turn)
    )

  def _notice(self, turn: int) -> str:
    """The last-turn warning, when the next turn is the forced one."""
    return self.template.last_turn if self.is_last(turn + 1) else ""
