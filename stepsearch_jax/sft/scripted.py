"""Scripted demonstrations for the warm start: how people search.

A demonstrator knows what a question asks, hop by hop, and searches for it
through the real retriever. It does not know in which words the passages put
it: it tries one wording after the other, asks the same thing twice now and
then, sometimes gives up and guesses. Nothing here knows the policy that
imitates it, or what reinforcement learning does later.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Generator, Sequence

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rewards import text_match
from stepsearch_jax.rollout import observations, recorder

_BATCH = 64  # Queries of one call; a call that fails costs all of them.


class Wording(enum.StrEnum):
  """What a demonstrator knows about the words of the corpus."""

  ANY = "any"  # Nothing: tries all wordings in random order.
  USUAL = "usual"  # What the corpus usually says, then what it says next.
  EXACT = "exact"  # What the passage it looks for says (search keys).


@dataclasses.dataclass(frozen=True)
class Habits:
  """How a demonstrator searches; shares are probabilities.

  Attributes:
    wording: what it knows about the words of the corpus.
    whole: searches for the whole question first.
    repeat: asks a query that did not help once more.
    give_up: guesses after a query that did not help.
  """

  wording: Wording
  whole: float
  repeat: float
  give_up: float

  def __post_init__(self):
    if self.wording not in tuple(Wording):
      raise types.UserError(
        f"warm_start.wording must be one of {[w.value for w in Wording]}, "
        f"got {self.wording!r}"
      )
    for field in ("whole", "repeat", "give_up"):
      if not 0 <= getattr(self, field) <= 1:
        raise types.UserError(
          f"warm_start.{field} must be a share in [0, 1], got "
          f"{getattr(self, field)}"
        )


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """What was recorded, and how many were left out as a search failed."""

  trajectories: list[types.Trajectory]
  failed: int


def demonstrate(
  questions: Sequence[types.Question], habits: Habits,
  env: search_env.SearchEnv, retriever: types.Retriever,
  tokenizer: tokenizer_lib.Tokenizer, max_observation: int,
  rng: np.random.Generator,
) -> Demonstrations:
  """Records one demonstration per question.

  All go on at once, so that a round of searches is one call.

  Args:
    questions: with decomposition and search keys.
    habits: of the demonstrator.
    env: the protocol.
    retriever: answers the searches.
    tokenizer: of the policy.
    max_observation: tokens of an observation.
    rng: its randomness.

  Returns:
    Trajectories in the questions' order; their policy tokens are the
    demonstrator's, end of text included.

  Raises:
    UserError: a question has no decomposition to follow.
  """
  scripts = [
    _Script(question, habits, env, tokenizer, child)
    for question, child in zip(questions, rng.spawn(len(questions)),
                               strict=True)
  ]
  waiting = scripts
  while waiting := [s for s in waiting if s.query is not None]:
    found = _search(retriever, [script.query for script in waiting], env.topk)
    for script, documents in zip(waiting, found, strict=True):
      script.read(documents, max_observation)
  done = [s.trajectory for s in scripts if s.trajectory is not None]
  return Demonstrations(done, len(scripts) - len(done))


def _search(retriever, queries, k) -> list[list[types.Passage] | None]:
  """Documents per query, None where the search failed."""
  found = []
  for start in range(0, len(queries), _BATCH):
    part = queries[start : start + _BATCH]
    found += distributed.search_together(
      functools.partial(retriever.search, part, k), len(part), k
    )
  return found


class _Script:
  """One demonstration as it goes on.

  Attributes:
    query: what it wants to know next; None once it has ended.
    trajectory: the record, None until it has ended and if a search failed.
  """

  def __init__(self, question, habits, env, tokenizer, rng):
    self.query: str | None = None
    self.trajectory: types.Trajectory | None = None
    self._env, self._tokenizer = env, tokenizer
    self._record = recorder.Recorder(0, question, 0)
    self._record.append(
      tokenizer.encode_prompt(env.prompt(question)), types.Provenance.PROMPT
    )
    self._plan = plan(question, habits, env.max_turns, rng)
    self._advance(None)

  def _advance(self, documents) -> None:
    try:
      self.query = self._plan.send(documents)
    except StopIteration as end:
      self.query = None
      self._answer(end.value)

  def read(self, documents, max_observation: int) -> None:
    """Records the reply to `query` and goes on."""
    if documents is None:  # Nobody should imitate a search without a result.
      self.query = None
      return
    record, tokenizer = self._record, self._tokenizer
    text = f"<search> {self.query} </search>"
    record.append(tokenizer.encode(text), types.Provenance.POLICY)
    position = len(record.tokens) - 1
    seen = self._env.observation(documents, len(record.turns))
    encoded = observations.encode(seen, tokenizer, max_observation)
    record.append(encoded.tokens, types.Provenance.OBSERVATION)
    record.truncated_documents += encoded.cut
    record.turns.append(
      types.Turn(
        text, types.Action.SEARCH, self.query, tuple(documents),
        tokenizer.decode(encoded.tokens), position, retrieved=True,
        shown=encoded.shown(documents),
      )
    )
    self._advance(documents)

  def _answer(self, answer: str) -> None:
    record, tokenizer = self._record, self._tokenizer
    text = f"<answer> {answer} </answer>"
    end = tokenizer.hf.eos_token_id
    record.append([*tokenizer.encode(text), end], types.Provenance.POLICY)
    record.turns.append(
      types.Turn(text, types.Action.ANSWER, answer, (), "",
                 len(record.tokens) - 2)
    )
    record.answer = answer
    self.trajectory = record.finish(types.StopReason.ANSWER)


def plan(
  question: types.Question, habits: Habits, turns: int,
  rng: np.random.Generator,
) -> Generator[str, Sequence[types.Passage], str]:
  """Yields queries, is sent the documents of each, returns the answer.

  Raises:
    UserError: the question has no decomposition to follow.
  """
  if not question.decomposition:
    raise types.UserError(
      f"question {question.id!r} has no decomposition to script a warm start "
      "from; set warm_start.steps = 0"
    )
  guess, asked = "unknown", 0
  if turns and rng.random() < habits.whole:
    documents = yield question.text
    asked += 1
    guess = documents[0].title if documents else guess
  for number, hop in enumerate(question.decomposition):
    for query in _queries(question, number, habits, rng):
      if asked == turns:
        return guess
      documents = yield query
      asked += 1
      if _helps(question, hop, documents):
        guess = hop.answer
        break
      if number == 0 and documents:
        guess = documents[0].title
      if rng.random() < habits.give_up:
        return guess
    else:
      return guess
  return question.answers[0]


def _queries(question, number, habits, rng) -> list[str]:
  """What is asked about one hop, until something helps."""
  groups = question.phrasings or question.search_keys
  queries = list(groups[number])
  # A hop for which no query was found has phrasings but no keys.
  exact = len(question.search_keys) == len(groups)
  if habits.wording == Wording.EXACT:
    queries = [question.search_keys[number][0] if exact else queries[0]]
  elif habits.wording == Wording.ANY:
    queries = [queries[i] for i in rng.permutation(len(queries))]
  return [
    query for query in queries
    for _ in range(1 + (rng.random() < habits.repeat))
  ]


def _helps(question, hop, documents) -> bool:
  """Whether documents hold the gold paragraph, or failing one the answer."""
  if hop.support >= 0:
    gold = question.support[hop.support].text
    return any(document.text == gold for document in documents)
  answer = f" {text_match.normalize_answer(hop.answer)} "
  return any(
    answer in f" {text_match.normalize_answer(document.text)} "
    for document in documents
  )
