"""Scripted trajectories: demonstrations for the warm start.

The script follows a question's decomposition and search keys through the real
retriever, with the tokens and provenance of a rollout. It is a deliberately
impatient demonstrator: it often answers before the last hop, repeats itself
or searches for the whole question. A policy that imitates it knows the
protocol and leaves something for reinforcement learning to mend.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from stepsearch_jax import types
from stepsearch_jax.env import search_env
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rollout import observations, recorder


@dataclasses.dataclass(frozen=True)
class ScriptMixture:
  """How often the demonstrator errs, each per hop.

  Attributes:
    impatient: answers with what it knows instead of searching on.
    repeat: asks its last query once more.
    whole: searches for the question itself first.
  """

  impatient: float
  repeat: float
  whole: float

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= getattr(self, field.name) <= 1:
        raise types.UserError(
          f"warm_start.{field.name} must be a share in [0, 1], got "
          f"{getattr(self, field.name)}"
        )


def _plan(question, mixture, rng) -> tuple[list[str], str]:
  """(queries to ask, final answer) of one demonstration."""
  queries: list[str] = []
  if rng.random() < mixture.whole:
    queries.append(question.text)
  known = ""
  for hop, keys in zip(
    question.decomposition, question.search_keys, strict=True
  ):
    if known and rng.random() < mixture.impatient:
      return queries, known
    if queries and rng.random() < mixture.repeat:
      queries.append(queries[-1])
    queries.append(keys[0])
    known = hop.answer
  return queries, question.answers[0]


def scripted_trajectory(
  question: types.Question,
  env: search_env.SearchEnv,
  retriever: types.Retriever,
  tokenizer,
  mixture: ScriptMixture,
  rng: np.random.Generator,
  max_observation: int,
) -> types.Trajectory:
  """One demonstration.

  Args:
    question: with decomposition and search keys.
    env: the protocol.
    retriever: answers the searches.
    tokenizer: of the policy.
    mixture: how the demonstrator errs.
    rng: its randomness.
    max_observation: tokens of an observation.

  Returns:
    A trajectory whose policy tokens are the script's, end of text included.

  Raises:
    UserError: the question has no decomposition to follow.
    SearchError: a search failed.
  """
  if not question.decomposition:
    raise types.UserError(
      f"question {question.id!r} has no decomposition to script a warm start "
      "from; set warm_start.steps = 0"
    )
  queries, answer = _plan(question, mixture, rng)
  queries = queries[: env.max_turns]
  record = recorder.Recorder(0, question, 0)
  record.append(
    tokenizer.encode_prompt(env.prompt(question)), types.Provenance.PROMPT
  )
  for query in queries:
    text = f"<search> {query} </search>"
    record.append(tokenizer.encode(text), types.Provenance.POLICY)
    position = len(record.tokens) - 1
    (documents,) = distributed.search_together(
      functools.partial(retriever.search, [query], env.topk), 1, env.topk
    )
    if documents is None:
      raise types.SearchError(f"the search for {query!r} failed")
    seen = env.observation(documents, len(record.turns))
    encoded = observations.encode(seen, tokenizer, max_observation)
    record.append(encoded.tokens, types.Provenance.OBSERVATION)
    record.truncated_documents += encoded.cut
    record.turns.append(
      types.Turn(text, types.Action.SEARCH, query, tuple(documents), seen.text,
                 position, retrieved=True)
    )
  text = f"<answer> {answer} </answer>"
  end = tokenizer.hf.eos_token_id
  record.append([*tokenizer.encode(text), end], types.Provenance.POLICY)
  record.turns.append(
    types.Turn(text, types.Action.ANSWER, answer, (), "",
               len(record.tokens) - 2)
  )
  record.answer = answer
  return record.finish(types.StopReason.ANSWER)
