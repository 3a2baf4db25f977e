"""Evaluations as Inspect's logs: the fields that it requires, the right values.

`REQUIRED` was written from inspect_ai 0.3.285 (`inspect_ai.log.EvalLog` and the
models that it holds), which read such a log when this was written.
"""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import tiny_agent
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.evaluation import inspect_log
from stepsearch_jax.run import reporting

ROOT = pathlib.Path(__file__).parents[2]
TEXT, NUMBER, LIST, OBJECT = str, (int, float), list, dict
# Path, {field: type}; "*" is every element of a list or value of an object.
REQUIRED = [
  ("", {"version": int, "status": TEXT, "eval": OBJECT, "plan": OBJECT,
        "results": OBJECT, "stats": OBJECT, "samples": LIST}),
  ("eval", {"eval_id": TEXT, "run_id": TEXT, "task_id": TEXT, "created": TEXT,
            "task": TEXT, "model": TEXT, "dataset": OBJECT, "config": OBJECT}),
  ("eval.dataset", {"name": TEXT, "samples": int, "sample_ids": LIST}),
  ("plan.steps.*", {"solver": TEXT}),
  ("results", {"total_samples": int, "completed_samples": int,
               "scores": LIST}),
  ("results.scores.*", {"name": TEXT, "scorer": TEXT, "metrics": OBJECT}),
  ("results.scores.*.metrics.*", {"name": TEXT, "value": NUMBER}),
  ("samples.*", {"id": TEXT, "epoch": int, "input": TEXT, "target": LIST,
                 "messages": LIST, "output": OBJECT, "scores": OBJECT}),
  ("samples.*.messages.*", {"id": TEXT, "role": TEXT, "content": TEXT}),
  ("samples.*.output", {"model": TEXT, "choices": LIST}),
  ("samples.*.output.choices.*", {"message": OBJECT, "stop_reason": TEXT}),
  ("samples.*.scores.*", {"value": NUMBER, "answer": TEXT}),
]


def at(row, path):
  for name in filter(None, path.split(".")):
    if name != "*":
      row = [inner[name] for inner in row]
    else:
      row = [x for inner in row
             for x in (inner.values() if isinstance(inner, dict) else inner)]
  return row


def check(log):
  for path, fields in REQUIRED:
    for row in at([log], path):
      for name, kind in fields.items():
        assert isinstance(row[name], kind), (path, name, row[name])
  assert log["version"] == 2 and log["status"] == "success"
  assert datetime.datetime.fromisoformat(log["eval"]["created"]).tzinfo
  for message in at([log], "samples.*.messages.*"):
    assert message["role"] in ("user", "assistant", "tool")
  for choice in at([log], "samples.*.output.choices.*"):
    assert choice["message"]["role"] == "assistant"
    assert choice["stop_reason"] in ("stop", "model_length", "unknown")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
  """A real evaluation of a policy that writes what it is told."""
  folder = epath.Path(tmp_path_factory.mktemp("run"))
  turns = ("Hm. <search> founder of Larn </search>", "no action",
           tiny_agent.TURNS[1])
  with tiny_agent.scripted_experiment(folder, turns) as experiment:
    # The first has a right word, the second is right.
    asked = list(experiment.eval_questions[:2])
    asked[0] = types.Question(**{**vars(asked[0]), "answers": ("Ada",)})
    asked[1] = types.Question(**{
      **vars(asked[1]), "answers": ("Ada Brandt",), "source": "musique",
    })
    card = reporting.evaluate(experiment, {}, "m", folder / "e",
                              questions=asked)
  rows = [json.loads(line) for line in
          (folder / "e/predictions.jsonl").read_text().splitlines()]
  return folder / "e", card, rows


def test_the_log_has_what_inspect_requires_and_the_cards_numbers(evaluation):
  folder, card, rows = evaluation
  log = inspect_log.make_log(card, rows, "2026-11-26T16:00:00+00:00")
  check(log)
  assert log["eval"]["model"] == "m" and log["eval"]["metadata"] == (
    card["settings"])
  assert log["results"]["metadata"]["sources"] == card["sources"]
  for score, metric in zip(log["results"]["scores"], ("em", "f1"), strict=True):
    values = {k: v["value"] for k, v in score["metrics"].items()}
    assert score["name"] == metric
    assert values["mean"] == card["metrics"][metric]
    for source, row in card["sources"].items():
      assert [values[source], values[f"{source}_low"], values[f"{source}_high"]
              ] == [row[metric], *row[f"{metric}_interval"]]
  assert card["metrics"]["em"] == 0.5
  for sample, row in zip(log["samples"], rows, strict=True):
    assert (sample["id"], sample["input"], sample["target"]) == (
      row["id"], row["question"], row["golden_answers"])
    assert sample["scores"]["em"] == {
      "value": row["em"], "answer": "Ada Brandt"}
    assert sample["metadata"]["searches"] == row["searches"] == 1
    assert "response" not in sample["metadata"]


