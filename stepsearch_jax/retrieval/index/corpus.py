"""Passages to retrieve from, and the hash that identifies a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import fields, paragraphs, questions

_RECENT = 1 << 22  # Entries between two sorts.


def load_corpus(path: str) -> list[types.Passage]:
  """Reads a passage file into memory; see `stream_corpus`."""
  return list(stream_corpus(path))


def stream_corpus(path: str) -> Iterator[types.Passage]:
  """Yields the passages of a file, which may be larger than memory.

  A passage that repeats is given once. One without an id has its content as
  identity, so the same file is the same corpus wherever it lies. Paragraphs of
  questions that have no text are left out and counted.

  Args:
    path: rows `{"id", "contents": "title\\ntext"}` or `{"id", "title",
      "content" | "text"}`; rows of questions give all their paragraphs:
      `paragraphs` (MuSiQue), `context` (HotpotQA) and the supporting ones
      (StepSearch, verl, this project).

  Raises:
    files.DataError: naming file, line and field, for a row without a passage
      too; also for an id that comes twice with different texts.
  """
  known, count, blank = _Known(), 0, 0
  for where, row in files.read_rows(path):
    for passage in _passages(where, row):
      if not passage.text.strip():
        blank += 1
        continue
      count += 1
      content = _hash(f"{passage.title}\0{passage.text}")
      earlier = known.add(_hash(passage.id), content)
      if earlier is None:
        yield passage
      elif earlier != content:
        raise files.DataError(
          f"{where}: passage id {passage.id!r} is used twice with other text"
        )
  if not count:
    raise files.DataError(f"{path}: no passages in the file")
  if blank:
    logging.warning("%s: %d paragraphs without text left out", path, blank)


def _hash(text: str) -> int:
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


class _Known:
  """A table of integers that needs 16 bytes per entry.

  The newest entries are in a dict, the others in sorted arrays. Two of 21
  million ids share their hash with a probability of 1e-5.
  """

  def __init__(self):
    self._recent: dict[int, int] = {}
    self._keys = self._values = np.zeros(0, np.uint64)

  def add(self, key: int, value: int) -> int | None:
    """Enters a value; returns the one that was entered before, if any."""
    earlier = self._recent.get(key)
    if earlier is None and len(self._keys):
      place = int(np.searchsorted(self._keys, np.uint64(key)))
      if place < len(self._keys) and int(self._keys[place]) == key:
        earlier = int(self._values[place])
    if earlier is None:
      self._recent[key] = value
      if len(self._recent) >= _RECENT:
        self._merge()
    return earlier

  def _merge(self) -> None:
    keys = np.concatenate(
      [self._keys, np.fromiter(self._recent, np.uint64)])
    values = np.concatenate(
      [self._values, np.fromiter(self._recent.values(), np.uint64)])
    order = np.argsort(keys)
    self._keys, self._values = keys[order], values[order]
    self._recent.clear()


def _passages(where: str, values: dict) -> list[types.Passage]:
  """Returns the passages of a row, at least one of them with a text."""
  row = fields.Row(where, values)
  text = row.filled(*fields.TEXTS)
  if text is None or row.filled("question"):
    row = questions.row_of(where, values)
    text = row.filled(*fields.TEXTS)
  if text is None or questions.is_question(row):
    return _of_question(row)
  passage = fields.passage(row, ids=True)
  if not passage.text.strip():
    raise row.error(text, "the text of a passage", row[text])
  return [passage]


def _of_question(row: fields.Row) -> list[types.Passage]:
  """Returns the paragraphs of a question, or says what the row lacks."""
  found = paragraphs.everything(row)
  if any(passage.text.strip() for passage in found):
    if not row.filled("paragraphs", "context"):
      logging.log_first_n(
        logging.WARNING, "%s: questions with their supporting paragraphs only; "
        "where nothing else can be found, searching is easy", 1, row.where,
      )
    return found
  name = row.filled("paragraphs", "context", *paragraphs.SUPPORTING)
  if name:
    raise row.error(name, "a paragraph with a text", row[name])
  if questions.is_question(row) or row.first("question", "prompt"):
    raise files.DataError(
      f"{row.where}: a question without paragraphs is no corpus: name one "
      f"(data.corpus or --corpus); found {row.names()}"
    )
  name = row.spelled(*fields.TEXTS)
  if name:
    raise row.error(name, "text", row[name])
  raise files.DataError(
    f"{row.where}: unknown corpus schema, expected contents, content, text, "
    f"paragraphs or context, found {row.names()}"
  )


def write_corpus(path: epath.Path, passages: Iterable[types.Passage]) -> int:
  """Writes passages as `{"id", "title", "text"}` rows; returns how many.

  Raises:
    files.DataError: the file is to be of another type than .jsonl.
  """
  if not path.name.endswith(".jsonl"):
    raise files.DataError(f"{path}: a corpus is written as .jsonl")
  count = 0
  with files.writing(path) as file:
    for p in passages:
      row = {"id": p.id, "title": p.title, "text": p.text}
      file.write(files.to_jsonl([row]).encode())
      count += 1
  return count


def corpus_from_questions(paths: Sequence[str]) -> list[types.Passage]:
  """Returns all paragraphs of question files, each once."""
  passages: dict[str, types.Passage] = {}
  for path in paths:
    for passage in stream_corpus(path):
      passages.setdefault(passage.id, passage)
  return list(passages.values())


def corpus_hash(passages: Iterable[types.Passage]) -> str:
  """Returns the identity of a corpus: ids, titles, texts and their order."""
  digest = CorpusDigest()
  for passage in passages:
    digest.add(passage)
  return digest.value()


class CorpusDigest:
  """The hash of a corpus while its passages go by."""

  def __init__(self):
    """Starts with no passage."""
    self._digest = hashlib.sha256()

  def add(self, passage: types.Passage) -> None:
    """Takes in the next passage."""
    for part in (passage.id, passage.title, passage.text):
      self._digest.update(part.encode())
      self._digest.update(b"\x00")

  def value(self) -> str:
    """Returns the hash of the passages so far."""
    return self._digest.hexdigest()[:16]
