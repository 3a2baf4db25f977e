"""Rows of local question and corpus files, and text written whole.

JSONL, JSON lists and parquet, gzipped or not, and TFDS datasets. Every problem
is reported as `file:line: what was expected, what was found`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from stepsearch_jax import types

_SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(types.UserError):
  """A data file is missing or malformed; the message names file and line."""


def encodable(value):
  """A JSON value whose strings hold no half of a surrogate pair.

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
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text)
  temporary.replace(path)


def read_rows(path: epath.PathLike) -> Iterator[tuple[str, dict]]:
  """Yields ("file:line", row) of a data file.

  Args:
    path: the file, or `tfds:<folder of the prepared dataset>:<split>` for a
      dataset that `tools/prepare_data` built or one whose features are the
      fields of a row (stored as array_record, which needs no TensorFlow).

  Raises:
    DataError: the file is missing, of an unknown type, or a row is no object.
  """
  if str(path).startswith("tfds:"):
    yield from _tfds(str(path))
    return
  path = epath.Path(path)
  if not path.exists() or path.is_dir():
    raise DataError(f"{path}: no such file")
  name = path.name.removesuffix(".gz")
  if name.endswith(".parquet"):
    yield from _parquet(path)
  elif name.endswith((".jsonl", ".json")):
    yield from _json(path, name)
  else:
    raise DataError(
      f"{path}: unknown file type, expected .jsonl, .json, .parquet (or .gz)"
    )


def _tfds(reference: str) -> Iterator[tuple[str, dict]]:
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
    where = f"{reference}:{number}"
    if "record" in example:
      yield where, _parse(where, example["record"].decode())
    else:
      yield where, _plain(example)


def _plain(value):
  """A TFDS example as the JSON value that it stands for."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  if isinstance(value, np.ndarray):
    return [_plain(item) for item in value.tolist()]
  return value.item() if isinstance(value, np.generic) else value


def _parquet(path: epath.Path) -> Iterator[tuple[str, dict]]:
  import pyarrow
  from pyarrow import parquet

  try:
    file = parquet.ParquetFile(path.open("rb"))
  except pyarrow.ArrowInvalid as error:
    raise DataError(f"{path}: not a parquet file: {error}") from error
  number = 0
  for batch in file.iter_batches():
    for row in batch.to_pylist():
      number += 1
      yield f"{path}:{number}", row


def _json(path: epath.Path, name: str) -> Iterator[tuple[str, dict]]:
  raw = path.open("rb")
  binary = gzip.open(raw) if path.name.endswith(".gz") else raw
  with raw, io.TextIOWrapper(binary, encoding="utf-8") as file:
    if name.endswith(".json"):
      head = file.read(1)
      if head == "[":
        try:
          rows = json.loads(head + file.read())
        except json.JSONDecodeError as error:
          raise DataError(
            f"{path}:{error.lineno}: malformed JSON ({error.msg})"
          ) from error
        for number, row in enumerate(rows, 1):
          yield _object(f"{path}:{number}", encodable(row))
        return
      file = io.StringIO(head + file.read())
    try:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield _object(f"{path}:{number}", _parse(f"{path}:{number}", line))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
      raise DataError(f"{path}: cannot be read as text: {error}") from error


def _parse(where: str, line: str):
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise DataError(
      f"{where}: malformed JSON ({error.msg} at column {error.colno})"
    ) from error
  # Most lines have no such escape, and their walk is saved.
  return encodable(row) if "\\ud" in line or "\\uD" in line else row


def _object(where: str, row) -> tuple[str, dict]:
  if not isinstance(row, dict):
    raise DataError(f"{where}: expected a JSON object, got "
                    f"{type(row).__name__}")
  return where, row
