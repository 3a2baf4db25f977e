"""The search environment: policy text in, observation text out.

It knows the protocol. It must not know JAX, token ids or slots; the engine
calls the retriever, so that searches overlap with decoding.
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
    text: the turn's text, up to and including its action tag.
    action: what the turn asks for.
    content: query or answer, stripped.
    done: whether the trajectory ends with this turn.
    query: what to retrieve, None if nothing.
    warning: text to feed back when not done and nothing is retrieved.
    begins: characters of the turn before the content; -1 where unknown.
  """

  text: str
  action: types.Action
  content: str
  done: bool = False
  query: str | None = None
  warning: str = ""
  begins: int = -1


@dataclasses.dataclass(frozen=True)
class Observation:
  """An observation in parts, so that documents can be cut one by one."""

  head: str
  documents: Sequence[prompts.ShownDocument]
  tail: str

  @property
  def text(self) -> str:
    """Returns the uncut observation."""
    documents = "".join(document.text for document in self.documents)
    return self.head + documents + self.tail


@dataclasses.dataclass(frozen=True)
class SearchEnv:
  """Rules of one protocol.

  Attributes:
    template: fixed texts.
    max_turns: turns that may search; one forced answer turn follows.
    topk: passages per search.
    sanitize: treat questions and documents as untrusted (see
      `prompts.sanitize`).
  """

  template: prompts.Template
  max_turns: int
  topk: int
  sanitize: bool = True

  def __post_init__(self):
    """Raises UserError, naming the field of the config."""
    types.expect(self.max_turns >= 0, "rollout.max_turns", "at least 0",
                 self.max_turns)
    types.expect(self.topk >= 1, "retrieval.topk", "at least 1", self.topk)

  def prompt(self, question: types.Question) -> str:
    """Returns the user message of a question."""
    # The chat template around it is encoded with its special tokens, so this
    # alone keeps a question from spelling them.
    text = question.text
    return self.template.render(
      prompts.sanitize(text) if self.sanitize else text
    )

  def is_last(self, turn: int) -> bool:
    """Returns whether a turn (from 0) is the forced one without search."""
    return turn >= self.max_turns

  def step(self, text: str, turn: int) -> Step:
    """Returns what a policy turn asks for; turns count from 0."""
    text = actions.until_tag(text)
    parsed = actions.parse(text)
    action, content = parsed.action, parsed.content
    if action is types.Action.ANSWER or self.is_last(turn):
      return Step(text, action, content, done=True, begins=parsed.begins)
    if action is types.Action.SEARCH:
      return Step(text, action, content, query=content)
    warning = self.template.invalid + self._notice(turn)
    return Step(text, action, content, warning=warning)

  def observation(
    self, documents: Sequence[types.Passage], turn: int
  ) -> Observation:
    """Returns the reply to the search of a turn."""
    return Observation(
      self.template.head,
      self.template.format_documents(documents, self.sanitize),
      self.template.tail + self._notice(turn),
    )

  def failure(self, turn: int) -> Observation:
    """Returns the reply to the search of a turn that failed."""
    return Observation(
      self.template.head + FAILED, (), self.template.tail + self._notice(turn)
    )

  def _notice(self, turn: int) -> str:
    """The last-turn warning, when the next turn is the forced one."""
    return self.template.last_turn if self.is_last(turn + 1) else ""
