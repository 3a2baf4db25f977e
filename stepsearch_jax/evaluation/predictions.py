"""Scores files of predictions, whoever made them."""

from __future__ import annotations

from stepsearch_jax import files
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.rewards import text_match


def score_predictions(path: str) -> dict[str, dict]:
  """EM, F1 and search counts of a prediction file; every row counts.

  Args:
    path: JSON list or JSONL, gzipped or not. An answer stands under
      `prediction` or `answer`, or in the last answer tag of `response`; gold
      answers under `golden_answers`, `ground_truth`, `target` or `answers`,
      or in verl's `reward_model`.

  Raises:
    UserError: naming file, row and field.
  """
  scored = []
  for where, row in files.read_rows(path):
    gold = _gold(where, row)
    if "prediction" in row or "answer" in row:
      answer = row.get("prediction", row.get("answer")) or ""
    elif "response" in row:
      answer = text_match.last_answer(row["response"]) or ""
    else:
      raise files.DataError(
        f"{where}: expected prediction, answer or response; found fields "
        f"{sorted(row)}"
      )
    scored.append({
      "data_source": row.get("data_source", ""),
      "em": text_match.exact_match(answer, gold),
      "f1": text_match.f1(answer, gold),
    })
  if not scored:
    raise files.DataError(f"{path}: no predictions in the file")
  return evaluation.by_source(scored)


def _gold(where: str, row: dict) -> list[str]:
  """Gold answers of a prediction row."""
  row = {**row.get("reward_model", {}), **row}
  names = ("golden_answers", "ground_truth", "target", "answers")
  gold = next((row[name] for name in names if name in row), None)
  if isinstance(gold, dict):
    gold = gold.get("target")
  gold = [gold] if isinstance(gold, str) else gold
  if not gold or not all(isinstance(answer, str) for answer in gold):
    raise files.DataError(
      f"{where}: expected gold answers under one of {names}, got {gold!r}; "
      f"found fields {sorted(row)}"
    )
  return list(gold)
