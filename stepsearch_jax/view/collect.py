"""Reads what the page shows from work directories.

Owns the page's data: settings, summary, curves and kept rollouts of each run,
in a compact form. It knows files of a run and nothing of how they came about.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax import files, types

# Metrics that the page draws first, if a run has them.
FIRST = (
  "val/em", "val/f1", "critic/score/mean", "critic/answer_correct/mean",
  "critic/information_gain/mean", "critic/redundancy/mean",
  "critic/search_key/mean", "env/searches_per_question", "actor/entropy",
  "critic/kl",
)


def collect(workdirs: Sequence[epath.Path], limit: int) -> dict[str, Any]:
  """Returns the data of the page.

  Args:
    workdirs: of the runs, at least one.
    limit: rollouts in all; each run gives its share, spread over its steps
      and evaluations.

  Raises:
    UserError: a folder holds no run, or a file of it is damaged.
  """
  share = max(limit // max(len(workdirs), 1), 1)
  names = _names(workdirs)
  runs = [
    _run(name, workdir, share)
    for name, workdir in zip(names, workdirs, strict=True)
  ]
  return {
    "first": [name for name in FIRST],
    "measures": ["reward", "advantage", "log-probability", "KL to reference",
                 "value", "entropy"],
    "runs": runs,
    # Rollouts that the runs hold and the page does not.
    "left_out": sum(run.pop("held") - len(run["rollouts"]) for run in runs),
  }


def _names(workdirs: Sequence[epath.Path]) -> list[str]:
  """Short names that tell the runs apart."""
  short = [workdir.name for workdir in workdirs]
  return short if len(set(short)) == len(short) else [str(w) for w in workdirs]


def _run(name: str, workdir: epath.Path, limit: int) -> dict[str, Any]:
  path = workdir / "metrics.jsonl"
  rollouts, held = _rollouts(workdir, limit)
  config = _json(workdir / "config.json", {"config": dict})
  if not config and not path.exists():
    raise types.UserError(f"{workdir}: no run (expected {path.name} there)")
  return {
    "name": name,
    "summary": _json(workdir / "summary.json", {}),
    "settings": {
      field: _short(value) for field, value in _flat(config.get("config", {}))
    },
    "changes": config.get("changes", []),
    # A run that has only begun has none.
    "curves": _curves(path) if path.exists() else {},
    "rollouts": rollouts,
    "held": held,
  }


def _json(path: epath.Path, fields: Mapping[str, type]) -> dict[str, Any]:
  return files.read_object(path, fields) if path.exists() else {}


def _flat(tree: Mapping[str, Any], prefix: str = ""):
  """Yields ("ppo.policy_lr", value) of nested settings."""
  for name, value in sorted(tree.items()):
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


def _short(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _lines(path: epath.Path):
  """Yields the rows of a JSONL file; a run may be writing the last one."""
  for _, row in files.try_rows(path):
    if not isinstance(row, files.DataError):
      yield row


def _curves(path: epath.Path) -> dict[str, list[list[float]]]:
  """{metric: [[step, value], ...]}."""
  curves: dict[str, list[list[float]]] = {}
  for row in _lines(path):
    for name, value in row.items():
      if name != "step":
        curves.setdefault(name, []).append(
          [row["step"], float(f"{value:.5g}")]
        )
  return curves


@dataclasses.dataclass(frozen=True)
class _Source:
  """A file of kept rollouts.

  Attributes:
    path: JSONL.
    origin: "training" or "evaluation".
    place: which one, in words.
    step: of the policy; None where the folder does not tell.
  """

  path: epath.Path
  origin: str
  place: str
  step: int | None


def _sources(workdir: epath.Path) -> list[_Source]:
  """Files of kept rollouts: of training steps, then of evaluations."""
  found = []
  for path in sorted((workdir / "trajectories").glob("step_*.jsonl")):
    step = int(path.stem.removeprefix("step_"))
    found.append(_Source(path, "training", f"step {step}", step))
  for path in sorted(workdir.glob("evaluations/*/trajectories.jsonl")):
    name = path.parent.name
    known = re.search(r"step_(\d+)", name)
    found.append(_Source(
      path, "evaluation", f"evaluation {name}",
      int(known[1]) if known else None,
    ))
  return found


def _rollouts(
  workdir: epath.Path, limit: int
) -> tuple[list[dict[str, Any]], int]:
  """Compact rows of the first rollouts of every source, and how many it has."""
  sources = _sources(workdir)
  rows, held = [], 0
  for source in sources:
    found = list(_lines(source.path))
    held += len(found)
    for row in found[: max(limit // len(sources), 1)]:
      rows.append(_compact(source, row))
  return rows[:limit], held


def _compact(source: _Source, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row with its tokens as parallel lists."""
  tokens = row["tokens"]
  return {
    "from": source.origin, "place": source.place, "step": source.step,
    **{name: row[name] for name in (
      "id", "question", "answers", "prediction", "em", "f1", "hops", "reward",
      "outcome", "prompt", "stop_reason",
    )},
    "searches": sum(turn["action"] == "search" and not turn["failed"]
                    for turn in row["turns"]),
    "turns": row["turns"],
    "start": row["start"],
    "texts": [token["text"] for token in tokens],
    "turn_of": [token["turn"] for token in tokens],
    # [] marks a token that the policy did not write, null what is not known.
    "values": [
      [x if x is None else float(f"{x:.3g}") for x in token.get("values", [])]
      for token in tokens
    ],
  }
