"""Demonstrations from files of traces, whoever made them.

A trace is written anew in the protocol of the run: the policy's words as they
stand, its actions in the protocol's tags, the documents that it was shown as
this environment shows them. Only what the policy wrote is trained on. What
cannot be imitated is left out and counted, with the reason.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from stepsearch_jax import files, types
from stepsearch_jax.data import questions
from stepsearch_jax.env import search_env
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.rewards import text_match
from stepsearch_jax.rollout import observations, recorder
from stepsearch_jax.sft import trace_formats
from stepsearch_jax.sft.trace_formats import MalformedError


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a demonstration must keep to.

  Attributes:
    context: tokens of a trajectory.
    max_observation: tokens of an observation; longer documents are cut.
    min_f1: F1 of the answer against the row's gold answers.
  """

  context: int
  max_observation: int
  min_f1: float = 0.0


@dataclasses.dataclass(frozen=True)
class Traces:
  """What a file of traces held.

  Attributes:
    trajectories: demonstrations, in the file's order.
    rejected: number of rows by reason.
    examples: by reason, where the first such row is.
  """

  trajectories: list[types.Trajectory]
  rejected: collections.Counter[str]
  examples: dict[str, str]

  def describe(self) -> str:
    """Returns counts and reasons as one line."""
    total = len(self.trajectories) + self.rejected.total()
    reasons = ", ".join(
      f"{count} {reason} (first {self.examples[reason]})"
      for reason, count in self.rejected.most_common()
    )
    return (f"{len(self.trajectories)} of {total} traces become "
            f"demonstrations{'; left out: ' if reasons else ''}{reasons}")


def read(
  path: str, env: search_env.SearchEnv, tokenizer: tokenizer_lib.Tokenizer,
  limits: Limits,
) -> Traces:
  """Reads demonstrations from a file of traces.

  Args:
    path: JSONL, JSON or parquet, gzipped or not; see `trace_formats`.
    env: the protocol that they are written in.
    tokenizer: of the policy.
    limits: what they must keep to.

  Raises:
    UserError: there is no such file, or none of its rows can be imitated.
  """
  found = Traces([], collections.Counter(), {})
  for number, (where, row) in enumerate(files.try_rows(path)):
    try:
      if isinstance(row, files.DataError):
        raise MalformedError("rows that cannot be read")
      found.trajectories.append(
        demonstrate(where, row, number, env, tokenizer, limits)
      )
    except MalformedError as error:
      reason = str(error)
      found.rejected[reason] += 1
      found.examples.setdefault(reason, where)
  if not found.trajectories:
    raise types.UserError(f"{path}: expected at least one trace that can be "
                          f"imitated, got none; {found.describe()}")
  return found


def demonstrate(
  where: str, row: Mapping[str, Any], number: int, env: search_env.SearchEnv,
  tokenizer: tokenizer_lib.Tokenizer, limits: Limits,
) -> types.Trajectory:
  """Returns one trace as a trajectory.

  Raises:
    MalformedError: it cannot be imitated.
  """
  if "provenance" in row:
    trajectory = _recorded(row, tokenizer)
  else:
    steps = trace_formats.steps_of(row)
    question = _question(where, row, number, steps[-1].content)
    trajectory = _write(question, steps, env, tokenizer, limits)
  if len(trajectory.tokens) > limits.context:
    raise MalformedError("longer than rollout.context")
  gold = trajectory.question.answers
  if text_match.answer_f1(trajectory.answer, gold) < limits.min_f1:
    raise MalformedError("wrong answers")
  return trajectory


def _question(
  where: str, row: Mapping[str, Any], number: int, answer: str
) -> types.Question:
  """Returns the question of a row; without gold, its answer is the answer."""
  try:
    return questions.parse_question(where, row, number)
  except files.DataError:
    text = row.get("question") or _asked(row)
  if not isinstance(text, str) or not text.strip():
    raise MalformedError("no question")
  return types.Question(str(row.get("id", number)), text.strip(), (answer,))


