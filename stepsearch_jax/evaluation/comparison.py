"""Paired differences between two evaluations of the same questions."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.evaluation import predictions, statistics

_METRICS = ("em", "f1")
_Key = tuple[str, str]  # Data source and id of a question.


@dataclasses.dataclass(frozen=True)
class Difference:
  """What one run scores more than another on one data source.

  Attributes:
    source: the data source, "all" for all questions.
    metric: "em" or "f1".
    n: questions.
    ours: mean of the first run.
    theirs: mean of the second run.
    difference: first minus second, with the paired 95 % interval.
    p: of the paired permutation test.
    adjusted: the same, by Holm over the sources.
  """

  source: str
  metric: str
  n: int
  ours: float
  theirs: float
  difference: statistics.Estimate
  p: float
  adjusted: float


def find_predictions(place: str, flag: str = "--compare") -> epath.Path:
  """Returns the predictions file of a run, an evaluation folder, or itself.

  Of a run it is that of training's last evaluation.

  Args:
    place: a path.
    flag: that it came with, for errors.

  Raises:
    UserError: there is none, or a run has several.
  """
  path = epath.Path(place)
  if not path.exists():
    raise types.UserError(f"{flag}: {place} does not exist")
  if not path.is_dir():
    return path
  found = [path / "predictions.jsonl"]
  if not found[0].exists() and (steps := sorted(
    path.glob("evaluations/step_*/predictions.jsonl")
  )):
    return steps[-1]
  if not found[0].exists():
    found = sorted(path.glob("evaluations/*/predictions.jsonl"))
  if len(found) != 1:
    raise types.UserError(
      f"{flag}: expected predictions.jsonl in {place} or in one folder of "
      f"its evaluations/, found {[str(p.parent) for p in found] or 'none'}"
    )
  return found[0]


def compare(ours: str, theirs: str) -> list[Difference]:
  """Returns the differences of two runs per data source and metric.

  Several attempts at a question count as their mean.

  Args:
    ours: a run, an evaluation folder or a file of predictions with ids.
    theirs: likewise, of the same questions.

  Raises:
    UserError: a file is missing or malformed, or their questions differ.
  """
  (first, asked), (second, also) = (
    _scores(find_predictions(p)) for p in (ours, theirs)
  )
  only = [sorted(set(a) - set(b)) for a, b in
          ((first, second), (second, first))]
  if only[0] or only[1]:
    name = (only[0] or only[1])[0]
    raise types.UserError(
      f"--compare: {len(only[0])} questions are only in {ours}, "
      f"{len(only[1])} only in {theirs}, for instance {name[1]!r} of "
      f"{name[0] or 'an unknown source'}; the same questions are compared"
    )
  for key in sorted(set(asked) & set(also)):
    types.expect(asked[key] == also[key], f"--compare: question {key[1]!r}",
                 f"the same text in both, in {ours} {asked[key]!r}", also[key])
  groups = {"all": sorted(first)}
  sources = sorted({source for source, _ in first})
  if len(sources) > 1:
    groups |= {s or "unknown": [k for k in sorted(first) if k[0] == s]
               for s in sources}
  found = []
  for i, metric in enumerate(_METRICS):
    rows = [
      _difference(source, metric,
                  np.array([first[key][i] for key in keys]),
                  np.array([second[key][i] for key in keys]))
      for source, keys in groups.items()
    ]
    # "all" is no further test of its own.
    parts = rows[1:] or rows
    adjusted = statistics.holm([row.p for row in parts])
    found += rows[: len(rows) - len(parts)] + [
      dataclasses.replace(row, adjusted=p)
      for row, p in zip(parts, adjusted, strict=True)
    ]
  return found


def render(rows: list[Difference], ours: str, theirs: str) -> str:
  """Returns a Markdown table of differences."""
  lines = [
    f"{ours} minus {theirs}, the same questions; 95 % intervals by paired "
    "bootstrap, p by paired permutation, Holm over the sources", "",
    "| source | metric | n | first | second | difference | p | p (Holm) |",
    "|---|---|---|---|---|---|---|---|",
  ]
  lines += [
    f"| {r.source} | {r.metric} | {r.n} | {r.ours:.4f} | {r.theirs:.4f} | "
    f"{r.difference.value:+.4f} ({r.difference.low:+.4f} to "
    f"{r.difference.high:+.4f}) | {r.p:.4f} | {r.adjusted:.4f} |"
    for r in rows
  ]
  return "\n".join(lines)


def _difference(source, metric, ours, theirs) -> Difference:
  p = statistics.permutation_test(ours, theirs)
  return Difference(
    source, metric, len(ours), float(ours.mean()), float(theirs.mean()),
    statistics.paired_bootstrap(ours, theirs), p, p,
  )


def _scores(
  path: epath.Path
) -> tuple[dict[_Key, np.ndarray], dict[_Key, str]]:
  """Returns (em, f1) of each question by its key, and their texts if known."""
  rows, texts = collections.defaultdict(list), {}
  for where, row in files.read_rows(path):
    if row.get("id") is None:
      raise files.DataError(
        f"{where}: field id is missing, by which questions are paired"
      )
    if any(not isinstance(row.get(m), (int, float)) for m in _METRICS):
      row = {**row, **predictions.score_row(where, row)}
    key = str(row.get("data_source") or ""), str(row["id"])
    rows[key].append([row[m] for m in _METRICS])
    if isinstance(row.get("question"), str):
      texts[key] = row["question"].strip()
  if not rows:
    raise files.DataError(f"{path}: no predictions in the file")
  return {key: np.mean(values, axis=0) for key, values in rows.items()}, texts
