"""Trial rewards of a question file, worked out by hand."""

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
