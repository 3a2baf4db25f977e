"""Question files of every accepted schema to `types.Question`.

What a field means does not depend on the others, so files that mix schemas and
rows whose other fields are null or empty are read like any:

  question      question, text, query, extra_info.question, or what follows
                "Question:" in prompt (verl)
  answers       final_answer, reward_model.ground_truth, golden_answers,
                answers or answer; with answer_aliases or aliases
  id            id, _id, qid; unique after loading
  source        data_source, source or dataset
  search keys   search_keys, sub_searchs, reward_model.ground_truth.search_keys,
                or written from question_decomposition
  support       see `paragraphs`
  hops          question_decomposition (MuSiQue) or decomposition (this
                project's own files, see `to_row`)

Fields inside `metadata` (FlashRAG) count as fields of the row.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from stepsearch_jax import files, types
from stepsearch_jax.data import fields, paragraphs, prompted

_SOURCES = {
  "bdsaglam/musique": "musique",
  "hotpotqa/hotpot_qa": "hotpotqa",
  "voidful/2wikimultihopqa": "2wikimultihopqa",
}
_TEXT = ("question", "text", "query")
_ID = ("id", "_id", "qid")
_SOURCE = ("data_source", "source", "dataset")
_ANSWERS = ("golden_answers", "answers", "answer")
_ALIASES = ("answer_aliases", "aliases")
_HOPS = ("question_decomposition", "decomposition")
# What a row holds an answer in.
_ANSWERED = ("final_answer", "reward_model", *_ANSWERS)
# All that is read in a row, for messages.
ACCEPTED = (
  *_TEXT, "prompt", *_ID, *_SOURCE, *_ANSWERED, *_ALIASES, "search_keys",
  "sub_searchs", "phrasings", *_HOPS, *paragraphs.SUPPORTING,
  "paragraphs", "supporting_facts", "context", "extra_info", "metadata",
  "answerable", "pseudo_support", "extra",
)


@dataclasses.dataclass
class Report:
  """What was met while reading a question file.

  Attributes:
    rows: rows read, skipped ones included.
    unanswerable: rows left out because they are marked answerable: false.
    renamed: ids that had come before and were made unique.
    lacking: gold paragraphs that are named but not among a row's paragraphs.
    cut: prompts with text behind the question, which was left out.
    used: per field, in how many rows it was read.
    ignored: per field, in how many rows it stood unread.
    reasons: why questions have no supporting paragraphs, with counts.
  """

  rows: int = 0
  unanswerable: int = 0
  renamed: int = 0
  lacking: int = 0
  cut: int = 0
  used: collections.Counter = dataclasses.field(
    default_factory=collections.Counter)
  ignored: collections.Counter = dataclasses.field(
    default_factory=collections.Counter)
  reasons: collections.Counter = dataclasses.field(
    default_factory=collections.Counter)

  def notes(self) -> list[str]:
    """Returns a line per thing that a user should know."""
    return [text for count, text in (
      (self.unanswerable, f"{self.unanswerable} of {self.rows} rows are marked "
       "answerable: false and left out"),
      (self.renamed, f"{self.renamed} rows repeat an id; source and row number "
       "were added to theirs"),
      (self.lacking, f"{self.lacking} gold paragraphs are named but not among "
       "the paragraphs of their rows"),
      (self.cut, f"{self.cut} prompts have text behind the question, which is "
       "left out; a field question would say where it ends"),
    ) if count]


@dataclasses.dataclass(frozen=True)
class QuestionFile:
  """Questions in file order, and what was met while reading them."""

  questions: list[types.Question]
  report: Report


@dataclasses.dataclass(frozen=True)
class _Parsed:
  question: types.Question | None  # None if it is marked unanswerable.
  support: paragraphs.Support
  cut: bool
  used: set[str]
  ignored: set[str]


def load_questions(
  path: str, limit: int | None = None, require_support: bool = False
) -> list[types.Question]:
  """Reads a question file and logs what is remarkable about it.

  Args:
    path: .jsonl, .json or .parquet, gzipped or not, or a TFDS dataset
      (see `files.read_rows`).
    limit: stop after this many; None reads all.
    require_support: a question without supporting paragraphs is an error, as
      it could earn no step reward.

  Returns:
    Questions in file order, at least one, each id once.

  Raises:
    files.DataError: naming file, line and field.
  """
  found = read_questions(path, limit, require_support)
  for note in found.report.notes():
    logging.warning("%s: %s", path, note)
  return found.questions


def read_questions(
  path: str, limit: int | None = None, require_support: bool = False
) -> QuestionFile:
  """Reads a question file like `load_questions`; returns a report with it."""
  types.expect(limit is None or limit >= 1, "limit", "at least 1", limit)
  report, questions, seen = Report(), [], set()
  for number, (where, row) in enumerate(files.read_rows(path)):
    parsed = _parse(where, row, number)
    report.rows += 1
    report.used.update(parsed.used)
    report.ignored.update(parsed.ignored)
    if parsed.question is None:
      report.unanswerable += 1
      continue
    question = parsed.question
    if not question.support:
      report.reasons[parsed.support.reason] += 1
    if require_support and not question.support:
      raise files.DataError(
        f"{where}: question {question.id!r} has no supporting paragraphs, "
        f"which step rewards need: {parsed.support.reason}"
      )
    report.lacking += parsed.support.lacking
    report.cut += parsed.cut
    identity = question.id
    while identity in seen:
      identity += f"@{question.source}:{number}"
    if identity != question.id:
      report.renamed += 1
      question = dataclasses.replace(question, id=identity)
    seen.add(identity)
    questions.append(question)
    if len(questions) == limit:
      break
  if not questions:
    raise files.DataError("; ".join(
      [f"{path}: no questions in the file", *report.notes()]
    ))
  return QuestionFile(questions, report)


def parse_question(
  where: str, row: Mapping[str, Any], number: int = 0
) -> types.Question:
  """Returns the question of one row; `number` is its id where it has none.

  Raises:
    files.DataError: it is no question, or a field is missing or malformed.
  """
  parsed = _parse(where, row, number)
  if parsed.question is None:
    raise files.DataError(f"{where}: the row is marked answerable: false")
  return parsed.question


def row_of(where: str, row: Mapping[str, Any]) -> fields.Row:
  """Returns the fields of a row, with those inside `metadata` among them."""
  inner = fields.parsed(row.get("metadata"))
  if isinstance(inner, Mapping):
    own = {k: v for k, v in row.items() if not fields.empty(v)}
    row = {**row, **inner, **own}
    row.pop("metadata", None)
  return fields.Row(where, row)


def is_question(row: fields.Row) -> bool:
  """Returns whether a row asks something; `text` alone may be a passage's.

  This project's own files have the question in `text`, beside an answer and a
  field for paragraphs, which may be empty.
  """
  if row.filled("question"):
    return True
  return row.filled(*_ANSWERED) is not None and (
    row.spelled("paragraphs", "context", *paragraphs.SUPPORTING) is not None
    or row.part("extra_info").filled("support_docs") is not None
  )


def _parse(where: str, values: Mapping[str, Any], number: int) -> _Parsed:
  row = row_of(where, values)
  info, model = row.part("extra_info"), row.part("reward_model")
  if row.flag("answerable") is False:
    return _Parsed(None, paragraphs.Support(), False, row.used, set())
  _recognize(row, info)
  cut, text = _text(row, info)
  answers = _answers(row, model)
  support = paragraphs.supporting(row, info)
  hops = _hops(row, support)
  groups = _keys(row, model, hops)
  keys = tuple(group for group in groups if group)
  question = types.Question(
    id=_identity(row, info, number),
    text=text,
    answers=answers,
    source=_source(row),
    search_keys=keys,
    support=support.passages,
    decomposition=hops,
    # Of a hop without a key the place still counts.
    phrasings=row.groups("phrasings") or (() if keys == groups else groups),
    extra=_extra(row),
  )
  ignored = {name for name in row.names() if row.filled(name)} - row.used
  return _Parsed(question, support, cut, row.used, ignored)


def _recognize(row: fields.Row, info: fields.Row) -> None:
  if row.first(*_TEXT, "prompt") is None and "question" not in info:
    raise files.DataError(
      f"{row.where}: unknown question schema, expected one of the fields "
      f"{[*_TEXT, 'prompt']}, found {row.names()}"
    )
  if row.first(*_ANSWERED) is None:
    known = "question" in row or row.first(*_HOPS, *paragraphs.SUPPORTING)
    raise files.DataError(
      f"{row.where}: "
      + ("field answer is missing" if known else "unknown question schema")
      + f", expected one of the fields {[*_ANSWERED]}, found {row.names()}"
    )


def _text(row: fields.Row, info: fields.Row) -> tuple[bool, str]:
  """Returns (whether the prompt goes on behind it, the question)."""
  name = row.filled("question")
  if name is None and info.filled("question"):
    row, name = info, "question"
  name = name or row.filled(*_TEXT)
  if name is None and row.filled("prompt"):
    return prompted.question_of(row)
  name = name or row.first(*_TEXT, "prompt") or "extra_info.question"
  text = row[name]
  if not isinstance(text, str) or not text.strip():
    raise files.DataError(
      f"{row.where}: field {name} is empty or no text, got {text!r}"
    )
  return False, text


def _answers(row: fields.Row, model: fields.Row) -> tuple[str, ...]:
  answers = row.texts("final_answer", plain=True)
  if not answers and "ground_truth" in model:
    truth = fields.parsed(model["ground_truth"])
    if isinstance(truth, Mapping):
      answers = model.part("ground_truth").texts("target")
    else:
      answers = model.texts("ground_truth")
  for name in _ANSWERS:
    answers = answers or row.texts(name, plain=name == "answer")
  if not answers:
    raise files.DataError(f"{row.where}: question without an answer")
  aliases = ()
  for name in _ALIASES:
    aliases = aliases or row.texts(name)
  return tuple(dict.fromkeys(answers + aliases))


def _identity(row: fields.Row, info: fields.Row, number: int) -> str:
  for name in _ID:
    identity = row.label(name)
    if identity is not None:
      return identity
  if "reward_model" in row:
    split, index = info.label("split"), info.label("index")
    return f"{split or 'row'}_{number if index is None else index}"
  return str(number)


def _source(row: fields.Row) -> str:
  for name in _SOURCE:
    source = row.label(name)
    if source is not None:
      return _SOURCES.get(source.lower(), source)
  if row.filled("question_decomposition", "sub_searchs"):
    return "musique"
  if row.filled("supporting_facts"):
    return "2wikimultihopqa" if row.filled("evidences") else "hotpotqa"
  return ""


def _hops(
  row: fields.Row, support: paragraphs.Support
) -> tuple[types.SubQuestion, ...]:
  name = row.filled(*_HOPS)
  if name is None:
    return ()
  hops = []
  for i, hop in enumerate(row.rows(name)):
    question, answer = hop.text("question"), hop.texts("answer", plain=True)
    if not question or not question.strip():
      raise hop.error("question", "text", question)
    if not answer:
      raise hop.error("answer", "text", hop["answer"])
    place = -1
    if name == "question_decomposition" and i < len(support.places):
      place = support.places[i]
    elif name == "decomposition":
      place = _place(hop, support)
    hops.append(types.SubQuestion(question, answer[0], place))
  return tuple(hops)


def _place(hop: fields.Row, support: paragraphs.Support) -> int:
  place = hop.number("support")
  if place in (None, -1):
    return -1
  if not 0 <= place < len(support.listed):
    raise hop.error(
      "support", f"a place in a list of {len(support.listed)} passages", place
    )
  return support.listed[place]


def _keys(
  row: fields.Row, model: fields.Row, hops: Sequence[types.SubQuestion]
) -> tuple[tuple[str, ...], ...]:
  """Returns a group per sub-question, empty ones too if another is not."""
  for name in ("search_keys", "sub_searchs"):
    if row.filled(name) and any(groups := row.groups(name)):
      return groups
  if isinstance(fields.parsed(model["ground_truth"]), Mapping):
    groups = model.part("ground_truth").groups("search_keys")
    if any(groups):
      return groups
  return default_keys(hops) if row.filled("question_decomposition") else ()


def _extra(row: fields.Row) -> dict[str, Any]:
  extra = row["extra"]
  if extra is not None and not isinstance(extra, Mapping):
    raise row.error("extra", "an object", extra)
  pseudo = {"pseudo_support": True} if row.flag("pseudo_support") else {}
  return {**(extra or {}), **pseudo}


def default_keys(
  decomposition: Sequence[types.SubQuestion],
) -> tuple[tuple[str, ...], ...]:
  """Returns search phrases from a decomposition, where a dataset ships none.

  Per hop: the sub-question with `#n` replaced by the n-th answer; MuSiQue's
  relation form "A >> relation" also as "A relation" and "relation A".
  """
  groups: list[tuple[str, ...]] = []
  for text in types.resolved(decomposition):
    if ">>" in text:
      entity, relation = (part.strip() for part in text.split(">>", 1))
      groups.append((f"{entity} {relation}", f"{relation} {entity}"))
    else:
      groups.append((text.strip(),))
  return tuple(groups)


def to_row(question: types.Question) -> dict:
  """Returns a question as a JSON-able row that `parse_question` reads back."""
  return dataclasses.asdict(question)
