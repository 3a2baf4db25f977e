"""Scoring files of predictions: nothing dropped, nothing guessed."""

import gzip
import json
import subprocess
import sys

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


def table_of(tmp_path, rows, name="p.jsonl", **scoring):
  path = tmp_path / name
  if name.endswith(".json"):
    path.write_text(json.dumps(rows))
  else:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return predictions.score_predictions(
    str(path), predictions.Scoring(**scoring))


def test_every_recorded_case_gives_what_is_expected(shared):
  folder = shared / "cases/predictions"
  for line in (folder / "expected.jsonl").read_text().splitlines():
    case = json.loads(line)
    path = str(folder / case["file"])
    if case.get("refused"):
      with pytest.raises(files.DataError, match=case["file"] + ":1: field"):
        predictions.score_predictions(path)
      continue
    (row,) = predictions.score_predictions(path).values()
    assert row["n"] == 1, case
    for name in ("em", "f1"):
      assert row[name] == case.get(name, row[name]), case


RIGHT = "<answer> Paris </answer>"


@pytest.mark.parametrize("row", [
  {"target": "Paris", "pred": "Paris", "answer": "London"},
  {"target": "Paris", "predicted_answer": "paris"},
  {"target": "Paris", "output": {"pred": "Paris", "metric_score": {"em": 1}}},
  {"answer": "Paris", "pred": "Paris"},
  {"answer": ["Paris", "Lutetia"], "response": RIGHT},
  {"golden_answers": ["Paris"], "answer": "Paris"},
  {"golden_answers": '["Paris"]', "prediction": "Paris"},
  {"gts": "Paris", "input": "q", "output": RIGHT},
  {"gts": '{"target": ["Paris"]}', "output": RIGHT},
  {"gts": ["Paris"], "output": RIGHT, "pred": None},
  {"reward_model": {"ground_truth": "Paris"}, "response": RIGHT},
  {"golden_answers": None, "reward_model": {"ground_truth": {
    "target": ["Paris"]}}, "response": RIGHT},
  {"golden_answers": ["", "Paris"], "prediction": "Paris"},
  {"golden_answers": [1998], "prediction": "1998"},
  {"golden_answers": ["1998"], "prediction": 1998.0},
  {"golden_answers": ["0"], "pred": 0},
  {"target": "Paris", "response": "p" + RIGHT, "prompt": "p"},
  {"target": "Paris", "response": [
    {"role": "user", "content": "<answer> Rome </answer>"},
    {"role": "assistant", "content": RIGHT},
    {"role": "tool", "content": "<answer> Rome </answer>"},
    {"role": "assistant", "content": None}]},
  {"target": "Paris", "messages": [
    {"role": "assistant", "content": [{"type": "text", "text": RIGHT}]}]},
  {"target": "Paris", "response":
   f"{RIGHT}<information> <answer> Rome </answer> </information>"},
  {"target": "Paris", "response": f"{RIGHT} Question: another one?"},
  {"target": "Paris", "response":
   f"Answer inside <answer> and </answer>. Question: capital?\n{RIGHT}"},
  {"target": "Paris", "response":
   f"{RIGHT}<tool_response> <answer> Rome </answer> </tool_response>"},
], ids=str)
def test_right_predictions_are_found_under_every_name(tmp_path, row):
  (table,) = table_of(tmp_path, [row]).values()
  assert (table["em"], table["f1"]) == (1.0, 1.0)


SEARCH_R1 = ("Answer the question. For example, <answer> Paris </answer>. "
             "Question: capital of France?\n")