def _asked(row: Mapping[str, Any]) -> str:
  """Returns the question inside a prompt: its last "Question:", or all."""
  for name in ("prompt", "input", "trajectory", "messages", "conversations"):
    value, text = row.get(name), ""
    if isinstance(value, str):
      text = value
    elif isinstance(value, list):
      users = [
        m for m in value if isinstance(m, Mapping)
        and m.get("role", m.get("from")) in ("user", "human")
      ]
      for user in users[:1]:
        text = trace_formats.content(user)
      if text and "Question:" not in text:
        return text.rpartition("User:")[2]
    asked = re.findall(r"Question:([^\n<]+)", text)
    if asked:
      return asked[0 if name == "trajectory" else -1]
  return ""


def _write(
  question: types.Question, steps: list[trace_formats.Step],
  env: search_env.SearchEnv, tokenizer: tokenizer_lib.Tokenizer,
  limits: Limits,
) -> types.Trajectory:
  """Writes a trace down in the protocol of `env`."""
  if len(steps) - 1 > env.max_turns:
    raise MalformedError("more searches than rollout.max_turns")
  record = recorder.Recorder(0, question, 0)
  record.append(
    tokenizer.encode_prompt(env.prompt(question)), types.Provenance.PROMPT
  )
  for turn, step in enumerate(steps):
    thought = step.thought.strip()
    text = (f"{thought}\n" if thought else "") + (
      f"<{step.action}> {step.content} </{step.action}>"
    )
    played = env.step(text, turn)
    if (played.action, played.content) != (step.action, step.content):
      raise MalformedError("thoughts that hold an action of their own")
    record.append(tokenizer.encode(text), types.Provenance.POLICY)
    position = len(record.tokens) - 1
    if step.action is types.Action.ANSWER:
      record.append([tokenizer.hf.eos_token_id], types.Provenance.POLICY)
      record.turns.append(
        types.Turn(text, step.action, step.content, (), "", position)
      )
      record.answer = step.content
      break
    _show(record, step, text, position, env, tokenizer, limits)
  return record.finish(types.StopReason.ANSWER)


def _show(record, step, text, position, env, tokenizer, limits) -> None:
  """Records a search and the documents of the trace."""
  if any(p.text == search_env.FAILED for p in step.documents):
    raise MalformedError("a search that failed")
  seen = env.observation(step.documents, len(record.turns))
  encoded = observations.encode(seen, tokenizer, limits.max_observation)
  record.append(encoded.tokens, types.Provenance.OBSERVATION)
  record.truncated_documents += encoded.cut
  record.turns.append(types.Turn(
    text, step.action, step.content, step.documents,
    tokenizer.decode(encoded.tokens), position, retrieved=True,
    shown=encoded.shown(step.documents),
  ))


def to_row(
  trajectory: types.Trajectory, tokenizer: tokenizer_lib.Tokenizer
) -> dict:
  """Returns a rollout as a row that `read` takes back token for token."""
  return {
    **questions.to_row(trajectory.question),
    "tokens": trajectory.tokens.tolist(),
    "provenance": trajectory.provenance.tolist(),
    "turn_index": trajectory.turn_index.tolist(),
    "turns": [
      {"text": turn.text, "action": str(turn.action), "content": turn.content,
       "action_position": turn.action_position}
      for turn in trajectory.turns
    ],
    "prediction": trajectory.answer,
    "transcript": tokenizer.decode(trajectory.tokens.tolist()),
  }


def _recorded(
  row: Mapping[str, Any], tokenizer: tokenizer_lib.Tokenizer
) -> types.Trajectory:
  """Returns the rollout of `to_row`; its tokens are never encoded again."""
  try:
    tokens = np.asarray(row["tokens"], np.int32)
    provenance = np.asarray(row["provenance"], np.int8)
    turn_index = np.asarray(row["turn_index"], np.int16)
    shapes = {array.shape for array in (tokens, provenance, turn_index)}
    if shapes != {(len(tokens),)} or not len(tokens):
      raise ValueError("arrays of other lengths")
    if tokenizer.decode(tokens.tolist()) != row["transcript"]:
      raise MalformedError("tokens of another tokenizer")
    return types.Trajectory(
      question=questions.parse_question("", row, 0), episode=0, tokens=tokens,
      provenance=provenance, turn_index=turn_index,
      logprobs=np.zeros(len(tokens), np.float32),
      turns=[
        types.Turn(turn["text"], types.Action(turn["action"]), turn["content"],
                   (), "", turn["action_position"])
        for turn in row["turns"]
      ],
      answer=row["prediction"], stop_reason=types.StopReason.ANSWER,
    )
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise MalformedError("recorded rollouts with damaged fields") from error
