"""Passage vectors that exist already: .npy, bare .memmap, FAISS flat index."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
import threading
from collections.abc import Iterator

import numpy as np

from stepsearch_jax import files, types

_NORM_TOLERANCE = 0.01  # Ten times what float16 rows can differ by.
_SAMPLE = 4096
_FLAT = {b"IxFI": "inner product", b"IxF2": "L2"}


@dataclasses.dataclass(frozen=True)
class ReadyVectors:
  """Embeddings that were made elsewhere.

  Attributes:
    path: where they come from, for messages.
    rows: [n, d].
    normalize: make unit vectors of rows of other norms. Searches rank by the
      inner product of unit vectors, so that changes which rows are found.
  """

  path: str
  rows: np.ndarray
  normalize: bool

  def unit(self, which: np.ndarray) -> np.ndarray:
    """Returns unit vectors of some rows, by ascending numbers.

    Raises:
      UserError: a row is not finite, or not of norm 1 and must not be changed.
    """
    rows = np.asarray(self.rows[which], np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
      row = which[np.argmin(np.isfinite(norms[:, 0]))]
      raise types.UserError(f"{self.path}: row {row} holds NaN or infinity")
    other = np.abs(norms[:, 0] - 1) > _NORM_TOLERANCE
    if other.any() and not self.normalize:
      raise types.UserError(
        f"{self.path}: expected unit vectors, row {which[other.argmax()]} has "
        f"norm {norms[other.argmax(), 0]:.4g} ({other.sum()} of {len(which)} "
        "rows looked at differ from 1); --normalize divides by the norms, "
        "which then no longer count in the search"
      )
    return rows / np.maximum(norms, 1e-12)

  def check_sample(self) -> None:
    """Looks at rows from all over the table, before hours of work."""
    count = len(self.rows)
    self.unit(np.unique(np.linspace(0, count - 1, _SAMPLE).astype(np.int64)))
    release(self.rows)


def read_npy(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
  """Returns the array of an .npy file.

  Args:
    path: on this machine.
    mapped: whether it is mapped into memory, read-only, instead of loaded.

  Raises:
    DataError: the file cannot be read, or is damaged or cut.
  """
  try:
    return np.load(os.fspath(path), "r" if mapped else None, allow_pickle=False)
  except Exception as error:  # A damaged header can raise whatever it likes.
    raise files.DataError(
      f"{path}: cannot be read as an .npy file: {types.first_line(error)}"
    ) from error


def open_vectors(path: str, dim: int | None = None) -> np.ndarray:
  """Memory-maps vectors.

  Args:
    path: .npy of float32 or float16 [n, d], a .memmap of nothing but float32
      values (as FlashRAG and Search-R1 save embeddings), or a file of FAISS's
      IndexFlat (IndexFlatIP or IndexFlatL2 as written by faiss.write_index).
    dim: d of a .memmap, which does not say it itself.

  Returns:
    [n, d], read-only, nothing loaded yet.

  Raises:
    UserError: no such file, or it holds something else.
  """
  try:
    with open(path, "rb") as file:
      head = file.read(64)
  except OSError as error:
    raise types.UserError(
      f"{path}: cannot be read: {error.strerror}"
    ) from error
  if head[:6] == b"\x93NUMPY":
    table = read_npy(path, mapped=True)
    if table.ndim != 2 or not table.size or table.dtype not in (
      np.float32, np.float16
    ):
      raise types.UserError(
        f"{path}: expected float32 or float16 [n, d], at least one row, got "
        f"{table.dtype} {list(table.shape)}"
      )
    return table
  if path.endswith(".memmap") and dim is not None:
    size = os.path.getsize(path)
    if not size or size % (4 * dim):
      raise types.UserError(
        f"{path}: {size} bytes are no float32 rows of {dim}"
      )
    return np.memmap(path, np.float32, "r", shape=(size // (4 * dim), dim))
  if head[:4] in _FLAT:
    return _faiss_flat(path, head)
  raise types.UserError(
    f"{path}: expected a .npy file, a .memmap or a FAISS flat index "
    f"(IndexFlatIP, IndexFlatL2), it begins with {head[:4]!r}"
  )


def release(table: np.ndarray) -> None:
  """Lets go of the pages of a memory-mapped array; using it reads them again.

  Without this a build over a file counts as much memory as the file is large.
  """
  mapped = getattr(table, "_mmap", None)
  if mapped is not None:
    mapped.madvise(mmap.MADV_DONTNEED)


@contextlib.contextmanager
def releasing(table: np.ndarray, every: float = 0.1) -> Iterator[None]:
  """Lets go of the pages of `table` again and again, while others read it.

  ScaNN copies its input early in a long build; the mapped original would stay
  in memory to the end.
  """
  done = threading.Event()

  def loop():
    while not done.wait(every):
      release(table)

  thread = threading.Thread(target=loop, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
    release(table)


def _faiss_flat(path: str, head: bytes) -> np.ndarray:
  # fourcc, d, ntotal, two unused words, is_trained, metric, then the length of
  # the codes in 4-byte units and the codes themselves.
  fields = struct.Struct("<iqqqbi")
  at = 4 + fields.size
  if len(head) < at + 8:
    raise types.UserError(f"{path}: the header of a FAISS index ends early")
  dim, count, _, _, _, metric = fields.unpack_from(head, 4)
  if metric not in (0, 1):
    raise types.UserError(
      f"{path}: FAISS metric {metric} is not supported, only "
      "inner product and L2"
    )
  (floats,) = struct.unpack_from("<Q", head, at)
  if dim < 1 or count < 1 or floats != dim * count:
    raise types.UserError(
      f"{path}: the header promises {count} x {dim} floats, the file says "
      f"{floats}"
    )
  size = os.path.getsize(path)
  if size < at + 8 + 4 * floats:
    raise types.UserError(
      f"{path}: {size} bytes cannot hold {count} x {dim} "
      "floats; is it only a part of the index?"
    )
  return np.memmap(path, np.float32, "r", offset=at + 8, shape=(count, dim))
