"""Scores a file of trajectories with the rewards of training.

  stepsearch score --preset=released \\
    --input=cases.jsonl --output=scores.jsonl

A line holds `response`, `target` and optionally `search_keys` and
`support_docs`. One line comes out per line in, in the same order; a line that
cannot be scored yields {"id": .., "error": ..} and exit code 1 at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tqdm
from absl import flags
from etils import epath

from stepsearch_jax import cli, files
from stepsearch_jax.data import fields
from stepsearch_jax.rewards import released, step_rewards

_PRESET = flags.DEFINE_enum(
  "preset", "paper", sorted(step_rewards.PRESETS), "Which reward."
)
_INPUT = flags.DEFINE_string("input", None, "JSONL file of trajectories.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of scores.")


def score_row(
  spec: step_rewards.RewardSpec, row: Mapping[str, Any], number: int
) -> dict:
  """Returns the scores of one row, or its error, whatever the row holds."""
  name = files.encodable(row.get("id", number))
  try:
    scores = released.score_case(spec, _named(row, spec))
  except (
    KeyError, TypeError, AttributeError, ValueError, IndexError
  ) as error:
    kind = getattr(error, "kind", type(error).__name__)
    return {"id": name, "error": f"{kind}: {error}"}
  return {"id": name, **dataclasses.asdict(scores)}


def _named(row: Mapping[str, Any], spec: step_rewards.RewardSpec) -> dict:
  """Returns the row with the field names of prediction files brought to ours.

  Where the transcript is read as released, keys stay as they stand in the row,
  because the released code takes strings apart; elsewhere a string is a group
  of one.
  """
  model = fields.Row("", row).part("reward_model")
  truth, row = fields.parsed(model["ground_truth"]), dict(row)
  if fields.missing(row.get("target")):
    if isinstance(truth, Mapping):
      row["target"] = truth.get("target")
      row.setdefault("search_keys", truth.get("search_keys", ()))
    else:
      row["target"] = next(
        (value for value in (truth, row.get("golden_answers"),
                             row.get("ground_truth"))
         if not fields.missing(value)), None,
      )
  extra = row.get("extra_info") or {}
  row.setdefault("support_docs", extra.get("support_docs", ()))
  if "response" not in row:
    raise step_rewards.RewardError(
      "KeyError", f"field response is missing, found {sorted(row)}"
    )
  if not isinstance(row["response"], str):
    raise step_rewards.RewardError(
      "TypeError", f"field response must hold text, got {row['response']!r}"
    )
  if spec.scored_text != "regex" and "search_keys" in row:
    row["search_keys"] = fields.Row("", row).groups("search_keys")
  return row


def score_file(
  spec: step_rewards.RewardSpec, path: str
) -> Iterator[dict]:
  """Yields the scores or the error of every row of a file, in order.

  Raises:
    files.DataError: there is no such file. What is damaged further on ends in
      a row with that error.
  """
  number = 0
  try:
    for number, (_, row) in enumerate(files.try_rows(path), 1):
      if isinstance(row, files.DataError):
        yield {"id": number, "error": f"DataError: {row}"}
      else:
        yield score_row(spec, row, number)
  except files.DataError as error:
    if not number:
      raise
    yield {"id": number + 1, "error": f"DataError: {error}"}


def main() -> int:
  """Entry; see the module docstring."""
  spec = step_rewards.PRESETS[_PRESET.value]()
  scored = list(tqdm.tqdm(score_file(spec, _INPUT.value), unit="row"))
  files.write_text(epath.Path(_OUTPUT.value), files.to_jsonl(scored))
  good = [row for row in scored if "error" not in row]
  print(f"{len(good)} of {len(scored)} rows scored, preset {_PRESET.value}")
  for name in ("score", "answer_correct", "search_key_score"):
    if good:
      print(f"{name:>20}  {np.mean([row[name] for row in good]):.4f}")
  return int(len(good) < len(scored))


if __name__ == "__main__":
  cli.run(main, required=["input", "output"])
