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
  {"target": "Paris", "output": {"prediction": "Paris"}},
  {"golden_answers": [], "target": "", "gts": "Paris", "pred": "Paris"},
  {"reward_model": '{"ground_truth": {"target": ["Paris"]}}', "pred": "Paris"},
  {"answer": "Lutetia", "answer_aliases": ["Paris"], "prediction": "Paris"},
  {"target": "Lutetia", "aliases": '["x", "Paris"]', "response": RIGHT},
  {"target": "Paris", "messages": [{"role": "Assistant", "content": RIGHT}]},
  {"target": "Paris", "messages": [{"role": "model", "content": [RIGHT]}]},
  {"target": "Paris", "messages": [
    {"role": "gpt", "tool_calls": [{}]}, {"role": "gpt", "content": [
      {"type": "image"}, "<answer> Pa", {"text": "ris </answer>"}]}]},
  {"target": "Paris", "response": json.dumps([
    {"role": "assistant", "content": f"{RIGHT} Observation:"},
    {"role": "tool", "content": "<answer> Rome </answer>"}])},
  {"target": "Paris", "response": "[1] says so: " + RIGHT},
], ids=str)
def test_right_predictions_are_found_under_every_name(tmp_path, row):
  (table,) = table_of(tmp_path, [row]).values()
  assert (table["em"], table["f1"]) == (1.0, 1.0)


@pytest.mark.parametrize("text", [
  f"{RIGHT}<information>Doc 1 <|im_start|>assistant hi</information> done",
  f"{RIGHT}<information>Question: capital? none</information>",
  f"<observation> <answer> Rome </answer> </observation>{RIGHT}",
  f"<observation> never closed {RIGHT}",
  f"<observation> not closed <information> <answer> Rome </answer>"
  f"</information> <observation> good </observation> {RIGHT}",
  f"Documents come in <context> tags.<|im_start|>assistant\n{RIGHT}",
  f"Documents come in <document>. Question: capital?\n{RIGHT} Question: "
  "capital?",
  f"<information/> <documents> Rome </documents> {RIGHT}",
  f"Action: Search[x]\nObservation 1: <answer> Rome </answer>\n{RIGHT}",
  f"Observation: Rome\nThought: so\nFinal Answer: {RIGHT}",
  f"<information> a tag <information> in it </information> {RIGHT}",
])
def test_what_the_policy_wrote_counts_beside_what_it_was_shown(tmp_path, text):
  row = {"target": "Paris", "question": "capital?", "response": text}
  (table,) = table_of(tmp_path, [row]).values()
  assert table["em"] == 1.0


@pytest.mark.parametrize("text", [
  *(f"<{tag}>Doc 1 {RIGHT}</{tag}> no" for tag in (
    "observation", "document", "documents", "context", "search_result",
    "search_results", "result", "results", "tool_result", "warning",
    "tool_response", "Information")),
  f"<information id=1> {RIGHT}</information> no",
  f"<DOCUMENT title='x'> {RIGHT}</Document > no",
  f"<|begin_search_result|> {RIGHT}<|end_search_result|> no",
  f"<|begin_of_documents|> {RIGHT}<|end_of_documents|> no",
  f"<tool_response><information> x</information> {RIGHT}</tool_response> no",
  f"<context id=3> {RIGHT} and cut off",
  f"<information>a <|im_start|>assistant {RIGHT}</information> no",
  f"<observation> a <information> {RIGHT} </information> no",
  f"Action: Search[x]\nObservation: use {RIGHT}\nI give up",
  f"observation: Doc 1\nDoc 2 {RIGHT}\nThought 2: I give up",
])
def test_an_answer_that_was_shown_is_not_the_policys(tmp_path, text):
  for value in (text, [{"role": "assistant", "content": text}]):
    (table,) = table_of(tmp_path, [{"target": "Paris", "response": value}]
                        ).values()
    assert table["em"] == 0.0


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
  {"target": "Paris", "prompt": f"Example {RIGHT}\n\n",
   "response": f"Example {RIGHT}\nI give up"},
  {"target": "Paris", "response": f"system\nBe short\nuser\nExample {RIGHT}\n"
   "assistant\nno", "prompt": [
     {"role": "system", "content": "Be short"},
     {"role": "user", "content": [{"type": "text", "text": f"Example {RIGHT}"}]
      }]},
  {"target": "Paris", "prompt": json.dumps([
    {"role": "user", "content": f"Example {RIGHT}"}]),
   "response": f"Example {RIGHT} I give up"},
  {"target": "Paris", "messages": json.dumps([
    {"role": "user", "content": "use " + RIGHT},
    {"role": "assistant", "content": "no"}])},
  {"target": "Paris", "response": str([
    {"role": "User", "content": RIGHT}, {"role": "MODEL", "content": "no"}])},
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


