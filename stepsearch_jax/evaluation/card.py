"""Evaluation cards: means, intervals per source and per number of hops.

Used for rollouts and for files of predictions, so that the numbers during
training and those of `evaluate.py` come from the same code. Every row counts,
answered or not.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from stepsearch_jax import files
from stepsearch_jax.evaluation import statistics

_MEANS = (
  "em", "f1", "searches", "failed_searches", "invalid", "unanswered",
  "truncated", "response_length", "retrieval_recall",
)


def make_card(
  settings: dict, records: Sequence[dict], attempts: int = 1
) -> dict:
  """Returns the card of an evaluation.

  Args:
    settings: what was measured, shown as it is.
    records: prediction rows (`playing.record`), all attempts of a question
      with the same id.
    attempts: rollouts per question.

  Returns:
    Settings, metrics with their intervals, and tables per source and per
    number of hops.
  """
  hops = by_hops(records, attempts)
  return {
    "settings": settings,
    "metrics": summarize(records) | {
      f"em_{number}_hops": row["em"] for number, row in hops.items()
    },
    "intervals": intervals(records, attempts),
    "sources": by_source(records, attempts),
    "hops": hops,
  }


def summarize(records: Sequence[dict]) -> dict[str, float]:
  """Returns means over prediction rows.

  A metric is the mean of the rows that have it, and is left out where none
  has, as retrieval_recall without gold passages.
  """
  return {
    name: float(np.mean([row[name] for row in records if name in row]))
    for name in _MEANS if any(name in row for row in records)
  }


def intervals(
  records: Sequence[dict], attempts: int = 1
) -> dict[str, list[float]]:
  """Returns [low, high] of EM and F1, and of EM per number of hops.

  95 %, by bootstrap over questions.
  """
  columns = _per_question(records, attempts)
  for hops, rows in _of_hops(records).items():
    columns[f"em_{hops}_hops"] = _per_question(rows, attempts)["em"]
  found = {
    name: statistics.bootstrap_mean(scores.mean(axis=1))
    for name, scores in columns.items()
  }
  return {name: [x.low, x.high] for name, x in found.items()}


def by_source(
  records: Sequence[dict], attempts: int = 1
) -> dict[str, dict]:
  """Returns EM and F1 per data source with bootstrap intervals and counts.

  With several attempts per question, EM and F1 are their means (avg@k), and
  pass@k is the share of questions of which an attempt was right. Intervals are
  over questions.
  """
  groups = collections.defaultdict(list)
  for row in records:
    groups[row["data_source"] or "unknown"].append(row)
  table = {}
  for source, rows in sorted(groups.items()):
    scores = _per_question(rows, attempts)
    line: dict[str, Any] = {"n": len(scores["em"])}
    table[source] = line
    for name in ("em", "f1"):
      found = statistics.bootstrap_mean(scores[name].mean(axis=1))
      line[name] = found.value
      line[f"{name}_interval"] = [found.low, found.high]
    if attempts > 1:
      line["attempts"] = attempts
      found = statistics.bootstrap_mean(scores["em"].max(axis=1))
      line["pass_at_k"] = found.value
      line["pass_at_k_interval"] = [found.low, found.high]
  return table


def _per_question(
  rows: Sequence[dict], attempts: int
) -> dict[str, np.ndarray]:
  """Returns em and f1 as [questions, attempts]."""
  if attempts == 1:
    places = [[row] for row in rows]
  else:
    grouped = collections.defaultdict(list)
    for row in rows:
      grouped[row["data_source"], row["id"]].append(row)
    places = list(grouped.values())
  return {
    name: np.array([[row[name] for row in group] for group in places],
                   np.float64)
    for name in ("em", "f1")
  }


def by_hops(records: Sequence[dict], attempts: int = 1) -> dict[str, dict]:
  """Returns EM, F1 and questions per number of hops, where that is known."""
  return {
    str(hops): {
      "n": len(rows) // attempts,
      "em": float(np.mean([row["em"] for row in rows])),
      "f1": float(np.mean([row["f1"] for row in rows])),
    }
    for hops, rows in _of_hops(records).items()
  }


def _of_hops(records: Sequence[dict]) -> dict[int, list[dict]]:
  """Rows by their number of hops, fewest first; others are left out."""
  groups = collections.defaultdict(list)
  for row in records:
    if row.get("hops"):
      groups[row["hops"]].append(row)
  return dict(sorted(groups.items()))


def write_card(folder: epath.Path, card: dict) -> None:
  """Writes `card.json` and a Markdown rendering of the same numbers."""
  files.write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
  lines = ["# Evaluation card", "", "| what | value |", "|---|---|"]
  lines += [f"| {k} | {v} |" for k, v in card["settings"].items()]
  for name, value in card["metrics"].items():
    between = card.get("intervals", {}).get(name)
    shown = f" ({between[0]:.4f}-{between[1]:.4f})" if between else ""
    lines.append(f"| {name} | {value:.4f}{shown} |")
  lines += ["", "| source | n | EM (95 %) | F1 (95 %) |", "|---|---|---|---|"]
  for source, row in card["sources"].items():
    cells = [
      f"{row[m]:.4f} ({row[m + '_interval'][0]:.4f}-"
      f"{row[m + '_interval'][1]:.4f})"
      for m in ("em", "f1")
    ]
    if "pass_at_k" in row:
      low, high = row["pass_at_k_interval"]
      cells[0] += (f", pass@{row['attempts']} {row['pass_at_k']:.4f} "
                   f"({low:.4f}-{high:.4f})")
    lines.append(f"| {source} | {row['n']} | {cells[0]} | {cells[1]} |")
  if card.get("hops"):
    lines += ["", "| hops | n | EM | F1 |", "|---|---|---|---|"]
    lines += [
      f"| {hops} | {row['n']} | {row['em']:.4f} | {row['f1']:.4f} |"
      for hops, row in card["hops"].items()
    ]
  lines += ["", *card.get("suite", ())]
  files.write_text(folder / "card.md", "\n".join(lines) + "\n")


def commit() -> str:
  """Returns the project's git commit, or "unknown" outside a checkout.

  It ends in "-dirty" where tracked files differ from it. STEPSEARCH_COMMIT
  names it for a copy whose .git is another's or missing.
  """
  if named := os.environ.get("STEPSEARCH_COMMIT"):
    return named
  try:
    done = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
      cwd=epath.Path(__file__).parent, capture_output=True, text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return done.stdout.strip()
