"""Scores a file of trajectories with the rewards of training.

  python -m stepsearch_jax.tools.score --preset=released \\
    --input=cases.jsonl --output=scores.jsonl

A line holds `response`, `target` and optionally `search_keys` and
`support_docs`. One line comes out per line in, in the same order; a line that
cannot be scored yields {"id": .., "error": ..} and exit code 1 at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import tqdm
from absl import flags
from etils import epath

from stepsearch_jax import cli, files
from stepsearch_jax.rewards import released, step_rewards

_PRESET = flags.DEFINE_enum(
  "preset", "paper", sorted(step_rewards.PRESETS), "Which reward."
)
_INPUT = flags.DEFINE_string("input", None, "JSONL file of trajectories.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of scores.")


def score_row(
  spec: step_rewards.RewardSpec, row: Mapping, number: int
) -> dict:
  """Scores of one row, or its error."""
  name = row.get("id", number)
  try:
    scores = released.score_case(spec, _named(row))
  except (step_rewards.RewardError, KeyError) as error:
    kind = getattr(error, "kind", "KeyError")
    return {"id": name, "error": f"{kind}: {error}"}
  return {"id": name, **dataclasses.asdict(scores)}


def _named(row: Mapping) -> dict:
  """The row with the field names of prediction files brought to ours."""
  row = dict(row)
  truth = row.get("reward_model", {}).get("ground_truth")
  if "target" not in row:
    if isinstance(truth, Mapping):
      row["target"] = truth["target"]
      row.setdefault("search_keys", truth.get("search_keys", ()))
    else:
      row["target"] = truth or row.get("golden_answers",
                                       row.get("ground_truth"))
  extra = row.get("extra_info", {})
  row.setdefault("support_docs", extra.get("support_docs", ()))
  if "response" not in row:
    raise step_rewards.RewardError(
      "KeyError", f"field response is missing, found {sorted(row)}"
    )
  return row


def main() -> int:
  """Entry; see the module docstring."""
  spec = step_rewards.PRESETS[_PRESET.value]()
  rows = list(files.read_rows(_INPUT.value))
  scored = [
    score_row(spec, row, number)
    for number, (_, row) in enumerate(tqdm.tqdm(rows, unit="row"), 1)
  ]
  output = epath.Path(_OUTPUT.value)
  temporary = output.with_name(output.name + ".tmp")
  temporary.write_text("".join(json.dumps(row) + "\n" for row in scored))
  temporary.replace(output)
  good = [row for row in scored if "error" not in row]
  print(f"{len(good)} of {len(scored)} rows scored, preset {_PRESET.value}")
  for name in ("score", "answer_correct", "search_key_score"):
    if good:
      print(f"{name:>20}  {np.mean([row[name] for row in good]):.4f}")
  return int(len(good) < len(scored))


if __name__ == "__main__":
  cli.run(main, required=["input", "output"])
