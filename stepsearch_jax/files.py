"""Rows read from data files, and files written whole.

Reads JSONL, JSON lists and parquet, gzipped or not, and TFDS datasets. Every
problem is reported as `file:line: what was expected, what was given`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, BinaryIO

import numpy as np
from etils import epath

from stepsearch_jax import buckets, types

_BUFFER = 1 << 20  # Bytes read from a bucket at a time.
_UPLOAD_SECONDS = 5.0
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = b"\xef\xbb\xbf"  # Some editors begin UTF-8 with it.


class DataError(types.UserError):
  """A data file is missing or malformed; the message names file and line."""


def encodable(value: Any) -> Any:
  """Returns a JSON value whose strings hold no half of a surrogate pair.

  JSON can spell such a half as an escape, but no encoder or file takes it.
  """
  if isinstance(value, str):
    return _SURROGATE.sub("\ufffd", value)
  if isinstance(value, list):
    return [encodable(item) for item in value]
  if isinstance(value, dict):
    return {encodable(k): encodable(v) for k, v in value.items()}
  return value


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file whole or not at all; makes its folder."""
  with writing(path) as file:
    file.write(text.encode())


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[BinaryIO]:
  """Opens a file for writing that appears whole, or not at all on an error.

  Makes the file's folder. An earlier file stands until the new one is complete.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  try:
    with temporary.open("wb") as file:
      yield file
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  temporary.replace(path)


def to_jsonl(rows: Iterable[dict]) -> str:
  """Returns rows as JSONL text, one JSON object per line."""
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class RowLog:
  """A JSONL file that grows row by row and goes on after a kill.

  Half a line that a kill left at the end is cut off when the file is opened
  again, and what comes next begins on a line of its own. Rows reach the file at
  once. Buckets cannot append: there the file is written anew, at most every few
  seconds, by `flush` and by `close`.
  """

  def __init__(self, path: epath.PathLike):
    """Opens the log at `path`, which need not exist."""
    self.path = epath.Path(path)
    self._lock = threading.Lock()
    self._file: IO[str] | None = None
    self._lines: list[str] | None = None  # Of a log in a bucket.
    self._uploaded = 0.0
    data = self.path.read_bytes() if self.path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    # A last line without its end may still be a whole row.
    with contextlib.suppress(ValueError, RecursionError):
      if isinstance(json.loads(data[len(whole) :]), dict):
        whole = data + b"\n"
    if whole != data:
      with writing(self.path) as file:
        file.write(whole)
    if buckets.is_bucket(self.path):
      self._lines = whole.decode().splitlines(keepends=True)

  def rows(self) -> list[dict]:
    """Returns all rows so far.

    Raises:
      DataError: a row is malformed, which no kill can cause.
    """
    self.flush()
    if not self.path.exists():
      return []
    with self.path.open("rb") as file:
      found = list(_json(self.path, file, one=False))
    rows = []
    for _, row in found:
      if isinstance(row, DataError):
        raise row
      rows.append(row)
    return rows

  def append(self, row: dict) -> None:
    """Adds a row; safe to call from several threads."""
    line = to_jsonl([row])
    with self._lock:
      if self._lines is not None:
        self._lines.append(line)
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
          self._upload()
        return
      if self._file is None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a")
      self._file.write(line)
      self._file.flush()

  def keep(self, wanted: Callable[[dict], bool]) -> None:
    """Drops the rows that are not wanted."""
    kept = [row for row in self.rows() if wanted(row)]
    self.close()
    write_text(self.path, to_jsonl(kept))
    if self._lines is not None:
      self._lines = [to_jsonl([row]) for row in kept]

  def flush(self) -> None:
    """Returns once all rows are in the file, a bucket's included."""
    with self._lock:
      if self._lines:
        self._upload()

  def close(self) -> None:
    """Writes what is outstanding; appending opens the file again."""
    self.flush()
    if self._file is not None:
      self._file.close()
      self._file = None

  def _upload(self) -> None:
    write_text(self.path, "".join(self._lines))
    self._uploaded = time.monotonic()


