"""What files a run needs: only what its algorithm rewards."""

import json

import pytest

from configs import quickstart
from stepsearch_jax import files
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings


def experiment(tmp_path, **changes):
  rows = [{"question": f"q{i}?", "answer": "A"} for i in range(20)]
  path = tmp_path / "plain.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = quickstart.get_config("runlocal")
  config.update_from_flattened_dict({"data.train": str(path), **changes})
  return Experiment(Settings.from_config(config), tmp_path)


def test_outcome_rewards_train_on_plain_questions_and_answers(tmp_path):
  assert len(experiment(tmp_path, algorithm="ppo").train_questions) > 10


def test_step_rewards_say_which_paragraphs_they_need(tmp_path):
  with pytest.raises(files.DataError, match=r"plain.jsonl:1: .*sub_support"):
    _ = experiment(tmp_path).train_questions
