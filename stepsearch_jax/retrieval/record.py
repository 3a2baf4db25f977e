"""Searches of a run on file, and runs that are played from the file.

One JSON object a line: first what was searched, then each distinct (query, k)
with its documents and scores. A replay needs neither index nor encoder and
returns what the recorded run saw.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence

from etils import epath

from stepsearch_jax import types
from stepsearch_jax.data import files


class RecordingRetriever:
  """Passes searches on and writes each distinct one down."""

  def __init__(self, inner, path: epath.PathLike):
    """Opens (or continues) a record.

    Args:
      inner: the retriever that answers.
      path: JSONL file; one of another index is an error.

    Raises:
      ValueError: the file is a record of another retrieval.
    """
    self._inner = inner
    self._lock = threading.Lock()
    self._known: set[tuple[str, int]] = set()
    path = epath.Path(path)
    if path.exists():
      about, found = _read(path)
      if about != inner.describe():
        raise ValueError(
          f"{path} records {about}, this run searches {inner.describe()}: "
          "choose another retrieval.record"
        )
      self._known = set(found)
    else:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps({"searched": inner.describe()}) + "\n")
    self._file = path.open("a")

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """See `search_env.Retriever`; failed searches are not recorded."""
    found = self._inner.search(queries, k)
    with self._lock:
      for query, documents in zip(queries, found, strict=True):
        if (query, k) in self._known:
          continue
        self._known.add((query, k))
        row = {"query": query, "k": k,
               "documents": [dataclasses.asdict(d) for d in documents]}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
      self._file.flush()
    return found

  def describe(self) -> dict:
    """What evaluation cards say about the retrieval."""
    return self._inner.describe()


class ReplayRetriever:
  """Answers from a record."""

  def __init__(self, path: epath.PathLike, inner=None):
    """Reads the record.

    Args:
      path: from `RecordingRetriever`.
      inner: asked for what is not on record; None makes that an error.

    Raises:
      files.DataError: the file is missing or no record.
    """
    self._path = path
    self._inner = inner
    self._about, self._found = _read(epath.Path(path))

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """The recorded passages of each query.

    Raises:
      ValueError: a query is not on record and nobody else may be asked.
    """
    missing = [q for q in dict.fromkeys(queries) if (q, k) not in self._found]
    if missing and self._inner is None:
      raise ValueError(
        f"{self._path}: {len(missing)} queries are not on record with k = {k}, "
        f"the first is {missing[0]!r} (retrieval.replay_miss = \"search\" asks "
        "the index)"
      )
    fresh = {}
    if missing:
      answers = self._inner.search(missing, k)
      fresh = dict(zip(missing, answers, strict=True))
    return [
      list(fresh[q] if q in fresh else self._found[q, k]) for q in queries
    ]

  def describe(self) -> dict:
    """What evaluation cards say about the retrieval."""
    return {**self._about, "replayed": str(self._path)}


def _read(
  path: epath.Path,
) -> tuple[dict, dict[tuple[str, int], list[types.Passage]]]:
  rows = files.read_rows(path)
  where, first = next(rows, (str(path), {}))
  if "searched" not in first:
    raise files.DataError(
      f"{where}: no record of searches, the first line must hold searched"
    )
  found = {
    (row["query"], row["k"]): [types.Passage(**d) for d in row["documents"]]
    for _, row in rows
  }
  return first["searched"], found