def read_object(
  path: epath.PathLike, fields: Mapping[str, type]
) -> dict[str, Any]:
  """Returns the JSON object that a file holds.

  Args:
    path: of the file, which exists.
    fields: the type of each that it must have; float takes integers as well.

  Raises:
    DataError: the file is damaged, holds something else or lacks a field.
  """
  data = epath.Path(path).read_bytes().removeprefix(_MARK)
  row = _parse(str(path), data, lines=True)
  check_fields(str(path), row, fields)
  return row


def check_fields(where: str, row: Any, fields: Mapping[str, type]) -> None:
  """Raises DataError, which begins with `where`, as `read_object` does."""
  if not isinstance(row, dict):
    raise _no_object(where, row)
  for name, kind in fields.items():
    wanted = (int, float) if kind is float else kind
    if name not in row or not isinstance(row[name], wanted):
      given = f"{row[name]!r:.60}" if name in row else "no such field"
      raise DataError(
        f"{where}: field {name}: expected {kind.__name__}, got {given}"
      )


def read_rows(path: epath.PathLike) -> Iterator[tuple[str, dict]]:
  """Yields ("file:line", row) of a data file.

  Args:
    path: the file, or `tfds:<folder of the prepared dataset>:<split>` for a
      dataset that `tools/prepare_data` built or one whose features are the
      fields of a row (stored as array_record, which needs no TensorFlow).

  Raises:
    DataError: the file is missing, of an unknown type or damaged, or a row is
      no JSON object.
  """
  for where, row in try_rows(path):
    if isinstance(row, DataError):
      raise row
    yield where, row


def try_rows(path: epath.PathLike) -> Iterator[tuple[str, dict | DataError]]:
  """Yields rows like `read_rows`, and the error in place of a bad row.

  Raises:
    DataError: nothing (more) of the file can be read.
  """
  if str(path).startswith("tfds:"):
    yield from _tfds(str(path))
    return
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise DataError(f"{path}: no such file")
  name = path.name.removesuffix(".gz")
  if not name.endswith((".parquet", ".jsonl", ".json")):
    raise DataError(
      f"{path}: unknown file type, expected .jsonl, .json, .parquet (or .gz)"
    )
  try:
    with path.open("rb") as raw:
      if buckets.is_bucket(path):  # Which finds the ends of lines byte by byte.
        raw = io.BufferedReader(raw, _BUFFER)
      file: Any = gzip.open(raw) if path.name.endswith(".gz") else raw
      if name.endswith(".parquet"):
        yield from _parquet(path, io.BytesIO(file.read()) if file is not raw
                            else raw)
      else:
        yield from _json(path, file, one=name.endswith(".json"))
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise DataError(
      f"{path}: damaged or cut gzip file ({error}); fetch it again"
    ) from error


def _tfds(reference: str) -> Iterator[tuple[str, dict | DataError]]:
  import tensorflow_datasets as tfds

  folder, _, split = reference.removeprefix("tfds:").rpartition(":")
  if not (epath.Path(folder) / "dataset_info.json").exists():
    raise DataError(
      f"{reference}: no prepared dataset in {folder!r}, expected "
      "tfds:<folder with dataset_info.json>:<split>"
    )
  builder = tfds.builder_from_directory(folder)
  if split not in builder.info.splits:
    raise DataError(
      f"{reference}: no split {split!r}, there are "
      f"{sorted(builder.info.splits)}"
    )
  for number, example in enumerate(builder.as_data_source(split), 1):
    where, row = f"{reference}:{number}", _plain(example)
    if isinstance(row.get("record"), str):
      yield where, _row(where, row["record"])
    else:
      yield where, row


def _plain(value, errors: str = "replace"):
  """Returns what TFDS or Parquet hold as the JSON that it stands for."""
  if isinstance(value, dict):
    return {key: _plain(item, errors) for key, item in value.items()}
  if isinstance(value, bytes):
    try:
      return value.decode(errors=errors)
    except UnicodeDecodeError:
      return value  # An image, for instance, which nobody reads.
  if isinstance(value, np.ndarray):
    value = value.tolist()
  if isinstance(value, (list, tuple)):
    return [_plain(item, errors) for item in value]
  return value.item() if isinstance(value, np.generic) else value


