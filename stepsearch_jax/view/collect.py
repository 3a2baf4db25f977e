"""Reads what the page shows from work directories.

Owns the page's data: settings, summary, curves and kept rollouts of each run,
in a compact form. It knows files of a run and nothing of how they came about.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stepsearch_jax import types

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
    limit: rollouts in all; each run gives its share, spread over its steps.

  Raises:
    UserError: a folder holds no run.
  """
  share = max(limit // max(len(workdirs), 1), 1)
  names = _names(workdirs)
  return {
    "first": [name for name in FIRST],
    "measures": ["reward", "advantage", "log-probability", "KL to reference",
                 "value", "entropy"],
    "runs": [
      _run(name, workdir, share)
      for name, workdir in zip(names, workdirs, strict=True)
    ],
  }


def _names(workdirs: Sequence[epath.Path]) -> list[str]:
  """Short names that tell the runs apart."""
  short = [workdir.name for workdir in workdirs]
  return short if len(set(short)) == len(short) else [str(w) for w in workdirs]


def _run(name: str, workdir: epath.Path, limit: int) -> dict[str, Any]:
  path = workdir / "metrics.jsonl"
  config = _json(workdir / "config.json")
  if not config and not path.exists():
    raise types.UserError(f"{workdir}: no run (expected {path.name} there)")
  return {
    "name": name,
    "summary": _json(workdir / "summary.json"),
    "settings": {
      field: _short(value) for field, value in _flat(config.get("config", {}))
    },
    "changes": config.get("changes", []),
    # A run that has only begun has none.
    "curves": _curves(path) if path.exists() else {},
    "rollouts": _rollouts(workdir / "trajectories", limit),
  }


def _json(path: epath.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


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
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
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


def _rollouts(folder: epath.Path, limit: int) -> list[dict[str, Any]]:
  """Compact rows of the kept rollouts, the first ones of every step."""
  if not folder.exists():
    return []
  files = sorted(folder.glob("step_*.jsonl"))
  rows = []
  for file in files:
    step = int(file.name.removeprefix("step_").removesuffix(".jsonl"))
    for row in list(_lines(file))[: max(limit // len(files), 1)]:
      rows.append(_compact(step, row))
  return rows[:limit]


def _compact(step: int, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row with its tokens as parallel lists."""
  tokens = row["tokens"]
  return {
    "step": step,
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
    # [] marks a token that the policy did not write.
    "values": [
      [float(f"{x:.3g}") for x in token.get("values", [])] for token in tokens
    ],
  }
