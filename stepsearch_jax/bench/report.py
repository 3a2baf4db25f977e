"""The JSON file of a benchmark: kept at every repeat, gone on from later.

  python -m stepsearch_jax.bench.report parity.json accelerator.json

prints the figures of such files as a table, failures among them, and the
largest operations of what was profiled.
"""

from __future__ import annotations

import json
import sys
from typing import Any

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
    self._results, self._failures = {}, {}
    if self._path is not None and self._path.exists():
      found = self._read()
      self._results = {_key(r): r for r in found["results"]}
      self._failures = {_key(r): r for r in found.get("failures", ())}

  def __len__(self) -> int:
    """How many figures there are so far."""
    return len(self._results)

  def _read(self) -> dict:
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
    return found

  def measure(self, item: Any, repeats: int) -> dict:
    """Takes the repeats of a duel or reading that the file lacks.

    Args:
      item: see `duel`.
      repeats: how many are wanted, those in the file among them.

    Returns:
      Its result; the file has it after every repeat.
    """
    key = _key_of(item)
    for result in item.measure(repeats, self._results.get(key)):
      self._results[key] = result
      self._failures.pop(key, None)
      self._write()
    return self._results[key]

  def failed(self, item: Any, error: Exception) -> None:
    """Keeps what a duel or reading raised, until it succeeds."""
    what, work, peer = key = _key_of(item)
    self._failures[key] = {
      "what": what, "work": work, "peer_name": peer, "error": brief(error),
    }
    self._write()

  def _write(self) -> None:
    if self._path is None:
      return
    report = self._head | {"results": list(self._results.values())}
    if self._failures:
      report["failures"] = list(self._failures.values())
    files.write_text(self._path, json.dumps(report, indent=2) + "\n")


def brief(error: Exception) -> str:
  """The kind of an error and its first lines, on one line."""
  lines = " | ".join(str(error).strip().splitlines()[:4])
  return f"{type(error).__name__}: {lines}"[:500]


def _key_of(item) -> tuple:
  return item.what, item.work, getattr(item, "peer", None)


def _key(result: dict) -> tuple:
  return result["what"], result["work"], result.get("peer_name")


_SHOWN = 6  # Of the operations; the file has more.


def summary(reports: list[dict]) -> str:
  """Largest operations, then every figure on a line, for a terminal."""
  lines = []
  for result in (r for report in reports for r in report["results"]):
    if "largest_ops" in result:
      lines.append(f"largest operations, {result['what']}: device busy "
                   f"{result['busy_share']:.2f}")
      lines += [f"  {share:6.3f}  {name}"
                for name, share in result["largest_ops"][:_SHOWN]]
  for report in reports:
    versions = report["versions"]
    lines.append(f"{report['suite']}: {versions['machine']}, jax "
                 f"{versions.get('jax')}, commit {versions['commit']}")
    lines += [_figure_line(result) for result in report["results"]]
    lines += [f"  FAILED  {failure['what']} ({failure['work']}): "
              f"{failure['error']}" for failure in report.get("failures", ())]
  return "\n".join(lines)


def _figure_line(result: dict) -> str:
  value = result["ratio"] if "ratio" in result else result["value"]
  unit = "x" if "ratio" in result else result["unit"]
  notes = [f"asked {result['goal']}"] if result["goal"] else []
  if "seconds" in result:
    notes.append(f"{result['seconds']:.3g} s, the first "
                 f"{result['first_seconds']:.3g} s")
  if "profile_error" in result:
    notes.append(f"no profile: {result['profile_error'][:80]}")
  return (f"  {value:10.4g} {unit:3} {result['what']} ({result['work']})"
          + "".join(f"; {note}" for note in notes))


if __name__ == "__main__":
  print(summary([
    json.loads(epath.Path(path).read_text()) for path in sys.argv[1:]
    if epath.Path(path).exists()
  ]))
