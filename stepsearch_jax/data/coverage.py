"""Whether a gold passage is among other passages, in whatever wording.

Answers can only be found where their passages are: wiki-18, for one, lacks many
gold paragraphs of MuSiQue and 2WikiMultihopQA, which were cut from other dumps,
and holds the others in pieces of a hundred words.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Collection, Iterable, Sequence

from stepsearch_jax import types

_WORD = re.compile(r"\w+")
ENOUGH = 0.8  # Share of words that two passages of one title must have.
_SHORT = 20  # Words; one of so few can be all that two texts differ in.


@functools.lru_cache(maxsize=1 << 14)
def _words(text: str) -> frozenset[str]:
  return frozenset(_WORD.findall(text.lower()))


def _title(passage: types.Passage) -> str:
  return " ".join(_WORD.findall(passage.title.lower()))


def contains(shown: types.Passage, gold: types.Passage) -> bool:
  """Returns whether a passage shows a gold passage or a piece of it.

  They have the same words, or the same title and at least 80 % of the words of
  the shorter one, of a short one (under 20 words) all. Case and punctuation do
  not count.
  """
  ours, theirs = _words(shown.text), _words(gold.text)
  if ours == theirs:
    return bool(ours)
  if _title(shown) != _title(gold):
    return False
  shorter = min(len(ours), len(theirs))
  needed = shorter if shorter < _SHORT else ENOUGH * shorter
  return shorter > 0 and len(ours & theirs) >= needed


def retrieval_recall(
  support: Sequence[types.Passage],
  shown: Sequence[types.Passage],
  absent: Collection[str] = frozenset(),
) -> float | None:
  """Returns the share of gold passages that were shown; see `contains`.

  Args:
    support: gold passages of a question.
    shown: passages that its searches found.
    absent: ids of gold passages that the corpus lacks, which do not count.

  Returns:
    None where no gold passage counts: there is no such share.
  """
  gold = [passage for passage in support if passage.id not in absent]
  if not gold:
    return None
  return sum(any(contains(s, g) for s in shown) for g in gold) / len(gold)


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
      gold.setdefault(_content(passage), passage)
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
    elif shared >= ENOUGH * max(len(words), 1):
      counts["covered"] += 1
    else:
      counts["missing"] += 1
      missing[key] = passage
  answerable = sum(
    all(_content(p) not in missing for p in q.support)
    for q in questions
  )
  return {
    "gold passages": len(gold), "same": counts["same"],
    "covered": counts["covered"], "missing": counts["missing"],
    "questions": len(questions), "questions answerable": answerable,
  }, list(missing.values())


def _content(passage: types.Passage) -> str:
  return types.Passage.of(passage.title, passage.text).id