def test_a_rollout_is_a_conversation_with_its_searches_as_tool_calls(
  evaluation
):
  folder, card, rows = evaluation
  sample = inspect_log.make_log(card, rows, "x")["samples"][0]
  asked, search, found, invalid, warned, answer = sample["messages"]
  assert asked["content"] == rows[0]["question"]
  assert [m["role"] for m in sample["messages"]] == [
    "user", "assistant", "tool", "assistant", "user", "assistant",
  ]
  assert search["content"].strip() == "Hm. <search> founder of Larn </search>"
  (call,) = search["tool_calls"]
  assert (call["function"], call["arguments"], call["type"]) == (
    "search", {"query": "founder of Larn"}, "function")
  assert found["tool_call_id"] == call["id"]
  assert found["content"].startswith("<information>")
  assert invalid["content"].strip() == "no action"
  assert "<warning>" in warned["content"]
  assert answer["content"].strip() == "<answer> Ada Brandt </answer>"
  assert sample["output"]["choices"][0] == {"message": answer,
                                            "stop_reason": "stop"}
  whole = "".join(m["content"] for m in sample["messages"][1:])
  assert whole == rows[0]["response"]
  ids = [m["id"] for s in inspect_log.make_log(card, rows, "x")["samples"]
         for m in s["messages"]]
  assert len(set(ids)) == len(ids)


def test_attempts_are_epochs(evaluation):
  _, card, rows = evaluation
  sources = {name: row | {"attempts": 2, "pass_at_k": 0.25}
             for name, row in card["sources"].items()}
  log = inspect_log.make_log(card | {"sources": sources}, rows + rows, "x")
  assert log["eval"]["config"]["epochs"] == 2
  assert log["eval"]["dataset"]["samples"] == 2
  assert [s["epoch"] for s in log["samples"]] == [1, 1, 2, 2]
  em, f1 = log["results"]["scores"]
  assert em["metrics"]["musique_pass_at_2"]["value"] == 0.25
  assert "musique_pass_at_2" not in f1["metrics"]


def test_rows_without_texts_of_turns_are_shown_whole(evaluation):
  _, card, rows = evaluation
  old = [{**row, "turns": [{k: v for k, v in turn.items() if k != "text"}
                           for turn in row["turns"]]} for row in rows]
  log = inspect_log.make_log(card, old, "2026-11-26T16:00:00+00:00")
  check(log)
  assert [m["content"] for m in log["samples"][0]["messages"]] == [
    rows[0]["question"], rows[0]["response"]]
  unplayed = [{**rows[0], "turns": [], "response": "",
               "stop_reason": "overlong"}]
  log = inspect_log.make_log(card, unplayed, "2026-11-26T16:00:00+00:00")
  check(log)
  assert [m["role"] for m in log["samples"][0]["messages"]] == ["user"]


def test_the_commit_is_named_where_it_is_known(evaluation):
  _, card, rows = evaluation

  def revision(commit):
    settings = card["settings"] | {"commit": commit}
    log = inspect_log.make_log(card | {"settings": settings}, rows, "x")
    return log["eval"].get("revision")

  assert revision("abc123-dirty") == {
    "type": "git", "origin": "", "commit": "abc123", "dirty": True}
  assert revision("abc123")["dirty"] is False
  assert revision("unknown") is None


def test_in_a_folder_the_file_has_a_name_that_inspect_lists(
  evaluation, tmp_path
):
  folder, card, _ = evaluation
  place = inspect_log.write(folder, epath.Path(tmp_path) / "logs")
  assert place.parent == tmp_path / "logs"
  assert re.match(  # The pattern of inspect_ai 0.3.285.
    r"^\d{4}-\d{2}-\d{2}T\d{2}[:-]\d{2}[:-]\d{2}.*$", place.name)
  assert place.name.endswith(".json")
  check(json.loads(place.read_text()))
  with pytest.raises(types.UserError, match="an evaluation with card.json"):
    inspect_log.write(epath.Path(tmp_path), epath.Path(tmp_path) / "l.json")


def test_the_command_writes_the_log_of_an_earlier_evaluation(
  evaluation, tmp_path
):
  folder, _, rows = evaluation

  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", "evaluate",
     f"--evaluation={folder}", "--inspect=log.json"],
    capture_output=True, text=True, timeout=120, cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == "log for `inspect view`: log.json\n"
  log = json.loads((tmp_path / "log.json").read_text())
  check(log)
  assert len(log["samples"]) == len(rows)


CARD = {"settings": {}, "metrics": {"em": 1, "f1": 1}, "sources": {}}
ROW = {"id": 1, "question": "Who?", "golden_answers": ["Ada"], "turns": [],
       "prediction": "Ada", "em": 1, "f1": 1.0, "response": ""}


@pytest.mark.parametrize("card, row, said", [
  ('{"set', ROW, r"card\.json:1: malformed JSON"),
  ("[]", ROW, r"card\.json: expected a JSON object, got list"),
  *[(json.dumps({k: v for k, v in CARD.items() if k != name}), ROW,
     rf"card\.json: field {name}: expected dict, got no such field")
    for name in CARD],
  *[(json.dumps(CARD), {k: v for k, v in ROW.items() if k != name},
     rf"predictions\.jsonl:1: field {name}: .*got no such field")
    for name in ROW],
  (json.dumps(CARD), ROW | {"em": "1"}, "field em: expected float, got '1'"),
])
def test_a_damaged_evaluation_is_one_line(tmp_path, card, row, said):
  folder = epath.Path(tmp_path)
  (folder / "predictions.jsonl").write_text(json.dumps(ROW) + "\n")
  (folder / "card.json").write_text(json.dumps(CARD))
  check(json.loads(inspect_log.write(folder, folder / "l.json").read_text()))
  (folder / "card.json").write_text(card)
  (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
  with pytest.raises(types.UserError, match=said):
    inspect_log.write(folder, folder / "m.json")
  assert not (folder / "m.json").exists()