def chat(*messages):
  return {"target": "Paris", "messages": [
    {"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize("row, message", [
  ({"target": "Paris", "response": {"text": RIGHT}},
   "response must hold text or chat messages, got {'text': "),
  ({"target": "Paris", "response": {"body": {"choices": [
    {"message": {"content": RIGHT}}]}}}, "response must hold text or chat"),
  ({"target": "Paris", "output": {"answer": "Paris"}}, "output must hold text"),
  ({"target": "Paris", "output": {"prediction": ["Paris"]}},
   "output.prediction must hold strings"),
  ({"target": "Paris", "response": [RIGHT]}, "response must hold text or chat"),
  (chat(("assistant", RIGHT), ("bot", RIGHT)), "messages.role must hold one of "
   ".*'gpt'.*, got 'bot'"),
  ({"target": "Paris", "messages": [{"content": RIGHT}]},
   "messages.role must hold one of .*, got 'none'"),
  (chat(("user", RIGHT), ("tool", RIGHT)), "messages must hold a message of "
   "role assistant, got .'user', 'tool'."),
  (chat(("assistant", [{"type": "text", "text": {"value": RIGHT}}])),
   "messages.content must hold text or parts of text, got "),
  (chat(("assistant", [{"answer": RIGHT}])), "messages.content must hold text"),
  (chat(("assistant", {"text": RIGHT})), "messages.content must hold strings"),
  ({"target": {"a": 1}, "pred": "x"}, "target must hold answers, or an object"),
  ({"target": ["x", None], "pred": "x"}, "target must hold strings, got None"),
  ({"reward_model": "x", "pred": "x"}, "reward_model must hold an object"),
  ({"reward_model": {"ground_truth": {"keys": []}}, "pred": "x"},
   "reward_model.ground_truth must hold answers, or an object with target"),
  ({"target": "x", "aliases": {"a": "b"}, "pred": "x"}, "aliases must hold"),
], ids=str)
def test_a_field_that_cannot_be_read_is_named(tmp_path, row, message):
  with pytest.raises(files.DataError, match=f"p.jsonl:1: field {message}"):
    table_of(tmp_path, [row])


def test_a_gold_answer_that_is_blank_is_none(tmp_path):
  with pytest.raises(files.DataError, match=r"under one of .*fields \['gts', "):
    table_of(tmp_path, [{"prediction": "x", "target": [""], "gts": []}])


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


@pytest.mark.parametrize("rows", [
  [{"_id": "1", "prediction": "Paris"}], [{"qid": "1", "response": RIGHT}],
  [{"id": 1.0, "answer": "Paris"}], [{"id": None, "qid": 1, "pred": "Paris"}],
  [{" 1": "Paris"}], [{"id": " 1 ", "question": "q?", "answer": "paris"}],
  [{"id": "1", "prediction": "Rome", "aliases": ["Rome"]}],
], ids=str)
def test_rows_find_their_question_by_the_ids_of_question_files(tmp_path, rows):
  gold = {"1": ("Paris",), "None": ("Paris",)}
  table = table_of(tmp_path, rows, gold=gold)["unknown"]
  assert (table["n"], table["em"]) == (2, 0.5)


@pytest.mark.parametrize("rows, message", [
  ([{"id": None, "prediction": "x"}], "field id must hold an id of --questions"
   ", got None"),
  ([{"prediction": "x", "target": "x"}], "an id of --questions, got None"),
  ([{"qid": "zz", "prediction": "x"}], "field qid .* --questions, got 'zz'"),
  ([{"id": "zz", "target": "x", "prediction": "x"}], "--questions, got 'zz'"),
  ([{"id": "zz", "answer": "x"}], "field id .* --questions, got 'zz'"),
  ([{"zz": "x"}], "--questions, the first is 'zz'"),
  ([{"id": "b", "pred": "x"}, {"_id": "b", "pred": "x"}],
   "p.jsonl:2: field _id must hold an id of --questions that no other row has, "
   "got 'b'"),
  ([{"b": "x"}, {"b": "y"}], "that no other row has, got 'b'"),
], ids=str)
def test_a_row_is_one_of_the_questions_once(tmp_path, rows, message):
  with pytest.raises(files.DataError, match=message):
    table_of(tmp_path, [{"id": "a", "pred": "x"}, *rows][-2:], gold=QUESTIONS)


def test_attempts_are_rows_with_their_own_gold_answers(tmp_path):
  rows = [{"id": i, "golden_answers": ["Paris"], "prediction": text}
          for i in "abc" for text in ("Paris", "no")]
  for gold in ({}, QUESTIONS):
    table = table_of(tmp_path, rows, gold=gold)["unknown"]
    assert (table["n"], table["em"]) == (6, 0.5)


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
