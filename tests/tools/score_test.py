"""The scoring command: a line out for every line in, whatever happens."""

import json
import subprocess
import sys

import pytest

GOOD = "<search> q </search>\n\n<information> Doc 1<## Title: T ##> alpha beta"
ROWS = [
  {"id": "a", "target": "Paris", "search_keys": [["q"]],
   "support_docs": [{"title": "T", "paragraph_text": "alpha beta"}],
   "response": GOOD + " </information>\n\n<answer> Paris </answer>"},
  {"id": "b", "target": 3, "response": "<answer> 3 </answer>"},
  {"id": "c", "golden_answers": ["Rome"], "response":
   "<search>q</search><information>Doc 1(Title: \"T\") x\n</information>"
   "<answer>Rome city</answer>"},
]


def score(tmp_path, preset, rows):
  source, output = tmp_path / "cases.jsonl", tmp_path / "scores.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax.tools.score", f"--preset={preset}",
     f"--input={source}", f"--output={output}"],
    capture_output=True, text=True,
  )
  return done, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_line_is_answered_in_order(tmp_path, preset):
  done, scores = score(tmp_path, preset, ROWS)
  assert done.returncode == 1, done.stderr
  assert [row["id"] for row in scores] == ["a", "b", "c"]
  assert scores[0]["score"] == pytest.approx(1.618)
  assert scores[0]["information_gains"] == pytest.approx([1.0])
  assert scores[1]["error"].startswith("TypeError: target must be")
  assert scores[2]["answer_correct"] == pytest.approx(2 / 3, abs=1e-4)
  assert "2 of 3 rows scored" in done.stdout


def test_a_file_without_errors_ends_well(tmp_path):
  done, scores = score(tmp_path, "paper", [ROWS[0], ROWS[2]])
  assert done.returncode == 0, done.stderr
  assert len(scores) == 2
