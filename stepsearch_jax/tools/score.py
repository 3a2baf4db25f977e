"""Scores a file of trajectories with the rewards of training.

  stepsearch score --preset=released \\
    --input=cases.jsonl --output=scores.jsonl

A line holds `response`, `target` and optionally `search_keys` and
`support_docs`; one that is null or empty is looked for under the other names
that prediction and question files have for it. One line comes out per line in,
in the same order; a line that cannot be scored yields {"id": .., "error": ..}
and exit code 1 at the end.
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
from stepsearch_jax.evaluation import predictions
from stepsearch_jax.rewards import released, step_rewards

_PRESET = flags.DEFINE_enum(
  "preset", "paper", sorted(step_rewards.PRESETS), "Which reward."
)
_INPUT = flags.DEFINE_string("input", None, "JSONL file of trajectories.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of scores.")
_GOLD = tuple(dict.fromkeys(
  ("target", "reward_model.ground_truth", *predictions.GOLD)))
_OTHER_NAMES = {"search_keys": "sub_searchs",
                "support_docs": "sub_support_docs"}


def score_row(
  spec: step_rewards.RewardSpec, row: Mapping[str, Any], number: int,
  where: str = "",
) -> dict:
  """Returns the scores of one row, or its error, whatever the row holds.

  Args:
    spec: which reward.
    row: a trajectory and its gold.
    number: its id where it names none.
    where: "file:line", for errors.
  """
  name = files.encodable(row.get("id", number))
  try:
    named = _named(where or f"row {number}", row, spec)
    scores = released.score_case(spec, named)
  except (
    KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError
  ) as error:
    kind = getattr(error, "kind", type(error).__name__)
    return {"id": name, "error": f"{kind}: {error}"}
  return {"id": name, **dataclasses.asdict(scores)}


def _named(
  where: str, row: Mapping[str, Any], spec: step_rewards.RewardSpec
) -> dict:
  """Returns the row with the field names of prediction files brought to ours.

  Where the transcript is read as released, fields that hold something stay as
  they stand in the row, because the released code takes strings apart;
  elsewhere they are read as in question files: JSON text is a list, a string
  is a group of one, aliases are accepted.
  """
  row = dict(row)
  if "response" not in row:
    raise step_rewards.RewardError(
      "KeyError", f"field response is missing, found {sorted(row)}"
    )
  if not isinstance(row["response"], str):
    raise step_rewards.RewardError(
      "TypeError", f"field response must hold text, got {row['response']!r}"
    )
  for name in _OTHER_NAMES:
    if fields.empty(row.get(name)):
      found = _elsewhere(fields.Row(where, row), name)
      if not fields.empty(found):
        row[name] = found
  if spec.scored_text != "regex":
    return {**row, **_as_questions(where, row)}
  row.setdefault("support_docs", ())
  row.setdefault("target", None)
  if fields.empty(row["target"]):
    found = predictions.gold_field(where, row, _GOLD)
    row["target"] = fields.parsed(found[0][found[1]]) if found else (
      row["target"])
  return row


def _elsewhere(row: fields.Row, name: str) -> Any:
  """Returns what a row has under the other names of a field."""
  if not fields.empty(row[_OTHER_NAMES[name]]):
    return row[_OTHER_NAMES[name]]
  if name == "support_docs":
    return row.part("extra_info")[name]
  truth = fields.parsed(row.part("reward_model")["ground_truth"])
  return truth.get(name) if isinstance(truth, Mapping) else None


def _as_questions(where: str, row: Mapping[str, Any]) -> dict:
  """Returns gold answers, keys and support, read as question files are.

  Raises:
    files.DataError: naming the field.
  """
  given = fields.Row(where, row)
  found = predictions.gold_field(where, row, _GOLD)
  if not found:
    raise given.error("target", "gold answers", row.get("target"))
  place, name = found
  gold = fields.parsed(place[name])
  if isinstance(gold, (str, list, tuple)) and all(
    isinstance(answer, str) for answer in gold
  ):
    gold = [*place.texts(name), *predictions.aliases(where, row)]
  keys, documents = (
    None if fields.empty(row.get(name)) else name for name in _OTHER_NAMES)
  return {
    "target": gold,
    "search_keys": given.groups(keys) if keys else (),
    "support_docs": [
      {"paragraph_text": passage.text}
      for passage in (given.passages(documents) if documents else ())
    ],
  }


def score_file(
  spec: step_rewards.RewardSpec, path: str
) -> Iterator[dict]:
  """Yields the scores or the error of every row of a file, in order.

  Raises:
    files.DataError: there is no such file, or no row in it. What is damaged
      further on ends in a row with that error.
  """
  number = 0
  try:
    for number, (where, row) in enumerate(files.try_rows(path), 1):
      if isinstance(row, files.DataError):
        yield {"id": number, "error": f"DataError: {row}"}
      else:
        yield score_row(spec, row, number, where)
  except files.DataError as error:
    if not number:
      raise
    yield {"id": number + 1, "error": f"DataError: {error}"}
  if not number:
    raise files.DataError(f"{path}: no trajectories in the file")


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