def _parquet(path: epath.Path, file: BinaryIO) -> Iterator[tuple[str, dict]]:
  import pyarrow
  from pyarrow import parquet

  number = 0
  try:
    for batch in parquet.ParquetFile(file).iter_batches():
      names = batch.schema.names
      columns = [
        _column(f"{path}: column {name} behind row {number}", column)
        for name, column in zip(names, batch.columns, strict=True)
      ]
      for values in zip(*columns, strict=True):
        number += 1
        yield f"{path}:{number}", dict(zip(names, values, strict=True))
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(
      f"{path}: not a parquet file, or damaged behind row {number}: "
      f"{types.first_line(error)}"
    ) from error


def _column(where: str, column) -> list:
  """Returns the values of an Arrow array, its times as text or numbers."""
  import pyarrow
  wanted = _timeless(column.type)
  try:
    if wanted != column.type:  # Python's own times have narrower limits.
      column = column.cast(wanted)
    values = column.to_pylist()
  except (pyarrow.ArrowException, ValueError, OverflowError) as error:
    raise DataError(f"{where}: {types.first_line(error)}") from error
  # Bytes are text that its writer did not mark as such.
  return _plain(values, "strict") if "binary" in str(wanted) else values


def _timeless(kind):
  """Returns an Arrow type with text or numbers in place of times."""
  import pyarrow
  if pyarrow.types.is_temporal(kind):
    # Text of a zone's time needs a machine that knows the zone.
    zoned = getattr(kind, "tz", None)
    return pyarrow.int64() if zoned else pyarrow.string()
  if pyarrow.types.is_struct(kind):
    return pyarrow.struct([f.with_type(_timeless(f.type)) for f in kind])
  if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
    return pyarrow.list_(kind.value_field.with_type(_timeless(kind.value_type)))
  return kind


def _json(
  path: epath.Path, file: BinaryIO, one: bool
) -> Iterator[tuple[str, dict | DataError]]:
  """Yields the rows of JSONL, or of a file named as `one` JSON value."""
  first = True
  for number, line in enumerate(file, 1):
    line = line.removeprefix(_MARK) if number == 1 else line
    if not line.strip():
      continue
    where = f"{path}:{number}"
    listed = line.lstrip().startswith(b"[")
    if first and (one and listed or (one or listed) and _broken(line)):
      # One value over all lines; blank ones keep their numbers.
      yield from _value(path, b"\n" * (number - 1) + line + file.read())
      return
    first = False
    yield where, _row(where, line)


def _broken(line: bytes) -> bool:
  """Returns whether a line is no JSON value by itself."""
  try:
    json.loads(line)
  except (ValueError, RecursionError):
    return True
  return False


def _value(path, data: bytes) -> Iterator[tuple[str, dict | DataError]]:
  value = _parse(str(path), data, lines=True)
  rows = value if isinstance(value, list) else [value]
  for number, row in enumerate(rows, 1):
    where = f"{path}:{number}"
    yield where, row if isinstance(row, dict) else _no_object(where, row)


def _row(where: str, line: str | bytes) -> dict | DataError:
  try:
    row = _parse(where, line)
  except DataError as error:
    return error
  return row if isinstance(row, dict) else _no_object(where, row)


def _no_object(where: str, row) -> DataError:
  return DataError(f"{where}: expected a JSON object, got {type(row).__name__}")


def _parse(where: str, text: str | bytes, lines: bool = False):
  """Parses JSON; `lines` adds the line of an error to `where`."""
  try:
    text = text if isinstance(text, str) else text.decode()
    row = json.loads(text)
    # Most texts have no such escape, and their walk is saved.
    return encodable(row) if "\\ud" in text or "\\uD" in text else row
  except json.JSONDecodeError as error:
    place = f"{where}:{error.lineno}" if lines else where
    raise DataError(
      f"{place}: malformed JSON ({error.msg} at column {error.colno})"
    ) from error
  except UnicodeDecodeError as error:
    raise DataError(
      f"{where}: cannot be read as text, expected UTF-8: {error}"
    ) from error
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: malformed JSON ({str(error)[:80]})") from error
