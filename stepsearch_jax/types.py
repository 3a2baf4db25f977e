"""The records that cross folder boundaries, and the axis letters.

Axis letters used in shapes throughout the project:

  B  trajectories          T  tokens of a trajectory (padded)
  R  packed rows           S  tokens of a chunk or query side
  D  model width           V  vocabulary
  L  layers                K  passages of one search
  N  anything flattened    P  parallel slots of the rollout cache
  U  turns of a trajectory (padded)

This module holds data, and the errors that users see. It knows nothing of JAX,
tokenizers or files.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

# A pytree: parameters, their shapes, or the places where they live.
Tree = Any
# One leaf of a record that is a pytree: by turns a host array, a device array,
# a shape while programs are lowered, or a sharding.
Leaf = Any


@dataclasses.dataclass(frozen=True)
class Passage:
  """One retrievable paragraph; `id` is unique within its corpus."""

  id: str
  title: str
  text: str
  score: float = 0.0

  @classmethod
  def of(cls, title: str, text: str) -> Passage:
    """Returns a passage that comes without an id: its content is its id."""
    return cls(f"{title}\n{text}", title, text)


class UserError(ValueError):
  """Something that the user can mend: a setting, a file, a flag.

  Commands print it as one line; every other exception keeps its traceback. The
  message names the field, file or flag, what was expected and what was given.
  """


def expect(holds: bool, field: str, expected: str, given: Any) -> None:
  """Raises a UserError that names the field unless `holds`.

  Args:
    holds: the condition on the setting.
    field: its path in the config, for instance "ppo.micro_rows".
    expected: what would have been right, in words.
    given: the value that was given.
  """
  if not holds:
    raise UserError(f"{field}: expected {expected}, got {given!r}")


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's text; its type where it has none.

  Of errors of other libraries and of users' code, which may be of any length.
  """
  return str(error).strip().partition("\n")[0] or type(error).__name__


class SearchError(RuntimeError):
  """A search failed for good; the trajectory goes on without its result."""


class Retriever(Protocol):
  """Anything that finds passages for queries; called from host threads."""

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[Passage] | None]:
    """Returns the passages of each query, at most k, best first, with scores.

    An empty list says that nothing was found, None that this query alone
    failed (a server refused it, for instance).

    Raises:
      SearchError: all queries failed.
    """
    ...

  def describe(self) -> dict[str, Any]:
    """Returns what a card says of it: engine, encoder, number of passages."""
    ...


def close_retriever(retriever: Retriever | None) -> None:
  """Closes the files and connections of a retriever that holds any.

  Such a retriever has a method `close`.
  """
  close = getattr(retriever, "close", None)
  if close is not None:
    close()


class TextCodec(Protocol):
  """Turns text into token ids and back; `models.tokenizer.Tokenizer` is one."""

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Returns the ids of a text.

    Args:
      text: what to encode.
      special: names of special tokens inside the text become those tokens.
    """
    ...

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Returns the text of ids, without special tokens by default."""
    ...


@dataclasses.dataclass(frozen=True)
class SubQuestion:
  """One hop of a decomposition.

  `question` may point at earlier answers as `#1`, `#2`, ... (MuSiQue).
  `support` is the index into `Question.support` or -1 where unknown.
  """

  question: str
  answer: str
  support: int = -1


def resolved(hops: Sequence[SubQuestion]) -> list[str]:
  """Returns the sub-questions with #1, #2, ... replaced by earlier answers.

  A number that belongs to no hop, #0 among them, stays as it is.
  """
  answers = [hop.answer for hop in hops]

  def fill(match: re.Match) -> str:
    place = int(match[1]) - 1
    return answers[place] if 0 <= place < len(answers) else match[0]

  return [re.sub(r"#(\d+)", fill, hop.question) for hop in hops]


@dataclasses.dataclass(frozen=True)
class Question:
  """A multi-hop question with everything its rewards need.

  Attributes:
    id: unique within its dataset.
    text: the question as asked.
    answers: accepted answers, the canonical one first; never empty.
    source: dataset name, the key of per-source metrics ("musique", ...).
    search_keys: per sub-question, the accepted search phrases; empty where
      the dataset has none (the search-key reward is then 0).
    support: the gold paragraphs; empty where the dataset has none (step
      rewards are then 0).
    decomposition: the hops in order; empty where unknown.
    phrasings: per sub-question, all queries that a person might try, in the
      order in which they are likely to help; empty = the search keys.
    extra: fields of the source row that nothing here interprets.
  """

  id: str
  text: str
  answers: tuple[str, ...]
  source: str = ""
  search_keys: tuple[tuple[str, ...], ...] = ()
  support: tuple[Passage, ...] = ()
  decomposition: tuple[SubQuestion, ...] = ()
  phrasings: tuple[tuple[str, ...], ...] = ()
  extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


class Provenance(enum.IntEnum):
  """Who wrote a token. Only POLICY tokens are trained and scored."""

  PROMPT = 0
  POLICY = 1
  OBSERVATION = 2


