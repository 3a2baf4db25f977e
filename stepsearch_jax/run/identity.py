"""What a work directory knows of its run: config.json and a lock.

`config.json` holds every field of the run and a hash of its questions. A
command that starts with other values stops and says which differ; fields that
cannot change a result (speed, logging, where a run is placed) are free, and
`--allow_changes` lets named ones through and writes that down.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from stepsearch_jax import buckets, files, types
from stepsearch_jax.parallel import distributed

# Fields, or whole sections, that change how fast a run is, what it logs or
# where it runs, and never what it learns. Questions count by their content,
# so a file may move.
FREE = (
  "checkpoint", "data.eval", "data.eval_limit", "data.split",
  "data.train", "eval", "log",
  "mesh", "model.remat", "retrieval.cache", "retrieval.patience",
  "retrieval.record", "rollout.compile_ahead", "rollout.search_threads",
)


# Likewise, until a run has its first checkpoint: what is wrong with them shows
# behind config.json, and nothing else in the folder was made with them.
FREE_AT_FIRST = ("probe", "warm_start")


class ChangedSettingsError(types.UserError):
  """A work directory was written with other settings."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested settings as {"ppo.policy_lr": value, ...}."""
  found = {}
  for name, value in config.items():
    path = prefix + name
    if isinstance(value, Mapping):
      found |= flat(value, path + ".")
    else:
      found[path] = value
  return found


def _plain(value: Any) -> Any:
  """The value as JSON gives it back (tuples become lists)."""
  return json.loads(json.dumps(value))


def is_free(field: str) -> bool:
  """Whether a field may differ from one start of a run to the next."""
  return _belongs(field, FREE)


def _belongs(field: str, parts: Sequence[str]) -> bool:
  """Whether a field is, or lies in, one of the named fields and sections."""
  return any(field == part or field.startswith(part + ".") for part in parts)


def has_learned(workdir: epath.Path) -> bool:
  """Whether a run has a checkpoint, finished or not."""
  folder = workdir / "checkpoints"
  return folder.exists() and any(folder.iterdir())


def questions_hash(questions: Sequence[types.Question]) -> str:
  """A hash of everything that training reads of its questions."""
  digest = hashlib.sha256()
  for question in questions:
    digest.update(repr((
      question.id, question.text, question.answers, question.search_keys,
      [(p.title, p.text) for p in question.support], question.decomposition,
    )).encode())
  return digest.hexdigest()[:16]


def _today() -> str:
  return datetime.date.today().isoformat()


def started(workdir: epath.Path) -> str:
  """The day on which a run began, as 2026-11-26; today where none has.

  Chat templates may name the day: a run keeps its first one to its end.
  """
  if not (workdir / "config.json").exists():
    return _today()
  return read(workdir).get("started", _today())


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (field, old value, new value) where a result could change."""
  old, new = flat(_plain(old)), flat(_plain(new))
  for field in sorted(set(old) | set(new)):
    if not is_free(field) and old.get(field) != new.get(field):
      yield field, old.get(field), new.get(field)


def read(workdir: epath.PathLike) -> dict[str, Any]:
  """Returns the content of a run's config.json.

  Raises:
    UserError: the folder holds no run, or the file is damaged.
  """
  path = epath.Path(workdir) / "config.json"
  if not path.exists():
    raise types.UserError(f"{path} does not exist: --workdir={workdir} is no "
                          "run of this version")
  return files.read_object(path, {"config": dict})


def claim(
  workdir: epath.Path, config: Mapping[str, Any], questions: str,
  allowed: Sequence[str] = (),
) -> None:
  """Writes config.json of a new run, or compares an old one with it.

  Args:
    workdir: of the run.
    config: all fields of this start, nested.
    questions: `questions_hash` of the training questions.
    allowed: fields that may differ; the change is written down.

  Raises:
    ChangedSettingsError: other fields, or the questions, differ.
  """
  path = workdir / "config.json"
  about = {
    "config": _plain(config), "questions": questions, "jax": jax.__version__,
    "changes": [], "started": started(workdir),
  }
  if path.exists():
    old = read(workdir)
    files.check_fields(str(path), old, {"questions": str, "changes": list})
    changed = list(differences(old["config"], config))
    if not has_learned(workdir):
      changed = [x for x in changed if not _belongs(x[0], FREE_AT_FIRST)]
    if old["questions"] != questions:
      changed.append(("data", old["questions"], questions))
    refused = [row for row in changed if row[0] not in allowed]
    if refused:
      lines = [f"{field}: the run has {was!r}, this start {now!r}"
               for field, was, now in refused]
      names = ",".join(field for field, _, _ in refused)
      raise ChangedSettingsError(
        f"{workdir} holds a run with other settings; use another --workdir, "
        f"or --allow_changes={names} to go on with these:\n  "
        + "\n  ".join(lines)
      )
    about["changes"] = old["changes"] + [
      {"field": field, "from": was, "to": now} for field, was, now in changed
    ]
  elif (workdir / "checkpoints").exists():
    raise types.UserError(
      f"{workdir} has checkpoints but no config.json: it was written by an "
      "earlier version; use another --workdir"
    )
  files.write_text(path, json.dumps(about, indent=2) + "\n")


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
  """Context in which this process alone uses a local work directory.

  The system frees the lock of a process that dies, however it dies. Buckets
  have no such locks, and of several processes only the first takes it.

  Raises:
    UserError: a living process uses the folder.
  """
  if buckets.is_bucket(workdir) or not distributed.is_primary():
    yield
    return
  with open(os.fspath(workdir / "run.lock"), "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      file.seek(0)
      holder = file.read().strip() or "another process"
      raise types.UserError(
        f"--workdir={workdir} is in use by {holder}: wait for it, or choose "
        "another folder"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield
