"""Exact match and token F1 of answers: the only copy in the project.

SQuAD normalization (Rajpurkar et al., 2016) in the order of the released
code: lower case, strip ASCII punctuation, drop articles, squeeze spaces.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@functools.lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
  """Lower-cased text without ASCII punctuation, articles, extra spaces."""
  text = text.lower().translate(_PUNCTUATION)
  return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str | None, golds: Sequence[str]) -> float:
  """Returns 1.0 when the normalized prediction equals a normalized gold answer.

  No answer, None or blank, is never right. Where nothing is left of a gold
  answer ("The The", "!!!"), the texts themselves must be equal but for case and
  spaces.
  """
  ours = normalize_answer(prediction or "")
  return float(any(
    ours == normalize_answer(gold) if ours else _equal_texts(prediction, gold)
    for gold in golds
  ))


def _equal_texts(prediction: str | None, gold: str) -> bool:
  ours = (prediction or "").lower().split()
  return bool(ours) and ours == gold.lower().split()


def answer_f1(
  prediction: str | None, golds: Sequence[str], decimals: int | None = None
) -> float:
  """Returns `f1`, or 1.0 for an exact match with a gold answer of no words."""
  best = f1(prediction, golds, decimals)
  return best if best else exact_match(prediction, golds)


def f1(
  prediction: str | None, golds: Sequence[str], decimals: int | None = None
) -> float:
  """Best token F1 over gold answers.

  Args:
    prediction: text, or None for no answer (scores 0).
    golds: accepted texts; none gives 0.
    decimals: round the result (the released reward rounds to 4), None = not.
  """
  if prediction is None:
    return 0.0
  ours = normalize_answer(prediction).split()
  counts = collections.Counter(ours)
  best = 0.0
  for gold in golds:
    theirs = normalize_answer(gold).split()
    overlap = (counts & collections.Counter(theirs)).total()
    if overlap:
      precision, recall = overlap / len(ours), overlap / len(theirs)
      best = max(best, 2 * (precision * recall) / (precision + recall))
  return best if decimals is None else round(best, decimals)


def last_answer(text: str) -> str | None:
  """Content of the last closed answer block, stripped; None without one."""
  found = _ANSWER.findall(text)
  return found[-1].strip() if found else None


def ends_with_answer(text: str) -> bool:
  """Whether the last closed answer block is the end of the text."""
  end = None
  for match in _ANSWER.finditer(text):
    end = match.end()
  return end is not None and not text[end:].strip()
