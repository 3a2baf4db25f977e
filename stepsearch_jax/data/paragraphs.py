"""The paragraphs that a question's row brings, and which of them are gold.

Every layout that the datasets use: MuSiQue's `paragraphs` by index or marked
`is_supporting`, the `context` of HotpotQA and 2WikiMultihopQA by title, lists
of supporting paragraphs by themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from stepsearch_jax import types
from stepsearch_jax.data import fields

# Lists of supporting paragraphs and nothing else, the first one there counts.
SUPPORTING = (
  "support", "sub_support_docs", "support_docs", "supporting_paragraphs"
)
_SENTENCES = ("sentences", "content", "text", "paragraph_text")


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
  name = row.first(*SUPPORTING)
  if name:
    listed = row.passages(name, ids=name == "support")
  else:
    listed = info.passages("support_docs")
  if listed:
    return _present(listed)
  found = Support(reason=(
    "expected for instance sub_support_docs, supporting_paragraphs, "
    "paragraphs with is_supporting, or supporting_facts with context"
  ))
  if "question_decomposition" in row:
    found = _by_index(row)
  elif "supporting_facts" in row:
    found = _by_title(row)
  if not found.passages and "paragraphs" in row:
    marked = [passage for passage, gold in _marked(row) if gold]
    if marked:
      return dataclasses.replace(
        _present(marked), places=(), lacking=found.lacking)
  return found


def everything(row: fields.Row) -> list[types.Passage]:
  """Returns all paragraphs of a question's row, gold or not."""
  if "paragraphs" in row:
    return [passage for passage, _ in _marked(row)]
  if "context" in row:
    return context(row)
  return list(supporting(row, row.part("extra_info")).passages)


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
  for item in value:
    if isinstance(item, dict):
      lines = next((item[n] for n in _SENTENCES if n in item), None)
      item = (item.get("title"), lines)
    if not isinstance(item, (list, tuple)) or len(item) != 2:
      raise row.error("context", wanted, item)
    title, lines = item
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
  held = {}
  for place, item in enumerate(row.items("paragraphs")):
    if isinstance(item, dict):
      paragraph = fields.Row(row.where, item, "paragraphs.")
      index = paragraph.number("idx")
      held[place if index is None else index] = paragraph
  passages, places, lacking = [], [], 0
  for hop in row.rows("question_decomposition"):
    index = hop.number("paragraph_support_idx")
    passage = fields.passage(held[index]) if index in held else None
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


def _by_title(row: fields.Row) -> Support:
  """Returns the paragraphs of `context` that `supporting_facts` names."""
  wanted = "[title, sentence number] pairs"
  facts = fields.parsed(row["supporting_facts"])
  if isinstance(facts, dict):
    titles = facts.get("title")
  elif isinstance(facts, (list, tuple)):
    titles = [
      fact.get("title") if isinstance(fact, dict)
      else fact[0] if isinstance(fact, (list, tuple)) and fact else None
      for fact in facts
    ]
  else:
    titles = None
  if not isinstance(titles, (list, tuple)) or not all(
    isinstance(title, str) for title in titles
  ):
    raise row.error("supporting_facts", wanted, facts)
  if "context" not in row:
    return Support(reason="supporting_facts without context")
  held = {passage.title: passage for passage in context(row)}
  names = dict.fromkeys(titles)
  found = [held[t] for t in names if t in held and held[t].text.strip()]
  return Support(
    tuple(found), lacking=len(names) - len(found),
    reason="" if found else "none of the supporting_facts is in the context",
  )
