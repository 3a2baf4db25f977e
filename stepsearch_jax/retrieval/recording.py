"""Searches of a run on file, and runs that are played from the file.

One JSON object a line: first what was searched, then each distinct (query, k)
with its documents and scores, or why it failed. A replay needs neither index
nor encoder and returns what the recorded run saw: a query on record is never
searched again, not even by the run that records, so engines whose answers
change cannot make the two differ.

A query that failed n times before it was found, if it ever was, fails the first
n times that a replay is asked for it: it has no documents (None), where the
recorded search may have raised an error for all of its queries. Behind them it
is found, or a miss like one that is not on record. A replay that is started
again counts from 0 again, also if the record was continued.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from stepsearch_jax import files, types

_DOCUMENT = {"id": str, "title": str, "text": str, "score": float}


class RecordingRetriever:
  """Passes searches on and writes each distinct one down."""

  def __init__(self, inner: types.Retriever, path: epath.PathLike):
    """Opens (or continues) a record.

    Args:
      inner: the retriever that answers.
      path: JSONL file; one of another index is an error.

    Raises:
      UserError: the file is a record of another retrieval.
    """
    self._inner = inner
    self._about = inner.describe()
    self._lock = threading.Lock()
    self._found: dict[tuple[str, int], list[types.Passage]] = {}
    self._log = files.RowLog(path)
    rows = self._log.rows()
    if rows:
      about, self._found, _ = _parse(
        path, [(f"{path}:{i}", row) for i, row in enumerate(rows, 1)]
      )
      if about != self._about:
        raise types.UserError(
          f"{path} records {about}, this run searches {self._about}: choose "
          "another retrieval.record"
        )
    else:
      self._log.append({"searched": self._about})

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """See `types.Retriever`; what is on record is not searched."""
    with self._lock:
      missing = [
        q for q in dict.fromkeys(queries) if (q, k) not in self._found
      ]
    reason = "this query alone"
    try:
      fresh = self._inner.search(missing, k) if missing else []
    except types.SearchError as error:
      fresh, reason = [None] * len(missing), str(error)
      logging.warning("%d searches failed: %s", len(missing), error)
    with self._lock:
      for query, documents in zip(missing, fresh, strict=True):
        # Another thread may have been first; both return the same.
        if (query, k) in self._found:
          continue
        if documents is None:
          self._log.append({"query": query, "k": k, "failed": reason})
          continue
        self._found[query, k] = list(documents)
        self._log.append({
          "query": query, "k": k,
          "documents": [dataclasses.asdict(d) for d in documents],
        })
      return [self._found.get((query, k)) for query in queries]

  def describe(self) -> dict:
    """What evaluation cards say about the retrieval."""
    return self._about

  def close(self) -> None:
    """Writes what is outstanding, which in a bucket can be much."""
    self._log.close()
    types.close_retriever(self._inner)


class ReplayRetriever:
  """Answers from a record."""

  def __init__(
    self, path: epath.PathLike, inner: types.Retriever | None = None
  ):
    """Reads the record.

    Args:
      path: from `RecordingRetriever`.
      inner: asked for what is not on record; None makes that an error.

    Raises:
      files.DataError: the file is missing or no record.
    """
    self._path = path
    self._inner = inner
    self._about, self._found, self._failures = _parse(
      path, list(files.read_rows(path))
    )
    self._lock = threading.Lock()

  def search(
    self, queries: Sequence[str], k: int
  ) -> list[list[types.Passage]]:
    """The recorded passages of each query, None where its search failed.

    Raises:
      UserError: a query is not on record and nobody else may be asked.
    """
    with self._lock:
      failed = {q for q in queries if self._failures[q, k]}
      for query in failed:
        self._failures[query, k] -= 1
    missing = [
      q for q in dict.fromkeys(queries)
      if (q, k) not in self._found and q not in failed
    ]
    if missing and self._inner is None:
      raise types.UserError(
        f"{self._path}: {len(missing)} queries are not on record with k = {k}, "
        f"the first is {missing[0]!r} (retrieval.replay_miss = \"search\" asks "
        "the index)"
      )
    fresh = dict.fromkeys(failed)
    if missing:
      answers = self._inner.search(missing, k)
      fresh |= zip(missing, answers, strict=True)
    return [fresh[q] if q in fresh else self._found[q, k] for q in queries]

  def describe(self) -> dict:
    """What evaluation cards say about the retrieval."""
    about = {**self._about, "replayed": str(self._path)}
    if self._inner is not None:
      about["misses_searched"] = self._inner.describe()
    return about

  def close(self) -> None:
    """Closes the retriever that is asked for what is not on record."""
    types.close_retriever(self._inner)


def _parse(
  path: epath.PathLike, rows: Sequence[tuple[str, dict]]
) -> tuple[
  dict, dict[tuple[str, int], list[types.Passage]], collections.Counter
]:
  """(what was searched, documents of each search, failures before them)."""
  about = rows[0][1].get("searched") if rows else None
  if not isinstance(about, dict):
    raise files.DataError(
      f"{path}:1: no record of searches, the first line must hold searched"
    )
  found, failures = {}, collections.Counter()
  for where, row in rows[1:]:
    files.check_fields(where, row, {"query": str, "k": int})
    key = row["query"], row["k"]
    if "failed" in row:
      failures[key] += 1
      continue
    files.check_fields(where, row, {"documents": list})
    found[key] = [_passage(f"{where}: document", d) for d in row["documents"]]
  return about, found, failures


def _passage(where: str, row: Any) -> types.Passage:
  """Returns a recorded document."""
  files.check_fields(where, row, _DOCUMENT)
  return types.Passage(**{name: row[name] for name in _DOCUMENT})
