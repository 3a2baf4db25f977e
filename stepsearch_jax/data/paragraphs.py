"""The paragraphs that a question's row brings, and which of them are gold.

Every layout that the datasets use: MuSiQue's `paragraphs` by index or marked
`is_supporting`, the `context` of HotpotQA and 2WikiMultihopQA by title, lists
of supporting paragraphs by themselves. An empty field counts as absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from stepsearch_jax import types
from stepsearch_jax.data import fields

# Lists of supporting paragraphs and nothing else, the first filled one counts.
SUPPORTING = (
  "support", "sub_support_docs", "support_docs", "supporting_paragraphs"
)
_SENTENCES = ("sentences", "content", "text", "paragraph_text")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Support:
  """The gold paragraphs of a question.

  Attributes:
    passages: those that the row holds.
    places: per hop, the place in `passages`; -1 where unknown.
    listed: per paragraph of a list of gold paragraphs, its place in
      `passages`; -1 where it is empty.
    lacking: gold paragraphs that the row names but does not hold.
    reason: why there are none, "" where there are some.
  """

  passages: tuple[types.Passage, ...] = ()
  places: tuple[int, ...] = ()
  listed: tuple[int, ...] = ()
  lacking: int = 0
  reason: str = ""


def supporting(row: fields.Row, info: fields.Row) -> Support:
  """Returns the gold paragraphs of a row.

  Args:
    row: of a question.
    info: its field extra_info.

  Raises:
    files.DataError: naming file, line and field.
  """
  listed = _listed(row, info)
  if listed:
    return _present(listed)
  found = Support(reason=(
    "expected for instance sub_support_docs, supporting_paragraphs, "
    "paragraphs with is_supporting, or supporting_facts with context"
  ))
  if row.filled("question_decomposition"):
    found = _by_index(row)
  elif "supporting_facts" in row:
    found = _by_title(row)
  if not found.passages and row.filled("paragraphs"):
    marked = [passage for passage, gold in _marked(row) if gold]
    if marked:
      return dataclasses.replace(
        _present(marked), places=(), lacking=found.lacking)
  return found


def everything(row: fields.Row) -> list[types.Passage]:
  """Returns all paragraphs of a question's row, gold or not, each once."""
  found = row.passages("paragraphs") if row.filled("paragraphs") else []
  found += context(row) if row.filled("context") else []
  found += _listed(row, row.part("extra_info"))
  unique: dict[tuple[str, str], types.Passage] = {}
  for passage in found:
    unique.setdefault((passage.title, passage.text), passage)
  return list(unique.values())


def _listed(row: fields.Row, info: fields.Row) -> list[types.Passage]:
  """Returns the paragraphs that stand in a list of gold ones."""
  name = row.filled(*SUPPORTING)
  if name:
    return row.passages(name, ids=name == "support")
  return info.passages("support_docs") if info.filled("support_docs") else []


def context(row: fields.Row) -> list[types.Passage]:
  """Returns the paragraphs of `context`: titles with lists of sentences.

  Pairs as in the datasets' own files, one object of columns as on the hub, or
  a list of objects.
  """
  value = fields.parsed(row["context"])
  if isinstance(value, dict):
    value = fields.columns(value)
  wanted = "[title, [sentence, ..]] pairs"
  if not isinstance(value, (list, tuple)):
    raise row.error("context", wanted, row["context"])
  found = []
  for item in map(fields.parsed, value):
    if isinstance(item, dict):
      part = fields.Row(row.where, item, "context.")
      lines = part.filled(*_SENTENCES) or part.first(*_SENTENCES)
      item = (item.get("title"), item.get(lines))
    if not isinstance(item, (list, tuple)) or len(item) != 2:
      raise row.error("context", wanted, item)
    title, lines = item[0], fields.parsed(item[1])
    if not isinstance(title, str) or not isinstance(lines, (list, tuple)):
      raise row.error("context", wanted, item)
    if not all(isinstance(line, str) for line in lines):
      raise row.error("context", wanted, item)
    found.append(types.Passage.of(title, joined(lines)))
  return found


