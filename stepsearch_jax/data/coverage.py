"""Which gold passages a corpus lacks, and a corpus that has them.

Answers can only be found where their passages are: wiki-18, for one, lacks many
gold paragraphs of MuSiQue and 2WikiMultihopQA, which were cut from other dumps.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence

from stepsearch_jax import types

_WORD = re.compile(r"\w+")
_ENOUGH = 0.8  # Share of a gold passage's words under the same title.


def _words(text: str) -> frozenset[str]:
  return frozenset(_WORD.findall(text.lower()))


def _title(passage: types.Passage) -> str:
  return " ".join(_WORD.findall(passage.title.lower()))


def audit(
  questions: Sequence[types.Question], corpus: Iterable[types.Passage]
) -> tuple[dict[str, int], list[types.Passage]]:
  """Compares the supporting passages of questions with a corpus.

  Args:
    questions: with supporting passages.
    corpus: read once.

  Returns:
    (counts, missing passages). A gold passage counts as "same" if its words
    are those of a corpus passage, as "covered" if the passages under its title
    together hold at least 80 % of its words, else as "missing".
    "questions answerable" have no missing passage.
  """
  gold: dict[str, types.Passage] = {}
  for question in questions:
    for passage in question.support:
      gold.setdefault(f"{passage.title}\n{passage.text}", passage)
  wanted = {_words(passage.text) for passage in gold.values()}
  titles = {_title(passage) for passage in gold.values()}
  same: set[frozenset[str]] = set()
  under: dict[str, set[str]] = collections.defaultdict(set)
  for passage in corpus:
    title = _title(passage)
    if title in titles:
      under[title] |= _words(passage.text)
    words = _words(passage.text)
    if words in wanted:
      same.add(words)
  missing, counts = {}, collections.Counter()
  for key, passage in gold.items():
    words = _words(passage.text)
    shared = len(words & under[_title(passage)])
    if words in same:
      counts["same"] += 1
    elif shared >= _ENOUGH * max(len(words), 1):
      counts["covered"] += 1
    else:
      counts["missing"] += 1
      missing[key] = passage
  answerable = sum(
    all(f"{p.title}\n{p.text}" not in missing for p in q.support)
    for q in questions
  )
  return {
    "gold passages": len(gold), "same": counts["same"],
    "covered": counts["covered"], "missing": counts["missing"],
    "questions": len(questions), "questions answerable": answerable,
  }, list(missing.values())
