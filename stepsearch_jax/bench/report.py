"""The JSON file of a benchmark: kept at every repeat, gone on from later."""

from __future__ import annotations

import json

from etils import epath

from stepsearch_jax import files, types


class Report:
  """What was measured so far under one head (suite, input and versions)."""

  def __init__(self, path: str | None, head: dict):
    """Reads the results of a file that is there.

    Args:
      path: the file; None keeps the results nowhere.
      head: names what must be equal for figures to belong together.

    Raises:
      UserError: the file is no report, or one with another head.
    """
    self._path = epath.Path(path) if path else None
    self._head = head
    self._results = {}
    if self._path is not None and self._path.exists():
      self._results = {_key(r): r for r in self._read()}

  def __len__(self) -> int:
    """How many figures there are so far."""
    return len(self._results)

  def _read(self) -> list[dict]:
    try:
      found = json.loads(self._path.read_text())
    except ValueError:
      found = None
    if not isinstance(found, dict) or "results" not in found:
      raise types.UserError(f"{self._path} is no report of a benchmark")
    for name, wanted in self._head.items():
      if found.get(name) != wanted:
        raise types.UserError(
          f"{self._path} holds figures of {name} {found.get(name)}, these "
          f"would be of {wanted}; give --json another file"
        )
    return found["results"]

  def measure(self, item, repeats: int) -> dict:
    """Takes the repeats of a duel or reading that the file lacks.

    Args:
      item: see `duel`.
      repeats: how many are wanted, those in the file among them.

    Returns:
      Its result; the file has it after every repeat.
    """
    key = item.what, item.work, getattr(item, "peer", None)
    for result in item.measure(repeats, self._results.get(key)):
      self._results[key] = result
      self._write()
    return self._results[key]

  def _write(self) -> None:
    if self._path is None:
      return
    report = self._head | {"results": list(self._results.values())}
    files.write_text(self._path, json.dumps(report, indent=2) + "\n")


def _key(result: dict) -> tuple:
  return result["what"], result["work"], result.get("peer_name")