def joined(sentences: Sequence[str]) -> str:
  """Returns sentences as one text, with a blank between two that lack one.

  HotpotQA's sentences begin with theirs, those of 2WikiMultihopQA have none.
  """
  text = ""
  for sentence in sentences:
    apart = not text or not sentence or text[-1].isspace() or (
      sentence[0].isspace())
    text += sentence if apart else " " + sentence
  return text.strip()


def _present(passages: list[types.Passage]) -> Support:
  """Returns gold paragraphs; those without any text count as lacking."""
  kept, listed = [], []
  for passage in passages:
    there = bool(passage.text.strip())
    listed.append(len(kept) if there else -1)
    kept += [passage] if there else []
  return Support(
    tuple(kept), (), tuple(listed), len(passages) - len(kept),
    "" if kept else "their texts are empty",
  )


def _marked(row: fields.Row) -> list[tuple[types.Passage, bool]]:
  """Returns `paragraphs`, each with whether it is marked as gold."""
  marks = [
    isinstance(item, dict)
    and bool(fields.Row(row.where, item, "paragraphs.").flag("is_supporting"))
    for item in row.items("paragraphs")
  ]
  return list(zip(row.passages("paragraphs"), marks, strict=True))


def _by_index(row: fields.Row) -> Support:
  """Returns what `paragraph_support_idx` of the hops points at."""
  items = row.items("paragraphs") if row.filled("paragraphs") else []
  held = _held(row, "paragraphs", "idx", (
    (_index(row, item, place), item) for place, item in enumerate(items)
  ))
  passages, places, lacking = [], [], 0
  for hop in row.rows("question_decomposition"):
    index = hop.number("paragraph_support_idx")
    passage = row.passage("paragraphs", held[index]) if index in held else None
    if passage is not None and passage.text.strip():
      places.append(len(passages))
      passages.append(passage)
    else:
      places.append(-1)
      lacking += bool(held) and index is not None
  reason = "" if passages else (
    "no paragraph_support_idx is among the paragraphs" if held
    else "the row has no paragraphs"
  )
  return Support(
    tuple(passages), tuple(places), lacking=lacking, reason=reason)


def _index(
  row: fields.Row, item: str | Mapping[str, Any], place: int
) -> int:
  """Returns the number of a paragraph: its own, else its place."""
  if isinstance(item, str):
    return place
  index = fields.Row(row.where, item, "paragraphs.").number("idx")
  return place if index is None else index


def _held(
  row: fields.Row, name: str, key: str, pairs: Iterable[tuple[Hashable, _T]]
) -> dict[Hashable, _T]:
  """Returns paragraphs by what points at them; a repeated one counts once.

  Raises:
    files.DataError: two that differ, of which nothing says which is meant.
  """
  held = {}
  for pointer, paragraph in pairs:
    if held.setdefault(pointer, paragraph) != paragraph:
      raise row.error(name, f"one paragraph per {key}", pointer)
  return held


def _by_title(row: fields.Row) -> Support:
  """Returns the paragraphs of `context` that `supporting_facts` names."""
  wanted = "[title, sentence number] pairs"
  facts = row["supporting_facts"]
  facts = [] if fields.empty(facts) else fields.parsed(facts)
  if isinstance(facts, dict):
    titles = fields.parsed(facts.get("title"))
  elif isinstance(facts, (list, tuple)):
    titles = [
      fact.get("title") if isinstance(fact, dict)
      else fact[0] if isinstance(fact, (list, tuple)) and fact else None
      for fact in map(fields.parsed, facts)
    ]
  else:
    titles = None
  if not isinstance(titles, (list, tuple)) or not all(
    isinstance(title, str) for title in titles
  ):
    raise row.error("supporting_facts", wanted, facts)
  if not row.filled("context"):
    return Support(reason="supporting_facts without context")
  names = dict.fromkeys(titles)
  held = _held(row, "context", "title of supporting_facts", (
    (passage.title, passage) for passage in context(row)
    if passage.title in names
  ))
  found = [held[t] for t in names if t in held and held[t].text.strip()]
  return Support(
    tuple(found), lacking=len(names) - len(found),
    reason="" if found else "none of the supporting_facts is in the context",
  )
