"""Passages to retrieve from, and the hash that identifies a corpus."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import questions

# Fields by which a row is a question that brings its paragraphs.
_OF_QUESTIONS = frozenset(
  ("paragraphs", "context", "support", "sub_support_docs", "reward_model")
)


def load_corpus(path: str) -> list[types.Passage]:
  """Reads a passage file.

  Args:
    path: rows `{"id", "contents": "title\\ntext"}` or `{"id", "title",
      "content" | "text"}`; rows of questions give all their paragraphs, each
      once: `paragraphs` (MuSiQue), `context` (HotpotQA) or, where there are no
      others, the supporting ones (StepSearch, verl, this project).

  Returns:
    Passages in file order.

  Raises:
    files.DataError: naming file, line and field.
  """
  passages: dict[str, types.Passage] = {}
  for where, row in files.read_rows(path):
    for passage in _passages(where, row):
      known = passages.setdefault(passage.id, passage)
      if known != passage:
        raise files.DataError(
          f"{where}: passage id {passage.id!r} is used twice with other text"
        )
  if not passages:
    raise files.DataError(f"{path}: no passages in the file")
  return list(passages.values())


def stream_corpus(path: str) -> Iterator[types.Passage]:
  """The passages of a file one by one, for corpora larger than memory.

  Unlike `load_corpus`, paragraphs that repeat are not recognised, except in
  files of questions, which are read whole.

  Raises:
    files.DataError: naming file, line and field.
  """
  rows = files.read_rows(path)
  where, first = next(rows, (path, None))
  if first is None:
    raise files.DataError(f"{path}: no passages in the file")
  if _OF_QUESTIONS & first.keys():
    yield from load_corpus(path)
    return
  yield from _passages(where, first)
  for where, row in rows:
    yield from _passages(where, row)


def _passages(where: str, row: dict) -> Iterable[types.Passage]:
  if "paragraphs" in row:
    for p in row["paragraphs"]:
      if not isinstance(p, dict) or "paragraph_text" not in p:
        raise files.DataError(
          f"{where}: paragraphs must hold title and paragraph_text, got {p!r}"
        )
      title = _text(where, "title", p.get("title", ""))
      yield _identified(
        title, _text(where, "paragraph_text", p["paragraph_text"])
      )
  elif "context" in row:
    for title, text in questions.context_paragraphs(where, row["context"]):
      yield _identified(title, text)
  elif _OF_QUESTIONS & row.keys():
    logging.log_first_n(
      logging.WARNING, "%s: questions with their supporting paragraphs only; "
      "where nothing else can be found, searching is easy", 1, where,
    )
    yield from questions.parse_question(where, row).support
  elif "contents" in row:
    contents = _text(where, "contents", row["contents"])
    title, _, text = contents.partition("\n")
    yield types.Passage(str(row.get("id", where)), title, text)
  elif "content" in row or "text" in row:
    name = "content" if "content" in row else "text"
    yield types.Passage(
      str(row.get("id", where)), _text(where, "title", row.get("title") or ""),
      _text(where, name, row[name]),
    )
  else:
    if "question" in row:
      raise files.DataError(
        f"{where}: a question without paragraphs is no corpus: name one "
        "(data.corpus or --corpus)"
      )
    raise files.DataError(
      f"{where}: unknown corpus schema, expected contents, content, text, "
      f"paragraphs or context, found {sorted(row)}"
    )


def _text(where: str, name: str, value) -> str:
  if not isinstance(value, str):
    raise files.DataError(f"{where}: field {name} must be a string, got "
                          f"{value!r}")
  return value


def _identified(title: str, text: str) -> types.Passage:
  return types.Passage(questions.paragraph_id(title, text), title, text)


def write_corpus(path: epath.Path, passages: Iterable[types.Passage]) -> int:
  """Writes passages as `{"id", "title", "text"}` rows; returns how many.

  Raises:
    files.DataError: the file is to be of another type than .jsonl.
  """
  if not path.name.endswith(".jsonl"):
    raise files.DataError(f"{path}: a corpus is written as .jsonl")
  temporary = path.with_name(path.name + ".tmp")
  count = 0
  with temporary.open("w") as file:
    for p in passages:
      row = {"id": p.id, "title": p.title, "text": p.text}
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
      count += 1
  temporary.replace(path)
  return count


def corpus_from_questions(paths: Sequence[str]) -> list[types.Passage]:
  """All paragraphs of question files, each once."""
  passages: dict[str, types.Passage] = {}
  for path in paths:
    for passage in load_corpus(path):
      passages.setdefault(passage.id, passage)
  return list(passages.values())


def corpus_hash(passages: Iterable[types.Passage]) -> str:
  """Identity of a corpus: ids, titles, texts and their order."""
  digest = hashlib.sha256()
  for passage in passages:
    for part in (passage.id, passage.title, passage.text):
      digest.update(part.encode())
      digest.update(b"\x00")
  return digest.hexdigest()[:16]
