"""Folders in buckets (gs://...) for libraries that read local files only.

Single files are read and written in place through epath. What is memory-mapped
or opened by other libraries (indexes, tokenizers, weights) is copied to
~/.cache/stepsearch_jax/buckets first, and only what has changed since.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator

from absl import logging
from etils import epath

_CACHE = "~/.cache/stepsearch_jax/buckets"
_CHUNK = 64 << 20  # Bytes copied at a time.
_LISTING = ".listing.json"


def is_bucket(path: epath.PathLike) -> bool:
  """Whether a path lies in a bucket, where nothing can be memory-mapped."""
  return "://" in os.fspath(path)


def scratch(path: epath.PathLike) -> epath.Path:
  """Returns the local folder that stands for one in a bucket.

  A local folder stands for itself. The parent exists, the folder may not.
  """
  if not is_bucket(path):
    return epath.Path(path)
  name = os.fspath(path).rstrip("/")
  digest = hashlib.sha256(name.encode()).hexdigest()[:16]
  parent = epath.Path(_CACHE).expanduser() / digest
  parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  return parent / name.rpartition("/")[2]


def new_scratch(folder: epath.PathLike) -> epath.Path:
  """Returns `scratch`, without what is left there of a folder that is gone."""
  local = scratch(folder)
  if is_bucket(folder) and local.exists() and not epath.Path(folder).exists():
    local.rmtree()
  return local


def local_copy(folder: epath.PathLike) -> epath.Path:
  """Returns a local folder with the files of one in a bucket.

  Files that an earlier call copied and that have not changed stay. A local
  folder is returned as it is.
  """
  if not is_bucket(folder):
    return epath.Path(folder)
  folder, local = epath.Path(folder), scratch(folder)
  with _locked(local):
    note = local / _LISTING
    known = json.loads(note.read_text()) if note.exists() else {}
    found = dict(_listing(folder))
    for name in known.keys() - found.keys():
      (local / name).unlink(missing_ok=True)
    for name, about in found.items():
      if known.get(name) == about and (local / name).exists():
        continue
      logging.info("copying %s/%s", folder, name)
      _copy(folder / name, local / name)
    note.write_text(json.dumps(found))
  return local


def publish(local: epath.PathLike, folder: epath.PathLike, last: str) -> None:
  """Moves a finished local folder to where it belongs.

  Args:
    local: the folder; gone afterwards if `folder` is local too.
    folder: must not exist, or only in parts. A bucket has no whole folders, so
    last: the file that says that the folder is complete comes last.
  """
  local, folder = epath.Path(local), epath.Path(folder)
  if not is_bucket(folder):
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
      partial.rmtree()
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(os.fspath(local), os.fspath(partial))
    partial.rename(folder)
    return
  names = sorted(
    (name for name, _ in _listing(local)), key=lambda name: name == last
  )
  for name in names:
    if name != _LISTING:
      _copy(local / name, folder / name)
  if local == scratch(folder):  # So `local_copy` has nothing to fetch.
    (local / _LISTING).write_text(json.dumps(dict(_listing(folder))))


def _listing(folder: epath.Path, prefix: str = "") -> Iterator:
  """Yields (relative name, [length, time of change]) of all files below."""
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _listing(path, f"{prefix}{path.name}/")
    else:
      stat = path.stat()
      yield f"{prefix}{path.name}", [stat.length, str(stat.mtime)]


def _copy(source: epath.Path, target: epath.Path) -> None:
  """Copies a file; a local target appears whole or not at all."""
  local = not is_bucket(target)
  if local:
    target.parent.mkdir(parents=True, exist_ok=True)
  written = target.with_name(target.name + ".tmp") if local else target
  with source.open("rb") as reading, written.open("wb") as writing:
    while chunk := reading.read(_CHUNK):
      writing.write(chunk)
  if local:
    written.replace(target)


@contextlib.contextmanager
def _locked(local: epath.Path):
  """Lets the processes of one machine copy one after the other."""
  local.mkdir(parents=True, exist_ok=True)
  with open(os.fspath(local.parent / "lock"), "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
