"""The hops of a question: its own, written by a model, or by rule.

Knows text and writers; no JAX.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.rewards import text_match
from stepsearch_jax.supervision import pipeline

_HOP_PROMPT = (
  "Split the question into the simple questions that have to be answered one "
  "after the other. Write one per line as: simple question => answer. Use #1, "
  "#2 for earlier answers. The final answer is: {answer}\n"
  "Question: {question}\nSteps:\n"
)


def decompose(
  questions: Sequence[types.Question], writer: pipeline.Writer | None
) -> list[types.Question]:
  """Questions with a decomposition: their own, a written one, or by rule.

  Args:
    questions: any.
    writer: asked where the data has none. Without one, or where what it writes
      does not end in the answer, supporting passages decide if there are any.
  """
  lacking = [q for q in questions if not q.decomposition]
  texts = ["" for _ in lacking]
  if writer is not None and lacking:
    texts = writer.write([
      _HOP_PROMPT.format(question=q.text, answer=q.answers[0]) for q in lacking
    ])
  hops = {}
  for question, text in zip(lacking, texts, strict=True):
    written = _parse_hops(text)
    right = written and text_match.exact_match(
      written[-1].answer, question.answers
    )
    hops[question.id] = (
      written if right or not question.support else _hops_by_support(question)
    )
  return [
    q if q.decomposition else dataclasses.replace(q, decomposition=hops[q.id])
    for q in questions
  ]


def _hops_by_support(question: types.Question) -> tuple[types.SubQuestion, ...]:
  """One hop per supporting passage, which asks for its title.

  Passages that the question names come first; what one says leads to the next,
  the last to the answer. No hops where a passage has no title.
  """
  if not all(passage.title.strip() for passage in question.support):
    return ()
  asked = set(text_match.normalize_answer(question.text).split())

  def named(passage):
    words = text_match.normalize_answer(_plain(passage.title)).split()
    return sum(word in asked for word in words) / max(len(words), 1)

  places = sorted(
    range(len(question.support)), key=lambda i: -named(question.support[i])
  )
  titles = [_plain(question.support[place].title) for place in places]
  answers = [*titles[1:], question.answers[0]]
  return tuple(map(types.SubQuestion, titles, answers, places))


def _plain(title: str) -> str:
  """A title without what tells it from others, as in `Paris (mythology)`."""
  return re.sub(r"\s*\([^)]*\)\s*$", "", title).strip() or title


def _parse_hops(text: str) -> tuple[types.SubQuestion, ...]:
  hops = []
  for line in text.splitlines():
    question, arrow, answer = pipeline.without_marker(line).partition("=>")
    if arrow and question.strip() and answer.strip():
      hops.append(types.SubQuestion(question.strip(), answer.strip()))
  return tuple(hops)
