"""Trial rewards of a question file, worked out by hand."""

import json
import subprocess
import sys

import pytest

from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards
from stepsearch_jax.tools import prepare_data

QUESTION = types.Question(
  "q", "Who?", ("Ada Brandt",), search_keys=(("alpha beta",), ("gamma",)),
  support=(types.Passage("1", "T", "alpha words"),
           types.Passage("2", "U", "other text entirely")),
)


def test_perfect_empty_and_wrong_answers_under_the_paper_preset():
  spec = step_rewards.RewardSpec.paper()
  trials = prepare_data.trial_rewards(spec, QUESTION)
  assert trials["perfect"].score == pytest.approx(1 + 0.618)
  # Each turn shows one of two gold paragraphs whole: gain 1/2.
  assert trials["perfect"].step_scores == pytest.approx([0.5, 0.5])
  assert trials["empty"].score == 0
  assert trials["wrong"].score == 0


def test_released_preset_punishes_the_empty_answer():
  spec = step_rewards.RewardSpec.released()
  trials = prepare_data.trial_rewards(spec, QUESTION)
  assert trials["empty"].score == -1
  assert trials["perfect"].score == pytest.approx(1.618)


def test_questions_without_keys_or_support_still_score():
  bare = types.Question("q", "Who?", ("Ada",))
  trials = prepare_data.trial_rewards(step_rewards.RewardSpec.paper(), bare)
  assert trials["perfect"].score == 1 and not trials["perfect"].step_scores


def test_check_as_json_prints_all_questions_and_nothing_else(tmp_path):
  def command(text):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    return subprocess.run(
      [sys.executable, "-m", "stepsearch_jax.tools.prepare_data", "--check",
       "--json", f"--input={path}"], capture_output=True, text=True,
    )

  rows = [{"id": "1", "question": "é?", "answer": i, "level": None,
           "supporting_paragraphs": [{"title": "T", "text": "P"}]}
          for i in range(5)]
  done = command("".join(json.dumps(row) + "\n" for row in rows))
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout)
  assert [row["answers"] for row in printed] == [[str(i)] for i in range(5)]
  assert printed[0] == {
    "id": "1", "source": "", "question": "é?", "answers": ["0"],
    "search_keys": [], "support": [{"title": "T", "text": "P"}],
  }
  assert "4 rows repeat an id" in done.stderr
  done = command('{"question": "q", "answer": ["a", null]}')
  assert done.returncode == 1 and done.stdout == ""
  (line,) = done.stderr.splitlines()[-1:]
  assert line.startswith("error: ") and "q.jsonl:1: field answer" in line
