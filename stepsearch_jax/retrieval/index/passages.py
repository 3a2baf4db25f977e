"""Passages on disk: a JSONL file, and where each line begins.

Twenty million passages do not belong in memory: rows are read when a search
finds them.
"""

from __future__ import annotations

import array
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.retrieval.index import corpus, vectors

TEXTS = "passages.jsonl"
_OFFSETS = "offsets.npy"


def write_passages(
  folder: epath.Path, passages: Iterable[types.Passage]
) -> tuple[int, str]:
  """Writes a passage store.

  Args:
    folder: exists.
    passages: consumed once.

  Returns:
    (number of passages, corpus hash as in `corpus.corpus_hash`).
  """
  digest, offsets, at = corpus.CorpusDigest(), array.array("q"), 0
  with (folder / TEXTS).open("wb") as file:
    for p in passages:
      row = {"id": p.id, "title": p.title, "text": p.text}
      line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
      file.write(line)
      offsets.append(at)
      at += len(line)
      digest.add(p)
  with (folder / _OFFSETS).open("wb") as file:
    np.save(file, np.array([*offsets, at], np.int64), allow_pickle=False)
  return len(offsets), digest.value()


class PassageStore(Sequence):
  """The passages of an index folder, read on demand."""

  def __init__(self, folder: epath.Path):
    """Opens what `write_passages` wrote.

    Raises:
      DataError: one of its files is damaged or cut, or they do not belong
        together.
    """
    self._path = folder / TEXTS
    self._offsets = vectors.read_npy(folder / _OFFSETS)
    size = os.path.getsize(self._path)
    if self._offsets.ndim != 1 or not self._offsets.size or (
      self._offsets[-1] != size
    ):
      raise files.DataError(
        f"{self._path}: {size} bytes, but {_OFFSETS} ends at "
        f"{self._offsets.ravel()[-1:]}; one of them was cut or altered, build "
        "the index again"
      )
    if size:
      with open(self._path, "rb") as file:
        self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def __len__(self) -> int:
    """Returns the number of passages."""
    return len(self._offsets) - 1

  def __getitem__(self, i: Any) -> Any:
    """Returns the passage in row `i`, or a list of those in a slice."""
    if isinstance(i, slice):
      return [self[row] for row in range(*i.indices(len(self)))]
    start, stop = self._offsets[i], self._offsets[i + 1]
    try:
      row = json.loads(self._bytes[start:stop])
      return types.Passage(row["id"], row["title"], row["text"])
    except (ValueError, KeyError, TypeError) as error:
      raise files.DataError(
        f"{self._path}:{i + 1}: no passage, the file was altered; build the "
        f"index again ({types.first_line(error)})"
      ) from error

  def __iter__(self) -> Iterator[types.Passage]:
    """Iterates over all passages in order."""
    return (self[i] for i in range(len(self)))