class Action(enum.StrEnum):
  """What a policy turn asks for."""

  SEARCH = "search"  # Passages for a query.
  ANSWER = "answer"  # To end with an answer.
  INVALID = "invalid"  # Nothing: the turn closed no action block.


class StopReason(enum.StrEnum):
  """Why a trajectory ended."""

  ANSWER = "answer"  # The policy answered.
  MAX_TURNS = "max_turns"  # The forced last turn brought no answer.
  CONTEXT = "context"  # No room for an observation and an answer behind it.


@dataclasses.dataclass(frozen=True)
class Turn:
  """One policy turn and what the environment made of it.

  Attributes:
    text: the policy's text of this turn, up to and including its action tag.
    action: what the turn asked for.
    content: the query or the answer, stripped; "" when invalid.
    documents: passages returned to a search, in rank order.
    observation: the text fed back; "" when the trajectory ended here.
    action_position: index in `Trajectory.tokens` of the sampled token that
      closed the action tag (the last policy token of the turn).
    retrieved: True when the turn's search was carried out and its result (no
      passage at all, perhaps) was shown; only such turns earn step rewards.
    failed: True when the turn's search failed for good.
    shown: what of each document's text the observation had room for; None
      where it had room for all.
    answer_position: index in `Trajectory.tokens` of the first sampled token
      behind the tag that opens the answer; -1 where the turn does not answer.
  """

  text: str
  action: Action
  content: str
  documents: tuple[Passage, ...]
  observation: str
  action_position: int
  retrieved: bool = False
  failed: bool = False
  shown: tuple[str, ...] | None = None
  answer_position: int = -1

  @property
  def shown_texts(self) -> tuple[str, ...]:
    """Texts of the documents as far as the policy was shown them."""
    if self.shown is None:
      return tuple(passage.text for passage in self.documents)
    return self.shown


@dataclasses.dataclass(frozen=True)
class AnswerProbe:
  """How likely a model finds the gold answers as a trajectory grows.

  Row 0 is behind the prompt, row t + 1 behind the observation of turn t. C
  gold answers were asked for.

  Attributes:
    logp: [turns + 1, C] float32, log-probability of the answer's tokens (their
      sum, in nats) right behind an opened answer tag; NaN where there was no
      observation, or no room for the answer.
    sizes: [C] int32, tokens of each answer.
    others: [turns + 1, N, C] float32, the same had the search found the
      documents of each of N other questions; N = 0 where nobody asked.
  """

  logp: np.ndarray
  sizes: np.ndarray
  others: np.ndarray


@dataclasses.dataclass
class Trajectory:
  """One finished rollout, token for token as the policy saw it.

  Attributes:
    question: what was asked.
    episode: number of this rollout in the run; with the seed it fixes every
      random draw.
    tokens: [T] int32, prompt first; never decoded and re-encoded.
    provenance: [T] int8, `Provenance` of each token.
    turn_index: [T] int16, turn that the token belongs to; -1 in the prompt.
    logprobs: [T] float32, log-probability under the sampling distribution;
      0 where not sampled.
    turns: per policy turn.
    answer: content of the final answer tag, None if never closed.
    stop_reason: why the trajectory ended.
    truncated_documents: number of documents cut to fit the observation.
    probe: how likely its gold answers were; None where nobody asked.
  """

  question: Question
  episode: int
  tokens: np.ndarray
  provenance: np.ndarray
  turn_index: np.ndarray
  logprobs: np.ndarray
  turns: list[Turn]
  answer: str | None
  stop_reason: StopReason
  truncated_documents: int = 0
  probe: AnswerProbe | None = None

  @property
  def policy_mask(self) -> np.ndarray:
    """[T] bool, True exactly on sampled tokens: the ONE policy mask."""
    return self.provenance == Provenance.POLICY


@dataclasses.dataclass
class RolloutBatch:
  """Trajectories as padded host arrays, the input of the learner.

  Attributes:
    tokens: [B, T] int32, right-padded.
    lengths: [B] int32, tokens of each row (not the loss mask's sum).
    policy_mask: [B, T] float32, 1 exactly on sampled tokens.
    token_rewards: [B, T] float32, non-zero on policy tokens only.
    rollout_logp: [B, T] float32, log-probability of each sampled token under
      the distribution that it was sampled from; 0 elsewhere.
    group: [B] int32, equal for rollouts of one question.
    turn: [B, T] int32, turn of each sampled token from 0 on; -1 elsewhere.
    anchor: [B, U] int32, state in which each turn began: equal numbers are
      the same last observation of the same question (the prompt for the first
      turn); -1 for a turn that did not happen.
    searches: [B] int32, searches that were answered.
    answer_start: [B] int32, place of the answer's first token, behind the tag
      that opens it; T where there is no answer.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  policy_mask: np.ndarray
  token_rewards: np.ndarray
  rollout_logp: np.ndarray
  group: np.ndarray
  turn: np.ndarray
  anchor: np.ndarray
  searches: np.ndarray
  answer_start: np.ndarray
