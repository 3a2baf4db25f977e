"""Scoring files of predictions: nothing dropped, nothing guessed."""

import gzip
import json

import numpy as np
import pytest

from stepsearch_jax import files
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.evaluation import predictions


@pytest.mark.parametrize("name", ["bamboogle", "nq", "triviaqa"])
def test_real_rollouts_score_as_their_own_evaluation_did(shared, name):
  path = shared / f"data/search_r1_rollouts/{name}_qwen25_3b_base.jsonl.gz"
  with gzip.open(path, "rt") as file:
    recorded = [json.loads(line)["metric"] for line in file]
  table = predictions.score_predictions(str(path))["unknown"]
  assert table["n"] == len(recorded)
  for metric in ("em", "f1"):
    assert table[metric] == pytest.approx(
      np.mean([row[metric] for row in recorded]), abs=1e-9
    )
    low, high = table[f"{metric}_interval"]
    assert low < table[metric] < high


def test_sources_are_apart_and_unanswered_rows_count(tmp_path):
  rows = [
    {"data_source": "a", "golden_answers": ["Paris"], "prediction": "paris."},
    {"data_source": "a", "target": "Rome", "response": "no answer tag"},
    {"data_source": "b", "reward_model": {"ground_truth": {"target": ["x y"]}},
     "response": "<answer> q </answer> then <answer> x </answer>"},
  ]
  path = tmp_path / "p.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  table = predictions.score_predictions(str(path))
  assert {s: (r["n"], r["em"]) for s, r in table.items()} == {
    "a": (2, 0.5), "b": (1, 0.0)
  }
  assert table["b"]["f1"] == pytest.approx(2 / 3)
  path.with_name("list.json").write_text(json.dumps(rows))
  assert predictions.score_predictions(str(tmp_path / "list.json")) == table


@pytest.mark.parametrize("row, message", [
  ({"prediction": "x"}, r"p.jsonl:2: expected gold answers under one of"),
  ({"target": "x"}, r"p.jsonl:2: expected prediction, answer or response"),
])
def test_rows_that_cannot_be_scored_are_named(tmp_path, row, message):
  path = tmp_path / "p.jsonl"
  good = {"target": "x", "prediction": "x"}
  path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
  with pytest.raises(files.DataError, match=message):
    predictions.score_predictions(str(path))


def test_bootstrap_interval_covers_what_normal_theory_gives():
  values = np.random.default_rng(0).random(400) < 0.3
  table = evaluation.by_source([
    {"data_source": "x", "em": float(v), "f1": float(v)} for v in values
  ])["x"]
  half = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
  low, high = table["em_interval"]
  assert low == pytest.approx(values.mean() - half, abs=0.006)
  assert high == pytest.approx(values.mean() + half, abs=0.006)
