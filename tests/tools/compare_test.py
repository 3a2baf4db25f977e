"""Two runs on the same questions: settings, differences, flipped questions."""

import json
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from stepsearch_jax.tools import compare

ROOT = pathlib.Path(__file__).parents[2]


def write_run(folder, lr, scores):
  for step, em in ((0, [0.0] * len(scores)), (10, scores)):
    place = folder / "evaluations" / f"step_{step:06d}"
    place.mkdir(parents=True)
    (place / "predictions.jsonl").write_text("".join(
      json.dumps({"id": f"q{i}", "question": f"Who {i}?", "em": x, "f1": x,
                  "prediction": "Ada", "data_source": "world"}) + "\n"
      for i, x in enumerate(em)
    ))
  (folder / "config.json").write_text(json.dumps(
    {"config": {"seed": 0, "ppo": {"policy_lr": lr}}, "changes": []}
  ))
  (folder / "metrics.jsonl").write_text('{"step": 0, "val/em": 0.0}\n')
  (folder / "summary.json").write_text(json.dumps(
    {"em_after": sum(scores) / len(scores), "algorithm": "ppo"}
  ))
  return epath.Path(folder)


@pytest.fixture
def runs(tmp_path):
  return (
    write_run(tmp_path / "a", 1e-3, [1.0, 1.0, 0.0, 1.0]),
    write_run(tmp_path / "b", 3e-4, [1.0, 0.0, 1.0, 0.0]),
  )


def test_only_settings_that_differ_are_named(runs):
  assert compare.settings_that_differ(*runs) == [
    ("ppo.policy_lr", 1e-3, 3e-4)
  ]


def test_flipped_questions_are_those_of_the_last_evaluation(runs):
  won, lost = compare.flipped(*runs)
  assert [row["id"] for row in won] == ["q1", "q3"]
  assert [row["id"] for row in lost] == ["q2"]


def test_the_command_prints_all_and_draws(runs, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "stepsearch_jax", "compare", *map(str, runs),
     f"--plot={tmp_path}/c.png"],
    cwd=ROOT, capture_output=True, text=True, timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert "2 questions that only" in done.stdout
  assert "| all | em | 4 | 0.7500 | 0.5000 | +0.2500 (" in done.stdout
  assert (tmp_path / "c.png").stat().st_size > 10_000