@pytest.mark.parametrize("row", [
  {"target": "Paris", "response": SEARCH_R1 + "I give up", "prompt": SEARCH_R1},
  {"target": "Paris", "response": SEARCH_R1 + "I give up",
   "question": "capital of France?"},
  {"target": "Paris", "output": SEARCH_R1 + "I give up", "input": SEARCH_R1},
  {"target": "Paris", "response":
   "Answer inside <answer> and </answer>, for example <answer> Paris </answer>."
   " Question: capital of France?\nI give up"},
  {"target": "Paris", "response":
   f"<|im_start|>user\n{RIGHT}<|im_end|>\n<|im_start|>assistant\nno"},
  {"target": "Paris", "response": f"[INST] {RIGHT} [/INST] no"},
  {"target": "Paris", "response": f"<information> {RIGHT} and cut off"},
  {"target": "Paris", "prediction": ""}, {"target": "Paris", "pred": None},
  {"target": "Paris", "output": {"pred": None}},
  {"target": "Paris", "messages": []},
  {"golden_answers": ["Paris"], "answer": "Paris", "prediction": None},
  {"golden_answers": ["Paris"], "answer": "Paris", "response": "no tag"},
  {"answer": "Paris", "response": None},
  {"answer": "Paris", "response": "no tag"},
  {"golden_answers": ["The", "Paris"], "prediction": " "},
  {"golden_answers": ["!!!"], "prediction": "???"},
  {"golden_answers": ["the"], "prediction": "a"},
], ids=str)
def test_what_was_not_answered_is_not_right(tmp_path, row):
  (table,) = table_of(tmp_path, [row]).values()
  assert (table["n"], table["em"], table["f1"]) == (1, 0.0, 0.0)


@pytest.mark.parametrize("row", [
  {"target": "x", "prediction": ["x"]}, {"target": "x", "prediction": True},
  {"target": "x", "prediction": {"text": "x"}}, {"target": "x", "response": 5},
  {"target": "x", "response": ["x"]}, {"target": "x", "messages": [{}]},
  {"target": {"a": 1}, "prediction": "x"}, {"target": None, "prediction": "x"},
  {"target": [None], "prediction": "x"}, {"target": [["x"]], "prediction": "x"},
  {"target": [], "prediction": "x"}, {"reward_model": 5, "prediction": "x"},
  {"reward_model": "x", "prediction": "x"}, {"target": "x"}, {},
  {"target": "x", "response": [{"role": "assistant", "content": 5.5j.imag,
                                }, 5]},
], ids=str)
def test_what_cannot_be_scored_is_one_line_with_file_and_row(tmp_path, row):
  with pytest.raises(files.DataError, match=r"p\.jsonl:2: ") as caught:
    table_of(tmp_path, [{"target": "x", "prediction": "x"}, row])
  assert "\n" not in str(caught.value)


QUESTIONS = {"a": ("Paris",), "b": ("Rome",), "c": ("Bonn", "Berlin")}


@pytest.mark.parametrize("name, rows", [
  ("p.json", {"a": "paris", "c": "Berlin"}),
  ("p.json", {"answer": {"a": "paris", "c": "Berlin"}, "sp": {"a": []}}),
  ("p.jsonl", [{"id": "a", "predicted_answer": "Paris"},
               {"id": "c", "predicted_answer": "bonn",
                "predicted_support_idxs": [1]}]),
  ("p.json", {"a": "paris", "b": None, "c": "Berlin"}),
])
def test_answers_by_id_are_scored_against_the_questions(tmp_path, name, rows):
  table = table_of(tmp_path, rows, name, gold=QUESTIONS, source="mine")
  assert table["mine"]["n"] == 3
  assert table["mine"]["em"] == pytest.approx(2 / 3)
  with pytest.raises(files.DataError, match="--questions|gold answers"):
    table_of(tmp_path, rows, name)


def test_released_scoring_equals_the_released_script(shared, tmp_path):
  data = json.loads((shared / "golden/eval/eval_cases.json").read_text())
  for case in data["cases"]:
    if not case["ground_truth"] or case["id"] == "edge:brace_empty":
      continue  # A file without gold answers is refused.
    row = {"golden_answers": case["ground_truth"], "response": case["response"]}
    (table,) = table_of(tmp_path, [row], preset="released").values()
    assert table["em"] == case["expected"]["em"], case["id"]
    assert table["f1"] == pytest.approx(case["expected"]["f1"]), case["id"]


def test_the_command_prints_the_table_as_json(tmp_path):
  path = tmp_path / "p.jsonl"
  path.write_text(json.dumps(
    {"target": "Paris", "response": "<answer>\\boxed{Paris}</answer>"}))
  for preset, em in (("paper", 0.0), ("released", 1.0)):
    done = subprocess.run(
      [sys.executable, "-m", "stepsearch_jax.evaluate", "--json",
       f"--predictions={path}", f"--preset={preset}", "--source=mine"],
      capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mine"]["em"] == em
